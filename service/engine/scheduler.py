"""Which tokens the next step computes: waiting and running sequences; admit, grow, preempt, finish.

Called by the engine process alone: add/abort as requests come, then schedule -> (launch) -> commit or fail, in the
order of launches. Accounting has no phases: a sequence has tokens known and tokens scheduled, and steps close the gap,
so chunked prefill, prefix hits and resumed sequences are no special case.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from service.engine.blocks import BlockPool
from service.engine.request import Delta, EngineStats, Finish, Request
from service.engine.sequence import Sequence
from service.model.batch import NOT_FINITE, SAMPLING, Batch, Int32, StepOutput


@dataclass(frozen=True, slots=True)
class _Placing:
    """Tokens start .. start + count - 1 of a sequence are computed in this step."""

    sequence: Sequence
    start: int
    count: int
    admitted: bool  # the sequence left the queue in this step


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """A launched batch: what it computes, and the sequences that get a token, by row."""

    placed: list[_Placing]
    sampled: list[Sequence]


class Scheduler:
    """Every sequence added gets exactly one Delta with a finish, from abort, commit or fail."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        context_length: int,
        end_of_text_id: int,
    ) -> None:
        """A lone sequence of a full context must fit in the blocks, and a token of each sequence in a step."""
        self._pool = BlockPool(num_blocks, block_size)
        assert num_blocks >= self._pool.blocks_for(context_length)
        assert max_num_batched_tokens >= max_num_seqs
        self._max_budget = max_num_batched_tokens
        self._budget = max_num_batched_tokens  # less for a while after the device ran out of memory
        self._context_length = context_length
        self._end_of_text_id = end_of_text_id
        self._waiting: OrderedDict[tuple[int, int], Sequence] = OrderedDict()
        self._running: dict[tuple[int, int], Sequence] = {}  # in order of admission
        self._plans: deque[_Plan] = deque()
        self._started: list[int] = []
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._sampling = np.zeros(max_num_seqs, dtype=SAMPLING)
        self._tables = np.zeros((max_num_seqs, self._pool.blocks_for(context_length)), dtype=np.int32)
        self._by_request: dict[int, list[Sequence]] = {}  # those that have not ended
        self.num_steps = 0  # committed
        self.num_sampled = 0  # rows of these steps
        self._num_preemptions = 0
        self._num_dropped_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    @property
    def num_open(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_launched(self) -> int:
        """Batches scheduled and neither committed nor failed."""
        return len(self._plans)

    def stats(self, *, step_seconds: tuple[float, ...] = (), batch_sizes: tuple[int, ...] = ()) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._pool.num_blocks,
            num_blocks_used=self._pool.num_used,
            num_steps=self.num_steps,
            num_preemptions=self._num_preemptions,
            num_dropped_tokens=self._num_dropped_tokens,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            step_seconds=step_seconds,
            batch_sizes=batch_sizes,
        )

    def add(self, request: Request) -> None:
        """Queue the request's sequences."""
        assert request.prompt
        assert request.params.max_tokens >= 1
        assert len(request.prompt) + request.params.max_tokens <= self._context_length
        sequences = [
            Sequence(request, choice, end_of_text_id=self._end_of_text_id, node=self._pool.root)
            for choice in range(request.n)
        ]
        self._by_request[request.id] = sequences
        self._waiting.update((sequence.key, sequence) for sequence in sequences)

    def abort(self, request_id: int, choice: int | None) -> list[Delta]:
        """End one choice of a request, or all of them. What is unknown or has ended is passed over."""
        found = list(self._by_request.get(request_id, ()))
        return [self._end(sequence, Finish.ABORT) for sequence in found if choice in (None, sequence.choice)]

    def take_started(self) -> tuple[int, ...]:
        """Requests that `schedule` has taken from the queue for the first time since the last call."""
        started, self._started = tuple(dict.fromkeys(self._started)), []
        return started

    def schedule(self) -> Batch | None:
        """The next step's batch, or None when there is nothing to compute now. It counts as launched."""
        budget = self._budget
        placed: list[_Placing] = []
        short = False  # of blocks: then nobody new is let in
        num_preemptions = self._num_preemptions
        for sequence in list(self._running.values()):  # those that stream
            if sequence.num_to_schedule == 1 and budget and sequence.row >= 0:
                if self._place(sequence, 1, placed):
                    budget -= 1
                else:
                    short = True
        for sequence in list(self._running.values()):  # those with a prompt to go on with
            if sequence.num_to_schedule > 1 and budget and sequence.row >= 0:
                count = min(sequence.num_to_schedule, budget)
                if self._place(sequence, count, placed):
                    budget -= count
                else:
                    short = True
        short = short or self._num_preemptions > num_preemptions
        while self._waiting and budget and self._free_rows and not short:
            sequence = next(iter(self._waiting.values()))
            if sequence.num_in_flight or not self._admit(sequence):
                break
            count = min(sequence.num_to_schedule, budget)
            fits = self._place(sequence, count, placed, admitted=True)
            assert fits, "admission has seen to it that the blocks are there"
            budget -= count
        if not placed:
            return None
        placed.sort(key=lambda placing: (placing.count > 1, placing.start))
        return self._launch(placed)

    def commit(self, output: StepOutput) -> list[Delta]:
        """Take the tokens of the oldest launched batch."""
        plan = self._plans.popleft()
        self.num_steps += 1
        self.num_sampled += len(plan.sampled)
        self._budget = min(self._max_budget, self._budget + max(1, self._budget // 16))
        deltas = []
        for sequence, token in zip(plan.sampled, output.token_ids.tolist(), strict=True):
            sequence.num_in_flight -= 1
            if sequence.finish is not None:
                self._num_dropped_tokens += 1
                continue
            if token == NOT_FINITE:
                self._pool.forget()
                deltas.append(
                    self._end(
                        sequence,
                        Finish.ERROR,
                        error="the model gave a number that is not finite",
                    )
                )
                continue
            sequence.tokens.append(token)
            num_generated = len(sequence.tokens) - sequence.num_prompt
            cached = sequence.cached_tokens if num_generated == 1 and sequence.choice == 0 else 0
            if token in sequence.stop_ids and num_generated >= sequence.request.params.min_tokens:
                deltas.append(self._end(sequence, Finish.STOP, token, cached_tokens=cached))
            elif len(sequence.tokens) >= sequence.limit:
                deltas.append(self._end(sequence, Finish.LENGTH, token, cached_tokens=cached))
            else:
                deltas.append(Delta(*sequence.key, (token,), cached_tokens=cached))
        return deltas

    def fail(self, error: str, *, launched: bool) -> list[Delta]:
        """A step raised: end its sequences. At its launch that is the newest batch, at its collection all launched.

        What was launched after a failing step may have read what that step did not write.
        """
        failed = list(self._plans) if launched else [self._plans[-1]]
        deltas = []
        for plan in failed:
            self._plans.remove(plan)
            self._undo(plan)
            for placing in plan.placed:
                if placing.sequence.finish is None:
                    deltas.append(self._end(placing.sequence, Finish.ERROR, error=error))
        return deltas

    def retreat(self) -> bool:
        """The newest batch did not fit in the device's memory: undo it, and schedule half as much next.

        Later steps grow again. False, and nothing done, when the batch is a single token: there is no less to try.
        """
        num_tokens = sum(placing.count for placing in self._plans[-1].placed)
        if num_tokens == 1:
            return False
        plan = self._plans.pop()
        self._undo(plan)
        for placing in reversed(plan.placed):
            if placing.sequence.row < 0:
                continue
            if placing.admitted:  # its prefix may be one that this very step was to compute
                self._preempt(placing.sequence)
            else:
                placing.sequence.num_scheduled = placing.start
        self._budget = num_tokens // 2
        return True

    # Inside

    def _undo(self, plan: _Plan) -> None:
        for sequence in plan.sampled:
            sequence.num_in_flight -= 1
        self._pool.forget()  # what the step was to write is not to be shared

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running ones, with the blocks that hold its prefix, if all of it fits."""
        blocks, node = self._pool.match(sequence.tokens)
        needed = self._pool.blocks_for(len(sequence.tokens)) - len(blocks) + self._pool.num_cached(blocks)
        # A block for each that runs: without room to grow, what is let in now is preempted soon.
        if needed + len(self._running) > self._pool.num_free:
            return False
        self._pool.share(blocks)
        num_hits = len(blocks) * self._pool.block_size
        if not sequence.started:  # what it finds when it comes back after a preemption is its own
            sequence.started = True
            sequence.cached_tokens = num_hits
            self._started.append(sequence.request.id)
            self._num_prefix_queries += len(sequence.tokens)
            self._num_prefix_hits += num_hits
        sequence.blocks, sequence.node, sequence.num_registered = blocks, node, len(blocks)
        sequence.num_scheduled = num_hits
        sequence.row = self._free_rows.pop()
        params = sequence.request.params
        self._tables[sequence.row, : len(blocks)] = blocks
        self._sampling[sequence.row] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            sequence.choice,
            sequence.num_prompt + params.min_tokens,
        )
        del self._waiting[sequence.key]
        self._running[sequence.key] = sequence
        return True

    def _place(self, sequence: Sequence, count: int, placed: list[_Placing], *, admitted: bool = False) -> bool:
        """Put `count` more tokens of the sequence into this step; False if there are no blocks for them.

        Takes blocks from sequences admitted later that are not in this step yet, by preempting them.
        """
        needed = self._pool.blocks_for(sequence.num_scheduled + count) - len(sequence.blocks)
        while needed > self._pool.num_free:
            victim = next(reversed(self._running.values()))
            if any(victim is placing.sequence for placing in placed):
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            held = len(sequence.blocks)
            sequence.blocks += self._pool.take(needed)
            self._tables[sequence.row, held : held + needed] = sequence.blocks[held:]
        placed.append(_Placing(sequence, sequence.num_scheduled, count, admitted))
        sequence.num_scheduled += count
        self._register(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, without blocks; its tokens are computed again, or found as a prefix."""
        self._leave(sequence)
        sequence.num_scheduled = 0
        self._waiting[sequence.key] = sequence
        self._waiting.move_to_end(sequence.key, last=False)
        self._num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._pool.give_back(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.blocks, sequence.row = [], -1

    def _end(
        self,
        sequence: Sequence,
        finish: Finish,
        *token_ids: int,
        error: str | None = None,
        cached_tokens: int = 0,
    ) -> Delta:
        if sequence.row >= 0:
            self._leave(sequence)
        else:
            del self._waiting[sequence.key]
        sequence.finish = finish
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]
        return Delta(*sequence.key, token_ids, finish, error, cached_tokens)

    def _launch(self, placed: list[_Placing]) -> Batch:
        num_sequences = len(placed)
        sequences = [placing.sequence for placing in placed]
        starts = np.fromiter((placing.start for placing in placed), np.int32, num_sequences)
        counts = np.fromiter((placing.count for placing in placed), np.int32, num_sequences)
        rows = np.fromiter((sequence.row for sequence in sequences), np.int32, num_sequences)
        query_starts = np.zeros(num_sequences + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        token_ids = np.zeros(num_tokens, np.int32)
        token_sources = np.full(num_tokens, -1, np.int32)
        sampled: list[Sequence] = []
        sample_indices: list[int] = []
        end = 0
        for placing in placed:
            sequence = placing.sequence
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
        size = self._pool.block_size
        tables = self._tables[rows, : self._pool.blocks_for(int(lengths.max()))]
        slots = tables[np.repeat(np.arange(num_sequences), counts), positions // size] * size + positions % size
        # Past a sequence's own blocks its row holds what earlier sequences left there.
        tables[np.arange(tables.shape[1]) * size >= lengths[:, None]] = 0
        indices: Int32 = np.asarray(sample_indices, np.int32)
        self._plans.append(_Plan(placed, sampled))
        return Batch(
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

    def _register(self, sequence: Sequence) -> None:
        """Let blocks be shared that are full of known tokens, computed by the steps up to this one."""
        size = self._pool.block_size
        full = min(sequence.num_scheduled, len(sequence.tokens))
        while (sequence.num_registered + 1) * size <= full:
            start = sequence.num_registered * size
            tokens = tuple(sequence.tokens[start : start + size])
            sequence.node = self._pool.register(sequence.blocks[sequence.num_registered], sequence.node, tokens)
            sequence.num_registered += 1
