"""8-bit weights, and keys and values in fp8, on a GPU at the served sizes: the kernels against plain operators.

Both have the very same numbers, so what is compared is the kernels; what quantisation costs, bench/accuracy.py tells.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.attention import LayerCache, narrowed
from service.model.formats import Narrowed, Plain, format_for
from service.model.gpt2 import GPT2
from service.model.kernels import norms
from service.model.kernels.plan import Product, Tiled, Vector, power_of_two
from service.model.kernels.plans import head_for, plan_for
from service.model.kernels.products import PARTIAL, SCATTER
from tests.model.kernels import twins
from tests.model.kernels.test_narrow_products import NARROW
from tests.model.kernels.test_products import Case
from tests.model.test_gpu_kernels import LENGTHS, PLACES, check_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def random_models(name: str, *, kv_cache: str = "auto") -> tuple[GPT2, GPT2]:
    """The 345M's shape in a format, and the same numbers in fp32, with keys and values as the format has them."""
    generator = torch.Generator("cuda").manual_seed(7)
    weights = format_for(name, CUDA, kv_cache=kv_cache)
    state: dict[str, Tensor] = {}

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device="cuda").normal_(float("norm.weight" in name), 0.02, generator=generator)
        state[name] = tensor.to(weights.dtype)
        return state[name]

    model = gpt2_345m(make, num_layers=24, weights=weights)

    def exact(name: str, _: tuple[int, ...]) -> Tensor:
        if (
            isinstance(weights, Narrowed)
            and name.startswith("layers")
            and name.endswith(".weight")
            and "norm" not in name
        ):
            narrow = weights.linear(state[name], None).narrow
            assert narrow is not None
            return narrow.wide()
        return state[name].float()

    cache_dtype = weights.cache_dtype if kv_cache == "fp8" else None
    reference = gpt2_345m(exact, num_layers=24, weights=Plain(torch.float32, cache_dtype=cache_dtype))
    if model.padded_head is not None and model.padded_head.narrow is not None:
        reference._head = Plain(torch.float32).head(model.padded_head.narrow.wide()[: CONFIG_345M.vocab_size])
    return model, reference


@pytest.mark.parametrize(
    ("name", "kv_cache", "tolerance"),
    [("int8", "auto", 2e-2), ("fp8", "auto", 2e-2), ("bfloat16", "fp8", 5e-2), ("fp8", "fp8", 5e-2)],
)
def test_8_bit_kernels_are_close_to_plain_operators(name: str, kv_cache: str, tolerance: float) -> None:
    """As test_gpu_kernels.py has it for 16 bits: prompts, decodes of 1 to 256 rows, and both in one step.

    With keys in fp8 one that lies between two of its numbers may become either, by the last bit of a sum.
    """
    model, exact = random_models(name, kv_cache=kv_cache)
    check_model(model, exact, PLACES, LENGTHS, rows=(1, 8, 64, 256), tolerance=tolerance)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 8, 24, 64, 100, 200])
def test_products_as_the_plans_shape_them(num_tokens: int, dtype: torch.dtype, narrow: torch.dtype) -> None:
    """Of every size, as its plan shapes them, within the rounding of fp32 sums: no error is quantisation's."""
    kind: dict[str, Any] = {"dtype": dtype, "narrow": True, "shared_memory": 227 * 1024}
    plan = plan_for(num_tokens, decodes_only=True, split=False, head_size=64, **kind)
    head = head_for(num_tokens, **kind)
    cases: list[tuple[Product, int, int]] = [(plan.down, 1024, 4096), (plan.out, 1024, 1024), (head, 50304, 1024)]
    for settings, size, depth in cases:
        if not isinstance(settings, Tiled | Vector):
            continue
        if isinstance(settings, Tiled):
            settings = replace(settings, wide=False)
        case = Case(size, depth, num_tokens, dtype=dtype, device=CUDA, narrow=narrow)
        splits = settings.splits
        y = torch.full((splits, num_tokens, size), torch.nan, device="cuda")
        put = {} if isinstance(settings, Vector) else {"put": PARTIAL.value}
        case.matrix().product(settings, case.x, y, num_tokens=num_tokens, pdl=False, **put)
        bias = case.bias if isinstance(settings, Vector) else None
        expected = twins.product(case.x, case.weight, bias)
        error = float((y.double().sum(0) - expected).norm() / expected.norm())
        print(f"{settings} {dtype} {narrow}: {error:.1e}")
        assert error < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_new_keys_and_values_are_rounded_to_fp8(dtype: torch.dtype) -> None:
    """To the nearest, what is too large to the largest, by the kernel and by the operators alike, to the bit."""
    width, rows = 1024, 64
    qkv = torch.randn(rows, 3 * width, generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(dtype)
    qkv *= torch.logspace(-4, 3, rows, device="cuda")[:, None].to(dtype)
    q = torch.empty(rows, width, dtype=dtype, device="cuda")
    cache = torch.zeros(2, rows, width, device="cuda").to(torch.float8_e4m3fn)
    slots = torch.randperm(rows, device="cuda").int()
    norms.write_kv[(rows,)](qkv, q, *cache, slots, H=width, WIDTH=power_of_two(width), PDL=False, launch_pdl=False)
    _, *expected = qkv.split(width, 1)
    for side, new in zip(cache, expected, strict=True):
        assert torch.equal(narrowed(new.contiguous(), torch.float8_e4m3fn).float(), side[slots.long()].float())


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("settings", [Vector(16, 64, 4), Tiled(16, 32, 32, 1, 4, 2)])
def test_products_put_keys_and_values_in_fp8(settings: Product, narrow: torch.dtype) -> None:
    """Those of the product, each within a sixteenth."""
    hidden = 64
    case = Case(3 * hidden, 64, 1, dtype=torch.bfloat16, device=CUDA, narrow=narrow)
    sides = torch.zeros(2, 4, hidden, device="cuda").to(torch.float8_e4m3fn)
    q = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([2], dtype=torch.int32, device="cuda")
    cache = LayerCache(*sides)
    case.matrix().product(settings, case.x, q, num_tokens=1, pdl=False, put=SCATTER.value, cache=cache, slots=slots)
    _, *expected = twins.product(case.x, case.weight, case.bias).split(hidden, 1)
    for side, new in zip(sides, expected, strict=True):
        found = side[2].double()
        assert bool(((found - new[0]).abs() <= new[0].abs() / 15 + 2**-10).all())
        assert not side[[0, 1, 3]].float().any()
