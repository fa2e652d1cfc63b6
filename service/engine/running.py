"""The sequences that run, with their rows and blocks: who is let in, grows, and is preempted. Used by the scheduler."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

import numpy as np

from service.engine.blocks import TOKEN_BYTES, BlockPool
from service.engine.rows import Indices, Placing, Rows
from service.engine.sequence import Sequence
from service.engine.waiting import Waiting

_ORDER = attrgetter("order")


class Running:
    """By priority, then arrival; the last is preempted first, back into `waiting`."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, context_length: int, waiting: Waiting
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        # A sequence that has left may have a token in flight: then its place is free, but its row is not yet.
        self.rows = Rows(2 * max_num_seqs, context_length=context_length, block_size=block_size)
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._waiting = waiting
        self._sequences: list[Sequence] = []
        self._indices: Indices | None = None
        self._left: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def full(self) -> bool:
        return len(self._sequences) == self._max_num_seqs

    @property
    def changed(self) -> bool:
        """Whether sequences have come or left since `indices` was read."""
        return self._indices is None

    @property
    def indices(self) -> Indices:
        """Their rows, in order."""
        if self._indices is None:
            self._indices = np.asarray([sequence.row for sequence in self._sequences], np.intp)
        return self._indices

    def admit(self, sequence: Sequence) -> int | None:
        """Let in a sequence, with the blocks that hold its prefix, if there is room for all of it.

        Gives the tokens of the prefix. None: there is no room, and nothing was done.
        """
        blocks, node = self.pool.match(sequence.findable, sequence.root)
        needed = self.pool.blocks_for(len(sequence.tokens) // TOKEN_BYTES) - len(blocks) + self.pool.num_cached(blocks)
        # A block for each that runs: without room to grow, what is let in now is preempted soon.
        if needed + len(self._sequences) > self.pool.num_free:
            return None
        self.pool.share(blocks)
        num_hits = len(blocks) * self.pool.block_size
        sequence.blocks, sequence.node, sequence.num_registered = blocks, node, len(blocks)
        self.rows.take(sequence, num_computed=num_hits)
        insort(self._sequences, sequence, key=_ORDER)
        self._indices = None
        sequence.running = True
        return num_hits

    def grow_decodes(self, decodes: Indices) -> Indices:
        """See that there is room for one more token of each of these rows, in order; those that have it."""
        rows = self.rows
        lacking = decodes[rows.num_scheduled[decodes] >= rows.capacities[decodes]]
        if len(lacking):
            lengths = np.minimum(rows.capacities[lacking], rows.num_known[lacking])
            for sequence, length in zip(rows.sequences[lacking], lengths.tolist(), strict=True):
                self._register(sequence, length)
            if len(lacking) <= self.pool.num_free:
                rows.extend_each(lacking, self.pool.take(len(lacking)))
            else:
                sequences = rows.sequences[decodes]
                for sequence in rows.sequences[lacking]:
                    if sequence.running:
                        self._make_room(sequence, int(rows.num_scheduled[sequence.row]) + 1, decodes[:0], [])
                decodes = decodes[[sequence.running for sequence in sequences]]
        return decodes

    def grow_draft(self, sequence: Sequence, count: int) -> int:
        """How many of `count` drafts after a decode's next token there is room for, in its own blocks or free ones.

        Free ones are taken only if they leave as much room to every sequence that runs: none is preempted for a draft.
        """
        rows, row = self.rows, sequence.row
        length, capacity = int(rows.num_scheduled[row]) + 1, int(rows.capacities[row])
        needed = self.pool.blocks_for(length + count) - len(sequence.blocks)
        self._register(sequence, min(capacity, int(rows.num_known[row])))
        if needed <= 0:
            return count
        if needed + len(self._sequences) * self.pool.blocks_for(count) > self.pool.num_free:
            return capacity - length
        rows.extend(sequence, self.pool.take(needed))
        return count

    def place(
        self, sequence: Sequence, budget: int, decodes: Indices, placed: list[Placing], *, admitted: bool = False
    ) -> int:
        """Put as many more tokens of the sequence as are wanted, up to `budget`, into this step; how many.

        Adds to `placed`, which with `decodes` is what the step has. 0 if there are no blocks for them.
        """
        rows, row = self.rows, sequence.row
        start, num_known = int(rows.num_scheduled[row]), int(rows.num_known[row])
        count = min(num_known + int(rows.num_in_flight[row]) - start, budget)
        if not self._make_room(sequence, start + count, decodes, placed):
            return 0
        placed.append(Placing(sequence, start, count, admitted))
        rows.num_scheduled[row] = start + count
        self._register(sequence, min(start + count, num_known))
        return count

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue, without blocks; its tokens are computed again, or found as a prefix."""
        self._waiting.put_back(sequence)
        self.num_preemptions += 1
        self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Its blocks are free at once, its row not before `take_left` has given it."""
        del self._sequences[bisect_left(self._sequences, sequence.order, key=_ORDER)]
        self._indices = None
        sequence.running = False
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        self._left.append(sequence)

    def take_left(self) -> list[Sequence]:
        """Sequences that have left and have nothing in flight any more; `rows.give_back` is to follow for each."""
        if not self._left:
            return []
        in_flight = self.rows.num_in_flight
        left = [sequence for sequence in self._left if not in_flight[sequence.row]]
        self._left = [sequence for sequence in self._left if in_flight[sequence.row]]
        return left

    # Inside

    def _make_room(self, sequence: Sequence, length: int, decodes: Indices, placed: list[Placing]) -> bool:
        """See that the sequence has blocks for `length` tokens; False if there are not enough.

        Takes blocks from the last of the running, if they are not in this step yet, by preempting them.
        """
        needed = self.pool.blocks_for(length) - len(sequence.blocks)
        while needed > self.pool.num_free:
            victim = self._sequences[-1]
            if victim.row in decodes or any(victim is placing.sequence for placing in placed):
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            self.rows.extend(sequence, self.pool.take(needed))
        return True

    def _register(self, sequence: Sequence, length: int) -> None:
        """Let blocks be shared that are full of its first `length` tokens, computed by the steps up to this one."""
        size = self.pool.block_size
        for number in range(sequence.num_registered, length // size):
            tokens = self.rows.tokens[sequence.row, number * size : (number + 1) * size].tobytes()
            sequence.node = self.pool.register(sequence.blocks[number], sequence.node, tokens)
            sequence.num_registered += 1
