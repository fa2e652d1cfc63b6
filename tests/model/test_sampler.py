"""The sampler: the counter hash against its published vectors, the filters and the draw against their definitions.

What changes logits before the draw (penalties, biases, masks) is in test_adjusted_logits.py.
"""

import numpy as np
import pytest
import torch

from service.model.sampler import SamplingTensors, philox, sample, uniform
from tests.model.rows import tensors
from tests.model.test_operators import Operators

END = 3
# Made by an implementation in Python's own integers.
PINNED = [
    16311500,
    1790048,
    11284412,
    1882284,
    11274260,
    13965427,
    12680039,
    9693369,
    1703637,
    3850015,
    1193720,
    14696925,
    10415838,
    7512982,
    236969,
    4698429,
    537047,
    5116604,
    9934592,
    7249840,
]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], expected: list[int]) -> None:
    """The known answers that the Random123 library ships for philox4x32-10."""
    words = philox(
        tuple(torch.tensor([word]) for word in counter),
        tuple(torch.tensor([word]) for word in key),
    )
    assert expected == [int(word) for word in words]


def test_twenty_uniform_numbers_are_pinned() -> None:
    """The integers behind them are the same on every device and every rank, for ever: (seed, choice, position)."""
    seeds = torch.tensor([0, 1, -1, 1234, 2**63 - 1])[:, None].expand(5, 4).reshape(-1)
    choices = torch.tensor([0, 0, 1, 127]).repeat(5)
    positions = torch.tensor([1, 1023, 5, 12]).repeat(5)
    numbers = (uniform(seeds, choices, positions) * 2**24).long().tolist()
    assert PINNED == numbers


def reference_filter(probabilities: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The kept ids, by the definition: sort, top_k, then top_p with the crossing token, then min_p."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k > 0:
        order = order[:top_k]
    total = sum(probabilities[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += probabilities[i]
    return {i for i in kept if probabilities[i] >= min_p * probabilities[order[0]]}


@pytest.mark.parametrize("top_k", [0, 1, 5, 60, 10**6])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_draws_stay_inside_the_filters_and_reach_all_of_them(top_k: int, top_p: float, min_p: float) -> None:
    """Over 4,000 seeds exactly the kept tokens of mass above 0.5 % appear, and none besides the kept."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    probabilities = torch.softmax(logits.double() / 0.8, -1).numpy()
    kept = reference_filter(probabilities, top_k, top_p, min_p)
    rows = 4000
    sampling = tensors(
        rows,
        temperature=0.8,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=list(range(rows)),
    )
    drawn = set(sample(logits.expand(rows, -1), sampling, end_of_text_id=END).tolist())
    mass = sum(probabilities[i] for i in kept)
    assert drawn <= kept
    assert {i for i in kept if probabilities[i] / mass > 0.005} <= drawn


def test_frequencies_match_the_distribution() -> None:
    """Chi-square over 20,000 seeds, below the 99.99 % point of its 19 degrees of freedom."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4))
    rows = 20_000
    drawn = sample(
        logits.expand(rows, -1),
        tensors(rows, seed=list(range(rows)), position=7),
        end_of_text_id=END,
    )
    expected = torch.softmax(logits, -1) * rows
    counts = torch.bincount(drawn, minlength=20)
    assert float(((counts - expected) ** 2 / expected).sum()) < 50


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """A mixed batch gives each row what it gets alone, bit for bit, whatever the others ask for."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 300, generator=generator) * 3
    sampling = tensors(
        6,
        temperature=[0.0, 1.0, 0.7, 1.5, 2.0, 0.0],
        top_k=[0, 0, 5, 0, 40, 3],
        top_p=[1.0, 1.0, 0.5, 0.9, 1.0, 0.1],
        min_p=[0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
        seed=[1, 2, 3, 4, -5, 6],
        may_end=[True, False, True, False, True, True],
    )
    together = sample(logits, sampling, end_of_text_id=END).tolist()
    for row in range(6):
        one = SamplingTensors(**{name: getattr(sampling, name)[row : row + 1] for name in SamplingTensors.__slots__})
        filtered = bool((one.top_k > 0) | (one.top_p < 1) | (one.min_p > 0))
        alone = sample(
            logits[row : row + 1],
            one,
            end_of_text_id=END,
            drawn=bool(one.temperature > 0),
            filtered=filtered,
        )
        assert [together[row]] == alone.tolist()


def test_greedy_takes_the_best() -> None:
    """Temperature 0 is the argmax, whatever the filters and the seed."""
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(6))
    sampling = tensors(4, temperature=0.0, top_k=7, top_p=0.2, seed=9)
    assert logits.argmax(-1).tolist() == sample(logits, sampling, end_of_text_id=END).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_is_not_drawn_before_min_tokens(temperature: float) -> None:
    """Also where it is nearly certain; the caller's logits stay as they are."""
    logits = torch.zeros(200, 10)
    logits[:, END] = 50
    before = logits.clone()
    sampling = tensors(200, temperature=temperature, may_end=False, seed=list(range(200)))
    assert END not in sample(logits, sampling, end_of_text_id=END).tolist()
    assert torch.equal(before, logits)
    sampling = tensors(200, temperature=temperature, seed=list(range(200)))
    assert {END} == set(sample(logits, sampling, end_of_text_id=END).tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_non_finite_logit_gives_no_token(value: float, temperature: float) -> None:
    """Wherever in the row it stands, and only in that row."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(7))
    logits[0, END] = value
    logits[2, 19] = value
    tokens = sample(logits, tensors(3, temperature=temperature), end_of_text_id=END).tolist()
    assert [-1, -1] == [tokens[0], tokens[2]]
    assert tokens[1] >= 0


def test_the_same_operators_run_whatever_the_values() -> None:
    """Fixed shape: greedy, filtered and banned rows take the operators of a plain draw, so one graph serves all."""

    def operators(**given: object) -> list[str]:
        logits, sampling = torch.randn(4, 50), tensors(4, **given)
        with Operators() as recorded:
            sample(logits, sampling, end_of_text_id=END)
        return recorded.names

    plain = operators()
    assert plain
    assert plain == operators(temperature=[0.0, 1.0, 0.5, 2.0], top_k=[0, 1, 2, 90], top_p=0.5, min_p=0.2)
    assert plain == operators(may_end=False, seed=-1, choice=5)
