"""Embeddings, sums and layer norms against their twins."""

import pytest
import torch

from service.model.kernels import norms
from service.model.kernels.plan import power_of_two
from tests.model.kernels import twins
from tests.model.kernels.poisoned import DTYPES, Poisoned, check_close, random

Chain = dict[str, bool]
EPSILON = 1e-5
WIDTHS = [48, 96, 64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_embeddings_are_of_the_tokens_wherever_they_come_from(
    dtype: torch.dtype, hidden: int, device: torch.device, chain: Chain
) -> None:
    """Of the host's ids and of the step before's samples; one that could not be sampled is 0. The turn goes on."""
    tokens = random(515, hidden, dtype=dtype, device=device, seed=1)
    places = random(40, hidden, dtype=dtype, device=device, seed=2)
    token_ids = torch.tensor([514, 0, 7, -1, -1], dtype=torch.int32, device=device)
    sources = torch.tensor([-1, -1, -1, 2, 1], dtype=torch.int32, device=device)
    sampled = torch.tensor([3, -1, 400, 5], dtype=torch.int32, device=device)
    positions = torch.tensor([39, 0, 3, 3, 20], dtype=torch.int32, device=device)
    turn = torch.tensor([2], dtype=torch.int32, device=device)
    resolved = Poisoned(7, dtype=torch.int32, device=device)
    x = Poisoned(7, hidden, dtype=torch.float32, device=device)
    norms.embed[(5,)](
        token_ids,
        sources,
        sampled,
        positions,
        tokens,
        places,
        0,
        turn,
        resolved.inside,
        x.inside,
        ROWS=515,
        PLACED=True,
        H=hidden,
        WIDTH=power_of_two(hidden),
        TURNS=3,
        **chain,
    )
    assert [0] == turn.tolist()
    ids, expected = twins.embed(token_ids, sources, sampled, positions, tokens, places)
    assert [514, 0, 7, 400, 0] == ids.tolist() == resolved.inside[:5].tolist()
    check_close(expected, x.inside[:5], torch.float32)
    assert resolved.is_untouched(slice(5, None))
    assert x.is_untouched(slice(5, None))
    resolved.check()
    x.check()


@pytest.mark.parametrize("placed", [True, False])
def test_a_part_of_the_vocabulary(placed: bool, device: torch.device, chain: Chain) -> None:
    """Of ids that the table has not, nothing is added; and positions by one of the ranks alone."""
    tokens, places = (random(rows, 48, dtype=torch.float32, device=device, seed=rows) for rows in (6, 40))
    token_ids = torch.tensor([9, 10, 15, 16], dtype=torch.int32, device=device)
    nothing = torch.full_like(token_ids, -1)
    positions = torch.tensor([39, 0, 3, 3], dtype=torch.int32, device=device)
    x = Poisoned(4, 48, dtype=torch.float32, device=device)
    resolved = torch.zeros_like(token_ids)
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    norms.embed[(4,)](
        token_ids,
        nothing,
        nothing,
        positions,
        tokens,
        places,
        10,
        turn,
        resolved,
        x.inside,
        ROWS=6,
        PLACED=placed,
        H=48,
        WIDTH=64,
        TURNS=3,
        **chain,
    )
    zero = torch.zeros_like(tokens[0])
    expected = torch.stack([zero, tokens[0], tokens[5], zero])
    assert torch.equal(expected + places[positions.long()] if placed else expected, x.inside)
    assert torch.equal(token_ids, resolved)
    x.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "splits"), [(48, 0), (96, 1), (48, 2), (96, 4), (64, 8)])
def test_partial_sums_are_added_and_normed(
    dtype: torch.dtype, hidden: int, splits: int, device: torch.device, chain: Chain
) -> None:
    """The residual stream gets bias and parts, the norm comes of what it is then; with no parts it stays as it is."""
    num_tokens = 5
    before = random(num_tokens, hidden, dtype=torch.float32, device=device, seed=1) * 3 + 2
    x = Poisoned(7, hidden, dtype=torch.float32, device=device)
    x.inside[:num_tokens] = before
    parts = random(splits or 1, num_tokens, hidden, dtype=torch.float32, device=device, seed=2)
    bias = random(hidden, dtype=dtype, device=device, seed=3)
    gain, shift = (random(hidden, dtype=torch.float32, device=device, seed=seed) for seed in (4, 5))
    normed = Poisoned(7, hidden, dtype=dtype, device=device)
    norms.add_and_norm[(num_tokens,)](
        x.inside,
        parts,
        bias,
        gain,
        shift,
        normed.inside,
        num_tokens,
        EPSILON,
        H=hidden,
        WIDTH=power_of_two(hidden),
        SPLITS=splits,
        **chain,
    )
    expected = before.double()
    if splits:
        expected = expected + bias.double() + parts.double().sum(0)
    check_close(expected, x.inside[:num_tokens], torch.float32)
    check_close(twins.layer_norm(expected, gain, shift, EPSILON), normed.inside[:num_tokens], dtype)
    for buffer in (x, normed):
        assert buffer.is_untouched(slice(num_tokens, None))
        buffer.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_sampled_rows_are_gathered_and_normed(
    dtype: torch.dtype, hidden: int, device: torch.device, chain: Chain
) -> None:
    """In any order, and the same one twice; rows that nobody asks for may be anything."""
    x = random(6, hidden, dtype=torch.float32, device=device, seed=1) * 3 + 2
    x[1] = torch.nan
    indices = torch.tensor([4, 0, 4, 5], dtype=torch.int32, device=device)
    gain, shift = (random(hidden, dtype=torch.float32, device=device, seed=seed) for seed in (2, 3))
    normed = Poisoned(5, hidden, dtype=dtype, device=device)
    norms.gather_and_norm[(4,)](
        x, indices, gain, shift, normed.inside, EPSILON, H=hidden, WIDTH=power_of_two(hidden), **chain
    )
    check_close(twins.layer_norm(x[indices.long()], gain, shift, EPSILON), normed.inside[:4], dtype)
    assert normed.is_untouched(4)
    normed.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_keys_and_values_go_to_their_slots(dtype: torch.dtype, hidden: int, device: torch.device, chain: Chain) -> None:
    """Bit for bit; no other slot is touched."""
    qkv = random(3, 3 * hidden, dtype=dtype, device=device, seed=1)
    slots = torch.tensor([8, 0, 3], dtype=torch.int32, device=device)
    q = Poisoned(4, hidden, dtype=dtype, device=device)
    keys, values = (Poisoned(9, hidden, dtype=dtype, device=device) for _ in range(2))
    norms.write_kv[(3,)](
        qkv, q.inside, keys.inside, values.inside, slots, H=hidden, WIDTH=power_of_two(hidden), **chain
    )
    others = torch.tensor([1, 2, 4, 5, 6, 7], device=device)
    for buffer, expected, at, rest in zip(
        (q, keys, values),
        qkv.split(hidden, 1),
        (slice(3), slots.long(), slots.long()),
        (slice(3, None), others, others),
        strict=True,
    ):
        assert torch.equal(expected, buffer.inside[at])
        assert buffer.is_untouched(rest)
        buffer.check()
