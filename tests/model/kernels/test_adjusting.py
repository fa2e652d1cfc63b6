"""Penalties, biases and masks on the GPU against service.model.sampler.adjust, which is their twin."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from service.model.batch import SAMPLING
from service.model.kernels import adjusting
from service.model.sampler import LogitBiases, Penalties, adjust
from tests.model.kernels.poisoned import Poisoned
from tests.model.rows import pack_mask

VOCAB = 1100  # not whole words of a mask, not whole blocks
STRIDE = 1104
CONTEXT = 64
WORDS = SAMPLING.itemsize // 4

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of infinities

Chain = dict[str, bool]


@dataclass(frozen=True)
class Row:
    """What one row asks for. `said` are its tokens, prompt first, the last of them in flight; none: no penalties."""

    said: list[int] = field(default_factory=list)
    num_prompt: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    biases: dict[int, float] = field(default_factory=dict)
    allowed: np.ndarray | None = None


def column(values: list[int] | list[float], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values or [0], dtype=dtype, device=device)


def run(logits: Tensor, rows: list[Row], chain: Chain, device: torch.device) -> tuple[Tensor, Tensor]:
    """Adjusted logits [R, V] and which rows were finite before, by the kernel."""
    num_rows = len(rows)
    given, adjusted = (Poisoned(num_rows, STRIDE, dtype=torch.float32, device=device) for _ in range(2))
    given.inside[:, :VOCAB] = logits
    finite = Poisoned(num_rows, dtype=torch.int32, device=device)
    records = np.zeros(num_rows, SAMPLING)
    for name, sampling in (
        ("num_prompt", "num_prompt"),
        *((n, f"{n}_penalty") for n in ("repetition", "frequency", "presence")),
    ):
        records[sampling] = [getattr(row, name) for row in rows]
    histories = [row.said[:-1] for row in rows]
    positions = [len(row.said) or 40 for row in rows]
    indices = list(range(2 * num_rows, 0, -2))  # in no order that is the rows'
    resolved = torch.full((2 * num_rows + 1,), -1, dtype=torch.int32)
    for index, row in zip(indices, rows, strict=True):
        resolved[index] = row.said[-1] if row.said else 0
    masked = [number for number, row in enumerate(rows) if row.allowed is not None]
    masks = pack_mask(np.stack([rows[number].allowed for number in masked])) if masked else np.zeros((1, 1), np.int32)
    adjusting.adjust_logits[(num_rows,)](
        given.inside,
        adjusted.inside,
        torch.from_numpy(records.view(np.int32).reshape(num_rows, WORDS)).to(device),
        column(positions, device),
        column(indices, device),
        resolved.to(device),
        column([masked.index(number) if number in masked else -1 for number in range(num_rows)], device),
        torch.from_numpy(masks).to(device),
        column(np.cumsum([0, *map(len, histories)]).tolist(), device),
        column([token for history in histories for token in history], device),
        column(np.cumsum([0, *(len(row.biases) for row in rows)]).tolist(), device),
        column([token for row in rows for token in row.biases], device),
        column([value for row in rows for value in row.biases.values()], device, torch.float32),
        finite.inside,
        V=VOCAB,
        STRIDE=STRIDE,
        WORDS=WORDS,
        BLOCK=512,
        HISTORY=CONTEXT,
        COMPARED=16,
        BIASES=128,
        num_warps=4,
        **chain,
    )
    adjusted.check()
    finite.check()
    assert adjusted.is_untouched(slice(None), slice(VOCAB, None))
    assert torch.equal(given.inside[:, :VOCAB].cpu().view(torch.int32), logits.view(torch.int32))
    return adjusted.inside[:, :VOCAB].cpu(), finite.inside.cpu()


def expect(logits: Tensor, rows: list[Row]) -> Tensor:
    """The twin, each row by itself."""
    found = []
    for row, number in zip(rows, range(len(rows)), strict=True):
        penalties = biases = masks = None
        if row.said:
            histories = torch.tensor([[*row.said[:-1], -1]])
            numbers = [torch.tensor([value]) for value in (row.repetition, row.frequency, row.presence)]
            penalties = Penalties(histories, torch.tensor(row.said[-1:]), torch.tensor([row.num_prompt]), *numbers)
        if row.biases:
            ids, values = torch.tensor(list(row.biases)), torch.tensor(list(row.biases.values()))
            biases = LogitBiases(torch.zeros_like(ids), ids, values)
        if row.allowed is not None:
            masks = torch.from_numpy(pack_mask(row.allowed[None]))
        one = logits[number : number + 1]
        found.append(adjust(one, torch.tensor([len(row.said)]), penalties=penalties, biases=biases, masks=masks))
    return torch.cat(found)


def check(rows: list[Row], chain: Chain, device: torch.device, *, seed: int = 0) -> Tensor:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    adjusted, finite = run(logits, rows, chain, device)
    expected = expect(logits, rows)
    torch.testing.assert_close(adjusted, expected, atol=1e-5, rtol=1e-6)
    untouched = expected == logits
    assert torch.equal(adjusted[untouched], logits[untouched])
    assert [1] * len(rows) == finite.tolist()
    return adjusted


def random_row(generator: np.random.Generator) -> Row:
    """Asks for some of all, over few tokens, so that they are repeated; of 1 to 64 tokens, prompts of 1 and more."""
    length = int(generator.choice([1, 2, 15, 16, 17, 33, CONTEXT]))
    asks = generator.random(3) < 0.6
    said = generator.choice([0, 1, 5, 31, 32, VOCAB - 1, *range(600, 612)], length).tolist()
    ids = generator.choice([0, 1, 5, 7, 600, 601, VOCAB - 1], 4, replace=False).tolist()
    return Row(
        said=said if asks[0] else [],
        num_prompt=int(generator.integers(1, length + 1)),
        repetition=float(generator.choice([1.0, 1.7, 0.6])),
        frequency=float(generator.choice([0.0, 0.7, -0.4])),
        presence=float(generator.choice([0.0, 1.5, -2.0])),
        biases=dict(zip(ids, generator.normal(size=4).tolist(), strict=True)) if asks[1] else {},
        allowed=generator.random(VOCAB) < 0.5 if asks[2] else None,
    )


@pytest.mark.parametrize("seed", range(4))
def test_logits_are_adjusted_as_the_sampler_does(seed: int, device: torch.device, chain: Chain) -> None:
    """Rows that ask for penalties, biases and masks, some of these or nothing, beside each other."""
    generator = np.random.default_rng(seed)
    check([Row(), *(random_row(generator) for _ in range(8)), Row()], chain, device, seed=seed)


def test_tokens_count_as_often_as_they_were_generated(device: torch.device, chain: Chain) -> None:
    """Not those of the prompt, which repetition alone counts; the one in flight counts like the others."""
    said = [7, 7, 9, 20, 9, 9, 11]
    rows = [Row(said, num_prompt, frequency=1.0, presence=0.25) for num_prompt in (1, 3, 5, 6, 7)]
    rows += [
        Row(said, 3, repetition=2.0),
        Row([9], 1, repetition=2.0),
        Row([9], 0, frequency=3.0),
        Row([9] * 3, 1, frequency=1.0),
    ]
    logits = torch.ones(len(rows), VOCAB)
    adjusted, _ = run(logits, rows, chain, device)
    torch.testing.assert_close(adjusted, expect(logits, rows))
    lost = (1 - adjusted)[:, [7, 9, 20, 11]].tolist()
    assert [1.25, 3.25, 1.25, 1.25] == lost[0]
    assert [0, 2.25, 1.25, 1.25] == lost[1]
    assert [0, 1.25, 0, 1.25] == lost[2]
    assert [0, 0, 0, 1.25] == lost[3]
    assert [0, 0, 0, 0] == lost[4]
    assert [0.5, 0.5, 0.5, 0.5] == lost[5]
    assert [[0, 0.5, 0, 0], [0, 3.0, 0, 0], [0, 2.0, 0, 0]] == lost[6:]


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1024])
def test_a_row_may_have_many_biases(count: int, device: torch.device, chain: Chain) -> None:
    """Up to 1,024, in any order, beside rows with few and none."""
    order = np.random.default_rng(count).permutation(VOCAB)[:count].tolist()
    many = {token: 0.01 * number - 3 for number, token in enumerate(order)}
    adjusted = check([Row(), Row(biases=many), Row(biases={3: 2.0}), Row()], chain, device)
    assert count <= int((adjusted[1] != check([Row()] * 4, chain, device)[1]).sum()) + 1  # one may be 0


def test_a_mask_has_the_last_word(device: torch.device, chain: Chain) -> None:
    """A bias does not bring a banned token back; every bit of a word, and the last word's few."""
    allowed = np.zeros(VOCAB, bool)
    allowed[[0, 31, 32, 63, VOCAB - 1]] = True
    rows = [Row(allowed=~allowed, biases={31: 100.0}), Row(allowed=allowed, said=[31, 31], num_prompt=1, frequency=1.0)]
    adjusted = check(rows, chain, device)
    assert torch.equal(torch.from_numpy(np.stack((allowed, ~allowed))), adjusted == -torch.inf)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 511, 512, VOCAB - 1])
def test_rows_that_are_not_finite_are_dropped(value: float, place: int, device: torch.device, chain: Chain) -> None:
    """Also where a mask hides it; their tokens become -1 and no other's, in a batch of more than a block."""
    rows = [Row(), Row(allowed=np.arange(VOCAB) == 40), Row()]
    logits = torch.zeros(3, VOCAB)
    logits[1, place] = value
    _, finite = run(logits, rows, chain, device)
    assert [1, 0, 1] == finite.tolist()
    tokens = Poisoned(40, dtype=torch.int32, device=device)
    tokens.inside.copy_(torch.arange(40))
    every = finite.repeat(13).to(device)  # 39 rows
    results = Poisoned(3, 41, dtype=torch.int32, device=device)
    results.inside.copy_(torch.arange(41))
    turn = torch.tensor([1], dtype=torch.int32, device=device)
    adjusting.drop_wrong[(3,)](tokens.inside, results.inside, turn, every, 39, MOST_ROWS=41, BLOCK=16, **chain)
    expected = [*(-1 if number % 3 == 1 else number for number in range(39)), 39]
    assert expected == tokens.inside.tolist()
    assert [list(range(41)), [*expected, 40], list(range(41))] == results.inside.tolist()
    tokens.check()
    results.check()
