"""CUDA C++ for Hopper GPUs, compiled as the engine starts: where it is faster than Triton's kernels, which do the same.

`link.cuh`, `sums.cuh` and `softmax.cuh` stand before each `.cu` (compiler.py); nothing else is included.
"""
