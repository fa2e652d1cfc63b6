"""Penalties, biases and masks of the sampler against plain loops over numbers."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.sampler import LogitBiases, Penalties, sample, uniform
from tests.model.rows import pack_mask, tensors
from tests.model.test_operators import Operators

END = 3
VOCAB = 45  # not whole words of a mask
COMMON = 5


@dataclass(frozen=True)
class Row:
    """What one row asks for. `said` are its tokens, prompt first; None is a row without mask."""

    said: list[int]
    num_prompt: int
    seed: int
    level: float = 0.0  # of the logits: penalties treat negative ones otherwise
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    biases: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None
    may_end: bool = True
    temperature: float = 0.0
    top_k: int = 0

    @property
    def logits(self) -> np.ndarray:
        """The ids that rows say most are the best, and close, so that what is taken hangs on the least penalty."""
        logits = np.random.default_rng(self.seed).normal(size=VOCAB) + self.level
        logits[:COMMON] += 3
        return logits.astype(np.float32)

    @property
    def has_penalties(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1, 0, 0)


ids = st.integers(0, VOCAB - 1)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    said = draw(st.lists(st.integers(0, COMMON - 1) | ids, min_size=1, max_size=12))
    allowed = draw(st.none() | st.frozensets(ids, min_size=1) | st.just(frozenset(range(VOCAB))))
    return Row(
        said=said,
        num_prompt=draw(st.integers(1, len(said))),
        seed=draw(st.integers(0, 1000)),
        level=draw(st.sampled_from([0.0, 5.0, -9.0])),
        repetition=draw(st.sampled_from([1.0, 1.1, 0.9, 5.0])),
        frequency=draw(st.sampled_from([0.0, 0.4, 2.0, -1.5])),
        presence=draw(st.sampled_from([0.0, 0.9, -2.0])),
        biases=draw(st.just({}) | st.dictionaries(ids, st.floats(-99, 99, width=32), max_size=6)),
        allowed=allowed,
        may_end=draw(st.booleans()) or allowed is not None,  # a mask bans end of text itself
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 0, 1])),
    )


def adjusted(row: Row) -> np.ndarray:
    """The logits that the row draws from, by the definitions, in fp32."""
    logits = row.logits
    for token in set(row.said):
        value = logits[token]
        value = value / np.float32(row.repetition) if value > 0 else value * np.float32(row.repetition)
        count = row.said[row.num_prompt :].count(token)
        value = value - np.float32(row.frequency) * np.float32(count)
        logits[token] = value - np.float32(row.presence) * np.float32(count > 0)
    for token, bias in row.biases.items():
        logits[token] += np.float32(bias)
    if row.allowed is not None:
        logits[[token for token in range(VOCAB) if token not in row.allowed]] = -np.inf
    if not row.may_end:
        logits[END] = -np.inf
    return logits


def take(batch: list[Row], *, everything: bool = False) -> list[int]:
    """The sampler's tokens. What no row asks for is left out, as the runner does, unless `everything` is there."""
    logits = torch.from_numpy(np.stack([row.logits for row in batch]))
    before = logits.clone()
    width = max(1, max(len(row.said) for row in batch) - 1)
    histories = [
        (row.said[:-1] if row.has_penalties else []) + [-1] * (width - (len(row.said) - 1) * row.has_penalties)
        for row in batch
    ]

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in batch], dtype=dtype)

    penalties = Penalties(
        histories=torch.tensor(histories),
        last=torch.tensor([row.said[-1] for row in batch]),
        num_prompt=column("num_prompt", torch.int64),
        repetition=column("repetition"),
        frequency=column("frequency"),
        presence=column("presence"),
    )
    entries = [(number, token, bias) for number, row in enumerate(batch) for token, bias in row.biases.items()]
    biases = LogitBiases(
        rows=torch.tensor([entry[0] for entry in entries], dtype=torch.int64),
        token_ids=torch.tensor([entry[1] for entry in entries], dtype=torch.int64),
        values=torch.tensor([entry[2] for entry in entries], dtype=torch.float32),
    )
    allowed = np.array([[row.allowed is None or token in row.allowed for token in range(VOCAB)] for row in batch])
    sampling = tensors(
        len(batch),
        temperature=[row.temperature for row in batch],
        top_k=[row.top_k for row in batch],
        seed=[row.seed for row in batch],
        position=[len(row.said) for row in batch],
        may_end=[row.may_end for row in batch],
    )
    tokens = sample(
        logits,
        sampling,
        end_of_text_id=END,
        drawn=everything or any(row.temperature > 0 for row in batch),
        filtered=everything or any(row.temperature > 0 and row.top_k > 0 for row in batch),
        penalties=penalties if everything or any(row.has_penalties for row in batch) else None,
        biases=biases if everything or entries else None,
        masks=torch.from_numpy(pack_mask(allowed)) if everything or any(row.allowed for row in batch) else None,
    )
    assert torch.equal(before, logits)
    return tokens.tolist()


@settings(deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5))
def test_a_row_takes_what_the_definitions_give(batch: list[Row]) -> None:
    """Greedy: the best of the adjusted logits. Drawn: where its uniform number falls, in their softmax."""
    for row, token in zip(batch, take(batch), strict=True):
        logits = adjusted(row)
        if row.temperature == 0 or row.top_k == 1:
            assert logits[token] >= logits.max() - (1e-6 if row.temperature else 0)
            continue
        weights = np.exp((logits - logits.max()).astype(np.float64) / row.temperature)
        cumulative = np.cumsum(weights / weights.sum())
        number = float(uniform(*(torch.tensor([word]) for word in (row.seed, 0, len(row.said)))))
        expected = int(np.searchsorted(cumulative, number, side="right"))
        assert token == expected or np.abs(cumulative - number).min() < 1e-5
        assert weights[token] > 0


@settings(deadline=None)
@given(st.lists(rows(), min_size=2, max_size=5))
def test_a_row_takes_the_same_alone(batch: list[Row]) -> None:
    """Whatever the others ask for, also where it asks for nothing: then alone it takes none of these paths."""
    assert take(batch) == [take([row])[0] for row in batch]


@settings(deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5))
def test_the_neutral_values_change_nothing(batch: list[Row]) -> None:
    """Also where penalties, biases, masks and filters are there only because another row might want them."""
    assert take(batch) == take(batch, everything=True)


@settings(deadline=None)
@given(st.lists(rows(), min_size=2, max_size=2), st.lists(rows(), min_size=2, max_size=2))
def test_the_same_operators_run_whatever_the_values(batch: list[Row], other: list[Row]) -> None:
    """Fixed shape: no branch on a value, no loop over rows."""

    def operators(asked: list[Row]) -> list[str]:
        with Operators() as recorded:
            take(asked, everything=True)
        return recorded.names

    assert operators(batch) == operators(other)
    assert len(operators(batch * 3)) == len(operators(batch))


def test_padding_is_never_counted() -> None:
    """A history filled up with -1 penalises neither the first id nor the last, nor the row's last token twice."""
    logits = torch.full((2, 8), 0.0)
    logits[:, [0, 5, 7]] = torch.tensor([9.0, 8.9, 9.1])
    penalties = Penalties(
        histories=torch.tensor([[2, -1, -1, -1], [-1, -1, -1, -1]]),
        last=torch.tensor([5, 5]),
        num_prompt=torch.tensor([0, 0]),
        repetition=torch.ones(2),
        frequency=torch.full((2,), -0.15),  # once brings 5 between 0 and 7, twice would bring it past 7
        presence=torch.zeros(2),
    )
    sampling = tensors(2, temperature=0.0, position=[2, 1])
    assert [7, 7] == sample(logits, sampling, end_of_text_id=END, penalties=penalties).tolist()
    without = logits.clone()
    without[:, 7] = -1
    assert [5, 5] == sample(without, sampling, end_of_text_id=END, penalties=penalties).tolist()


def test_every_bit_of_a_mask_is_one_token() -> None:
    """A mask of a single bit leaves that token, greedy and drawn, for all ids of a vocabulary of 45."""
    masks = torch.from_numpy(pack_mask(np.eye(VOCAB, dtype=bool)))
    for temperature in (0.0, 2.0):
        tokens = sample(
            torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8)),
            tensors(VOCAB, temperature=temperature, top_p=0.9),
            end_of_text_id=END,
            masks=masks,
        )
        assert list(range(VOCAB)) == tokens.tolist()


def test_a_non_finite_logit_that_is_masked_still_gives_no_token() -> None:
    """And a mask, a bias or a penalty never makes a good row look bad."""
    logits = torch.zeros(2, VOCAB)
    logits[0, 9] = float("nan")
    masks = torch.from_numpy(pack_mask(np.tile(np.arange(VOCAB) == 4, (2, 1))))
    assert [-1, 4] == sample(logits, tensors(2), end_of_text_id=END, masks=masks).tolist()
