"""The runner of graphs against the plain one; without a GPU its bodies and tails run in Triton's interpreter.

What a batch may ask for is compared with transformers in test_batch_fields.py, and for the served model in test_gpu.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.checkpoint.hub import read_state
from service.model import graphs
from service.model.batch import Batch, Biases, Runner, Scored, StepOutput, TopLogprobs
from service.model.config import ModelConfig
from service.model.formats import Format
from service.model.gpt2 import GPT2
from service.model.graphs import GraphRunner
from service.model.inputs import Shape
from service.model.kernels.plan import Decode, Plan, Prefill, Tiled, Vector
from service.model.runner import TorchRunner
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.conftest import Pair
from tests.model.kernels.conftest import ON_GPU
from tests.model.kernels.poisoned import DTYPES
from tests.model.rows import pack_mask
from tests.model.test_batch_fields import PENALTIES, generate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of infinities

MOST_SEQUENCES = 5
PROMPTS = [[7], [3, 4, 5, 4, 3, 4], list(range(20, 37)), list(range(400, 430))]
SAMPLING: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "seed": 9, "choice": 1},
    {"temperature": 1.2, "min_p": 0.02, "seed": 3, "min_length": 1000},
]
_ATTENTION = (Decode(16, 2, 4), Prefill(16, 16, 4, 2))
TILED = Plan(
    Tiled(16, 32, 32, 1, 4, 2),
    Tiled(16, 32, 32, 2, 4, 2),
    Tiled(16, 64, 32, 1, 4, 2),
    Tiled(16, 32, 32, 4, 4, 2),
    *_ATTENTION,
)
VECTOR = Plan(Vector(16, 32, 4), Vector(8, 32, 4), Vector(32, 32, 4), Vector(8, 64, 4), Decode(16, 2, 4, merged=False))


Load = Callable[[torch.dtype], GPT2]


def read(folder: Path, config: ModelConfig, dtype: torch.dtype, weights: Format | None = None) -> GPT2:
    """The model there, with queries and keys large enough that attention looks somewhere."""
    state = read_state(folder, config, dtype=dtype, device="cuda" if ON_GPU else "cpu")
    # On a CPU they may be views of the file, turned and not to be written to; kernels read rows.
    copies = {name: tensor * (20 if "qkv.weight" in name else 1) for name, tensor in state.items()}
    return GPT2(config, {name: tensor.contiguous() for name, tensor in copies.items()}, weights)


@pytest.fixture
def load(make_pair: Callable[..., Pair], tmp_path: Path) -> Load:
    """One layer of two heads of 16."""
    config = make_pair(n_layer=1, n_embd=32, n_head=2)[1].config
    return lambda dtype: read(tmp_path, config, dtype)


@pytest.fixture
def model(load: Load) -> GPT2:
    """In 32 bits."""
    return load(torch.float32)


def make_plain(model: GPT2) -> TorchRunner:
    return TorchRunner(model, num_blocks=MOST_SEQUENCES * MOST_BLOCKS, block_size=BLOCK_SIZE)


def make_graphs(model: GPT2) -> GraphRunner:
    runner = GraphRunner(
        model,
        num_blocks=MOST_SEQUENCES * MOST_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MOST_SEQUENCES,
        max_num_batched_tokens=80,
    )
    runner.capture()
    return runner


def run(runner: Runner, batch: Batch) -> StepOutput:
    runner.launch(batch)
    return runner.collect()


def check_logprobs(expected: TopLogprobs | None, got: TopLogprobs | None) -> None:
    assert (expected is None) == (got is None)
    if expected is not None and got is not None:
        np.testing.assert_allclose(got.chosen, expected.chosen, atol=3e-5, rtol=0)
        np.testing.assert_allclose(got.top, expected.top, atol=3e-5, rtol=0)
        np.testing.assert_array_equal(got.top_ids, expected.top_ids)


def check_16_bits(expected: TopLogprobs | None, got: TopLogprobs | None) -> None:
    """The best alike; which they are is rounding's choice."""
    assert expected is not None
    assert got is not None
    np.testing.assert_allclose(got.top, expected.top, atol=2e-2, rtol=0)


def check_output(expected: StepOutput, got: StepOutput) -> None:
    assert expected.token_ids.tolist() == got.token_ids.tolist()
    check_logprobs(expected.logprobs, got.logprobs)
    check_logprobs(expected.scores, got.scores)


def check_generated(model: GPT2, sampling: list[dict[str, float]], *, num_tokens: int = 4, **asked: object) -> None:
    """The prompts and some tokens after each, by both."""
    prompts = PROMPTS[: len(sampling)]
    expected, expected_outputs = generate(make_plain(model), prompts, sampling, num_tokens, **asked)  # type: ignore[arg-type]
    got, outputs = generate(make_graphs(model), prompts, sampling, num_tokens, **asked)  # type: ignore[arg-type]
    assert expected == got
    for expected_output, output in zip(expected_outputs, outputs, strict=True):
        check_output(expected_output, output)


def watch_bodies(runner: GraphRunner) -> list[Shape]:
    """The shapes of the bodies that the steps from now on run."""
    ran: list[Shape] = []

    def watched(shape: Shape, body: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            ran.append(shape)
            body()

        return both

    for captured in (runner._bodies, runner._steps):
        captured |= {shape: watched(shape, work) for shape, work in captured.items()}
    return ran


@pytest.mark.parametrize("in_flight", [False, True])
def test_prompts_and_decodes_equal_the_plain_runner(model: GPT2, in_flight: bool) -> None:
    """Greedy, drawn and filtered rows beside each other, with a step in flight and without."""
    check_generated(model, SAMPLING, in_flight=in_flight, penalised=False)


@pytest.mark.parametrize("in_flight", [False, True])
def test_rows_that_ask_for_everything_equal_the_plain_runner(model: GPT2, in_flight: bool) -> None:
    """Penalties, biases, masks, log-probabilities and scores; the first row asks for nothing of them."""
    allowed = np.ones((4, 515), bool)
    allowed[2] = np.arange(515) % 5 == 0
    biases = Biases(np.array([1, 1, 3], np.int32), np.array([77, 4, 9], np.int32), np.array([4.5, -9, 3.5], np.float32))
    sampling = [penalty | given for penalty, given in zip(PENALTIES, SAMPLING, strict=True)]
    scored = Scored(np.array([0, 2, 3], np.int32), np.array([9, 4, 21], np.int32))
    check_generated(
        model,
        sampling,
        num_tokens=3,
        in_flight=in_flight,
        masks=pack_mask(allowed),
        biases=biases,
        logprobs=True,
        scored=scored,
    )


def mixed() -> list[Batch]:
    """Prompts whole and in chunks while others decode; the long one is sampled in the last step only."""
    long, short = list(range(100, 160)), list(range(50, 74))
    return [
        make_batch(Part(short[:20], sampling=SAMPLING[1]), Part(long[:30], place=1, sampled=False)),
        make_batch(
            Part([9], place=2, sampling=SAMPLING[2]),
            Part([*short[:20], 0], start=20, source=0, sampling=SAMPLING[1]),
            Part(long[:47], start=30, place=1, sampled=False),
            Part(short[:18], place=3),
        ),
        make_batch(
            Part([*short[:21], 0], start=21, source=1, sampling=SAMPLING[1]),
            Part(long, start=47, place=1, sampling=SAMPLING[3]),
        ),
    ]


def test_mixed_steps_equal_the_plain_runner(model: GPT2) -> None:
    """Decodes whose token is in flight, a prompt of one token, chunks of two prompts and a row that is not sampled."""
    plain, runner = make_plain(model), make_graphs(model)
    ran = watch_bodies(runner)
    batches = mixed()
    expected = [run(plain, batch) for batch in batches]
    runner.launch(batches[0])
    for number, batch in enumerate(batches[1:]):
        runner.launch(batch)  # the step before is in flight
        check_output(expected[number], runner.collect())
    check_output(expected[2], runner.collect())
    assert [64, 64, 16] == [shape.num_tokens for shape in ran]
    assert all(shape.tile for shape in ran)
    sources = make_batch(*(Part([5, 6, 0], start=2, place=place, source=1 - place) for place in range(2)))
    check_output(run(plain, sources), run(runner, sources))  # each goes on from the other's sample


@pytest.mark.parametrize("plan", [TILED, VECTOR], ids=["tiled", "vector"])
def test_every_kind_of_plan_gives_the_tokens(model: GPT2, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles with split products and split contexts; for one token, vectors with splits that the next product merges."""

    def planned(num_tokens: int, *, decodes_only: bool, **_: object) -> Plan:
        return VECTOR if plan is VECTOR and decodes_only and num_tokens == 1 else TILED

    monkeypatch.setattr(graphs, "plan_for", planned)
    monkeypatch.setattr(graphs, "head_for", lambda num_rows, **_: Tiled(16, 64, 32, 1, 4, 2))
    sampling = SAMPLING if plan is TILED else SAMPLING[:1]
    check_generated(model, sampling, num_tokens=3, in_flight=True, penalised=False, logprobs=True)


@pytest.mark.parametrize(
    "config",
    [
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        {"scale_attn_weights": False, "activation_function": "gelu", "n_inner": 48, "tie_word_embeddings": False},
    ],
)
def test_every_kind_of_model_gives_the_tokens(
    make_pair: Callable[..., Pair], tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers in tiles: a prompt's scores, and a decode of a known token."""
    monkeypatch.setattr(graphs, "plan_for", lambda *_, **__: TILED)
    given = make_pair(n_layer=2, n_embd=32, n_head=2, **config)[1].config
    model = read(tmp_path, given, torch.float32)
    plain, runner = make_plain(model), make_graphs(model)
    prompt = PROMPTS[2]
    scored = Scored(np.arange(16, dtype=np.int32), np.asarray(prompt[1:], np.int32))
    for batch in (make_batch(Part(prompt), scored=scored), make_batch(Part([*prompt, 9], start=17), logprobs=True)):
        check_output(run(plain, batch), run(runner, batch))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bits_are_close_to_the_plain_runner(load: Load, dtype: torch.dtype) -> None:
    """In the plans that serve them: log-probabilities over a prompt, and of decodes of one row and of three."""
    check_close_to_plain(load(dtype))


def check_close_to_plain(model: GPT2) -> None:
    plain, runner = make_plain(model), make_graphs(model)
    prompt = list(range(100, 140))
    scored = Scored(np.arange(39, dtype=np.int32), np.asarray(prompt[1:], np.int32))
    prefill = make_batch(Part(prompt), scored=scored, logprobs=True)
    expected, got = run(plain, prefill), run(runner, prefill)
    check_16_bits(expected.logprobs, got.logprobs)
    check_16_bits(expected.scores, got.scores)
    runner._tail.sampled.fill_(77)  # what both go on from
    for rows in (1, 3):
        known = [Part([*prompt, 77], start=40, place=0) for _ in range(rows)]
        flying = [replace(part, source=row) for row, part in enumerate(known)]
        expected = run(plain, make_batch(*known, logprobs=True))
        check_16_bits(expected.logprobs, run(runner, make_batch(*flying, logprobs=True)).logprobs)
        runner._tail.sampled.fill_(77)


def test_a_row_alone_gets_what_it_gets_among_others(model: GPT2) -> None:
    """Prompt and decodes, in the smallest bucket and in one that others share."""
    together, _ = generate(make_graphs(model), PROMPTS, SAMPLING, 3, penalised=False)
    alone, _ = generate(make_graphs(model), PROMPTS[2:3], SAMPLING[2:3], 3, penalised=False)
    assert together[2] == alone[0]


def test_scores_are_computed_in_slices(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 each, of which the last has 4; the sampled row's log-probabilities are its own."""
    monkeypatch.setattr(graphs, "_MOST_SCORED", 7)
    prompt = list(range(100, 140))
    indices = np.arange(39, dtype=np.int32)
    scored = Scored(indices, np.asarray(prompt[1:], np.int32))
    batch = make_batch(Part(prompt), scored=scored, logprobs=True)
    runner = make_graphs(model)
    expected = run(make_plain(model), batch)
    check_output(expected, run(runner, batch))
    check_output(replace(expected, scores=None), run(runner, replace(batch, scored=None)))
    unsampled = make_batch(Part(prompt, sampled=False), scored=scored)
    check_output(run(make_plain(model), unsampled), run(runner, unsampled))


def test_which_body_a_step_takes(model: GPT2) -> None:
    """That of decodes where every sequence has one token, else that of any mix; the smallest with room for all."""
    runner = make_graphs(model)
    ran = watch_bodies(runner)
    context = list(range(5, 15))
    places = range(MOST_SEQUENCES)
    prompts = [Part(context[:2], place=place) for place in places]

    def decodes(rows: int, known: int = 0) -> Batch:
        sources = [-1 if place < known else place for place in range(rows)]
        return make_batch(*(Part(context[:3], start=2, place=place, source=sources[place]) for place in range(rows)))

    for batch, expected in (
        (make_batch(*prompts), (16, True)),
        (decodes(5), (8, False)),  # the most that there are, which are rounded up
        (decodes(3), (4, False)),
        (decodes(3, known=1), (4, False)),
        (decodes(1), (1, False)),
        (decodes(1, known=1), (1, False)),
        (make_batch(Part(list(range(17)))), (32, True)),
        (make_batch(Part(list(range(80)))), (80, True)),
    ):
        run(runner, batch)
        assert expected == (ran[-1].num_tokens, ran[-1].tile > 0)


def test_a_known_token_may_read_what_another_row_writes_in_the_step(model: GPT2) -> None:
    """A sequence that shares a block with another one's new token sees it, as Batch says: no keys are read early."""
    plain, runner = make_plain(model), make_graphs(model)
    ran = watch_bodies(runner)
    prompt = list(range(200, 215))
    prefill = make_batch(Part(prompt[:7], sampling=SAMPLING[0]))
    first, second = Part(prompt[:8], start=7), Part(prompt[:9], start=8, place=1)
    both = make_batch(first, second, logprobs=True)
    both.block_tables[1, 0] = both.block_tables[0, 0]  # the first's block, which is full with the token of this step
    for batch in (prefill, both):
        check_output(run(plain, batch), run(runner, batch))
    assert ran[-1].tile
    alone = make_batch(replace(first, place=2), Part(prompt[:9], start=8, place=3))  # a block that only its row reads
    run(runner, alone)
    assert not ran[-1].tile


def test_no_step_touches_a_block_that_is_not_its_own(model: GPT2) -> None:
    """Whatever fills its bucket up goes to a block beyond the last: all other slots but the step's keep their bits."""
    runner = make_graphs(model)
    cache = runner._fused._cache._cache
    cache.normal_()
    slots = cache.view(*cache.shape[:2], -1, cache.shape[-2] * cache.shape[-1])  # [layers, 2, slots, H]
    batches = [*mixed(), make_batch(*(Part([5, 6, 7], start=2, place=place, source=place) for place in range(3)))]
    for batch in batches:
        before = slots.clone()
        run(runner, batch)
        changed = (slots != before).any(-1)[:, :, :-BLOCK_SIZE].nonzero()[:, 2]
        assert sorted(batch.slots.tolist()) == sorted(set(changed.tolist()))
        assert bool(slots.isfinite().all())


def test_padding_survives_what_a_larger_step_left(model: GPT2) -> None:
    """Steps of fewer rows and tokens after steps of more, one of which was not finite, give what they give at first."""
    runner = make_graphs(model)
    small = make_batch(Part([5, 6, 7], place=4, sampling=SAMPLING[1]), logprobs=True)
    expected = run(runner, small)
    embedding = model.token_embedding
    kept = embedding[9].clone()
    embedding[9] = torch.nan
    bad = make_batch(*(Part([9] * 12, place=place, sampling=SAMPLING[place]) for place in range(4)), logprobs=True)
    assert [-1] * 4 == run(runner, bad).token_ids.tolist()
    after = make_batch(*(Part([9] * 13, start=12, place=place, source=place) for place in range(4)))
    assert [-1] * 4 == run(runner, after).token_ids.tolist()
    embedding[9] = kept
    check_output(expected, run(runner, small))


def test_a_mask_does_not_hide_a_row_that_is_not_finite(model: GPT2) -> None:
    """The only NaN is the logit of a token that the mask bans; with a number there, the row gets its token."""
    allowed = np.arange(515)[None] != 9
    batch = make_batch(Part([5, 6, 7]), masks=pack_mask(allowed))
    kept = model.token_embedding[9].clone()
    model.token_embedding[9] = torch.nan
    for make in (make_plain, make_graphs):  # after the change: a head that is padded is a copy
        assert [-1] == run(make(model), batch).token_ids.tolist()
    model.token_embedding[9] = kept
    check_output(run(make_plain(model), batch), run(make_graphs(model), batch))


@pytest.mark.parametrize("what", ["_score", "upload"])
def test_a_launch_that_raises_half_way_leaves_the_next_as_they_are(
    model: GPT2, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its body has run; the steps after it read their own inputs and give their own tokens."""
    plain, runner = make_plain(model), make_graphs(model)
    allowed = np.arange(515)[None] != 9
    asking = make_batch(
        Part([5, 6, 7]), masks=pack_mask(allowed), scored=Scored(np.array([0], np.int32), np.array([6], np.int32))
    )

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(runner if what == "_score" else runner._asked, what, broken)
        with pytest.raises(RuntimeError, match="no room"):
            runner.launch(asking)
    for tokens in ([9, 8, 7, 6], [3], [1, 2], [40, 41, 42]):
        batch = make_batch(Part(tokens), logprobs=True)
        check_output(run(plain, batch), run(runner, batch))


def test_progress_goes_from_nothing_to_all(model: GPT2) -> None:
    """One step a captured graph."""
    heard: list[float] = []
    runner = GraphRunner(model, num_blocks=8, block_size=BLOCK_SIZE, max_num_seqs=3, max_num_batched_tokens=40)
    runner.capture(heard.append)
    assert heard == sorted(heard)
    assert 1 == heard[-1]
    assert len(heard) == len(runner._bodies) + len(runner._tails) + len(runner._steps) + 1
