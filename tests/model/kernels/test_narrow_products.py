"""Products with a matrix in 8 bits against their twins on the very same numbers: quantisation is no error here."""

import pytest
import torch

from service.model.kernels.plan import Library, Product, Tiled, Vector
from service.model.kernels.products import ACTIVATE, MERGE, NORM, PLAIN, RESIDUAL, SCATTER, STORE
from tests.model.kernels import twins
from tests.model.kernels.poisoned import DTYPES
from tests.model.kernels.test_products import (
    TILES,
    Case,
    check_one_token,
    check_partial,
    check_scattered,
    check_stored,
)

NARROW = [pytest.param(torch.int8, id="int8"), pytest.param(torch.float8_e4m3fn, id="fp8")]
pytestmark = pytest.mark.parametrize("narrow", NARROW)


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
    narrow: torch.dtype,
    device: torch.device,
    pdl: bool,
) -> None:
    """Whatever the sizes are multiples of."""
    case = Case(size, depth, num_tokens, dtype=dtype, device=device, narrow=narrow)
    check_stored(case, settings, put, pdl=pdl, into=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [Tiled(16, 16, 32, 1, 4, 2), Vector(16, 32, 4)])
def test_logits_are_stored_unrounded(
    dtype: torch.dtype, narrow: torch.dtype, settings: Product, device: torch.device, pdl: bool
) -> None:
    """A head puts 32-bit numbers, whatever it multiplies."""
    case = Case(515, 48, 1, dtype=dtype, device=device, narrow=narrow)
    check_stored(case, settings, STORE.value, pdl=pdl, into=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden", "depth"), [(1, 16, 48), (23, 48, 48), (7, 24, 80)])
def test_tiles_scatter(
    num_tokens: int,
    hidden: int,
    depth: int,
    dtype: torch.dtype,
    narrow: torch.dtype,
    device: torch.device,
    pdl: bool,
) -> None:
    """Queries beside each other, keys and values to their slots."""
    case = Case(3 * hidden, depth, num_tokens, dtype=dtype, device=device, narrow=narrow)
    expected = twins.product(case.x, case.weight, case.bias)
    check_scattered(case, Tiled(16, 32, 32, 1, 4, 2), expected, case.tokens(num_tokens + 3).inside, pdl=pdl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "size", "depth", "splits"), [(1, 48, 48, 1), (23, 40, 96, 2), (16, 48, 80, 4), (5, 48, 48, 8)]
)
def test_tiles_put_partial_sums(
    num_tokens: int,
    size: int,
    depth: int,
    splits: int,
    dtype: torch.dtype,
    narrow: torch.dtype,
    device: torch.device,
    pdl: bool,
) -> None:
    """Each of them times the scales."""
    case = Case(size, depth, num_tokens, dtype=dtype, device=device, narrow=narrow)
    check_partial(case, splits, pdl=pdl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("put", [STORE.value, ACTIVATE.value, RESIDUAL.value, SCATTER.value])
@pytest.mark.parametrize("read", [PLAIN.value, NORM.value, MERGE.value], ids=["plain", "norm", "merge"])
def test_one_token(
    put: int, read: int, dtype: torch.dtype, narrow: torch.dtype, device: torch.device, pdl: bool
) -> None:
    """Every way to read the activations with every way to put the result; a folded norm is of the same matrix."""
    check_one_token(Case(12, 48, 1, dtype=dtype, device=device, narrow=narrow), put, read, pdl=pdl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_takes_the_matrix_in_16_bits(
    dtype: torch.dtype, narrow: torch.dtype, device: torch.device, pdl: bool
) -> None:
    """So that of many rows, too, products are of these numbers, but for their rounding."""
    check_stored(
        Case(40, 48, 7, dtype=dtype, device=device, narrow=narrow), Library(), STORE.value, pdl=pdl, into=dtype
    )
