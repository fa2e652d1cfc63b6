"""The CUDA kernel of 33 tokens and more without a GPU, as test_cuda_few.py does those of fewer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.random_model import CONFIG_345M
from service.model.kernels.cuda.chain import packed, shared_memory, sources
from service.model.kernels.cuda.compiler import Source
from service.model.kernels.plans import WIDES, plan_for
from tests.model.kernels import twins
from tests.model.kernels.emulating import Run, check, normal, tiled

BF16 = torch.bfloat16
HIDDEN, INNER = 1024, 4096
SHARED_MEMORY = 227 * 1024  # of a block, on a Hopper GPU

Emulate = Callable[[Source], Run]


def run(emulate: Emulate, num_tokens: int, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *y: Any) -> None:
    """`y` and where keys and values go."""
    wide, inner = WIDES[num_tokens], max(len(weight), x.shape[1]) if name in ("up", "down") else INNER
    config = replace(CONFIG_345M, intermediate_size=inner)
    source = sources(config, BF16, wide, block_size=16, num_tokens=num_tokens)[name]
    shape = dict(source.defines)
    grid = shape["N"] // shape["ROWS"], shape["PARTS"], -(-num_tokens // (64 * wide.groups))
    arguments = tiled(x, shape["STEP"]), None, packed(weight), bias, None, None, *y, 0.0
    emulate(source)(grid, *arguments, late=(x,))


@pytest.mark.parametrize("num_tokens", WIDES)
def test_qkv_puts_keys_and_values_into_their_slots(emulate: Emulate, num_tokens: int) -> None:
    """And writes nothing else of the cache. A row that fills the step up may be no numbers, which others do not see."""
    x, weight = normal(num_tokens, HIDDEN).to(BF16), normal(3 * HIDDEN, HIDDEN, deviation=0.02).to(BF16)
    x[-1] = torch.nan
    bias = normal(3 * HIDDEN)
    q = torch.full((num_tokens, HIDDEN), torch.inf, dtype=BF16)
    keys, values = (torch.full((num_tokens + 9, HIDDEN), torch.inf, dtype=BF16) for _ in range(2))
    slots = torch.randperm(num_tokens + 9)[:num_tokens].int()
    run(emulate, num_tokens, "qkv", x, weight, bias, q, keys, values, slots)
    found = torch.cat([q, keys[slots], values[slots]], 1)
    check(found[:-1], twins.product(x[:-1], weight, bias), 6e-3)
    assert found[-1].isnan().all()
    for side in (keys, values):
        side[slots] = torch.inf
        assert side.isinf().all()


@pytest.mark.parametrize(("num_tokens", "size"), [*((num, INNER) for num in WIDES), (64, 2048), (64, 1024), (96, 1024)])
def test_up_activates(emulate: Emulate, num_tokens: int, size: int) -> None:
    """Of all the sizes that a chain suits."""
    x, weight = normal(num_tokens, HIDDEN).to(BF16), normal(size, HIDDEN, deviation=0.05).to(BF16)
    bias, inner = normal(size), torch.full((num_tokens, size), torch.nan, dtype=BF16)
    run(emulate, num_tokens, "up", x, weight, bias, inner, None, None, None)
    check(inner, twins.product(x, weight, bias, "gelu_tanh"), 6e-3)


@pytest.mark.parametrize("num_tokens", WIDES)
@pytest.mark.parametrize(("name", "depth"), [("out", HIDDEN), ("down", INNER), ("down", 1024)])
def test_sums_of_parts_of_k(emulate: Emulate, num_tokens: int, name: str, depth: int) -> None:
    """Each part's is of its own columns of the matrix and of what it multiplies; there is no bias yet."""
    x, weight = normal(num_tokens, depth).to(BF16), normal(HIDDEN, depth, deviation=0.02).to(BF16)
    splits = WIDES[num_tokens].out_splits if name == "out" else WIDES[num_tokens].down_splits
    sums = torch.full((splits, num_tokens, HIDDEN), torch.nan)
    run(emulate, num_tokens, name, x, weight, None, sums, None, None, None)
    left, right = (each.double().view(len(each), splits, -1) for each in (x, weight))
    check(sums, torch.einsum("tsk,nsk->stn", left, right), 1e-5)


def test_a_block_has_room() -> None:
    """For its rows of the matrix and the stages of activations, beside a KiB of its own."""
    for num_tokens, wide in WIDES.items():
        for source in sources(CONFIG_345M, BF16, wide, block_size=16, num_tokens=num_tokens).values():
            assert shared_memory(source) + 1024 <= SHARED_MEMORY


def test_only_steps_of_single_tokens_have_it() -> None:
    """With prompts it is no faster."""
    shape: dict[str, Any] = {
        "dtype": BF16,
        "narrow": False,
        "split": False,
        "head_size": 64,
        "shared_memory": SHARED_MEMORY,
    }
    for num_tokens, wide in WIDES.items():
        assert [wide, None] == [plan_for(num_tokens, decodes_only=only, **shape).chain for only in (True, False)]
