"""The CUDA kernel of the head without a GPU, as test_cuda.py does those of a layer: logits, and the first look at them.

Of a small vocabulary: blocks have several chunks, rings go round, and the last tile is not full.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.batch import SAMPLING, SAMPLING_WORD, SAMPLING_WORDS
from service.model.gpt2 import LayerNorm, whole_tiles
from service.model.kernels.cuda.chain import packed
from service.model.kernels.cuda.compiler import Source
from service.model.kernels.cuda.head import CHUNK, HeadKernel, Ring, source
from service.model.kernels.plan import Library, Vector
from service.model.tail import RowTensors, Tail
from tests.model.kernels import twins
from tests.model.kernels.emulating import Run, check, normal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of infinities

BF16 = torch.bfloat16
HIDDEN, VOCAB, END = 1024, 1000, 640
CONFIG = replace(CONFIG_345M, vocab_size=VOCAB, end_of_text_id=END)
CHUNKS = -(-VOCAB // CHUNK)
EPSILON = 1e-5
RING = Ring()

Emulate = Callable[[Source], Run]


def head_kernel(emulate: Emulate, num_rows: int, *late: Tensor, ring: Ring = RING) -> HeadKernel:
    """In three blocks, which have three chunks, or two."""
    compiled, num_blocks = source(CONFIG, BF16, num_rows=num_rows, most_blocks=3, ring=ring)
    assert num_blocks == 3
    return HeadKernel(partial(emulate(compiled), late=late), num_blocks)


def records(temperatures: list[float], min_lengths: list[int]) -> Tensor:
    rows = np.zeros(len(temperatures), SAMPLING)
    rows["temperature"], rows["min_length"] = temperatures, min_lengths
    return torch.from_numpy(rows.view(np.int32).reshape(-1, SAMPLING_WORDS))


def scanned(logits: Tensor, heat: float, banned: int) -> list[tuple[float, int, float]]:
    """Of each chunk of a row's logits: the largest, its first id, the mass."""
    found = []
    for start in range(0, VOCAB, CHUNK):
        raw = logits[start : min(start + CHUNK, VOCAB)].double()
        x = raw.clone()
        if start <= banned < start + len(x):
            x[banned - start] = -torch.inf
        peak = float(x.max())
        mass = float(torch.exp((x - peak) / (heat or 1.0)).sum()) if raw.isfinite().all() else torch.nan
        found.append((peak, start + int((x == peak).nonzero()[0]) if peak == peak else -1, mass))
    return found


class Given:
    """Rows, a head whose rows past the vocabulary are no numbers, and what is put."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.x = normal(num_rows + 3, HIDDEN, deviation=2, mean=0.5)
        self.indices = (torch.randperm(num_rows + 3)[:num_rows]).int()
        self.norm = LayerNorm(normal(HIDDEN, mean=1), normal(HIDDEN), EPSILON, BF16)
        self.exact = twins.layer_norm(self.x[self.indices.long()], self.norm.weight, self.norm.bias, EPSILON)
        self.normed = self.exact.to(BF16)
        self.weight = whole_tiles(normal(VOCAB, HIDDEN, deviation=0.05)).to(BF16)
        self.weight[VOCAB:] = torch.nan
        self.temperatures = [(0.0, 0.7, 1e-3, 2.0)[row % 4] for row in range(num_rows)]
        self.min_lengths = [100 * (row % 3 == 1 or num_rows == 1) for row in range(num_rows)]
        self.logits = torch.full((num_rows + 1, len(self.weight)), torch.nan)
        size = num_rows * CHUNKS + 1
        self.scanned = tuple(
            torch.full((size,), -7, dtype=kind) for kind in (torch.float32, torch.int32, torch.float32)
        )

    def run(self, emulate: Emulate, ring: Ring = RING) -> None:
        read = self.x if self.num_rows == 1 else self.normed
        head_kernel(emulate, self.num_rows, read, ring=ring)(
            read,
            self.indices,
            self.norm,
            packed(self.weight),
            self.logits,
            records(self.temperatures, self.min_lengths),
            torch.full((self.num_rows,), 50, dtype=torch.int32),
            self.scanned,
            end_of_text_id=END,
            pdl=True,
        )
        assert self.logits[-1].isnan().all()
        assert all(int(each[-1]) == -7 for each in self.scanned)

    def check_scan(self) -> list[list[tuple[float, int, float]]]:
        """Of the logits that are there; what holds is returned."""
        peaks, winners, masses = (each[:-1].view(self.num_rows, CHUNKS) for each in self.scanned)
        expected = []
        for row, (heat, least) in enumerate(zip(self.temperatures, self.min_lengths, strict=True)):
            expected.append(scanned(self.logits[row], heat, END if least > 50 else -1))
            for chunk, (peak, winner, mass) in enumerate(expected[-1]):
                assert float(masses[row, chunk]) == pytest.approx(mass, rel=1e-5, nan_ok=True)
                if mass == mass:
                    assert (float(peaks[row, chunk]), int(winners[row, chunk])) == (peak, winner)
        return expected


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 16, 24, 32])
def test_logits_and_the_first_look_at_them(emulate: Emulate, num_rows: int) -> None:
    """Of rows of several temperatures, some of which may not end; the first of those that equal is the winner.

    A lone row is normed as in fp32.
    """
    given = Given(num_rows)
    given.weight[[300, 310, 290, 998]] = given.normed[-1] * 0.1
    given.weight[END] = given.normed.double().mean(0).to(BF16)
    given.run(emulate)
    expected = twins.product(given.exact if num_rows == 1 else given.normed, given.weight[:VOCAB])
    check(given.logits[:num_rows, :VOCAB], expected, 3e-5 if num_rows == 1 else 1e-5)
    found = given.check_scan()
    assert 290 == found[-1][290 // CHUNK][1]
    banned = [row for row, least in enumerate(given.min_lengths) if least > 50]
    assert banned
    assert all(found[row][END // CHUNK][1] != END for row in banned)


@pytest.mark.parametrize("ring", [Ring(1, 1), Ring(4, 1), Ring(5, 0), Ring(30, 30)])
def test_rings_of_other_sizes(emulate: Emulate, ring: Ring) -> None:
    """Of one tile, asked for early or late, and of more than a block has."""
    given = Given(2)
    given.run(emulate, ring)
    check(given.logits[:2, :VOCAB], twins.product(given.normed, given.weight[:VOCAB]), 1e-5)
    given.check_scan()


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_a_mass_of_nan(emulate: Emulate, value: float, num_rows: int) -> None:
    """In its chunk alone, also at the banned id; of a row that is no numbers in all, which the others do not see."""
    given = Given(num_rows)
    given.weight[END] = value
    given.weight[130, 7] = value
    if num_rows > 1:
        given.normed[3] = torch.nan
    given.run(emulate)
    for row, chunks in enumerate(given.check_scan()):
        wrong = [number for number, (_, _, mass) in enumerate(chunks) if mass != mass]
        assert wrong == (list(range(CHUNKS)) if row == 3 else [1, END // CHUNK])


@pytest.mark.parametrize("num_rows", [1, 2, 8])
@pytest.mark.parametrize("gathered", [False, True])
def test_a_tail_samples_from_it(emulate: Emulate, num_rows: int, gathered: bool) -> None:
    """Whichever product is asked for, what Triton's kernels sample from the same logits.

    Of rows that the layers have normed, and of such as are gathered.
    """
    generator = torch.Generator().manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).normal_(float("norm.weight" in name), 0.05, generator=generator).to(BF16)

    model = gpt2_345m(make, num_layers=1, vocab_size=VOCAB)
    x = torch.randn(12, HIDDEN, generator=generator)
    indices = torch.randperm(12, generator=generator)[:num_rows] if gathered else torch.arange(num_rows)
    sampling = records([(1.5, 0.0)[row % 2] for row in range(num_rows)], [0] * num_rows)
    sampling[:, SAMPLING_WORD["top_p"]] = torch.tensor(1.0).view(torch.int32)
    rows = RowTensors(indices.int(), torch.arange(num_rows, dtype=torch.int32), sampling)
    turn, head = torch.ones(1, dtype=torch.int32), Vector(16, 1024, 4) if num_rows == 1 else Library()
    kernel = head_kernel(emulate, num_rows)
    tail = Tail(model, max_rows=9, turn=turn, num_turns=3, pdl=False, heads={num_rows: kernel, 16: kernel})
    logits = tail.logits(x, rows, head, normed=None if gathered else model.final_norm(x))
    check(logits, model.logits(x[indices]).double(), 1e-2)
    found = []
    for made_by in (head, None):
        tail.sample(logits, rows, head=made_by)
        found.append(tail.sampled[:num_rows].tolist())
        assert found[-1] == tail.results[1, :num_rows].tolist()
    assert found[0] == found[1]
    assert len(set(found[0])) == num_rows
