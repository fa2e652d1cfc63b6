"""Which tokens the next step computes: waiting and running sequences; admit, grow, preempt, finish.

Called by the engine process alone: add/supply/abort as requests come, then schedule -> (launch) -> commit or fail, in
the order of launches. Accounting has no phases: a sequence has tokens known and tokens scheduled, and steps close the
gap, so chunked prefill, prefix hits and resumed sequences are no special case.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING

from service.engine.blocks import BlockPool
from service.engine.logprobs import PackedLogprobs
from service.engine.request import Delta, EngineStats, Finish, Logprobs, Request, SamplingParams
from service.engine.rows import Placing, Plan, Rows
from service.engine.sequence import Group, Sequence
from service.model.batch import NOT_FINITE, NUM_TOP, Batch, StepOutput

if TYPE_CHECKING:
    from service.engine.grammar import Constraint

NOT_FINITE_ERROR = "the model gave a number that is not finite"
_ORDER = attrgetter("order")


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
        vocab_size: int,
        end_of_text_id: int,
    ) -> None:
        """A lone sequence of a full context must fit in the blocks, and a token of each sequence in a step."""
        self._pool = BlockPool(num_blocks, block_size)
        assert num_blocks >= self._pool.blocks_for(context_length)
        assert max_num_batched_tokens >= max_num_seqs
        self._max_budget = max_num_batched_tokens
        self._budget = max_num_batched_tokens  # less for a while after the device ran out of memory
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._end_of_text_id = end_of_text_id
        self._rows = Rows(max_num_seqs, blocks_per_row=self._pool.blocks_for(context_length), block_size=block_size)
        self._waiting: list[Sequence] = []  # both by priority, then arrival
        self._running: list[Sequence] = []
        self._num_pending = 0
        self._by_request: dict[int, list[Sequence]] = {}  # those that have not ended
        self._group: Group | None = None  # of the request added last
        self._arrivals = itertools.count()
        self._plans: deque[Plan] = deque()
        self._started: list[int] = []
        self.num_steps = 0  # committed
        self.num_sampled = 0  # rows of these steps
        self._num_preemptions = 0
        self._num_dropped_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    @property
    def num_open(self) -> int:
        """Sequences that steps can bring on: those that wait for a constraint are not counted."""
        return len(self._waiting) + len(self._running)

    @property
    def num_launched(self) -> int:
        """Batches scheduled and neither committed nor failed."""
        return len(self._plans)

    def stats(self, *, step_seconds: tuple[float, ...] = (), batch_sizes: tuple[int, ...] = ()) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + self._num_pending,
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

    def add(self, request: Request, params: SamplingParams, *, completing_ids: bytes = b"") -> None:
        """Queue the request's sequences; with a grammar, they wait for `supply` first.

        The requests of a group come one after the other, with one and the same `params`.
        """
        assert request.prompt
        assert len(request.prompt) + params.max_tokens <= self._context_length
        assert request.score_from is None or request.score_from >= 1
        assert (params.num_logprobs or 0) <= NUM_TOP
        group = self._group
        if group is None or group.params is not params or group.completing_ids != completing_ids:
            group = Group(params, completing_ids, vocab_size=self._vocab_size, end_of_text_id=self._end_of_text_id)
            self._group = group
        sequences = [Sequence(request, choice, group, arrival=next(self._arrivals)) for choice in range(request.n)]
        self._by_request[request.id] = sequences
        if params.grammar is not None:
            self._num_pending += request.n
            return
        for sequence in sequences:
            insort(self._waiting, sequence, key=_ORDER)

    def supply(self, request_id: int, constraint: Constraint) -> None:
        """Queue a request that waits for the constraint its grammar is compiled to; if it has ended, do nothing."""
        for sequence in self._by_request.get(request_id, ()):
            sequence.constraint = constraint.copy()
            sequence.pending = False
            self._num_pending -= 1
            insort(self._waiting, sequence, key=_ORDER)

    def refuse(self, request_id: int, error: str) -> list[Delta]:
        """End a request with an error; if it has ended, do nothing."""
        found = list(self._by_request.get(request_id, ()))
        return [self._end(sequence, Finish.GRAMMAR, error=error) for sequence in found]

    def abort(self, request_id: int, choice: int | None) -> list[Delta]:
        """End one choice of a request, or all of them. What is unknown or has ended is passed over."""
        found = list(self._by_request.get(request_id, ()))
        return [self._end(sequence, Finish.ABORT) for sequence in found if choice in (None, sequence.choice)]

    def is_open(self, request_id: int) -> bool:
        """Whether a sequence of the request has not ended. Any thread may ask."""
        return request_id in self._by_request

    def take_started(self) -> tuple[int, ...]:
        """Requests that `schedule` has taken from the queue for the first time since the last call."""
        started, self._started = tuple(dict.fromkeys(self._started)), []
        return started

    def schedule(self) -> Batch | None:
        """The next step's batch, or None when there is nothing to compute now. It counts as launched."""
        budget = self._budget
        placed: list[Placing] = []
        short = False  # of blocks: then nobody new is let in
        num_preemptions = self._num_preemptions
        for sequence in list(self._running):  # those that stream
            if sequence.num_to_schedule == 1 and budget and sequence.row >= 0:
                if self._place(sequence, 1, placed):
                    budget -= 1
                else:
                    short = True
        for sequence in list(self._running):  # those with a prompt to go on with
            if sequence.num_to_schedule > 1 and budget and sequence.row >= 0:
                count = min(sequence.num_to_schedule, budget)
                if self._place(sequence, count, placed):
                    budget -= count
                else:
                    short = True
        short = short or self._num_preemptions > num_preemptions
        while self._waiting and budget and self._rows.num_free and not short:
            sequence = self._waiting[0]
            if sequence.num_in_flight or not self._admit(sequence):
                break
            count = min(sequence.num_to_schedule, budget)
            fits = self._place(sequence, count, placed, admitted=True)
            assert fits, "admission has seen to it that the blocks are there"
            budget -= count
        if not placed:
            return None
        placed.sort(key=lambda placing: (placing.count > 1, placing.start))
        batch, plan = self._rows.batch(placed)
        self._plans.append(plan)
        return batch

    def commit(self, output: StepOutput) -> list[Delta]:
        """Take the tokens and scores of the oldest launched batch."""
        plan = self._plans.popleft()
        self.num_steps += 1
        self.num_sampled += len(plan.sampled)
        self._budget = min(self._max_budget, self._budget + max(1, self._budget // 16))
        deltas = self._take_scores(plan, output) if plan.scored else []
        packed = None if output.logprobs is None else PackedLogprobs(output.logprobs)
        for row, (sequence, token) in enumerate(zip(plan.sampled, output.token_ids.tolist(), strict=True)):
            sequence.num_in_flight -= 1
            if sequence.finish is not None:
                self._num_dropped_tokens += 1
                continue
            deltas.append(self._take_token(sequence, token, row, packed))
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

    def _undo(self, plan: Plan) -> None:
        for sequence in plan.sampled:
            sequence.num_in_flight -= 1
        self._pool.forget()  # what the step was to write is not to be shared

    def _take_scores(self, plan: Plan, output: StepOutput) -> list[Delta]:
        assert output.scores is not None
        packed = PackedLogprobs(output.scores)
        deltas = []
        for scoring in plan.scored:
            sequence = scoring.sequence
            start = scoring.start + sequence.next_score - scoring.first  # a preemption may have some computed again
            if sequence.finish is not None or start >= scoring.stop:
                continue
            scores = packed.records(start, scoring.stop, sequence.group.params.num_logprobs or 0)
            if scores is None:
                self._pool.forget()
                deltas.append(self._end(sequence, Finish.ERROR, error=NOT_FINITE_ERROR))
            else:
                assert sequence.scores is not None
                sequence.scores += scores
                sequence.next_score += scoring.stop - start
        return deltas

    def _take_token(self, sequence: Sequence, token: int, row: int, packed: PackedLogprobs | None) -> Delta:
        logprobs: Logprobs | None = None
        if packed is not None and sequence.group.num_logprobs is not None:
            logprobs = packed.records(row, row + 1, sequence.group.num_logprobs)
            token = NOT_FINITE if logprobs is None else token
        if token == NOT_FINITE:
            self._pool.forget()
            return self._end(sequence, Finish.ERROR, error=NOT_FINITE_ERROR)
        cached_tokens, scores = 0, None
        if len(sequence.tokens) == sequence.num_prompt:  # its first
            cached_tokens = sequence.cached_tokens if sequence.choice == 0 else 0
            scores, sequence.scores = sequence.scores, None
        new: tuple[int, ...] = (token,)
        finish = sequence.append(token)
        if finish is Finish.GRAMMAR:
            return self._end(sequence, finish, error=sequence.error)
        if finish is not None:
            if not sequence.group.params.max_tokens:  # it was not wanted
                finish, new = Finish.LENGTH, ()
            self._close(sequence, finish)
        urgent = bool(new) and sequence.group.completes(token)
        return Delta(*sequence.key, new, finish, None, cached_tokens, logprobs, scores, urgent)

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running ones, with the blocks that hold its prefix, if all of it fits."""
        blocks, node = self._pool.match(sequence.findable, sequence.root)
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
        self._rows.take(sequence)
        _remove(self._waiting, sequence)
        insort(self._running, sequence, key=_ORDER)
        return True

    def _place(self, sequence: Sequence, count: int, placed: list[Placing], *, admitted: bool = False) -> bool:
        """Put `count` more tokens of the sequence into this step; False if there are no blocks for them.

        Takes blocks from the last of the running, if they are not in this step yet, by preempting them.
        """
        needed = self._pool.blocks_for(sequence.num_scheduled + count) - len(sequence.blocks)
        while needed > self._pool.num_free:
            victim = self._running[-1]
            if any(victim is placing.sequence for placing in placed):
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            self._rows.extend(sequence, self._pool.take(needed))
        placed.append(Placing(sequence, sequence.num_scheduled, count, admitted))
        sequence.num_scheduled += count
        self._register(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, without blocks; its tokens are computed again, or found as a prefix."""
        self._leave(sequence)
        sequence.num_scheduled = 0
        insort(self._waiting, sequence, key=_ORDER)
        self._num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        _remove(self._running, sequence)
        self._pool.give_back(sequence.blocks)
        sequence.blocks = []
        self._rows.give_back(sequence)

    def _close(self, sequence: Sequence, finish: Finish) -> None:
        if sequence.row >= 0:
            self._leave(sequence)
        elif sequence.pending:
            self._num_pending -= 1
        else:
            _remove(self._waiting, sequence)
        sequence.finish = finish
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]

    def _end(self, sequence: Sequence, finish: Finish, *, error: str | None = None) -> Delta:
        self._close(sequence, finish)
        return Delta(*sequence.key, (), finish, error)

    def _register(self, sequence: Sequence) -> None:
        """Let blocks be shared that are full of known tokens, computed by the steps up to this one."""
        size = self._pool.block_size
        full = min(sequence.num_scheduled, len(sequence.tokens))
        while (sequence.num_registered + 1) * size <= full:
            start = sequence.num_registered * size
            tokens = tuple(sequence.tokens[start : start + size])
            sequence.node = self._pool.register(sequence.blocks[sequence.num_registered], sequence.node, tokens)
            sequence.num_registered += 1


def _remove(line: list[Sequence], sequence: Sequence) -> None:
    del line[bisect_left(line, sequence.order, key=_ORDER)]
