"""CUDA kernels as functions, compiled for a processor by emulated.h."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.model.kernels.cuda import compiler
from service.model.kernels.cuda.chain import shared_memory
from service.model.kernels.cuda.compiler import Source

FOLDER = Path(compiler.__file__).parent

HEADER = Path(__file__).with_name("emulated.h")
COMPILE = ["g++", "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-fPIC"]

Run = Callable[..., None]


def precompile(folder: Path) -> None:
    """What all sources begin with, which takes as long as the rest of one."""
    subprocess.run([*COMPILE, "-x", "c++-header", "-o", folder / "emulated.h.gch", HEADER], check=True)


def built(source: Source, folder: Path, header: Path) -> Run:
    """`source` as a function of its grid and arguments; it is built in `folder`, an empty one.

    `header` is a folder that was given to `precompile`.
    """
    entry = Path(source.file).stem
    first, *others = compiler._BEFORE
    assert first == "link.cuh"
    text = '#include "emulated.h"\n' + "".join((FOLDER / name).read_text() for name in (*others, source.file))
    text += (
        '\nextern "C" int start(int x, int y, int z, int shared, void** a) '
        f"{{ return run({entry}, x, y, z, THREADS, shared, a); }}\n"
    )
    (folder / "kernel.cpp").write_text(text)
    options = [f"-D{name}={value}" for name, value in source.defines]
    command = [*COMPILE, *options, "-I", header, "-shared", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))

    def run(grid: tuple[int, int, int], *arguments: Any, late: tuple[Tensor, ...] = (), pdl: bool = True) -> None:
        """`late` are arguments that the kernel before writes: nothing may read them before the wait."""
        written = [tensor.clone() for tensor in late]
        for tensor, copy in zip(late, written, strict=True):
            size = ctypes.c_size_t(tensor.nbytes)
            library.expect_late(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_void_p(copy.data_ptr()), size)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        shared = shared_memory(source)
        assert 0 == library.start(*grid, shared, pointers), "threads wait for ever, or not for the kernel before"

    return run


class Tiled(ctypes.Structure):
    """What launch.py's tiled_map gives a kernel, for emulated.h."""

    _fields_ = (("at", ctypes.c_void_p), ("rows", ctypes.c_int), ("columns", ctypes.c_int), ("beside", ctypes.c_int))


def tiled(matrix: Tensor, step: int) -> Tiled:
    return Tiled(matrix.data_ptr(), *matrix.shape, step // 64)


def _value(argument: Tensor | Tiled | float | None) -> Any:
    if isinstance(argument, Tiled):
        return argument
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def normal(*shape: int, deviation: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.randn(*shape) * deviation + mean


def check(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected).abs()
    assert float(error.max()) <= tolerance * float(expected.abs().max()), f"{error.max()} at {error.argmax()}"


def folded(weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return weight.float() @ shift + bias, weight.float() @ gain
