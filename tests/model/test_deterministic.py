"""Batch-invariant mode, to the bit: a row's place, its neighbours, and how steps are cut change nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from service.model import deterministic
from service.model.attention import Decodes
from service.model.batch import Batch, Biases, Scored, StepOutput
from service.model.deterministic import DeterministicRunner, spread
from service.model.formats import Format, Plain, WeightOnlyInt8, format_for
from service.model.runner import TorchRunner, warm_up
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.conftest import Pair

CPU = torch.device("cpu")
ROWS = deterministic._SLICE_ROWS["cpu"]
FORMATS: dict[str, Callable[[], Format]] = {
    "float32": lambda: format_for("float32", CPU),
    "bfloat16": lambda: format_for("bfloat16", CPU),
    "float16": lambda: format_for("float16", CPU),
    "int8": lambda: format_for("int8", CPU),
    "float32, plain": lambda: Plain(torch.float32),
    "bfloat16, plain": lambda: Plain(torch.bfloat16),
    "int8, weights only": WeightOnlyInt8,
}


@pytest.fixture(params=[1, 2, 3], ids=lambda number: f"{number} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_places_are_alike(compute: Callable[[Tensor], Tensor], row: Tensor) -> None:
    """A row gives the same bits at each place of a slice, beside small, large and non-finite neighbours."""
    expected: Tensor | None = None
    for place in range(ROWS):
        for factor in (0.1, 1e3, torch.nan):
            x = (random(ROWS, *row.shape, seed=place) * factor).to(row.dtype)
            x[place] = row
            found = compute(x)[place]
            expected = found.clone() if expected is None else expected
            assert torch.equal(expected, found), f"place {place}, neighbours by {factor}"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("size", "depth"), [(1024, 4096), (3072, 1024), (515, 200), (50257, 16)])
@torch.inference_mode()
def test_a_product_of_a_slice_does_not_look_at_places(name: str, size: int, depth: int) -> None:
    """Nor does the head's, in every format: of the 345M's shapes, of one that no vector divides, and of one so wide
    that torch cuts what follows the product over threads.
    """
    weights = FORMATS[name]()
    row, weight = random(depth, seed=1).to(weights.dtype), random(size, depth, seed=2).to(weights.dtype)
    assert_places_are_alike(weights.linear(weight, random(size, seed=3).to(weights.dtype)), row)
    assert_places_are_alike(weights.head(weight), row)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [4096, 1540])
@torch.inference_mode()
def test_activations_do_not_look_at_places(make_pair: Callable[..., Pair], size: int) -> None:
    """Each row by itself: of a whole slice torch cuts and ends its loops inside of rows."""
    for activation in ("gelu_new", "gelu", "silu", "tanh"):
        _, ours = make_pair(activation_function=activation)
        runner = DeterministicRunner(ours, num_blocks=1, block_size=BLOCK_SIZE)
        for dtype in (torch.float32, torch.bfloat16):
            assert_places_are_alike(runner._model.activation, random(size, seed=1).to(dtype))
        assert runner._model is not ours, "the model that was given is another's too"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_attention_does_not_look_at_company(make_pair: Callable[..., Pair], dtype: torch.dtype) -> None:
    """A row of a rectangle of up to a slice's rows, of a width of 1 to 7 blocks, is as alone in one."""
    _, ours = make_pair()
    runner = DeterministicRunner(ours, num_blocks=16, block_size=BLOCK_SIZE)
    cache: Any = runner._cache
    cache._keys = random(*cache._keys.shape, seed=1).to(dtype)
    cache._values = random(*cache._values.shape, seed=2).to(dtype)
    q = random(ROWS, 4, 16, seed=3)
    for width in range(1, 8):
        lengths = (width - 1) * BLOCK_SIZE + 1 + torch.arange(ROWS) % BLOCK_SIZE
        tables = torch.stack([torch.randperm(16)[:width] for _ in range(ROWS)])
        mixed = [attend(runner, q, tables, lengths, [slice(row, row + 1) for row in range(ROWS)])]
        mixed += [attend(runner, q, tables, lengths, [slice(0, cut), slice(cut, ROWS)]) for cut in (1, 3, 7)]
        mixed += [attend(runner, q, tables, lengths, [slice(0, ROWS)])]
        for found in mixed[1:]:
            assert torch.equal(mixed[0], found)


def attend(runner: DeterministicRunner, q: Tensor, tables: Tensor, lengths: Tensor, cuts: list[slice]) -> Tensor:
    """In rectangles of `cuts`; the keys and values of the rows themselves go where nobody looks."""
    groups = [Decodes(cut.start, cut.stop, int(lengths[cut].min()), tables[cut], lengths[cut]) for cut in cuts]
    slots = torch.full((len(q),), runner.num_blocks * BLOCK_SIZE)
    attention = runner._cache.attention(slots=slots, decodes=groups, prefills=[])
    return attention(q, q, q, runner._cache.layer(0), scale=0.25, upcast=False)


PROMPT = list(range(5, 45))
DRAWN = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 7}
PENALISED = {"num_prompt": 9, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2}
PLAIN = {"repetition_penalty": 1.0}
ASKED: list[dict[str, float]] = [PLAIN, PLAIN | DRAWN, PENALISED, DRAWN | PENALISED]


def demanding(parts: list[Part]) -> Batch:
    """Two decodes and two prompts, of which rows ask for this and that, all tokens scored."""
    batch = make_batch(*parts, logprobs=True)
    rows = len(batch.sampling)
    histories = np.full((rows, 30), -1, np.int32)
    for row, part in enumerate(parts):
        if "num_prompt" in part.sampling:
            histories[row, : len(part.tokens) - 1] = part.tokens[:-1]
    masks = np.full((rows, -(-515 // 32)), -1, np.int32)
    masks[0, ::2] = 0
    return replace(
        batch,
        histories=histories,
        masks=masks,
        biases=Biases(*(np.asarray(x, np.int32) for x in ([1, 1, 3], [9, 8, 7])), np.asarray([2, -3, 4], np.float32)),
        scored=Scored(np.arange(len(batch.token_ids), dtype=np.int32), batch.token_ids[::-1].copy()),
    )


def steps(runner: TorchRunner) -> list[StepOutput]:
    """Two prompts, then one more token of each in flight beside two prompts, one of which has a part before it."""
    before = [Part(PROMPT[:9], place=0), Part(PROMPT[3:21], place=1), Part(PROMPT[:12], place=2, sampled=False)]
    runner.launch(make_batch(*before))
    runner.launch(
        demanding(
            [
                Part([*PROMPT[:9], 0], start=9, place=0, source=0, sampling=ASKED[0]),
                Part([*PROMPT[3:21], 0], start=18, place=1, source=1, sampling=ASKED[1]),
                Part(PROMPT[:17], start=12, place=2, sampling=ASKED[2]),
                Part(PROMPT[:30], place=3, sampling=ASKED[3]),
            ]
        )
    )
    return [runner.collect(), runner.collect()]


def equal(one: StepOutput, other: StepOutput) -> bool:
    pairs = ((one.logprobs, other.logprobs), (one.scores, other.scores))
    return np.array_equal(one.token_ids, other.token_ids) and all(
        (a is None and b is None)
        or (a is not None and b is not None and all(map(np.array_equal, fields(a), fields(b))))
        for a, b in pairs
    )


def fields(found: Any) -> tuple[np.ndarray, ...]:
    return found.chosen.view(np.int32), found.top_ids, found.top.view(np.int32)


def like_a_gpus(runner: DeterministicRunner) -> DeterministicRunner:
    """As on a GPU, but for its kernels: one rectangle of the whole context, the plain cache, two rows for one."""
    runner._one_rectangle, runner._slice_rows, runner._copies = True, 32, 2
    runner._cache = runner._model.new_cache(num_blocks=runner.num_blocks + 1, block_size=BLOCK_SIZE)
    return runner


@pytest.mark.parametrize("kind", ["a CPU's", "a GPU's"])
def test_steps_are_those_of_the_other_runner(make_pair: Callable[..., Pair], kind: str) -> None:
    """The same tokens, and log-probabilities within fp32's error, of all that a row can ask for; a GPU's way too."""
    _, ours = make_pair()
    runner = DeterministicRunner(ours, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE)
    if kind == "a GPU's":
        like_a_gpus(runner)
    plain = TorchRunner(ours, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE)
    for expected, found in zip(steps(plain), steps(runner), strict=True):
        assert expected.token_ids.tolist() == found.token_ids.tolist()
        for a, b in ((expected.logprobs, found.logprobs), (expected.scores, found.scores)):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-4, rtol=0)


def test_two_rows_for_one_are_the_same_one(make_pair: Callable[..., Pair]) -> None:
    """What a GPU samples from; on a CPU it can be seen to change nothing."""
    _, ours = make_pair()
    found = []
    for copies in (1, 2):
        runner = DeterministicRunner(ours, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE)
        runner._copies = copies
        found.append(steps(runner))
    assert all(map(equal, *found))


def test_tokens_are_spread_in_order_of_what_they_attend_to() -> None:
    """By position, whole slices; what fills them up has no context, and goes to no block that has an owner."""
    batch = demanding(
        [Part(PROMPT[: 3 + place], start=2 + place if place < 2 else 0, place=place) for place in range(4)]
    )
    found = spread(batch, slice_rows=8, table_width=MOST_BLOCKS, no_slot=1000)
    num_tokens, num_rows = len(batch.token_ids), len(found.token_ids)
    assert (13, 16) == (num_tokens, num_rows)
    assert sorted(batch.positions.tolist()) == found.positions[:num_tokens].tolist()
    assert (found.positions[:num_tokens] + 1).tolist() == found.context_lengths[:num_tokens].tolist()
    assert [0] * 3 == found.context_lengths[num_tokens:].tolist()
    assert [1000] * 3 == found.slots[num_tokens:].tolist()
    assert (num_rows, MOST_BLOCKS) == found.block_tables.shape
    assert found.scored is not None
    assert batch.scored is not None
    for name in ("slots", "positions", "token_ids", "token_sources"):
        before, after = getattr(batch, name), getattr(found, name)
        assert before[batch.sample_indices].tolist() == after[found.sample_indices].tolist()
        assert before[batch.scored.indices].tolist() == after[found.scored.indices].tolist()
    for slot, table, position in zip(found.slots[:13], found.block_tables, found.positions, strict=False):
        assert slot == table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def test_warm_up_leaves_the_runner_as_it_was(make_pair: Callable[..., Pair]) -> None:
    """The largest steps run; what comes after is as without it."""
    _, ours = make_pair()
    runner = DeterministicRunner(ours, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE)
    expected = steps(runner)
    warm_up(runner, max_num_seqs=4, max_num_batched_tokens=64)
    assert all(map(equal, expected, steps(runner)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_prompts_on_a_gpu_get_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Of the 345M's shape in two layers: alone, among 39 others in both orders, and whole or in two parts."""
    from bench.random_model import random_gpt2

    model = random_gpt2(
        weights=format_for(str(dtype).removeprefix("torch."), torch.device("cuda")), device="cuda", num_layers=2
    )
    prompts = [random(4 + 2 * number, seed=number).abs().mul(1000).long().tolist() for number in range(40)]

    def ask(*numbers: int, parts: int = 1) -> dict[int, tuple[Any, ...]]:
        runner = DeterministicRunner(model, num_blocks=40 * MOST_BLOCKS, block_size=BLOCK_SIZE)
        for part in range(1, parts):
            cut = [Part(prompts[number][: 2 * part], place=number, sampled=False) for number in numbers]
            runner.launch(make_batch(*cut))
            runner.collect()
        start = 2 * (parts - 1)
        cut = [Part(prompts[number], start=start, place=number, sampling=DRAWN) for number in numbers]
        runner.launch(make_batch(*cut, logprobs=True))
        found = runner.collect()
        assert found.logprobs is not None
        words = zip(*fields(found.logprobs), strict=True)
        return {
            number: (token, *(word.tobytes() for word in row))
            for number, token, row in zip(numbers, found.token_ids.tolist(), words, strict=True)
        }

    alone = {number: ask(number)[number] for number in range(40)}
    assert alone == ask(*range(40))
    assert alone == ask(*range(40), parts=2)
    assert {number: alone[number] for number in range(20, 40)} == ask(*range(20, 40))
