"""Weight formats: what a model's matrices are kept in, and how they are multiplied. One for the life of a process.

The products on a CPU are oneDNN's, over weights that it has laid out once, as it likes them on this processor: several
times as fast as a product that lays them out each time (docs/performance.md, CPU).
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = torch.tensor(1e-30)  # a row's scale at least, so that a row of zeros has one

Product = Callable[[Tensor], Tensor]  # [rows, in] to [rows, out]


class Format(Protocol):
    """`linear` and `head` may keep the tensors that they are given, or copies of them."""

    name: str  # as the setting dtype calls it; with keys and values in fp8 it says so, as these change answers, too
    made_of: torch.dtype | None  # of the tensors that it takes; None: of any
    dtype: torch.dtype  # of what goes from product to product
    cache_dtype: torch.dtype  # of keys and values

    def linear(self, weight: Tensor, bias: Tensor | None) -> Product:
        """y = x W^T + b in `dtype` for x in `dtype`, W (out, in)."""

    def head(self, weight: Tensor) -> Product:
        """y = x W^T in fp32 for x in `dtype`."""

    def embedding(self, weight: Tensor) -> Tensor:
        """The table of which rows are taken."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """A weight in 8 bits: each row times its scale."""

    rows: Tensor  # int8 or float8_e4m3fn [out, in]
    scales: Tensor  # fp32 [out]

    def wide(self) -> Tensor:
        """fp32 [out, in]."""
        return self.rows.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b with W (out, in); `narrow` is W, but for rounding to its dtype, for who can multiply by that."""

    weight: Tensor
    bias: Tensor | None
    narrow: Narrow | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Plain:
    """Weights as they are, multiplied by torch's own operators: on a GPU, and where oneDNN is not."""

    def __init__(self, dtype: torch.dtype, *, cache_dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.made_of: torch.dtype | None = dtype
        self.cache_dtype = cache_dtype or dtype
        self.name = self._named(str(dtype).removeprefix("torch."))

    def _named(self, name: str) -> str:
        return name if self.cache_dtype == self.dtype else f"{name} (fp8 KV)"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return Linear(weight, bias)

    def head(self, weight: Tensor) -> Product:
        if not weight.is_cuda:
            return _Widened(Linear(weight.float(), None))  # no operator multiplies 16 bits into 32 on every CPU
        if self.dtype == torch.float32:
            return Linear(weight, None)
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)

    def embedding(self, weight: Tensor) -> Tensor:
        return weight


@dataclass(frozen=True, slots=True)
class _Widened:
    """A product in fp32 of rows that may be in less."""

    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.float())


def size_for(num_rows: int) -> int:
    """The least size that holds the rows: each number up to 16 is one, and past it eight to each power of two."""
    step = 1 << max(num_rows.bit_length() - 4, 0)
    return -(-num_rows // step) * step


def _padded(x: Tensor) -> Tensor:
    """oneDNN compiles a product for each number of rows and keeps it, and malloc what lay around it; few sizes bound
    that, which was 450 MB, and with it 1.2 GB (docs/performance.md, Start and memory on a CPU)."""
    padding = size_for(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, padding)) if padding else x


@dataclass(frozen=True, slots=True)
class _Packed:
    """In the weight's dtype."""

    weight: Tensor  # in oneDNN's layout
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x), self.weight, self.bias, "none", [], "")
        return y[: len(x)]


@dataclass(frozen=True, slots=True)
class _Half:
    """y = x W^T in fp32 of x in fp32 and W in fp16."""

    weight: torch.ScriptObject  # in FBGEMM's layout

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.weight)
        return y


class Packed:
    """fp32 or bf16 weights that oneDNN has laid out. AMX and AVX-512's bf16 are used where the processor has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.made_of: torch.dtype | None = dtype
        self.dtype = self.cache_dtype = dtype

    def linear(self, weight: Tensor, bias: Tensor | None) -> _Packed:
        return _Packed(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)

    def head(self, weight: Tensor) -> Product:
        """oneDNN gives bf16 of bf16, too coarse for logits: in 16 bits FBGEMM's product, where torch has it."""
        has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
        if self.dtype != torch.float32 and has_fbgemm and _fits_half(weight):
            return _Half(torch.ops.quantized.linear_prepack_fp16(weight.float(), None))
        return _Widened(self.linear(weight.float(), None))

    def embedding(self, weight: Tensor) -> Tensor:
        return weight


def quantized(weight: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """`dtype` [out, in] and fp32 scales [out]: each row by its own largest number, to -127 .. 127, or to e4m3's 448."""
    weight = weight.float()
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scales = weight.abs().amax(1).div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
    rows = weight / scales[:, None]
    # Products read rows, and a weight may be a turned view of its file.
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype).contiguous(), scales


class Narrowed(Plain):
    """8-bit weights, a scale a row, for a GPU's kernels, which multiply rows in 16 bits by them, also the head's.

    Beside them the same numbers in 16 bits, for the library's products of many rows and for plain operators: twice the
    memory more, of which a model of this size takes little, and embeddings as they come.
    """

    def __init__(
        self, name: str, weights: torch.dtype, dtype: torch.dtype, *, cache_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dtype, cache_dtype=cache_dtype)
        self.made_of = None
        self.name = self._named(name)
        self._weights = weights

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        narrow = Narrow(*quantized(weight, self._weights))
        return Linear(narrow.wide().to(self.dtype), None if bias is None else bias.to(self.dtype), narrow)

    def embedding(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


@dataclass(frozen=True, slots=True)
class _Int8:
    """Each row of x is quantised by its own largest number as it comes, so no row depends on its neighbours.

    The product is of integers, so exact, and one row's is the same to the bit in any company.
    """

    weight: Tensor  # int8, in oneDNN's layout
    scales: Tensor  # fp32 [out]
    zeros: Tensor  # int32 [out]
    bias: Tensor  # fp32 [out]
    largest: int

    def __call__(self, x: Tensor) -> Tensor:
        scale = torch.add(_TINY, x.abs().amax(1, keepdim=True), alpha=1 / self.largest)
        zero = self.largest + 1
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            _padded(x.div(scale).add_(zero + 0.5).to(torch.uint8)),  # cut off, which rounds what is positive
            1.0,
            zero,
            self.weight,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.addcmul(self.bias, y[: len(x)], scale)


class Int8:
    """int8 weights, a scale a row; activations in fp32, quantised row by row for each product, also the head's."""

    name = "int8"
    made_of: torch.dtype | None = None
    dtype = torch.float32
    cache_dtype = torch.float16

    def __init__(self) -> None:
        self._largest = 63 if _saturates() else 127

    def linear(self, weight: Tensor, bias: Tensor | None) -> _Int8:
        rows, scales = quantized(weight)
        packed = torch.ops.onednn.qlinear_prepack(rows, None)
        zeros = torch.zeros(len(rows), dtype=torch.int32)
        return _Int8(packed, scales, zeros, torch.zeros(len(rows)) if bias is None else bias.float(), self._largest)

    def head(self, weight: Tensor) -> Product:
        return self.linear(weight, None)

    def embedding(self, weight: Tensor) -> Tensor:
        return _halved(weight)


def _halved(weight: Tensor) -> Tensor:
    """In fp16, where that takes less memory and holds the numbers."""
    return weight.half() if weight.dtype == torch.float32 and _fits_half(weight) else weight


def _fits_half(weight: Tensor) -> bool:
    """Whether fp16 holds its numbers."""
    return bool(weight.abs().max() <= torch.finfo(torch.float16).max)


def _saturates() -> bool:
    """Whether int8 products lose sums past 16 bits here: processors without VNNI add pairs of products in so many."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return bool((y != 255 * 127 * 64).any())


@dataclass(frozen=True, slots=True)
class _WeightOnlyInt8:
    """bf16 rows times int8 weights, by torch's own kernel (NEON, AVX)."""

    weight: Tensor  # int8 [out, in and zeros up to a multiple of _DEPTH, past which the kernel would read]
    scales: Tensor  # bf16 [out]
    bias: Tensor  # fp32 [out]

    def __call__(self, x: Tensor) -> Tensor:
        rows = _whole_depth(x).bfloat16()
        return torch._weight_int8pack_mm(rows, self.weight, self.scales).float() + self.bias


_DEPTH = 64


def _whole_depth(x: Tensor) -> Tensor:
    missing = -x.shape[1] % _DEPTH
    return F.pad(x, (0, missing)) if missing else x


class WeightOnlyInt8:
    """int8 weights where oneDNN has no fast product for them: rows in bf16, and the head in fp32."""

    name = "int8"
    made_of: torch.dtype | None = None
    dtype = torch.float32
    cache_dtype = torch.float16

    def linear(self, weight: Tensor, bias: Tensor | None) -> _WeightOnlyInt8:
        rows, scales = quantized(weight)
        bias = torch.zeros(len(rows)) if bias is None else bias.float()
        return _WeightOnlyInt8(_whole_depth(rows), scales.bfloat16(), bias)

    def head(self, weight: Tensor) -> Product:
        return Linear(weight.float(), None)

    def embedding(self, weight: Tensor) -> Tensor:
        return _halved(weight)


_NARROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def format_for(name: str, device: torch.device, *, stored: str = "bfloat16", kv_cache: str = "auto") -> Format:
    """What `name` (float32, bfloat16, float16, int8, fp8) means on a device; on a CPU there is no fp8.

    Where a GPU has 8-bit weights, activations are in `stored`, the files' dtype, if that has 16 bits, else in bfloat16.
    `kv_cache` (auto, fp8) is what keys and values are in, on a GPU.
    """
    if device.type == "cuda":
        cache_dtype = _NARROW.get(kv_cache)
        if name in _NARROW:
            dtype = torch.float16 if stored == "float16" else torch.bfloat16
            return Narrowed(name, _NARROW[name], dtype, cache_dtype=cache_dtype)
        return Plain(getattr(torch, name), cache_dtype=cache_dtype)
    assert "fp8" not in (name, kv_cache)
    # On other processors oneDNN's products are of other libraries, with which nothing here has been run.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    has_onednn = is_x86 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if name == "int8":
        return Int8() if has_onednn else WeightOnlyInt8()
    dtype = getattr(torch, name)
    if has_onednn and (dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bf16())):
        return Packed(dtype)
    return Plain(dtype)


def _has_bf16() -> bool:
    """Whether oneDNN lays out bf16 for this processor: with AVX2 alone it refuses."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
