"""Batches made by hand, for tests that say exactly what one step computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.model.batch import SAMPLING, Batch

BLOCK_SIZE = 8
MOST_BLOCKS = 16  # of one sequence


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence in a step: those from `start` on, of its `tokens`, in the blocks of its `place`."""

    tokens: Sequence[int]
    start: int = 0
    place: int = 0
    sampled: bool = True
    source: int = -1  # the last token is not known: row of the previous launch that sampled it
    sampling: dict[str, float] = field(default_factory=dict)  # fields of SAMPLING; by default greedy


def make_batch(*parts: Part, **asked: Any) -> Batch:
    """One step of `parts`, in their order, with `asked` as further fields."""
    lengths = [len(part.tokens) for part in parts]
    counts = [len(part.tokens) - part.start for part in parts]
    num_decodes = counts.count(1)
    assert counts[:num_decodes] == [1] * num_decodes
    assert lengths[:num_decodes] == sorted(lengths[:num_decodes])
    starts = np.cumsum([0, *counts])
    tables = np.zeros((len(parts), -(-max(lengths) // BLOCK_SIZE)), np.int32)
    sources = np.full(starts[-1], -1, np.int32)
    for row, part in zip(tables, parts, strict=True):
        num_blocks = -(-len(part.tokens) // BLOCK_SIZE)
        row[:num_blocks] = part.place * MOST_BLOCKS + np.arange(num_blocks)
    for end, part in zip(starts[1:], parts, strict=True):
        sources[end - 1] = part.source
    positions = np.concatenate([np.arange(part.start, len(part.tokens)) for part in parts])
    offsets = np.concatenate([np.full(count, part.place) for count, part in zip(counts, parts, strict=True)])
    sampled = [number for number, part in enumerate(parts) if part.sampled]
    sampling = np.zeros(len(sampled), SAMPLING)
    sampling["top_p"] = 1
    for record, number in enumerate(sampled):
        for name, value in parts[number].sampling.items():
            sampling[name][record] = value
    return Batch(
        token_ids=np.concatenate([part.tokens[part.start :] for part in parts]).astype(np.int32),
        token_sources=sources,
        positions=positions.astype(np.int32),
        slots=(offsets * MOST_BLOCKS * BLOCK_SIZE + positions).astype(np.int32),
        query_starts=starts.astype(np.int32),
        context_lengths=np.asarray(lengths, np.int32),
        block_tables=tables,
        num_decodes=num_decodes,
        sample_indices=(starts[1:] - 1)[sampled].astype(np.int32),
        sample_positions=np.asarray(lengths, np.int32)[sampled],
        sampling=sampling,
        **asked,
    )
