"""Which tokens the next step computes: waiting and running sequences; admit, grow, preempt, finish.

Called by the engine process alone: add/supply/abort as requests come, then schedule -> (launch) -> commit or fail, in
the order of launches. Accounting has no phases: a sequence has tokens known and tokens scheduled, and steps close the
gap, so chunked prefill, prefix hits and resumed sequences are no special case.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

from service.engine.logprobs import PackedLogprobs, take_scores
from service.engine.request import Delta, EngineStats, Finish, Logprobs, Request, SamplingParams, is_scored_only
from service.engine.rows import Placing, Plan
from service.engine.running import Running
from service.engine.sequence import Group, Sequence
from service.engine.speculation import MOST_SAMPLED, Speculation
from service.engine.waiting import Waiting
from service.model.batch import NOT_FINITE, NUM_TOP, Batch, StepOutput

if TYPE_CHECKING:
    from service.engine.grammar import Constraint
    from service.engine.rows import Indices
    from service.model.batch import Int32

NOT_FINITE_ERROR = "the model gave a number that is not finite"


class Scheduler:
    """Every sequence added gets exactly one Delta with a finish, from abort, commit or fail.

    What cannot wait is told by the method it happens in: a sequence's first token, an urgent one, and its finish, each
    with all that was not told before. The other tokens are told by `take_held`.
    """

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
        speculation: Speculation | None = None,  # for a runner of depth 0; None: nothing is drafted
    ) -> None:
        """A lone sequence of a full context must fit in the blocks, and a token of each sequence in a step."""
        assert max_num_batched_tokens >= max_num_seqs
        self._max_budget = max_num_batched_tokens
        self._budget = max_num_batched_tokens  # less for a while after the device ran out of memory
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._end_of_text_id = end_of_text_id
        self._speculation = speculation or Speculation(most=0)
        self._waiting = Waiting()
        self._running = Running(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            context_length=context_length,
            waiting=self._waiting,
        )
        self._rows, self._pool = self._running.rows, self._running.pool
        assert num_blocks >= self._pool.blocks_for(context_length)
        self._num_pending = 0
        self._by_request: dict[int, list[Sequence]] = {}  # those that have not ended
        self._group: Group | None = None  # of the request added last
        self._arrivals = itertools.count()
        self._plans: deque[Plan] = deque()
        self._last: tuple[Batch, Plan] | None = None  # that was launched, and has not failed
        self._deltas: list[Delta] = []  # to be returned by the next method that returns Deltas
        self._started: list[int] = []
        self.num_steps = 0  # committed
        self.num_sampled = 0  # rows of these steps
        self._num_dropped_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0

    @property
    def num_streams(self) -> int:
        """Of those that run, sequences whose tokens are told as they come."""
        return self._rows.num_streams

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
            num_preemptions=self._running.num_preemptions,
            num_dropped_tokens=self._num_dropped_tokens,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_draft_tokens=self._speculation.num_drafted,
            num_accepted_tokens=self._speculation.num_accepted,
            step_seconds=step_seconds,
            batch_sizes=batch_sizes,
        )

    def add(
        self,
        request: Request,
        params: SamplingParams,
        *,
        completing_ids: bytes = b"",
        patient: bool = False,
        client: str = "",
    ) -> None:
        """Queue the request's sequences; with a grammar, they wait for `supply` first.

        The requests of a group come one after the other, with one and the same `params`. Clients take turns.
        """
        assert request.prompt
        num_computed = len(request.prompt) - is_scored_only(request, params) + params.max_tokens
        assert num_computed <= self._context_length
        assert request.score_from is None or request.score_from >= 1
        assert (params.num_logprobs or 0) <= NUM_TOP
        group = self._group
        if group is None or not group.is_of(params, completing_ids, client):
            group = Group(
                params,
                completing_ids,
                client=client,
                vocab_size=self._vocab_size,
                end_of_text_id=self._end_of_text_id,
            )
            self._group = group
        sequences = [
            Sequence(request, choice, group, arrival=next(self._arrivals), patient=patient)
            for choice in range(request.n)
        ]
        self._by_request[request.id] = sequences
        if params.grammar is not None:
            self._num_pending += request.n
            return
        for sequence in sequences:
            self._waiting.add(sequence)

    def supply(self, request_id: int, constraint: Constraint) -> None:
        """Queue a request that waits for the constraint its grammar is compiled to; if it has ended, do nothing."""
        for sequence in self._by_request.get(request_id, ()):
            sequence.constraint = constraint.copy()
            sequence.pending = False
            self._num_pending -= 1
            self._waiting.add(sequence)

    def refuse(self, request_id: int, error: str) -> list[Delta]:
        """End a request with an error; if it has ended, do nothing."""
        for sequence in list(self._by_request.get(request_id, ())):
            self._end(sequence, Finish.GRAMMAR, error=error)
        return self._take_deltas()

    def abort(self, request_id: int, choice: int | None) -> list[Delta]:
        """End one choice of a request, or all of them. What is unknown or has ended is passed over."""
        for sequence in list(self._by_request.get(request_id, ())):
            if choice in (None, sequence.choice):
                self._end(sequence, Finish.ABORT)
        return self._take_deltas()

    def is_open(self, request_id: int) -> bool:
        """Whether a sequence of the request has not ended. Any thread may ask."""
        return request_id in self._by_request

    def take_started(self) -> tuple[int, ...]:
        """Requests that `schedule` has taken from the queue for the first time since the last call."""
        started, self._started = tuple(dict.fromkeys(self._started)), []
        return started

    def take_held(self) -> list[Delta]:
        """The tokens, of all sequences that are not patient, that nothing has told yet."""
        for sequence, tokens in self._rows.untold():
            logprobs, sequence.logprobs = sequence.logprobs, None
            self._deltas.append(Delta(*sequence.key, tokens, logprobs=logprobs))
        return self._take_deltas()

    def schedule(self) -> Batch | None:
        """The next step's batch, or None when there is nothing to compute now. It counts as launched."""
        self._free_rows()
        running, rows, speculation, repeats = self._running, self._rows, self._speculation, self._repeats()
        speculation.look(rows, running.indices)
        if repeats is not None and not speculation.would_draft(len(running.indices)):
            self._last = rows.next_batch(*repeats, in_flight=bool(self._plans))
            self._plans.append(self._last[1])
            return self._last[0]
        self._last = None
        num_preemptions = running.num_preemptions
        wanted = rows.num_wanted(running.indices)
        prompts = list(rows.sequences[running.indices[wanted > 1]])
        decodes = running.grow_decodes(running.indices[wanted == 1][: self._budget])
        budget = self._budget - len(decodes)
        placed: list[Placing] = []
        short = False  # of blocks: then nobody new is let in
        for sequence in prompts:  # they go on with theirs
            if budget and sequence.running:
                count = running.place(sequence, budget, decodes, placed)
                budget -= count
                short = short or not count
        short = short or running.num_preemptions > num_preemptions
        while self._waiting and budget and not running.full and not short:
            sequence = self._waiting.first()
            if sequence.row >= 0 or not self._admit(sequence):
                break
            count = running.place(sequence, budget, decodes, placed, admitted=True)
            assert count, "admission has seen to it that the blocks are there"
            budget -= count
        if not len(decodes) and not placed:
            return None
        room = 0 if short else min(budget, MOST_SAMPLED - len(decodes) - len(placed))
        drafts = speculation.drafts(running, decodes, num_tokens=self._budget - budget, room=room)
        self._last = rows.batch(decodes, placed, drafts)
        self._plans.append(self._last[1])
        return self._last[0]

    def _repeats(self) -> tuple[Batch, Plan] | None:
        """The last batch, if all there is to do is the same decodes again, each one token on."""
        if self._last is None or self._running.changed or (self._waiting and not self._running.full):
            return None
        _, plan = self._last
        return self._last if plan.num_like_it and len(plan.rows) == len(self._running) else None

    def commit(self, output: StepOutput) -> list[Delta]:
        """Take the tokens and scores of the oldest launched batch."""
        plan = self._plans.popleft()
        rows = self._rows
        self.num_steps += 1
        self._budget = min(self._max_budget, self._budget + max(1, self._budget // 16))
        if output.scores is not None:
            for sequence in take_scores(plan.scored, output.scores):
                self._pool.forget()
                self._end(sequence, Finish.ERROR, error=NOT_FINITE_ERROR)
        packed = None if output.logprobs is None else PackedLogprobs(output.logprobs)
        rows.num_in_flight[plan.sampled] -= 1
        if plan.drafted is None:
            self.num_sampled += len(plan.sampled)
            self._take_tokens(plan.sampled, output.token_ids, range(len(plan.sampled)), packed)
        else:
            self.num_sampled += int((plan.drafted.numbers == 0).sum())
            for at in self._speculation.kept(rows, plan.drafted, output.token_ids):
                self._take_tokens(plan.sampled[at], output.token_ids[at], at.tolist(), packed)
        self._speculation.learn(rows, plan)
        return self._take_deltas()

    def fail(self, error: str, *, launched: bool) -> list[Delta]:
        """A step raised: end its sequences. At its launch that is the newest batch, at its collection all launched.

        What was launched after a failing step may have read what that step did not write.
        """
        failed = list(self._plans) if launched else [self._plans[-1]]
        for plan in failed:
            self._plans.remove(plan)
            self._undo(plan)
            for sequence in plan.sequences:
                if sequence.finish is None:
                    self._end(sequence, Finish.ERROR, error=error)
        return self._take_deltas()

    def retreat(self) -> bool:
        """The newest batch did not fit in the device's memory: undo it, and schedule half as much next.

        Later steps grow again. False, and nothing done, when the batch is a single token: there is no less to try.
        """
        num_tokens = self._plans[-1].num_tokens
        if num_tokens == 1:
            return False
        plan = self._plans.pop()
        self._undo(plan)
        self._rows.num_scheduled[plan.rows] = plan.starts
        for sequence in reversed(plan.admitted):  # its prefix may be one that this very step was to compute
            self._running.preempt(sequence)
        self._budget = num_tokens // 2
        return True

    # Inside

    def _undo(self, plan: Plan) -> None:
        self._last = None
        self._rows.num_in_flight[plan.sampled] -= 1
        self._pool.forget()  # what the step was to write is not to be shared

    def _take_tokens(
        self, rows: Indices, token_ids: Int32, indices: list[int] | range, packed: PackedLogprobs | None
    ) -> None:
        """The next token of each of the rows; `indices` are theirs in the step's samples."""
        for number in self._rows.take_tokens(rows, token_ids):
            self._take_token(self._rows.sequences[rows[number]], int(token_ids[number]), indices[number], packed)

    def _take_token(self, sequence: Sequence, token: int, index: int, packed: PackedLogprobs | None) -> None:
        """A token that ends its sequence, or is watched for; the rows have it already."""
        rows, row = self._rows, sequence.row
        if sequence.finish is not None:
            rows.num_known[row] -= 1
            self._num_dropped_tokens += 1
            return
        length = int(rows.num_known[row])
        logprobs: Logprobs | None = None
        if packed is not None and sequence.group.num_logprobs is not None:
            logprobs = packed.records(index, index + 1, sequence.group.num_logprobs)
            token = NOT_FINITE if logprobs is None else token
        if token == NOT_FINITE:
            self._pool.forget()
            rows.num_known[row] -= 1
            self._end(sequence, Finish.ERROR, error=NOT_FINITE_ERROR)
            return
        finish = sequence.take(token, length)
        if finish is Finish.GRAMMAR:
            rows.num_known[row] -= 1
            self._end(sequence, finish, error=sequence.error)
            return
        if logprobs is not None:
            sequence.logprobs = logprobs if sequence.logprobs is None else sequence.logprobs + logprobs
        urgent = sequence.group.completes(token)
        cached_tokens, scores = 0, None
        first = length == sequence.num_prompt + 1
        if first:
            cached_tokens = sequence.cached_tokens if sequence.choice == 0 else 0
            scores, sequence.scores = sequence.scores, None
            rows.watch(sequence, each=sequence.group.watched)
            if not sequence.group.params.max_tokens:  # it was not wanted
                finish, urgent = Finish.LENGTH, False
                rows.num_known[row] -= 1
        if first or urgent or finish is not None:
            self._tell(sequence, finish, cached_tokens=cached_tokens, scores=scores, urgent=urgent)
        if finish is not None:
            self._close(sequence, finish)

    def _tell(
        self,
        sequence: Sequence,
        finish: Finish | None = None,
        *,
        error: str | None = None,
        cached_tokens: int = 0,
        scores: Logprobs | None = None,
        urgent: bool = False,
    ) -> None:
        """A Delta of the tokens that were not told before."""
        tokens: tuple[int, ...] = ()
        if sequence.row >= 0:
            tokens = tuple(self._rows.known(sequence)[self._rows.num_told[sequence.row] :].tolist())
            self._rows.num_told[sequence.row] += len(tokens)
        logprobs, sequence.logprobs = sequence.logprobs, None
        self._deltas.append(Delta(*sequence.key, tokens, finish, error, cached_tokens, logprobs, scores, urgent))

    def _take_deltas(self) -> list[Delta]:
        self._free_rows()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _free_rows(self) -> None:
        for sequence in self._running.take_left():
            if sequence.finish is None and len(self._rows.known(sequence)) > self._rows.num_told[sequence.row]:
                self._tell(sequence)
            self._rows.give_back(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running ones, if there is room for all of it."""
        num_hits = self._running.admit(sequence)
        if num_hits is None:
            return False
        self._waiting.remove(sequence, served=True)
        if not sequence.started:  # what it finds when it comes back after a preemption is its own
            sequence.started = True
            sequence.cached_tokens = num_hits
            self._started.append(sequence.request.id)
            self._num_prefix_queries += sequence.num_prompt
            self._num_prefix_hits += num_hits
        return True

    def _close(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        if sequence.row >= 0:
            self._rows.watch(sequence, each=True)  # what is in flight is to be dropped
        if sequence.running:
            self._running.leave(sequence)
        elif sequence.pending:
            self._num_pending -= 1
        else:
            self._waiting.remove(sequence, served=False)
        siblings = self._by_request[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.id]

    def _end(self, sequence: Sequence, finish: Finish, *, error: str | None = None) -> None:
        self._tell(sequence, finish, error=error)
        self._close(sequence, finish)
