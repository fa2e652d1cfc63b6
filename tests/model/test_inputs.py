"""What of a batch the GPU is told, and where: read back from the tensors that bodies and tails read."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.batch import SAMPLING, Batch, Biases
from service.model.inputs import AskedInputs, Layout, Shape, StepInputs
from service.model.tail import AskedTensors
from tests.model.batches import MOST_BLOCKS, Part, make_batch
from tests.model.rows import pack_mask

NO_SLOT = 9999
VOCAB = 45
CONTEXT = 128
DECODES = Shape(4, 4)
MIXED = Shape(64, 5, 16)
SAMPLED = {"temperature": 0.5, "top_k": 3, "seed": 2**40 + 7, "min_length": 4}

# Tokens from 1,000 on, each its own number. Decodes in order of their lengths, then prompts.
PARTS = [
    Part(range(1000, 1003), start=2, place=0, source=1, sampling=SAMPLED),
    Part(range(1100, 1140), start=39, place=1, sampling={"temperature": 1.0}),
    Part(range(1200, 1217), place=2, sampled=False),
    Part(range(1300, 1340), start=7, place=3, sampling={"min_p": 0.25}),
]


def make_inputs() -> StepInputs:
    return StepInputs(
        [DECODES, MIXED], max_rows=5, table_width=MOST_BLOCKS, no_slot=NO_SLOT, device=torch.device("cpu")
    )


def send(inputs: StepInputs, batch: Batch, shape: Shape, *, num_rows: int, turn: int = 0) -> None:
    """Through the slot of a turn, which is all that is read."""
    inputs._staged.fill_(-77)
    inputs.stage(batch, shape, num_rows=num_rows, turn=turn)
    inputs.turn.fill_(turn)
    inputs.fetch(shape)


def check_body(batch: Batch, inputs: StepInputs, shape: Shape) -> None:
    """All that a body reads of the batch's tokens and sequences, and that what fills it up does no harm."""
    step = inputs.step(shape)
    tokens, sequences = len(batch.token_ids), len(batch.context_lengths)
    for name, expected, filling in (
        ("token_ids", batch.token_ids, 0),
        ("sources", batch.token_sources, -1),
        ("positions", batch.positions, 0),
        ("slots", batch.slots, NO_SLOT),
    ):
        assert [*expected.tolist(), *[filling] * (shape.num_tokens - tokens)] == getattr(step, name).tolist()
    assert batch.context_lengths.tolist() == step.lengths[:sequences].tolist()
    assert (shape.num_sequences, MOST_BLOCKS) == step.tables.shape
    width = batch.block_tables.shape[1]
    assert batch.block_tables.tolist() == step.tables[:sequences, :width].tolist()
    assert [batch.num_decodes] == step.num_decodes.tolist()


def check_rows(batch: Batch, inputs: StepInputs, num_rows: int) -> None:
    """All that a tail reads; rows that fill it up are greedy ones of the first token."""
    rows = inputs.rows(num_rows)
    sampled = len(batch.sampling)
    assert [*batch.sample_indices.tolist(), *[0] * (num_rows - sampled)] == rows.indices.tolist()
    assert batch.sample_positions.tolist() == rows.positions[:sampled].tolist()
    records = rows.records.numpy().view(SAMPLING)[:, 0]
    np.testing.assert_array_equal(records[:sampled], batch.sampling)
    assert not records[sampled:].view(np.int32).any()


def test_a_mixed_batch_arrives_whole() -> None:
    """Tokens in flight and known, decodes and prompts, rows sampled and not."""
    inputs, batch = make_inputs(), make_batch(*PARTS)
    send(inputs, batch, MIXED, num_rows=4)
    check_body(batch, inputs, MIXED)
    check_rows(batch, inputs, 4)
    step = inputs.step(MIXED)
    assert step.query_starts is not None
    assert step.tile_sequences is not None
    assert step.tile_starts is not None
    assert step.num_tiles is not None
    assert [0, 1, 2, 19, 52] == step.query_starts[:5].tolist()
    assert [5] == step.num_tiles.tolist()
    assert [2, 2, 3, 3, 3] == step.tile_sequences[:5].tolist()
    assert [0, 16, 0, 16, 32] == step.tile_starts[:5].tolist()


def test_a_later_batch_leaves_nothing_of_an_earlier_one() -> None:
    """Over more turns than there are slots, large steps and small ones, in either bucket."""
    inputs = make_inputs()
    large = make_batch(*PARTS)
    full = make_batch(*(Part(range(50 + place, 60 + place), start=9, place=place, source=place) for place in range(4)))
    small = make_batch(Part(range(7, 10), start=2, place=3, sampling=SAMPLED))
    unsampled = make_batch(replace(PARTS[2], sampled=False))
    for turn in (0, 1, 2, 0):
        for batch, shape, rows in (
            (large, MIXED, 5),
            (full, DECODES, 4),
            (small, DECODES, 2),
            (unsampled, MIXED, 0),
            (small, MIXED, 5),
        ):
            send(inputs, batch, shape, num_rows=rows, turn=turn)
            check_body(batch, inputs, shape)
            check_rows(batch, inputs, rows)


def test_decodes_alone_have_no_tiles() -> None:
    """Neither those fields nor room for them."""
    step = make_inputs().step(DECODES)
    assert step.query_starts is step.tile_sequences is step.tile_starts is step.num_tiles is None
    assert 0 == DECODES.num_tiles


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(7, 3, 16), Shape(24, 24), Shape(2048, 256, 64)])
def test_fields_lie_beside_each_other_from_16_bytes_to_16_bytes(shape: Shape) -> None:
    """From the first word on, without overlap."""
    layout = Layout(shape, first=48, table_width=7)
    end = 48
    for first, size in layout.fields.values():
        assert 0 == first % 4
        assert end <= first < end + 4
        end = first + int(np.prod(size))
    assert end <= layout.end < end + 4


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=0, max_size=8).map(sorted),
    num_decodes=st.integers(0, 6),
    tile=st.sampled_from([16, 64]),
)
def test_tiles_cover_every_new_token_of_a_prompt_once(counts: list[int], num_decodes: int, tile: int) -> None:
    """And none of a decode's; a bucket has room for the tiles of any step that it has room for."""
    tokens = sum(counts) + num_decodes
    if not tokens:
        return
    shape = Shape(tokens, len(counts) + num_decodes, tile)
    inputs = StepInputs([shape], max_rows=16, table_width=MOST_BLOCKS, no_slot=NO_SLOT, device=torch.device("cpu"))
    parts = [Part(range(5), start=4, place=place) for place in range(num_decodes)]
    batch = make_batch(*parts, *(Part(range(count), place=6) for count in counts))
    send(inputs, batch, shape, num_rows=len(batch.sampling))
    step = inputs.step(shape)
    assert step.tile_sequences is not None
    assert step.tile_starts is not None
    assert step.num_tiles is not None
    num_tiles = int(step.num_tiles)
    assert num_tiles <= shape.num_tiles == len(step.tile_sequences)
    covered = []
    for sequence, start in zip(
        step.tile_sequences[:num_tiles].tolist(), step.tile_starts[:num_tiles].tolist(), strict=True
    ):
        first, end = batch.query_starts[sequence : sequence + 2].tolist()
        covered += range(first + start, min(first + start + tile, end))
    assert list(range(num_decodes, tokens)) == covered


def make_asked() -> AskedInputs:
    return AskedInputs(max_rows=5, vocab_size=VOCAB, context_length=CONTEXT, device=torch.device("cpu"))


def histories_of(asked: AskedTensors, row: int) -> list[int]:
    start, end = asked.history_starts[row : row + 2].tolist()
    return asked.history[start:end].tolist()


def biases_of(asked: AskedTensors, row: int) -> dict[int, float]:
    start, end = asked.bias_starts[row : row + 2].tolist()
    return dict(zip(asked.bias_ids[start:end].tolist(), asked.bias_values[start:end].tolist(), strict=True))


def mask_of(asked: AskedTensors, row: int) -> list[int] | None:
    number = int(asked.mask_rows[row])
    width = -(-VOCAB // 32)
    return None if number < 0 else asked.masks[number * width : (number + 1) * width].tolist()


ROWS = [Part(range(5, 9), place=place) for place in range(4)]


def test_what_some_rows_ask_for_is_theirs_alone() -> None:
    """Masks, histories and biases of rows between such that have none; rows that fill a bucket up ask for nothing."""
    allowed = np.ones((4, VOCAB), bool)
    allowed[1, ::2] = allowed[3, 44] = False
    masks = pack_mask(allowed)
    masks[[0, 2]] = -1
    batch = make_batch(
        *ROWS,
        masks=masks,
        histories=np.array([[-1, -1, -1], [-1, -1, -1], [5, 6, 7], [8, -1, -1]], np.int32),
        biases=Biases(np.array([0, 3, 3], np.int32), np.array([7, 9, 2], np.int32), np.array([1, 2, -3], np.float32)),
    )
    inputs = make_asked()
    inputs.upload(batch, num_rows=5, turn=1)
    asked = inputs.tensors()
    assert [None, masks[1].tolist(), None, masks[3].tolist(), None] == [mask_of(asked, row) for row in range(5)]
    assert [[], [], [5, 6, 7], [8], []] == [histories_of(asked, row) for row in range(5)]
    assert [{7: 1.0}, {}, {}, {9: 2.0, 2: -3.0}, {}] == [biases_of(asked, row) for row in range(5)]
    assert asked.bias_values.dtype == torch.float32


@pytest.mark.parametrize("name", ["masks", "histories", "biases"])
def test_what_is_asked_no_more_is_gone(name: str) -> None:
    """A batch that asks for one thing only, after batches that asked for all; over every staging buffer."""
    inputs = make_asked()
    every = {
        "masks": pack_mask(np.zeros((4, VOCAB), bool)),
        "histories": np.full((4, CONTEXT - 1), 9, np.int32),
        "biases": Biases(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.ones(4, np.float32)),
    }
    for turn in range(3):
        inputs.upload(make_batch(*ROWS, **every), num_rows=5, turn=turn)
        inputs.upload(make_batch(*ROWS[:2], **{name: cut(every[name], 2)}), num_rows=5, turn=turn)
        asked = inputs.tensors()
        for row in range(5):
            has = row < 2
            assert (name == "masks" and has) == (mask_of(asked, row) is not None)
            assert (name == "histories" and has) == (len(histories_of(asked, row)) > 0)
            assert (name == "biases" and has) == (len(biases_of(asked, row)) > 0)


def cut(array: np.ndarray | Biases, rows: int) -> np.ndarray | Biases:
    if isinstance(array, Biases):
        return Biases(*(getattr(array, field.name)[:rows] for field in fields(array)))
    return array[:rows]


def test_the_most_that_every_row_may_ask_for_fits() -> None:
    """A whole context of history, a mask and 1,024 biases, of as many rows as there may be."""
    rows = [Part(range(5, 9), place=place) for place in range(5)]
    count = 1024
    batch = make_batch(
        *rows,
        masks=pack_mask(np.zeros((5, VOCAB), bool)),
        histories=np.tile(np.arange(CONTEXT, dtype=np.int32), (5, 1)),
        biases=Biases(
            np.repeat(np.arange(5, dtype=np.int32), count),
            np.tile(np.arange(count, dtype=np.int32), 5),
            np.arange(5 * count, dtype=np.float32),
        ),
    )
    inputs = make_asked()
    inputs.upload(batch, num_rows=5, turn=1)
    asked = inputs.tensors()
    assert list(range(CONTEXT)) == histories_of(asked, 4)
    assert {token: float(4 * count + token) for token in range(count)} == biases_of(asked, 4)
