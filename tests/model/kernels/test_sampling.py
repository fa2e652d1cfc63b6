"""The sampling kernels against service.model.sampler, which is their twin."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from service.model import sampler
from service.model.batch import NOT_FINITE, SAMPLING
from service.model.kernels import sampling
from service.model.kernels.plan import power_of_two
from service.model.sampler import SamplingTensors
from tests.model.kernels.poisoned import Poisoned
from tests.model.rows import pack_mask, tensors
from tests.model.test_sampler import PINNED

VOCAB = 515
END = 3
STRIDE = 528
CHUNK = 256
CHUNKS = -(-VOCAB // CHUNK)
WORDS = SAMPLING.itemsize // 4
ROUNDING = 2e-6  # of a cumulative sum of 515 weights in fp32, in proportion to the sum

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of NaNs

Chain = dict[str, bool]


def records(given: SamplingTensors, min_length: int) -> np.ndarray:
    """What the host sends of rows whose columns are `given`."""
    found = np.zeros(len(given.seed), SAMPLING)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "choice"):
        found[name] = getattr(given, name).numpy()
    found["min_length"] = np.where(given.may_end.numpy(), 0, min_length)
    return found


def pick(logits: Tensor, given: SamplingTensors, chain: Chain, *, device: torch.device, masked: bool = False) -> Tensor:
    """Tokens [R] by the kernels; what lies between the rows of logits is poison."""
    num_rows = len(logits)
    buffer = Poisoned(num_rows, STRIDE, dtype=torch.float32, device=device)
    buffer.inside[:, :VOCAB] = logits
    words = torch.from_numpy(records(given, min_length=10**6).view(np.int32).reshape(num_rows, WORDS)).to(device)
    positions = given.position.int().to(device)
    peaks, masses = (Poisoned(num_rows, CHUNKS, dtype=torch.float32, device=device) for _ in range(2))
    winners = Poisoned(num_rows, CHUNKS, dtype=torch.int32, device=device)
    tokens = Poisoned(num_rows, dtype=torch.int32, device=device)
    results = Poisoned(3, num_rows + 1, dtype=torch.int32, device=device)
    shape: dict[str, Any] = {"V": VOCAB, "STRIDE": STRIDE, "CHUNKS": CHUNKS, "CHUNK": CHUNK, "WORDS": WORDS} | chain
    partials = (peaks.inside, winners.inside, masses.inside)
    sampling.scan_logits[(CHUNKS, num_rows)](buffer.inside, words, positions, *partials, END, **shape, ADJUSTED=masked)
    sampling.pick_tokens[(num_rows,)](
        buffer.inside,
        words,
        positions,
        *partials,
        tokens.inside,
        results.inside,
        torch.tensor([2], dtype=torch.int32, device=device),
        END,
        **shape,
        MOST_ROWS=num_rows + 1,
        CHUNKS_WIDTH=power_of_two(CHUNKS),
        PIECE=128,
        PIECES=power_of_two(-(-VOCAB // 128)),
        BLOCK=512,
    )
    for written in (peaks, masses, winners, tokens):
        written.check()
    assert tokens.inside.tolist() == results.inside[2, :num_rows].tolist()
    assert results.is_untouched(slice(0, 2))
    return tokens.inside.long().cpu()


def distances(logits: Tensor, given: SamplingTensors, a: Tensor, b: Tensor) -> Tensor:
    """[R]: how far the uniform number is from all of the boundaries between the tokens a and b, of a total of 1.

    The distribution is the twin's, filters and all, in 64-bit numbers.
    """
    logits = logits.clone()
    logits[~given.may_end, END] = -torch.inf
    probabilities = torch.softmax(logits.double() / given.temperature.double()[:, None], -1)
    probabilities = sampler._filter(probabilities, given)
    cumulative = (probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True)).float().double()
    first, last = torch.minimum(a, b), torch.maximum(a, b) - 1
    uniforms = sampler.uniform(given.seed, given.choice, given.position).double()
    ends = cumulative.gather(-1, torch.stack((first, last), -1).clamp(min=0))
    return (ends - uniforms[:, None]).abs().max(-1).values


def check(logits: Tensor, given: SamplingTensors, chain: Chain, device: torch.device) -> Tensor:
    """The kernels' tokens are the twin's but where the draw is nearer to a boundary than rounding; the tokens."""
    expected = sampler.sample(logits, given, end_of_text_id=END)
    found = pick(logits, given, chain, device=device)
    other = expected != found
    assert bool((given.temperature > 0)[other].all())
    rows = SamplingTensors(**{name: getattr(given, name)[other] for name in SamplingTensors.__slots__})
    if bool(other.any()):
        assert float(distances(logits[other], rows, expected[other], found[other]).max()) < ROUNDING
    assert int(other.sum()) <= 1 + len(logits) // 50
    return found


def normal(num_rows: int, *, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


ROWS = 12
FILTERS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.9},
    "top_k": {"temperature": 0.9, "top_k": [1, 2, 5, 40, VOCAB - 1, VOCAB] * 2},
    "top_k past the vocabulary": {"top_k": [VOCAB + 1, 10**6, 2**31 - 1] * 4},
    "top_p": {"top_p": [1e-9, 0.1, 0.5, 0.9, 0.999, 0.0] * 2},
    "top_p of all": {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "temperature": 2.0},
    "min_p": {"min_p": [1e-6, 0.01, 0.2, 1.0] * 3, "temperature": 1.3},
    "all": {"top_k": [3, 50, 400] * 4, "top_p": [0.3, 0.8, 0.95, 1.0] * 3, "min_p": [0.0, 0.003, 0.1] * 4},
    "cold": {"temperature": [1e-5, 1e-3, 0.01] * 4, "top_p": 0.9},
    "hot": {"temperature": [100.0, 10.0] * 6, "top_k": [0, 300, 0] * 4, "top_p": [1.0, 1.0, 0.7] * 4},
    "some greedy": {"temperature": [0.0, 1.0] * 6, "top_k": [0, 0, 7] * 4},
    "without end of text": {"temperature": [0.0, 0.7, 1.0] * 4, "may_end": False, "top_p": [1.0, 0.9] * 6},
}


@pytest.mark.parametrize("name", list(FILTERS))
def test_tokens_are_the_samplers(name: str, device: torch.device, chain: Chain) -> None:
    """For every filter by itself, all at once, and rows beside each other that ask for different ones."""
    logits = normal(ROWS, seed=len(name))
    logits[::2, END] = 12  # what would be drawn mostly, where it may be
    seeds = [number * 7919 - 10**12 for number in range(ROWS)]
    given = tensors(ROWS, seed=seeds, choice=[0, 1, 127] * 4, **FILTERS[name])
    check(logits, given, chain, device)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_any_parameters_are_the_samplers(seed: int, device: torch.device, chain: Chain) -> None:
    """Drawn at random, each row its own."""
    generator = np.random.default_rng(seed)
    given = tensors(
        ROWS,
        temperature=generator.choice([0.0, 0.3, 0.8, 1.0, 1.7], ROWS).tolist(),
        top_k=generator.choice([0, 1, 10, 200, 600], ROWS).tolist(),
        top_p=generator.choice([0.0, 0.2, 0.7, 0.95, 1.0], ROWS).tolist(),
        min_p=generator.choice([0.0, 0.001, 0.05], ROWS).tolist(),
        seed=generator.integers(-(2**63), 2**63, ROWS).tolist(),
        choice=generator.integers(0, 128, ROWS).tolist(),
        position=generator.integers(0, 1024, ROWS).tolist(),
        may_end=generator.choice([False, True], ROWS).tolist(),
    )
    check(normal(ROWS, seed=seed), given, chain, device)


def test_equals_stay_together(device: torch.device, chain: Chain) -> None:
    """Greedy takes the first of the best, in whichever chunks they are; a filter keeps all that equal the last."""
    logits = (normal(ROWS, seed=5, scale=1.0) * 2).round() / 2
    for row, ids in enumerate(([514, 300, 270], [0, 514], [255, 256])):
        logits[row, ids] = 9.0
    given = tensors(ROWS, temperature=[0.0] * 3 + [1.0] * 9, top_k=[0, 5, 30] * 4, top_p=[1.0, 0.8] * 6, seed=6)
    assert [270, 0, 255] == check(logits, given, chain, device)[:3].tolist()
    logits = torch.zeros(ROWS, VOCAB)
    logits[:, [7, 200, 300, 400]] = 1.0
    given = tensors(ROWS, top_k=2, seed=list(range(ROWS)))
    assert {7, 200, 300, 400} == set(check(logits, given, chain, device).tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gets_no_token(
    temperature: float, value: float, device: torch.device, chain: Chain
) -> None:
    """Wherever in the row it stands, also at the banned id and whatever the filters; others get theirs."""
    logits = normal(6, seed=8)
    logits[0, 0] = logits[1, END] = logits[3, VOCAB - 1] = logits[4] = value
    given = tensors(6, temperature=temperature, top_k=[0, 0, 0, 5, 0, 0], may_end=[True, False] * 3)
    tokens = check(logits, given, chain, device)
    assert [True, True, False, True, True, False] == (tokens == NOT_FINITE).tolist()


def test_masked_tokens_are_not_drawn(device: torch.device, chain: Chain) -> None:
    """Minus infinity is a mask's, where the kernel is told so; a NaN stays wrong. Whole chunks may be masked."""
    allowed = np.random.default_rng(9).random((ROWS, VOCAB)) < 0.3
    allowed[1] = np.arange(VOCAB) == VOCAB - 1
    allowed[2] = (np.arange(VOCAB) >= CHUNK) & (np.arange(VOCAB) < CHUNK + 9)
    allowed[:, 20] |= ~allowed.any(1)
    logits = normal(ROWS, seed=10)
    temperature = [0.0, 1.0, 1.0, 1.0, 0.0, 0.5] * 2
    given = tensors(ROWS, temperature=temperature, top_p=[1.0, 1.0, 0.9] * 4, top_k=[0, 0, 0, 20] * 3, seed=11)
    expected = sampler.sample(logits, given, end_of_text_id=END, masks=torch.from_numpy(pack_mask(allowed)))
    masked = logits.masked_fill(torch.from_numpy(~allowed), -torch.inf)
    found = pick(masked, given, chain, device=device, masked=True)
    assert allowed[np.arange(ROWS), found].all()
    other = (expected != found).nonzero()[:, 0]
    rows = SamplingTensors(**{name: getattr(given, name)[other] for name in SamplingTensors.__slots__})
    assert len(other) <= 1
    assert bool((distances(masked[other], rows, expected[other], found[other]) < ROUNDING).all())
    masked[5, 7] = torch.nan
    masked[6, 7] = torch.inf
    again = pick(masked, given, chain, device=device, masked=True)
    assert [5, 6] == (again == NOT_FINITE).nonzero()[:, 0].tolist()
    assert torch.equal(again[7:], found[7:])


def test_end_of_text_may_be_sampled_from_min_length_on(device: torch.device, chain: Chain) -> None:
    """A row at the position itself may end, one before it may not; no more than this hangs on the position's ban."""
    logits = normal(2, seed=12)
    logits[:, END] = 50
    num_rows = 2
    given = tensors(num_rows, temperature=0.0, position=[999_999, 10**6], may_end=False)
    tokens = pick(logits, given, chain, device=device)
    logits[0, END] = -torch.inf
    assert [int(logits[0].argmax()), END] == tokens.tolist()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device, chain: Chain) -> None:
    """Bit for bit what it gets alone."""
    logits = normal(6, seed=13)
    given = tensors(
        6, temperature=[0.0, 1.0, 0.7, 1.5, 2.0, 1.0], top_k=[0, 0, 5, 0, 40, 0], top_p=[1, 1, 0.5, 0.9, 1, 1]
    )
    together = pick(logits, given, chain, device=device).tolist()
    for row in range(6):
        one = SamplingTensors(**{name: getattr(given, name)[row : row + 1] for name in SamplingTensors.__slots__})
        assert [together[row]] == pick(logits[row : row + 1], one, chain, device=device).tolist()


@triton.jit
def _put_uniforms(seeds, choices, positions, numbers, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    low, high = tl.load(seeds + 2 * i), tl.load(seeds + 2 * i + 1)
    tl.store(numbers + i, sampling._uniform(low, high, tl.load(choices + i), tl.load(positions + i)))


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    """By the kernels' own function, of a power of two of int64 columns."""
    count = len(seeds)
    numbers = Poisoned(count, dtype=torch.float32, device=device)
    words = seeds.view(torch.int32).to(device)
    _put_uniforms[(1,)](words, choices.int().to(device), positions.int().to(device), numbers.inside, COUNT=count)
    numbers.check()
    return numbers.inside.cpu()


def test_twenty_uniform_numbers_are_pinned(device: torch.device) -> None:
    """Those that the twin's test pins, bit for bit."""
    seeds = torch.tensor([0, 1, -1, 1234, 2**63 - 1])[:, None].expand(5, 4).reshape(-1)
    choices, positions = torch.tensor([0, 0, 1, 127]).repeat(5), torch.tensor([1, 1023, 5, 12]).repeat(5)
    filled = [torch.cat((column, column[:12])) for column in (seeds, choices, positions)]
    numbers = uniforms(*filled, device)
    assert PINNED == (numbers[:20] * 2**24).long().tolist()


def test_uniform_numbers_are_the_samplers(device: torch.device) -> None:
    """Bit for bit, over all of a seed's bits, choices and positions."""
    generator = torch.Generator().manual_seed(14)
    seeds = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=generator)
    choices = torch.randint(0, 2**31 - 1, (1024,), generator=generator)
    positions = torch.randint(0, 2**31 - 1, (1024,), generator=generator)
    assert torch.equal(sampler.uniform(seeds, choices, positions), uniforms(seeds, choices, positions, device))
