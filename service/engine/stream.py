"""The deltas of a group of requests, as the API process reads them. Made by the engine's client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Self

import msgspec

from service.engine.backlog import Entry, QueueFull, QueueTimeout
from service.engine.request import Delta, Finish, Request, Submit, count_tokens

if TYPE_CHECKING:
    from service.engine.client import EngineClient
    from service.engine.handle import EngineHandle

# Token ids and log-probabilities that wait for a reader of a stream: several times what all rows make in one publish.
_MAX_UNREAD = 2**20


class DeadlineExceeded(Exception):
    """The group has not finished by its deadline."""


class Stream:
    """The deltas of a group of requests: an async iterator over lists of Deltas, to be closed.

    Deltas that arrive before the reader takes them are merged, so the mailbox holds at most one Delta a sequence; the
    group is ended with an error where these get too long, unless it is patient. Iteration ends when every sequence has
    had its last Delta. It raises QueueTimeout, QueueFull where the group had to give way to others, and
    DeadlineExceeded; what is whole when the reader comes for it is never late.
    """

    def __init__(
        self, client: EngineClient, submit: Submit, *, deadline: float | None, queue_deadline: float | None
    ) -> None:
        requests = submit.requests
        self._client = client
        self._submit = submit
        self._engines: dict[int, EngineHandle] = {}  # request id -> who was asked for it
        self._deadline = deadline
        self._queue_deadline = queue_deadline
        self._open = {(request.id, choice) for request in requests for choice in range(request.n)}
        self._mailbox: dict[tuple[int, int], Delta] = {}
        self._arrival: asyncio.Future[None] | None = None  # what the reader waits for
        self._num_unread = 0  # of _MAX_UNREAD
        self._unstarted = {request.id: request for request in requests}
        # The tokens of each sequence that counts in the backlog.
        self._queued = {
            (request.id, choice): count_tokens(request, submit.params, choice)
            for request in requests
            for choice in range(request.n)
        }
        self._entry = Entry(
            submit.client, requests[0].priority, len(self._queued), sum(self._queued.values()), self._refuse
        )
        self._refused: QueueFull | None = None
        self._resubmitted: set[int] = set()  # ids of requests that were asked for again
        self._ended: tuple[Finish, str] | None = None  # how the client ended it for good
        self.submitted_at = time.monotonic()
        # When the requests that the group began with left the engine's queue, by id (monotonic seconds).
        self.started_at: dict[int, float] = {}
        self._has_gone_on = False

    def close(self) -> None:
        """Abort whatever has not finished, and read no more."""
        self._abort_all()
        for key in list(self._open):
            self._close(key)
        self._client._forget(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Delta]:  # an async generator is kept account of by the event loop
        while self._open or self._mailbox:
            seconds_left = self._check_deadlines()
            if self._mailbox:
                deltas = list(self._mailbox.values())
                self._mailbox.clear()
                self._num_unread = 0
                return deltas
            await self._wait(seconds_left)
        raise self._refused or StopAsyncIteration

    async def _wait(self, seconds: float | None) -> None:
        """Until something has arrived, or the seconds are over. asyncio's Event and timeout take four times as long."""
        loop = asyncio.get_running_loop()
        self._arrival = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, self._arrived)
        try:
            await self._arrival
        finally:
            self._arrival = None
            if timer is not None:
                timer.cancel()

    def _arrived(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def go_on(self, requests: Sequence[Request]) -> None:
        """Hand over more requests of the same group in place of its present ones, which must have finished.

        The group was taken when it began, so a drain waits for these too. Where it cannot go on, they end with an
        error as others do.
        """
        assert not self._open, "some have not finished"
        self._has_gone_on = True
        self._queue_deadline = None  # the group has begun
        before = self._submit.requests
        self._submit = msgspec.structs.replace(self._submit, requests=tuple(requests))
        self._open = {(request.id, choice) for request in requests for choice in range(request.n)}
        self._unstarted = {request.id: request for request in requests}
        engine = self._engines[before[0].id]  # which has what they begin with in its blocks
        engine.hand_over(self, self._submit)
        for request in before:
            self._engines.pop(request.id).forget(request.id)
        if self._ended is not None:
            self._end(*self._ended)

    def abort(self, request_id: int, choice: int) -> None:
        """End one sequence: nothing more of it is delivered. Used when a stop string is found in its text."""
        if (request_id, choice) in self._open:
            self._close((request_id, choice))
            self._engines[request_id].abort(request_id, choice)
            self._leave_queue((request_id, choice), served=False)
            if request_id in self._unstarted and not any(open_id == request_id for open_id, _ in self._open):
                del self._unstarted[request_id]  # nobody waits for its start
        self._mailbox.pop((request_id, choice), None)
        self._arrived()

    def _deliver(self, delta: Delta) -> None:
        key = (delta.request_id, delta.choice)
        if key not in self._open:
            return
        self._unstarted.pop(delta.request_id, None)
        if self._queued:
            self._leave_queue(key, served=delta.finish not in (Finish.ERROR, Finish.ABORT))
        if delta.finish is not None:
            self._close(key)
        self._num_unread += len(delta.token_ids) + (0 if delta.logprobs is None else len(delta.logprobs.top) // 4)
        earlier = self._mailbox.get(key)
        if earlier is not None:
            delta = earlier.then(delta)
        self._mailbox[key] = delta
        self._arrived()
        if self._num_unread > _MAX_UNREAD and self._open and not self._submit.patient:
            self._give_up_reader()

    def _give_up_reader(self) -> None:
        """Keep nothing for it but an error of each sequence that had not finished."""
        self._mailbox.clear()
        self._num_unread = 0
        self._abort_all()
        self._end(Finish.ERROR, "the client takes its answer too slowly")

    def _close(self, key: tuple[int, int]) -> None:
        self._open.remove(key)
        self._engines[key[0]].settled()

    def _abort_all(self) -> None:
        """Let the engines compute no more of what has not finished."""
        for request_id in {request_id for request_id, _ in self._open}:
            self._engines[request_id].abort(request_id, None)

    def _mark_started(self, request_id: int) -> None:
        if self._unstarted.pop(request_id, None) is not None and not self._has_gone_on:
            self.started_at[request_id] = time.monotonic()
            self._leave_queue((request_id, 0), served=True)  # its samples are let in in their order

    def _leave_queue(self, key: tuple[int, int], *, served: bool) -> None:
        """The sequence waits no more, if it did: it has begun (`served`), or ended."""
        num_tokens = self._queued.pop(key, None)
        if num_tokens is not None:
            self._client.backlog.shrink(self._entry, num_requests=1, num_tokens=num_tokens, served=served)

    def _refuse(self, error: QueueFull) -> None:
        """The group, of which nothing has begun, gives its place in the queue to others."""
        self._refused = error
        self.close()
        self._arrived()

    def _num_open(self, request: Request) -> int:
        """How many of its sequences have not ended."""
        return sum((request.id, choice) in self._open for choice in range(request.n))

    def _engine_lost(self, engine: EngineHandle, error: str) -> None:
        """End what the lost engine had begun. What it had not begun stays, to be asked for again, once."""
        lost = {request_id for request_id, other in self._engines.items() if other is engine}
        kept = (lost & self._unstarted.keys()) - self._resubmitted
        self._end(Finish.ERROR, error, lost - kept, for_good=not kept)

    def _end(self, finish: Finish, error: str, of: Collection[int] | None = None, *, for_good: bool = True) -> None:
        """End every open sequence, or those `of` the requests; `for_good`: nor does the group go on."""
        if for_good:
            self._ended = finish, error
        for request_id, choice in list(self._open):
            if of is None or request_id in of:
                self._deliver(Delta(request_id, choice, (), finish, error))

    def _take_unstarted(self, engine: EngineHandle) -> tuple[Request, ...]:
        """What of the engine's has not begun, and is now to be asked for again."""
        requests = tuple(each for each in self._unstarted.values() if self._engines[each.id] is engine)
        self._resubmitted.update(request.id for request in requests)
        return requests

    def _check_deadlines(self) -> float | None:
        """Seconds until the next deadline, if there is one. Raises QueueTimeout, DeadlineExceeded."""
        if not self._unstarted:
            self._queue_deadline = None  # for good: every event comes past here
        if not self._open or (self._deadline is None and self._queue_deadline is None):
            return None
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            raise DeadlineExceeded("the request was not answered by its deadline")
        if self._queue_deadline is not None and now >= self._queue_deadline:
            raise QueueTimeout(
                "the request waited in the queue for longer than it may; try again later",
                retry_after_seconds=self._client.backlog.retry_after_seconds,
            )
        deadlines = (self._deadline, self._queue_deadline)
        return min(deadline - now for deadline in deadlines if deadline is not None)
