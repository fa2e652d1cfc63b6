"""Weight formats on a CPU: what each costs in accuracy, and that no row's result depends on the others'."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.model import formats
from service.model.formats import (
    Format,
    Int8,
    Narrowed,
    Packed,
    Plain,
    WeightOnlyInt8,
    format_for,
    quantized,
    size_for,
)

CPU = torch.device("cpu")
# What the relative error of a product of Gaussian numbers may be; 1.2 to 2 times what was measured.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 1.5e-2, "int8, weights only": 1.5e-2}
NAMES = tuple(TOLERANCE)


def made(name: str) -> Format:
    if name == "int8, weights only":
        return WeightOnlyInt8()
    return format_for(name, CPU)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(expected: Tensor, found: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("turned", [False, True], ids=["as it is multiplied", "as transformers' files have it"])
@pytest.mark.parametrize(("size", "depth"), [(96, 64), (515, 128), (64, 200)])
def test_products_are_those_of_fp32(name: str, num_rows: int, turned: bool, size: int, depth: int) -> None:
    """With and without a bias, and the head's in fp32; however the weight lies in memory."""
    weights = made(name)
    weight, bias = random(size, depth, seed=1), random(size, seed=2)
    x = random(num_rows, depth, seed=3, dtype=weights.dtype)
    given, b = weight.to(weights.dtype), bias.to(weights.dtype)
    if turned:
        given = given.t().contiguous().t()
    found = weights.linear(given, b)(x)
    assert weights.dtype == found.dtype
    assert relative_error(F.linear(x.float(), weight, bias), found) < TOLERANCE[name]
    assert relative_error(F.linear(x.float(), weight), weights.linear(given, None)(x)) < TOLERANCE[name]
    logits = weights.head(given)(x)
    assert torch.float32 == logits.dtype
    assert relative_error(F.linear(x.float(), weight), logits) < TOLERANCE[name]


def test_numbers_past_fp16_are_kept() -> None:
    """Nothing is cut at 65,504 where a format keeps something in fp16: bf16's head, and int8's embeddings."""
    weight = random(40, 64, seed=1)
    weight[3, 5] = 1e5
    x = random(2, 64, seed=2)
    assert relative_error(F.linear(x.bfloat16().float(), weight), made("bfloat16").head(weight)(x.bfloat16())) < 1e-2
    assert made("int8").embedding(weight).isfinite().all()


def test_logits_of_16_bits_are_not_rounded_to_them() -> None:
    """The head of bf16 weights gives what fp32 gives of the same weights and rows, to fp32's own error."""
    weights = made("bfloat16")
    weight, x = random(515, 128, seed=1).bfloat16(), random(7, 128, seed=3).bfloat16()
    assert relative_error(F.linear(x.float(), weight.float()), weights.head(weight)(x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_in_any_company(name: str) -> None:
    """Among rows a thousand times as large or small each is as alone: to the bit with int8, whose sums are exact."""
    weights = made(name)
    x = random(24, 256, seed=3) * torch.logspace(-3, 3, 24)[:, None]
    x = x.to(weights.dtype)
    product = weights.linear(random(96, 256, seed=1).to(weights.dtype), random(96, seed=2).to(weights.dtype))
    together = product(x)
    alone = torch.cat([product(row[None]) for row in x])
    if isinstance(weights, Int8):
        assert torch.equal(alone, together)
    else:
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[weights.dtype if name == "float32" else torch.bfloat16]
        torch.testing.assert_close(alone, together, rtol=bound, atol=bound)


def test_few_sizes_of_products() -> None:
    """Whatever steps have, what oneDNN compiles is bounded; no size is an eighth too large, few rows are exact."""
    sizes = [size_for(num_rows) for num_rows in range(1, 8193)]
    assert list(range(1, 17)) == sizes[:16]
    assert all(num_rows <= size < 1.125 * num_rows for num_rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 16 + 8 * 9


@pytest.mark.parametrize("name", NAMES)
def test_products_of_every_number_of_rows(name: str) -> None:
    """As many rows as were given, with their values, also of a view and at sizes that are padded."""
    weights = made(name)
    weight = random(96, 64, seed=1)
    product = weights.linear(weight.to(weights.dtype), None)
    x = random(200, 64, seed=3, dtype=weights.dtype)
    for num_rows in (*range(1, 70), 127, 128, 129, 199):
        found = product(x[1 : num_rows + 1])
        assert relative_error(F.linear(x[1 : num_rows + 1].float(), weight), found) < TOLERANCE[name]


def test_int8_of_zeros_and_of_what_is_not_finite() -> None:
    """A row of zeros gives the bias; a NaN or an infinity is seen in its own row, and in no other."""
    weights = made("int8")
    bias = random(96, seed=2)
    weight = random(96, 64, seed=1)
    weight[5] = 0
    x = random(4, 64, seed=3)
    x[0], x[1, 7], x[2, 9] = 0, torch.nan, torch.inf
    found = weights.linear(weight, bias)(x)
    assert torch.equal(bias, found[0])
    assert not found[1].isfinite().any()
    assert not found[2].isfinite().any()
    assert relative_error(F.linear(x[3], weight, bias), found[3]) < TOLERANCE["int8"]


def test_quantised_rows_have_scales_of_their_own() -> None:
    """Each number within half a step of its row's."""
    weight = random(40, 64, seed=1) * torch.logspace(-4, 4, 40)[:, None]
    rows, scales = quantized(weight)
    assert ((rows * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    assert torch.equal(torch.full((40,), 127), rows.int().abs().amax(1))


def test_fp8_rows_have_scales_of_their_own() -> None:
    """The largest number of each is e4m3's; others are within a sixteenth of themselves, or half of its least step."""
    weight = random(40, 64, seed=1) * torch.logspace(-4, 4, 40)[:, None]
    weight[7] = 0
    rows, scales = quantized(weight, torch.float8_e4m3fn)
    found = rows.float() * scales[:, None]
    assert ((found - weight).abs() <= (weight.abs() / 16).maximum(scales[:, None] * 2**-10) * 1.0001).all()
    assert 39 == (rows.float().abs().amax(1) == 448).sum()


GPU = torch.device("cuda")


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 1e-2), ("fp8", 3e-2)])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_8_bits_for_kernels_are_the_same_in_16(name: str, tolerance: float, stored: str) -> None:
    """A GPU's: what kernels multiply by is what operators do, but for rounding, and near the weight; a bias is kept."""
    weights = format_for(name, GPU, stored=stored)
    assert (torch.float16 if stored == "float16" else torch.bfloat16) == weights.dtype == weights.cache_dtype
    weight, bias = random(96, 64, seed=1).t().contiguous().t(), random(96, seed=2)
    linear = weights.linear(weight, bias)
    assert linear.narrow is not None
    assert linear.narrow.rows.is_contiguous()
    assert (name, 1) == (weights.name, linear.narrow.rows.itemsize)
    wide = linear.narrow.wide()
    assert torch.equal(wide.to(weights.dtype), linear.weight)
    assert torch.equal(bias.to(weights.dtype), linear.bias)
    assert relative_error(weight, wide) < tolerance


def test_keys_and_values_in_fp8_are_told_by_the_name() -> None:
    """Whatever the weights are in: answers are others, and so is the fingerprint that is made of it."""
    for name in ("float32", "bfloat16", "float16", "int8", "fp8"):
        found = format_for(name, GPU, kv_cache="fp8")
        assert (f"{name} (fp8 KV)", torch.float8_e4m3fn) == (found.name, found.cache_dtype)


@pytest.mark.skipif(type(format_for("int8", CPU)) is not Int8, reason="int8 is not oneDNN's here")
def test_products_that_lose_sums_get_smaller_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pairs of products are added in 16 bits, activations take 7 bits, of which no pair is too large."""
    monkeypatch.setattr(formats, "_saturates", lambda: True)
    weights = Int8()
    assert 2 * (2 * weights._largest + 1) * 127 < 2**15
    weight, x = random(96, 64, seed=1), random(5, 64, seed=3)
    assert relative_error(F.linear(x, weight), weights.linear(weight, None)(x)) < 2 * TOLERANCE["int8"]


def test_what_a_setting_means_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gets weights as they are, or in 8 bits for its kernels; so does a CPU without oneDNN, but for int8, which
    goes through torch's own kernel there.
    """
    for name in ("float32", "bfloat16", "float16"):
        found = format_for(name, GPU)
        assert (Plain, name) == (type(found), found.name)
    assert [Narrowed] * 2 == [type(format_for(name, GPU)) for name in ("int8", "fp8")]
    assert isinstance(format_for("float16", CPU), Plain)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for name in ("float32", "bfloat16"):
        assert isinstance(format_for(name, CPU), Plain)
    assert isinstance(format_for("int8", CPU), WeightOnlyInt8)
    monkeypatch.undo()
    if platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
        assert isinstance(format_for("float32", CPU), Packed)
    with monkeypatch.context() as older:
        older.setattr(formats, "_has_bf16", lambda: False)
        assert isinstance(format_for("bfloat16", CPU), Plain)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    for name, kind in (("float32", Plain), ("bfloat16", Plain), ("int8", WeightOnlyInt8)):
        assert isinstance(format_for(name, CPU), kind)


_OLDER = """
import torch
from service.model.formats import format_for
generator = torch.Generator().manual_seed(0)
weight, x = (torch.rand(shape, generator=generator) for shape in ((256, 512), (9, 512)))  # all of one sign: sums grow
for name in ("float32", "bfloat16", "int8"):
    weights = format_for(name, torch.device("cpu"))
    found = weights.linear(weight.to(weights.dtype), None)(x.to(weights.dtype)).float()
    expected = x @ weight.T
    print(name, float((found - expected).norm() / expected.norm()))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86")
@pytest.mark.parametrize(("onednn", "torch_s"), [("AVX2", "avx2"), ("AVX512_CORE", "avx512")])
def test_older_processors(onednn: str, torch_s: str) -> None:
    """Without VNNI, and without AVX-512 at all, every format is there and no sum of int8 is lost."""
    older = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": torch_s}
    done = subprocess.run(
        [sys.executable, "-c", _OLDER], env=os.environ | older, check=True, capture_output=True, text=True
    )
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert {"float32", "bfloat16", "int8"} == set(errors)
    assert all(float(error) < TOLERANCE[name] for name, error in errors.items())
