"""What the host tells the GPU of a step: staged in pinned memory, from where a graph's first kernel fetches it.

Called by model/graphs.py. Rows (what is sampled) come first and lie at fixed places; then the body's fields, whose
places depend on its bucket.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from service.model.batch import SAMPLING, SAMPLING_WORDS, Batch, Int32
from service.model.fused import StepTensors
from service.model.kernels import exchange
from service.model.tail import AskedTensors, RowTensors

_ALIGNMENT = 4  # words: kernels rely on 16 bytes
_MOST_BIASES = 1024  # of a row; the API takes no more
NUM_TURNS = 3  # slots for what goes to the GPU and comes back: one is filled while the two before are in use
_BLOCK = 1024  # words that one program fetches


@dataclass(frozen=True, slots=True)
class Shape:
    """A body's bucket: room for `num_tokens` of `num_sequences`; with `tile`, prompts in tiles of so many tokens."""

    num_tokens: int
    num_sequences: int
    tile: int = 0  # 0: every sequence has one token

    @property
    def num_tiles(self) -> int:
        """The most tiles that the prompts of a step can make."""
        return self.num_tokens // self.tile + min(self.num_sequences, self.num_tokens // 2) + 1 if self.tile else 0


class Layout:
    """Where the fields of a bucket lie in the buffer, in words."""

    def __init__(self, shape: Shape, *, first: int, table_width: int) -> None:
        tokens, sequences = shape.num_tokens, shape.num_sequences
        fields: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "sources", "positions", "slots"), (tokens,))
        fields |= {"lengths": (sequences,), "num_decodes": (1,)}
        if shape.tile:
            fields |= {"query_starts": (sequences + 1,), "num_tiles": (1,)}
            fields |= dict.fromkeys(("tile_sequences", "tile_starts"), (shape.num_tiles,))
        fields["tables"] = (sequences, table_width)
        self.fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, size in fields.items():
            self.fields[name] = (first, size)
            first += -(-int(np.prod(size)) // _ALIGNMENT) * _ALIGNMENT
        self.end = first


class StepInputs:
    """The buffer on the device, and the pinned slots that it is filled from in turn."""

    def __init__(
        self, shapes: Iterable[Shape], *, max_rows: int, table_width: int, no_slot: int, device: torch.device
    ) -> None:
        """`no_slot`: where the keys and values of what fills a bucket up go."""
        max_rows = -(-max_rows // _ALIGNMENT) * _ALIGNMENT
        self._no_slot = no_slot
        words = max_rows + max_rows + max_rows * SAMPLING_WORDS
        first = -(-words // _ALIGNMENT) * _ALIGNMENT
        self._layouts = {shape: Layout(shape, first=first, table_width=table_width) for shape in shapes}
        size = max(layout.end for layout in self._layouts.values())
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._staged = torch.zeros(NUM_TURNS, size, dtype=torch.int32, pin_memory=pinned)
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)  # whose slot the next step is in
        self._max_rows = max_rows
        self._row_views = [self._rows_of(staged.numpy()) for staged in self._staged]
        self._views = [
            {shape: self._fields_of(layout, staged.numpy()) for shape, layout in self._layouts.items()}
            for staged in self._staged
        ]

    def rows(self, num_rows: int) -> RowTensors:
        """The tensors that a tail of `num_rows` reads."""
        most = self._max_rows
        records = self._device[2 * most : 2 * most + most * SAMPLING_WORDS].view(most, SAMPLING_WORDS)
        return RowTensors(self._device[:num_rows], self._device[most : most + num_rows], records[:num_rows])

    def step(self, shape: Shape) -> StepTensors:
        """The tensors that the body of a bucket reads."""
        layout = self._layouts[shape]
        found = {}
        for name, (first, size) in layout.fields.items():
            found[name] = self._device[first : first + int(np.prod(size))].view(size)
        return StepTensors(**found, turn=self.turn, num_turns=NUM_TURNS)

    def fetch(self, shape: Shape) -> None:
        """Fill the tensors of a bucket, and of rows, from the slot whose turn it is."""
        count = self._layouts[shape].end
        exchange.fetch[(-(-count // _BLOCK),)](
            self._staged,
            self.turn,
            self._device,
            STRIDE=self._staged.shape[1],
            COUNT=count,
            BLOCK=_BLOCK,
        )

    def stage(self, batch: Batch, shape: Shape, *, num_rows: int, turn: int) -> None:
        """Put `batch` into the slot of `turn`, filled up to `shape` and to `num_rows` rows."""
        indices, positions, records = self._row_views[turn]
        sampled = len(batch.sampling)
        if sampled:
            indices[:sampled] = batch.sample_indices
            positions[:sampled] = batch.sample_positions
            records[:sampled] = batch.sampling
            if sampled < num_rows:
                indices[sampled:num_rows] = 0
                records[sampled:num_rows] = 0
        fields = self._views[turn][shape]
        tokens, sequences = len(batch.token_ids), len(batch.context_lengths)
        for name, values in (
            ("token_ids", batch.token_ids),
            ("sources", batch.token_sources),
            ("positions", batch.positions),
            ("slots", batch.slots),
        ):
            fields[name][:tokens] = values
        if tokens < shape.num_tokens:
            fields["token_ids"][tokens:] = 0
            fields["sources"][tokens:] = -1
            fields["positions"][tokens:] = 0
            fields["slots"][tokens:] = self._no_slot
        fields["lengths"][:sequences] = batch.context_lengths
        fields["num_decodes"][0] = batch.num_decodes
        fields["tables"][:sequences, : batch.block_tables.shape[1]] = batch.block_tables
        if shape.tile:
            fields["query_starts"][: sequences + 1] = batch.query_starts
            owners, starts = _tiles(batch, shape.tile)
            fields["tile_sequences"][: len(owners)] = owners
            fields["tile_starts"][: len(owners)] = starts
            fields["num_tiles"][0] = len(owners)

    def _rows_of(self, words: Int32) -> tuple[Int32, Int32, np.ndarray]:
        most = self._max_rows
        records = words[2 * most : 2 * most + most * SAMPLING_WORDS].view(SAMPLING)
        return words[:most], words[most : 2 * most], records

    def _fields_of(self, layout: Layout, words: Int32) -> dict[str, Int32]:
        return {
            name: words[first : first + int(np.prod(size))].reshape(size)
            for name, (first, size) in layout.fields.items()
        }


def _tiles(batch: Batch, tile: int) -> tuple[Int32, Int32]:
    """The sequence of each tile of the step's prompts, and the first of the sequence's new tokens in it."""
    counts = np.diff(batch.query_starts[batch.num_decodes :])
    tiles = -(-counts // tile)
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
    before = np.cumsum(tiles) - tiles
    numbers = np.arange(len(owners), dtype=np.int32) - before[owners].astype(np.int32)
    return owners + np.int32(batch.num_decodes), numbers * np.int32(tile)


class AskedInputs:
    """The same for what only some rows ask for: masks, histories and biases."""

    def __init__(self, *, max_rows: int, vocab_size: int, context_length: int, device: torch.device) -> None:
        self._mask_words = -(-vocab_size // 32)
        sizes = {
            "mask_rows": max_rows,
            "masks": max_rows * self._mask_words,
            "history_starts": max_rows + 1,
            "history": max_rows * context_length,
            "bias_starts": max_rows + 1,
            "bias_ids": max_rows * _MOST_BIASES,
            "bias_values": max_rows * _MOST_BIASES,
        }
        pinned = device.type == "cuda"
        self._device = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
        self._staged = [
            {name: torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for name, size in sizes.items()}
            for _ in range(NUM_TURNS)
        ]

    def tensors(self) -> AskedTensors:
        """What a tail reads; those of its rows that ask for nothing are told so by `upload`."""
        return AskedTensors(**self._device | {"bias_values": self._device["bias_values"].view(torch.float32)})

    def upload(self, batch: Batch, *, num_rows: int, turn: int) -> None:
        """Copy what the rows of `batch` ask for, and nothing for those that fill up `num_rows`."""
        nothing = np.zeros(num_rows + 1, np.int32)
        arrays: dict[str, Int32] = {"mask_rows": nothing[:-1] - 1, "history_starts": nothing, "bias_starts": nothing}
        if batch.masks is not None:
            restricted = np.flatnonzero((batch.masks != -1).any(1))
            numbers = nothing[:-1] - 1
            numbers[restricted] = np.arange(len(restricted), dtype=np.int32)
            arrays |= {"mask_rows": numbers, "masks": batch.masks[restricted].ravel()}
        if batch.histories is not None:
            known = batch.histories >= 0
            arrays |= {"history_starts": _starts(known.sum(1), num_rows), "history": batch.histories[known]}
        if batch.biases is not None:
            counts = np.bincount(batch.biases.rows, minlength=num_rows)
            arrays |= {"bias_starts": _starts(counts, num_rows), "bias_ids": batch.biases.token_ids}
            arrays["bias_values"] = batch.biases.values.view(np.int32)
        staged = self._staged[turn]
        for name, values in arrays.items():
            staged[name].numpy()[: len(values)] = values
            self._device[name][: len(values)].copy_(staged[name][: len(values)], non_blocking=True)


def _starts(counts: np.ndarray, num_rows: int) -> Int32:
    starts = np.zeros(num_rows + 1, np.int32)
    np.cumsum(counts, out=starts[1 : len(counts) + 1])
    starts[len(counts) + 1 :] = starts[len(counts)]
    return starts
