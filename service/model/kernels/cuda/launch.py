"""Compiled kernels, launched by the driver on torch's current stream, and so into a graph that it captures."""

import ctypes
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

_ATTRIBUTES = driver.CUfunction_attribute

Argument = Any  # Tensor, driver.CUtensorMap, int, float; None: no address


class LaunchError(RuntimeError):
    """The driver refuses a kernel."""


class Kernel:
    """A kernel of `threads` to a block, with `shared` bytes of memory that are given at its launch.

    Loaded for the current device; stays so as long as the process, as torch's own do.
    """

    def __init__(self, cubin: bytes, name: str, *, threads: int, shared: int) -> None:
        """Raises LaunchError."""
        self.name = name
        self._threads = threads
        self._shared = shared
        self._module = _checked(driver.cuModuleLoadData(cubin))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        attribute = _ATTRIBUTES.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, attribute, shared))

    @property
    def registers(self) -> int:
        """Of a thread."""
        return int(_checked(driver.cuFuncGetAttribute(_ATTRIBUTES.CU_FUNC_ATTRIBUTE_NUM_REGS, self._function)))

    def __call__(self, grid: tuple[int, int, int], *arguments: Argument, pdl: bool) -> None:
        """Launch; with `pdl` it may begin before the kernel ahead of it ends. Raises LaunchError."""
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        if pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
        config.numAttrs = int(pdl)
        values, types = zip(*map(_parameter, arguments), strict=True)
        _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def tiled_map(matrix: Tensor, step: int) -> driver.CUtensorMap:
    """What `ask_tiles` of link.cuh copies from: `matrix` [rows, columns] in 16 bits, `step` columns at once.

    It is contiguous, and both are of whole 64s of columns. Raises LaunchError.
    """
    rows, columns = matrix.shape
    assert matrix.is_contiguous()
    assert matrix.itemsize == 2
    assert columns % 64 == step % 64 == 0
    words, longs = driver.cuuint32_t, driver.cuuint64_t
    return _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            3,
            matrix.data_ptr(),
            [longs(64), longs(rows), longs(columns // 64)],
            [longs(2 * columns), longs(128)],  # bytes, of the second dimension on
            [words(64), words(64), words(step // 64)],
            [words(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def driver_version() -> int:
    return int(_checked(driver.cuDriverGetVersion()))


def _parameter(argument: Argument) -> tuple[Any, Any]:
    if isinstance(argument, driver.CUtensorMap):
        return argument, None  # by value
    if argument is None:
        return 0, ctypes.c_void_p
    if isinstance(argument, Tensor):
        return argument.data_ptr(), ctypes.c_void_p
    return argument, ctypes.c_float if isinstance(argument, float) else ctypes.c_int


def _checked(answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if result != driver.CUresult.CUDA_SUCCESS:
        name = driver.cuGetErrorName(result)[1]
        raise LaunchError(f"CUDA error: {name.decode() if isinstance(name, bytes) else result}")
    return values[0] if values else None
