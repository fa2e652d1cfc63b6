"""The arrays that batches are cut from, a row a running sequence. Called by the scheduler alone."""

from dataclasses import dataclass, replace

import numpy as np

from service.engine.sequence import Sequence
from service.model.batch import SAMPLING, Batch, Biases, Float32, Int32, Scored


@dataclass(frozen=True, slots=True)
class Placing:
    """Tokens start .. start + count - 1 of a sequence are computed in this step."""

    sequence: Sequence
    start: int
    count: int
    admitted: bool  # the sequence left the queue in this step


@dataclass(frozen=True, slots=True)
class Scoring:
    """Prompt tokens of a sequence from index `first` on are scored in this step: its scores start .. stop - 1."""

    sequence: Sequence
    first: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A launched batch: what it computes, the sequences that get a token, by row, and the prompt tokens scored."""

    placed: list[Placing]
    sampled: list[Sequence]
    scored: list[Scoring]


class Rows:
    """What a sequence brings to every step it is in: its sampling parameters and its block table."""

    def __init__(self, num_rows: int, *, blocks_per_row: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_rows - 1, -1, -1))
        self._sampling = np.zeros(num_rows, dtype=SAMPLING)
        self._tables = np.zeros((num_rows, blocks_per_row), dtype=np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, sequence: Sequence) -> None:
        """Give the sequence a row, with the blocks that it has."""
        row = sequence.row = self._free.pop()
        params = sequence.group.params
        self._tables[row, : len(sequence.blocks)] = sequence.blocks
        self._sampling[row] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            sequence.choice,
            0 if sequence.group.mask is not None else sequence.num_prompt + params.min_tokens,
            sequence.num_prompt,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        """The sequence has `blocks` more."""
        held = len(sequence.blocks)
        sequence.blocks += blocks
        self._tables[sequence.row, held : len(sequence.blocks)] = blocks

    def give_back(self, sequence: Sequence) -> None:
        self._free.append(sequence.row)
        sequence.row = -1

    def batch(self, placed: list[Placing]) -> tuple[Batch, Plan]:
        """The batch that computes `placed`. A sequence that is then complete gets a row of its samples."""
        num_sequences = len(placed)
        starts = np.fromiter((placing.start for placing in placed), np.int32, num_sequences)
        counts = np.fromiter((placing.count for placing in placed), np.int32, num_sequences)
        rows = np.fromiter((placing.sequence.row for placing in placed), np.int32, num_sequences)
        query_starts = np.zeros(num_sequences + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        token_ids = np.zeros(num_tokens, np.int32)
        token_sources = np.full(num_tokens, -1, np.int32)
        sampled: list[Sequence] = []
        sample_indices: list[int] = []
        plain = True
        end = 0
        for placing in placed:
            sequence = placing.sequence
            plain = plain and sequence.plain
            start, end = end, end + placing.count
            known = sequence.tokens[placing.start : placing.start + placing.count]
            token_ids[start : start + len(known)] = known
            if len(known) < placing.count:  # only the last can be in flight, and only from the previous launch
                token_sources[end - 1] = sequence.sample_row
            if sequence.num_scheduled == sequence.length:
                sequence.sample_row = len(sampled)
                sequence.num_in_flight += 1
                sampled.append(sequence)
                sample_indices.append(end - 1)
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)
        lengths = starts + counts
        size = self._block_size
        tables = self._tables[rows, : -(-int(lengths.max()) // size)]
        slots = tables[np.repeat(np.arange(num_sequences), counts), positions // size] * size + positions % size
        # Past a sequence's own blocks its row holds what earlier sequences left there.
        tables[np.arange(tables.shape[1]) * size >= lengths[:, None]] = 0
        indices: Int32 = np.asarray(sample_indices, np.int32)
        batch = Batch(
            token_ids=token_ids,
            token_sources=token_sources,
            positions=positions,
            slots=slots.astype(np.int32, copy=False),
            query_starts=query_starts,
            context_lengths=lengths,
            block_tables=tables,
            num_decodes=int((counts == 1).sum()),
            sample_indices=indices,
            sample_positions=positions[indices] + 1,
            sampling=self._sampling[np.fromiter((sequence.row for sequence in sampled), np.intp, len(sampled))],
        )
        if plain:
            return batch, Plan(placed, sampled, [])
        sample_positions = batch.sample_positions.tolist()
        scored, scorings = _scored(placed)
        _decay(batch.sampling["top_p"], sample_positions, sampled)
        batch = replace(
            batch,
            masks=_masks(sample_positions, sampled),
            biases=_biases(sampled),
            histories=_histories(sample_positions, sampled),
            logprobs=any(sequence.group.num_logprobs is not None for sequence in sampled),
            scored=scored,
        )
        return batch, Plan(placed, sampled, scorings)


def _masks(positions: list[int], sampled: list[Sequence]) -> Int32 | None:
    words = {
        row: sequence.mask(positions[row]) for row, sequence in enumerate(sampled) if sequence.group.mask is not None
    }
    given = [(row, mask) for row, mask in words.items() if mask is not None]
    if not given:
        return None
    masks = np.full((len(sampled), len(given[0][1])), -1, np.int32)
    for row, mask in given:
        masks[row] = mask
    return masks


def _decay(top_p: Float32, positions: list[int], sampled: list[Sequence]) -> None:
    """Set the top_p of rows whose sequences lower it with each generated token, those in flight included."""
    for row, sequence in enumerate(sampled):
        params = sequence.group.params
        if params.top_p_decay:
            num_generated = positions[row] - sequence.num_prompt
            top_p[row] = max(params.top_p * params.top_p_decay**num_generated, params.top_p_bound)


def _biases(sampled: list[Sequence]) -> Biases | None:
    biased = [(row, sequence.group) for row, sequence in enumerate(sampled) if len(sequence.group.bias_ids)]
    if not biased:
        return None
    rows, groups = zip(*biased, strict=True)
    return Biases(
        np.repeat(np.asarray(rows, np.int32), [len(group.bias_ids) for group in groups]),
        np.concatenate([group.bias_ids for group in groups]),
        np.concatenate([group.bias_values for group in groups]),
    )


def _histories(positions: list[int], sampled: list[Sequence]) -> Int32 | None:
    known = {  # by row, without the last
        row: sequence.history[: positions[row] - 1]
        for row, sequence in enumerate(sampled)
        if sequence.history is not None
    }
    if not known:
        return None
    histories = np.full((len(sampled), max(1, *map(len, known.values()))), -1, np.int32)
    for row, tokens in known.items():
        histories[row, : len(tokens)] = tokens
    return histories


def _scored(placed: list[Placing]) -> tuple[Scored | None, list[Scoring]]:
    indices: list[int] = []
    targets: list[int] = []
    scorings = []
    start = 0  # of the sequence's tokens in the batch
    for placing in placed:
        sequence = placing.sequence
        first = max(placing.start + 1, sequence.next_score)
        stop = min(placing.start + placing.count + 1, sequence.num_prompt)
        if first < stop:
            scorings.append(Scoring(sequence, first, len(targets), len(targets) + stop - first))
            indices += range(start + first - 1 - placing.start, start + stop - 1 - placing.start)
            targets += sequence.tokens[first:stop]
        start += placing.count
    if not targets:
        return None, scorings
    return Scored(np.asarray(indices, np.int32), np.asarray(targets, np.int32)), scorings
