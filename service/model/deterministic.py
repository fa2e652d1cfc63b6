"""The runner of batch-invariant mode: a request gets the same bits in any company. Called by the engine.

How sums round depends on their order, which operators choose by the shapes that they are given. So each gets one shape
whatever the step is: tokens go through the layers in slices of as many rows, logits are made in such slices, and
sampling and log-probabilities are of one row at a time. What is left to hold is that neither a row's place in a slice
nor its neighbours change its result: `tests/model/test_deterministic.py`, and `megatron-gpt2 selftest` for all of it.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from service.model.attention import Decodes
from service.model.batch import Batch, Int32, Scored
from service.model.gpt2 import GPT2
from service.model.logprobs import logprob_words
from service.model.runner import TorchRunner

# Rows of a slice. On a CPU 8 take little more time than 1; on a GPU it goes into launches, however many rows there are.
_SLICE_ROWS = {"cpu": 8, "cuda": 32}
# CUDA sums one row cumulatively in whatever order its blocks come to run; with two rows it has an order.
_COPIES = {"cpu": 1, "cuda": 2}
# Of attention on a GPU. cuDNN's, which torch may prefer on Hopper, does not keep the order of a row's sums.
_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class DeterministicRunner(TorchRunner):
    """A TorchRunner whose tokens and log-probabilities of a request depend on nothing but the request, to the bit.

    On one machine, with the same versions, dtype, block size and number of threads.
    """

    def __init__(self, model: GPT2, *, num_blocks: int, block_size: int) -> None:
        """Takes memory for a block more than `num_blocks`: it is for what fills slices up."""
        kind = model.device.type
        if kind == "cpu":
            model = copy.copy(model)
            model.activation = _by_rows(model.activation)
        super().__init__(model, num_blocks=num_blocks + 1, block_size=block_size)
        self.num_blocks = num_blocks
        self._slice_rows = _SLICE_ROWS[kind]
        self._copies = _COPIES[kind]
        self._one_rectangle = kind == "cuda"
        self._table_width = -(-model.config.context_length // block_size)

    def launch(self, batch: Batch) -> None:
        no_slot = self.num_blocks * self._block_size
        batch = spread(batch, slice_rows=self._slice_rows, table_width=self._table_width, no_slot=no_slot)
        with sdpa_kernel(_ATTENTION) if self._one_rectangle else nullcontext():
            super().launch(batch)

    def _hidden(self, batch: Batch, inputs: Mapping[str, Tensor], *, token_ids: Tensor) -> Tensor:
        slots, positions = inputs["slots"].long(), inputs["positions"].long()
        found = []
        for start in range(0, len(token_ids), self._slice_rows):
            rows = slice(start, start + self._slice_rows)
            attention = self._cache.attention(
                slots=slots[rows], decodes=self._decodes(batch, inputs, rows), prefills=[]
            )
            found.append(self._model.hidden(token_ids[rows], positions[rows], self._cache, attention))
        return torch.cat(found)

    def _decodes(self, batch: Batch, inputs: Mapping[str, Tensor], rows: slice) -> list[Decodes]:
        """What rows attend to, each as wide as its own context is in blocks; on a GPU as wide as any can be.

        Rows of one width are one rectangle: softmax and the sums of model/bags.py are of one row each.
        """
        tables, lengths = inputs["tables"].view(batch.block_tables.shape)[rows], inputs["lengths"][rows]
        if self._one_rectangle:
            return [Decodes(0, self._slice_rows, 0, tables, lengths)]
        decodes, start = [], 0
        contexts = batch.context_lengths[rows].tolist()
        for width, group in groupby(contexts, lambda length: -(-length // self._block_size)):
            end = start + len(list(group))
            if width:
                decodes.append(Decodes(start, end, contexts[start], tables[start:end, :width], lengths[start:end]))
            start = end
        return decodes

    def _logits(self, hidden: Tensor, indices: Tensor) -> Tensor:
        filled = F.pad(hidden[indices], (0, 0, 0, -len(indices) % self._slice_rows))
        logits = [self._model.logits(rows) for rows in torch.split(filled, self._slice_rows)]
        return torch.cat(logits)[: len(indices)]

    def _words(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        # A copy begins where every tensor does in memory: no operator finds one row aligned otherwise than another.
        rows = zip(torch.split(logits, 1), torch.split(token_ids, 1), strict=True)
        return torch.cat([logprob_words(row.clone(), ids) for row, ids in rows])

    def _sample(self, batch: Batch, inputs: Mapping[str, Tensor], *, logits: Tensor, token_ids: Tensor) -> Tensor:
        tokens = []
        for row in range(len(logits)):
            own_batch, own_inputs = only(batch, inputs, row, copies=self._copies)
            own_logits = logits[row : row + 1].repeat(self._copies, 1)
            tokens.append(super()._sample(own_batch, own_inputs, logits=own_logits, token_ids=token_ids)[:1])
        return torch.cat(tokens)


def spread(batch: Batch, *, slice_rows: int, table_width: int, no_slot: int) -> Batch:
    """The same step with every token as a decode, in order of positions, and filled up to whole slices.

    In that order each token comes after those that it attends to, or in their slice. What fills up has a context of
    length 0, and its keys and values go to `no_slot`. Tables are `table_width` wide.
    """
    counts = np.diff(batch.query_starts)
    owners = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(batch.positions, kind="stable")
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    filling = -len(order) % slice_rows

    def filled(values: Int32, filler: int) -> Int32:
        return np.concatenate((values[order], np.full(filling, filler, np.int32)))

    num_rows = len(order) + filling
    tables = np.zeros((num_rows, table_width), np.int32)
    tables[: len(order), : batch.block_tables.shape[1]] = batch.block_tables[owners[order]]
    scored = batch.scored
    return replace(
        batch,
        token_ids=filled(batch.token_ids, 0),
        token_sources=filled(batch.token_sources, -1),
        positions=filled(batch.positions, 0),
        slots=filled(batch.slots, no_slot),
        query_starts=np.arange(num_rows + 1, dtype=np.int32),
        context_lengths=filled(batch.positions + np.int32(1), 0),
        block_tables=tables,
        num_decodes=num_rows,
        sample_indices=places[batch.sample_indices],
        scored=None if scored is None else Scored(places[scored.indices], scored.targets),
    )


def only(batch: Batch, inputs: Mapping[str, Tensor], row: int, *, copies: int) -> tuple[Batch, dict[str, Tensor]]:
    """What a batch and its tensors on the device say of one sampled row, so many times over; biases once."""
    one = [row] * copies
    own = replace(batch, sampling=batch.sampling[one])
    tensors = {name: inputs[name][row : row + 1].expand(copies) for name in ("indices", "sample_positions")}

    def take(name: str, width: int) -> None:
        whole = inputs[name].view(len(batch.sampling), -1)
        tensors[name] = whole[row : row + 1, :width].expand(copies, -1)

    take("sampling", inputs["sampling"].numel())
    if batch.histories is not None:
        width = max(1, int((batch.histories[row] >= 0).sum()))
        own = replace(own, histories=batch.histories[one, :width])
        take("histories", width)
    if batch.masks is not None:
        own = replace(own, masks=batch.masks[one])
        take("masks", batch.masks.shape[1])
    if batch.biases is not None:
        start, end = np.searchsorted(batch.biases.rows, (row, row + 1)).tolist()
        own = replace(own, biases=batch.biases if start < end else None)
        tensors |= {name: inputs[name][start:end] for name in ("bias_ids", "bias_values")}
        tensors["bias_rows"] = torch.zeros_like(tensors["bias_ids"])
    return own, tensors


def _by_rows(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """torch cuts it over threads at any number, and computes the last few of a part by another way than the others."""
    return lambda x: torch.cat([activation(row) for row in torch.split(x, 1)])
