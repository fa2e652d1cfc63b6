"""Triton kernels of the GPU path, one noun a file. Called by model/fused.py; each has a plain-torch twin in its tests.

All run in chains by programmatic dependent launch where `PDL` is set: a kernel lets the next one be launched at once,
asks for what no kernel of this step writes (weights, tables, cached keys), and waits for the one before it only then.
"""
