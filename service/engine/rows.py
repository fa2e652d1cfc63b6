"""The running sequences as arrays, a row each, and the batches cut from them. Called by the scheduler alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from service.engine.sequence import Sequence
from service.model.batch import SAMPLING, Batch, Biases, Float32, Int32, Scored

Indices = npt.NDArray[np.intp]


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
class Drafted:
    """Of a launched batch with drafts, what each of its R samples is."""

    rows: Indices  # [R]
    numbers: Int32  # [R] how many drafts of its row stand before it
    positions: Int32  # [R]
    after: Int32  # [R] the token it is computed from, a draft where `numbers` is not 0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A launched batch: S sequences, of which R get a token."""

    rows: Indices  # [S]
    sequences: npt.NDArray[np.object_]  # [S] whose rows they were then
    starts: Int32  # [S] tokens of each that were scheduled before
    admitted: list[Sequence]  # those that left the queue in this step
    num_tokens: int
    sampled: Indices  # [R] rows, which stay their sequences' until the tokens are back
    scored: list[Scoring]
    # So many batches may follow of the same rows, each of the next token, in which nobody needs a block or has enough.
    num_like_it: int
    drafted: Drafted | None = None  # then R counts the drafts, and `sampled` has rows several times


class Rows:
    """What steps need of the sequences: tokens, how far these have come, blocks, sampling parameters.

    An entry a row; the scheduler reads and writes the public ones, for many rows at once.
    """

    def __init__(self, num_rows: int, *, context_length: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_rows - 1, -1, -1))
        self.sequences: npt.NDArray[np.object_] = np.full(num_rows, None, np.object_)
        # One more than the context: a token is sampled also where none is wanted.
        self.tokens: Int32 = np.zeros((num_rows, context_length + 1), np.int32)
        self.num_known: Int32 = np.zeros(num_rows, np.int32)  # tokens that the host has seen
        self.num_in_flight: Int32 = np.zeros(num_rows, np.int32)  # sampled on the device, not seen by the host
        self.num_scheduled: Int32 = np.zeros(num_rows, np.int32)  # keys and values computed, or being computed
        self.num_told: Int32 = np.zeros(num_rows, np.int32)  # tokens of the prompt, and of Deltas
        self._patient: npt.NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self.capacities: Int32 = np.zeros(num_rows, np.int32)  # tokens that the blocks have room for
        self._limits: Int32 = np.zeros(num_rows, np.int32)
        self._stop_ids: npt.NDArray[np.uint32] = np.zeros(num_rows, np.uint32)  # tokens from these ids on get a look
        self._watched_from: Int32 = np.zeros(num_rows, np.int32)  # tokens known, from which on each gets a look
        self._follows: npt.NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self._num_following = 0
        self._num_demanding = 0
        self.num_streams = 0  # sequences that are not patient
        self._sample_rows: Int32 = np.zeros(num_rows, np.int32)  # in the last launch that samples for the sequence
        self._sampling = np.zeros(num_rows, SAMPLING)
        self._tables: Int32 = np.zeros((num_rows, -(-context_length // block_size)), np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, sequence: Sequence, *, num_computed: int) -> None:
        """Give the sequence a row, with the blocks that it has, which hold `num_computed` of its tokens."""
        row = sequence.row = self._free.pop()
        tokens = np.frombuffer(sequence.tokens, np.int32)
        num_known = len(tokens)
        self.sequences[row] = sequence
        self.tokens[row, :num_known] = tokens
        if sequence.target is not None:  # until a token is sampled in its place
            self.tokens[row, sequence.num_prompt] = sequence.target
        self.num_known[row] = self.num_told[row] = num_known
        self.num_scheduled[row] = self.capacities[row] = num_computed
        self._patient[row] = sequence.patient
        self._limits[row] = sequence.limit
        self._stop_ids[row] = sequence.group.stop_id
        self.watch(sequence, each=num_known == sequence.num_prompt or sequence.group.watched)
        self._follows[row] = sequence.follows
        self._num_following += sequence.follows
        self._num_demanding += not sequence.plain
        self.num_streams += not sequence.patient
        self._sampling[row] = sequence.sampling
        self._tables[row] = 0
        self._tables[row, : len(sequence.blocks)] = sequence.blocks

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        """The sequence has `blocks` more."""
        held = len(sequence.blocks)
        sequence.blocks += blocks
        self._tables[sequence.row, held : len(sequence.blocks)] = blocks
        self.capacities[sequence.row] = len(sequence.blocks) * self._block_size

    def extend_each(self, rows: Indices, blocks: list[int]) -> None:
        """The sequence of each of `rows` has one of `blocks` more."""
        held = self.capacities[rows]
        self._tables[rows, held // self._block_size] = blocks
        self.capacities[rows] = held + self._block_size
        for sequence, block in zip(self.sequences[rows], blocks, strict=True):
            sequence.blocks.append(block)

    def watch(self, sequence: Sequence, *, each: bool) -> None:
        """Whether `take_tokens` reports each of the sequence's tokens, or one that ends it only."""
        self._watched_from[sequence.row] = 0 if each else sequence.limit

    def give_back(self, sequence: Sequence) -> None:
        """None of its tokens may be in flight."""
        row = sequence.row
        sequence.tokens = self.known(sequence).tobytes()
        self.sequences[row] = None
        self.num_known[row] = self.num_told[row] = 0
        self._num_following -= sequence.follows
        self._num_demanding -= not sequence.plain
        self.num_streams -= not sequence.patient
        self._free.append(row)
        sequence.row = -1

    def known(self, sequence: Sequence) -> Int32:
        """Its tokens that the host has seen."""
        return self.tokens[sequence.row, : self.num_known[sequence.row]]

    def num_wanted(self, rows: Indices) -> Int32:
        """Tokens of each that still must be computed before the next can be sampled.

        0 when no more is wanted, and while the next mask depends on a token in flight.
        """
        lengths = self.num_known + self.num_in_flight
        ready = lengths < self._limits
        if self._num_following:
            ready &= ~(self._follows & (self.num_in_flight > 0))
        wanted: Int32 = ((lengths - self.num_scheduled) * ready)[rows]
        return wanted

    def take_tokens(self, rows: Indices, token_ids: Int32) -> list[int]:
        """The next token of each of these; which of them, by index, may end their sequences or are watched for."""
        num_known = self.num_known[rows]
        self.tokens[rows, num_known] = token_ids
        num_known += 1
        self.num_known[rows] = num_known
        # As unsigned, NOT_FINITE is above all ids; and end of text is the last of GPT-2's.
        looks = (num_known >= self._watched_from[rows]) | (token_ids.view(np.uint32) >= self._stop_ids[rows])
        indices: list[int] = looks.nonzero()[0].tolist()
        return indices

    def untold(self) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Sequences that are not patient, with the tokens that no Delta has told; these count as told from now on."""
        rows = ((self.num_known > self.num_told) & ~self._patient).nonzero()[0]
        starts, ends = self.num_told[rows].tolist(), self.num_known[rows].tolist()
        self.num_told[rows] = ends
        return [
            (self.sequences[row], tuple(self.tokens[row, start:end].tolist()))
            for row, start, end in zip(rows.tolist(), starts, ends, strict=True)
        ]

    def batch(self, decodes: Indices, placed: list[Placing], drafts: Mapping[int, Int32]) -> tuple[Batch, Plan]:
        """The batch that computes one more token of each of the rows `decodes`, and `placed`.

        A sequence that is then complete gets a row of its samples. The `drafts` of a decode, by its row, are as many
        decodes more, as if they were its next tokens; with any, nothing may be in flight.
        """
        rows, starts = decodes, self.num_scheduled[decodes]
        numbers: Int32 | None = None  # [S] how many drafts of its row stand before a decode
        if drafts:
            rows, numbers = self._with_drafts(rows, drafts)
            starts = self.num_scheduled[rows] + numbers
        if placed or drafts:
            counts = np.ones(len(rows) + len(placed), np.int32)
            counts[len(rows) :] = [placing.count for placing in placed]
            rows = np.concatenate((rows, np.asarray([placing.sequence.row for placing in placed], np.intp)))
            starts = np.concatenate((starts, np.asarray([placing.start for placing in placed], np.int32)))
            order = np.lexsort((starts, counts > 1))
            rows, starts, counts = rows[order], starts[order], counts[order]
            lengths = starts + counts
            query_starts = np.zeros(len(rows) + 1, np.int32)
            counts.cumsum(out=query_starts[1:])
            positions = np.arange(query_starts[-1], dtype=np.int32) + (starts - query_starts[:-1]).repeat(counts)
            token_rows = rows.repeat(counts)
            num_decodes = int((counts == 1).sum())
            samples = (lengths >= self.num_known[rows] + self.num_in_flight[rows]).nonzero()[0]
            sampled = rows[samples]
            indices = query_starts[samples + 1] - 1
            sample_positions = lengths[samples]
        else:
            order = starts.argsort(kind="stable")
            rows = token_rows = sampled = rows[order]
            positions = starts = starts[order]
            lengths = sample_positions = starts + 1
            query_starts = np.arange(len(rows) + 1, dtype=np.int32)
            num_decodes = len(rows)
            indices = query_starts[:-1]
        # Only a sequence's last token can be in flight, and only from the previous launch.
        in_flight = np.zeros(len(positions), np.bool_) if drafts else positions >= self.num_known[token_rows]
        blocks, offsets = np.divmod(positions, np.int32(self._block_size))
        batch = Batch(
            token_ids=self.tokens[token_rows, positions],
            token_sources=np.where(in_flight, self._sample_rows[token_rows], np.int32(-1)),
            positions=positions,
            slots=self._tables[token_rows, blocks] * self._block_size + offsets,
            query_starts=query_starts,
            context_lengths=lengths,
            block_tables=self._tables[rows, : int(blocks.max()) + 1],
            num_decodes=num_decodes,
            sample_indices=indices,
            sample_positions=sample_positions,
            sampling=self._sampling.take(sampled),
        )
        self.num_in_flight[sampled] += 1
        self._sample_rows[sampled] = np.arange(len(sampled), dtype=np.int32) if placed else indices
        self.num_scheduled[rows] = lengths
        sequences = self.sequences[rows]
        admitted = [placing.sequence for placing in placed if placing.admitted]
        scorings: list[Scoring] = []
        num_like_it = 0
        if self._num_demanding:
            batch, scorings = self._demand(batch, sequences, sampled)
        elif not placed and not drafts:
            num_left = min(self._block_size - int(offsets.max()), int((self._limits[rows] - lengths).min()))
            num_like_it = max(0, num_left - 1)
        drafted: Drafted | None = None
        if numbers is not None:
            numbers = np.concatenate((numbers, np.zeros(len(placed), np.int32)))[order]
            drafted = Drafted(sampled, numbers[samples], sample_positions, batch.token_ids[indices])
            rows, sequences, starts = (each[numbers == 0] for each in (rows, sequences, starts))
        plan = Plan(rows, sequences, starts, admitted, len(positions), sampled, scorings, num_like_it, drafted)
        return batch, plan

    def _with_drafts(self, decodes: Indices, drafts: Mapping[int, Int32]) -> tuple[Indices, Int32]:
        """Each of the rows once more for each of its drafts, which stand then where its next tokens will; and how many
        of these stand before."""
        counts = np.ones(len(decodes), np.intp)
        for index, row in enumerate(decodes.tolist()):
            if (tokens := drafts.get(row)) is not None:
                known = self.num_known[row]
                self.tokens[row, known : known + len(tokens)] = tokens
                counts[index] += len(tokens)
        firsts = counts.cumsum() - counts
        numbers = np.arange(counts.sum(), dtype=np.int32) - firsts.repeat(counts).astype(np.int32)
        return decodes.repeat(counts), numbers

    def next_batch(self, batch: Batch, plan: Plan, *, in_flight: bool) -> tuple[Batch, Plan]:
        """The batch after `batch`, of which `plan.num_like_it` is above 0, when no sequence has ended or come.

        `in_flight` says whether the tokens that it sampled are.
        """
        assert plan.num_like_it > 0
        rows, positions = plan.rows, batch.context_lengths
        lengths = positions + 1
        following = Batch(
            token_ids=batch.token_ids if in_flight else self.tokens[rows, positions],
            token_sources=batch.sample_indices if in_flight else np.full_like(positions, -1),
            positions=positions,
            slots=batch.slots + 1,
            query_starts=batch.query_starts,
            context_lengths=lengths,
            block_tables=batch.block_tables,
            num_decodes=batch.num_decodes,
            sample_indices=batch.sample_indices,
            sample_positions=lengths,
            sampling=batch.sampling,
        )
        self.num_in_flight[rows] += 1
        self.num_scheduled[rows] = lengths
        return following, Plan(rows, plan.sequences, positions, [], len(rows), rows, [], plan.num_like_it - 1)

    def _demand(self, batch: Batch, placed: npt.NDArray[np.object_], sampled: Indices) -> tuple[Batch, list[Scoring]]:
        """The batch with what its sequences ask for besides."""
        sequences = list(self.sequences[sampled])
        positions = batch.sample_positions.tolist()
        scored, scorings = self._scored(batch, placed)
        _decay(batch.sampling["top_p"], positions, sequences)
        demanded = replace(
            batch,
            masks=self._masks(positions, sequences),
            biases=_biases(sequences),
            histories=self._histories(positions, sequences),
            logprobs=any(sequence.group.num_logprobs is not None for sequence in sequences),
            scored=scored,
        )
        return demanded, scorings

    def _masks(self, positions: list[int], sampled: list[Sequence]) -> Int32 | None:
        words = {
            row: sequence.mask(self.known(sequence), positions[row] - sequence.num_prompt)
            for row, sequence in enumerate(sampled)
            if sequence.group.mask is not None
        }
        given = [(row, mask) for row, mask in words.items() if mask is not None]
        if not given:
            return None
        masks = np.full((len(sampled), len(given[0][1])), -1, np.int32)
        for row, mask in given:
            masks[row] = mask
        return masks

    def _histories(self, positions: list[int], sampled: list[Sequence]) -> Int32 | None:
        known = {  # by row, without the last
            row: self.tokens[sequence.row, : positions[row] - 1]
            for row, sequence in enumerate(sampled)
            if sequence.group.penalized
        }
        if not known:
            return None
        histories = np.full((len(sampled), max(1, *map(len, known.values()))), -1, np.int32)
        for row, tokens in known.items():
            histories[row, : len(tokens)] = tokens
        return histories

    def _scored(self, batch: Batch, placed: npt.NDArray[np.object_]) -> tuple[Scored | None, list[Scoring]]:
        indices: list[int] = []
        targets: list[int] = []
        scorings = []
        # Where the tokens of each sequence begin in the batch, and how many it has by the end of the step.
        for sequence, begin, end, length in zip(
            placed,
            batch.query_starts[:-1].tolist(),
            batch.query_starts[1:].tolist(),
            batch.context_lengths.tolist(),
            strict=True,
        ):
            start = length - (end - begin)
            first = max(start + 1, sequence.next_score)
            stop = min(length + 1, sequence.score_to)
            if first < stop:
                scorings.append(Scoring(sequence, first, len(targets), len(targets) + stop - first))
                indices += range(begin + first - 1 - start, begin + stop - 1 - start)
                targets += self.tokens[sequence.row, first:stop].tolist()
        if not targets:
            return None, scorings
        return Scored(np.asarray(indices, np.int32), np.asarray(targets, np.int32)), scorings


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
