"""Products with a weight matrix against their twins, launched as Matrix launches them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from service.model.attention import LayerCache
from service.model.formats import Narrow, quantized
from service.model.gpt2 import ACTIVATIONS, LayerNorm
from service.model.kernels import products
from service.model.kernels.plan import Library, Product, Tiled, Vector
from service.model.kernels.products import ACTIVATE, MERGE, NORM, PARTIAL, PLAIN, RESIDUAL, SCATTER, STORE
from service.model.matrix import Matrix
from tests.model.kernels import twins
from tests.model.kernels.poisoned import DTYPES, Poisoned, check_close, random

EPSILON = 1e-5
SLOTS = 30


class Case:
    """Random numbers for a matrix [size, depth] and `num_tokens` rows of activations, and where the result goes.

    With `narrow` the matrix is in that, and `weight` has just these numbers.
    """

    def __init__(
        self,
        size: int,
        depth: int,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        narrow: torch.dtype | None = None,
    ) -> None:
        self.size, self.depth, self.num_tokens, self.dtype, self.device = size, depth, num_tokens, dtype, device
        self.weight = self.random(size, depth, seed=1) * depth**-0.5
        self.narrow = None
        if narrow is not None:
            self.weight *= torch.logspace(-2, 0, size, device=device)[:, None]  # so that each scale matters
            self.narrow = Narrow(*quantized(self.weight, narrow))
            self.weight = self.narrow.wide()
        self.bias = self.random(size, seed=2)
        gain, shift = (self.random(depth, seed=seed, dtype=torch.float32) for seed in (3, 4))
        self.norm = LayerNorm(gain, shift, EPSILON, dtype)
        self.x = self.random(num_tokens, depth, seed=5)

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        return random(*shape, dtype=dtype or self.dtype, device=self.device, seed=seed)

    def matrix(self, *, activation: str = "gelu_tanh", normed: bool = False) -> Matrix:
        norm = self.norm if normed else None
        return Matrix(self.weight.to(self.dtype), self.bias, activation=activation, norm=norm, narrow=self.narrow)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Poisoned:
        return Poisoned(*shape, dtype=dtype or self.dtype, device=self.device)

    def tokens(self, rows: int) -> Poisoned:
        """The activations as the first of `rows`; the others are poison."""
        x = self.out(rows, self.depth)
        x.inside[: self.num_tokens] = self.x
        return x


def check_stored(
    case: Case, settings: Product, put: int, *, pdl: bool, into: torch.dtype, activation: str = "gelu_tanh"
) -> None:
    """STORE and ACTIVATE of plain activations into a buffer with room for more tokens."""
    y = case.out(case.num_tokens + 3, case.size, dtype=into)
    x = case.tokens(case.num_tokens + 3)
    case.matrix(activation=activation).product(
        settings, x.inside, y.inside, num_tokens=case.num_tokens, pdl=pdl, put=put
    )
    expected = twins.product(case.x, case.weight, case.bias, activation if put == ACTIVATE.value else None)
    check_close(expected, y.inside[: case.num_tokens], into if into == case.dtype else torch.float32)
    assert y.is_untouched(slice(case.num_tokens, None))
    y.check()


def check_scattered(case: Case, settings: Product, expected: Tensor, x: Tensor, *, pdl: bool, **asked: Any) -> None:
    """SCATTER to slots in no order, of which the first is the last of the cache."""
    hidden = case.size // 3
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(6))[: case.num_tokens].int()
    slots[0], slots[1:][slots[1:] == SLOTS - 1] = SLOTS - 1, slots[0].clone()
    q = case.out(case.num_tokens + 3, hidden)
    sides = [case.out(SLOTS, hidden) for _ in range(2)]
    case.matrix(normed="read" in asked).product(
        settings,
        x,
        q.inside,
        num_tokens=case.num_tokens,
        pdl=pdl,
        put=SCATTER.value,
        cache=LayerCache(*(side.inside for side in sides)),
        slots=slots.to(case.device),
        **asked,
    )
    queries, keys, values = expected.split(hidden, 1)
    check_close(queries, q.inside[: case.num_tokens], case.dtype)
    assert q.is_untouched(slice(case.num_tokens, None))
    others = torch.tensor([slot for slot in range(SLOTS) if slot not in slots.tolist()], device=case.device)
    for side, found in zip((keys, values), sides, strict=True):
        check_close(side, found.inside[slots.long().to(case.device)], case.dtype)
        assert found.is_untouched(others)
    for buffer in (q, *sides):
        buffer.check()


TILES = [
    pytest.param(1, 40, 48, Tiled(16, 16, 16, 1, 4, 2), id="one token"),
    pytest.param(23, 96, 80, Tiled(16, 32, 32, 1, 4, 3), id="two tiles of tokens"),
    pytest.param(16, 515, 48, Tiled(16, 64, 64, 1, 4, 2, prefetch=False), id="a vocabulary"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("put", [STORE.value, ACTIVATE.value])
@pytest.mark.parametrize(("num_tokens", "size", "depth", "settings"), TILES)
def test_tiles_store(
    num_tokens: int,
    size: int,
    depth: int,
    settings: Tiled,
    put: int,
    dtype: torch.dtype,
    device: torch.device,
    pdl: bool,
) -> None:
    """Whatever the sizes are multiples of."""
    case = Case(size, depth, num_tokens, dtype=dtype, device=device)
    check_stored(case, settings, put, pdl=pdl, into=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [Tiled(16, 16, 32, 1, 4, 2), Vector(16, 32, 4)])
def test_logits_are_stored_unrounded(dtype: torch.dtype, settings: Product, device: torch.device, pdl: bool) -> None:
    """A head puts 32-bit numbers, whatever it multiplies."""
    case = Case(515, 48, 1, dtype=dtype, device=device)
    check_stored(case, settings, STORE.value, pdl=pdl, into=torch.float32)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("settings", [Tiled(16, 16, 16, 1, 4, 2), Vector(16, 32, 4)])
def test_every_activation(activation: str, settings: Product, device: torch.device, pdl: bool) -> None:
    """Within fp32 rounding of torch's, from -100 to 100: each number by itself."""
    assert set(ACTIVATIONS) == set(products.ACTIVATIONS)
    case = Case(96, 32, 1, dtype=torch.float32, device=device)
    case.weight *= 0.1
    case.bias = torch.cat([torch.linspace(-100, 100, 32), torch.linspace(-4, 4, 64)]).to(device)
    y = case.out(1, 96)
    case.matrix(activation=activation).product(settings, case.x, y.inside, num_tokens=1, pdl=pdl, put=ACTIVATE.value)
    expected = twins.product(case.x, case.weight, case.bias, activation)
    torch.testing.assert_close(y.inside.double(), expected, atol=4e-6, rtol=2e-5)
    y.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden", "depth"), [(1, 16, 48), (23, 48, 48), (7, 24, 80)])
def test_tiles_scatter(
    num_tokens: int, hidden: int, depth: int, dtype: torch.dtype, device: torch.device, pdl: bool
) -> None:
    """Queries beside each other, keys and values to their slots, also where a tile has some of two of these."""
    case = Case(3 * hidden, depth, num_tokens, dtype=dtype, device=device)
    expected = twins.product(case.x, case.weight, case.bias)
    settings = Tiled(16, 32, 32, 1, 4, 2)
    check_scattered(case, settings, expected, case.tokens(num_tokens + 3).inside, pdl=pdl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "size", "depth", "splits"), [(1, 48, 48, 1), (23, 40, 96, 2), (16, 48, 80, 4), (5, 48, 48, 8)]
)
def test_tiles_put_partial_sums(
    num_tokens: int, size: int, depth: int, splits: int, dtype: torch.dtype, device: torch.device, pdl: bool
) -> None:
    """Without bias; each split's is of its own share of the depth, and a split may have none."""
    check_partial(Case(size, depth, num_tokens, dtype=dtype, device=device), splits, pdl=pdl)


def check_partial(case: Case, splits: int, *, pdl: bool) -> None:
    """Split as `splits` says, by tiles of 16."""
    settings = Tiled(16, 16, 16, splits, 4, 2)
    size, depth, num_tokens = case.size, case.depth, case.num_tokens
    y = case.out(splits, num_tokens, size, dtype=torch.float32)
    x = case.tokens(num_tokens + 3)
    case.matrix().product(settings, x.inside, y.inside, num_tokens=num_tokens, pdl=pdl, put=PARTIAL.value)
    share = -(-depth // (16 * splits)) * 16
    for split, part in enumerate(y.inside):
        columns = slice(split * share, (split + 1) * share)
        check_close(twins.product(case.x[:, columns], case.weight[:, columns]), part, torch.float32)
    y.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_puts_a_rank_s_part_of_a_sum(dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    """Unrounded and without bias, which is added once, not by every rank."""
    case = Case(12, 48, 1, dtype=dtype, device=device)
    y = case.out(2, 12, dtype=torch.float32)
    case.matrix().product(Vector(8, 32, 4), case.x, y.inside, num_tokens=1, pdl=pdl, put=PARTIAL.value)
    check_close(twins.product(case.x, case.weight), y.inside[:1], torch.float32)
    assert y.is_untouched(1)
    y.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("put", [STORE.value, ACTIVATE.value, RESIDUAL.value, SCATTER.value])
@pytest.mark.parametrize("read", [PLAIN.value, NORM.value, MERGE.value], ids=["plain", "norm", "merge"])
def test_one_token(put: int, read: int, dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    """Every way to read the activations with every way to put the result; neither size is a multiple of a block."""
    check_one_token(Case(12, 48, 1, dtype=dtype, device=device), put, read, pdl=pdl)


def check_one_token(case: Case, put: int, read: int, *, pdl: bool) -> None:
    """Of a matrix [12, 48]."""
    dtype = case.dtype
    settings = Vector(8, 32, 4, prefetch=True)
    asked: dict[str, Any] = {}
    x, value = case.x, case.x.double()
    if read == NORM.value:
        x = case.random(1, 48, seed=7, dtype=torch.float32) + 1
        value = twins.layer_norm(x, case.norm.weight, case.norm.bias, EPSILON)
        asked = {"read": read}
    elif read == MERGE.value:
        splits = 4
        x = case.random(1, splits, 48, seed=8, dtype=torch.float32)
        stats = torch.stack((case.random(1, splits, 48, seed=9, dtype=torch.float32) * 5, x.abs() + 1), 2)
        x[:, 2], stats[:, 2, 0], stats[:, 2, 1] = 0, -1e30, 0  # a split without context
        value = twins.merge(x, stats)
        asked = {"read": read, "splits": splits, "stats": stats.contiguous()}
    expected = twins.product(value, case.weight, case.bias, "gelu_tanh" if put == ACTIVATE.value else None)
    if put == SCATTER.value:
        check_scattered(case, settings, expected, x, pdl=pdl, **asked)
        return
    into = torch.float32 if put == RESIDUAL.value else dtype
    y = case.out(2, 12, dtype=into)
    if put == RESIDUAL.value:
        y.inside[0] = case.random(12, seed=10, dtype=torch.float32)
        expected = expected + y.inside[0].double()
    case.matrix(normed=read == NORM.value).product(settings, x, y.inside, num_tokens=1, pdl=pdl, put=put, **asked)
    check_close(expected, y.inside[:1], into)
    assert y.is_untouched(1)
    y.check()


def test_layer_norm_of_a_row_far_from_zero_keeps_its_precision(device: torch.device, pdl: bool) -> None:
    """Sums of squares less the square of the mean: a mean ten times the deviation costs two digits, no more."""
    case = Case(12, 48, 1, dtype=torch.float32, device=device)
    x = case.random(1, 48, seed=7) + 10
    y = case.out(1, 12)
    case.matrix(normed=True).product(Vector(8, 64, 4), x, y.inside, num_tokens=1, pdl=pdl, read=NORM.value)
    expected = twins.product(twins.layer_norm(x, case.norm.weight, case.norm.bias, EPSILON), case.weight, case.bias)
    error = (y.inside.cpu().double() - expected.cpu()).abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_library_stores_and_activates(dtype: torch.dtype, activation: str, device: torch.device, pdl: bool) -> None:
    """Into the served dtype, and what stands past the tokens stays."""
    case = Case(40, 48, 7, dtype=dtype, device=device)
    for put in (STORE.value, ACTIVATE.value):
        check_stored(case, Library(), put, pdl=pdl, activation=activation, into=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_puts_sums_unrounded(dtype: torch.dtype, device: torch.device, pdl: bool) -> None:
    """As one partial sum into the flat buffer of them, and as logits, for which no head has a bias."""
    case = Case(40, 48, 7, dtype=dtype, device=device)
    expected = twins.product(case.x, case.weight)
    parts = case.out(9 * 40, dtype=torch.float32)
    case.matrix().product(Library(), case.x, parts.inside, num_tokens=7, pdl=pdl, put=PARTIAL.value)
    check_close(expected, parts.inside[: 7 * 40].view(7, 40), torch.float32)
    assert parts.is_untouched(slice(7 * 40, None))
    parts.check()
    case.bias.zero_()
    check_stored(case, Library(), STORE.value, pdl=pdl, into=torch.float32)
