"""What waits for the engine, as the API process counts it: how much may, whose must give way, and when to try again."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

_WINDOW_SECONDS = 10.0  # of work on the queue, from which its rate is taken; as much before it counts too
_RETRY_SECONDS = 5.0  # while nothing is known of that rate
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1.0, 60.0  # clients give up above two minutes


class Overloaded(Exception):
    """A request that the service has no time for now. `retry_after_seconds` is 1 to 60."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(Overloaded):
    """The queue has no room for the group."""


class QueueTimeout(Overloaded):
    """A request of the group has not left the queue by its queue deadline."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of what may wait. A group that finds the queue empty is taken whatever its size."""

    max_requests: int = 2048  # sequences
    max_tokens: int = 1_000_000  # of prompts, and max_tokens of each sequence
    timeout_seconds: float = 60.0


@dataclass(eq=False, slots=True)
class Entry:
    """What of a group waits. `refuse` ends the group with the error."""

    client: str
    priority: int
    num_requests: int
    num_tokens: int
    refuse: Callable[[QueueFull], None]
    begun: bool = False  # some of it has left the queue by itself


@dataclass(eq=False, slots=True)
class _Load:
    num_requests: int = 0
    num_tokens: int = 0

    def grow(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens


@dataclass(eq=False, slots=True)
class _Client:
    """What of one client's waits, the oldest first."""

    load: _Load = field(default_factory=_Load)
    entries: dict[Entry, None] = field(default_factory=dict)


class _Rate:
    """Tokens a second that leave the queue, while there is one."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._tokens_before, self._seconds_before = 0, 0.0  # of the window before
        self._since: float | None = None  # when the clock was started

    def run(self, now: float) -> None:
        """Something waits from now on, if nothing did."""
        if self._since is None:
            self._since = now

    def stop(self, now: float) -> None:
        self._pass(now)
        self._since = None

    def leave(self, now: float, num_tokens: int) -> None:
        self._pass(now)
        self._tokens += num_tokens

    def seconds_for(self, now: float, num_tokens: int) -> float:
        """How long so many tokens take; infinite where none have left for long."""
        self._pass(now)
        tokens, seconds = self._tokens + self._tokens_before, self._seconds + self._seconds_before
        if tokens:
            return num_tokens * seconds / tokens
        return math.inf if seconds > _WINDOW_SECONDS else _RETRY_SECONDS

    def _pass(self, now: float) -> None:
        if self._since is not None:
            self._seconds += now - self._since
            self._since = now
        if self._seconds >= _WINDOW_SECONDS:
            self._tokens_before, self._seconds_before = self._tokens, self._seconds
            self._tokens, self._seconds = 0, 0.0


class Backlog:
    """Everything that waits, within `limits`. `clock` gives seconds."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._clients: dict[str, _Client] = {}
        self._all = _Load()
        self._rate = _Rate()

    @property
    def num_requests(self) -> int:
        return self._all.num_requests

    @property
    def num_tokens(self) -> int:
        return self._all.num_tokens

    def num_requests_by_client(self) -> list[tuple[str, int]]:
        """Of every client that has some waiting."""
        return [(name, client.load.num_requests) for name, client in self._clients.items()]

    @property
    def retry_after_seconds(self) -> float:
        """About when what waits now will have left."""
        wait = self._rate.seconds_for(self._clock(), self.num_tokens)
        return min(max(wait, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def check(self, client: str) -> None:
        """Raises QueueFull if even the smallest and most urgent request of the client would be refused."""
        self._victims(Entry(client, -sys.maxsize, 1, 1, lambda _: None))

    def add(self, entry: Entry) -> None:
        """Let a group in. Raises QueueFull, unless the newest of a client that has more waiting can give way to it."""
        for victim in self._victims(entry):
            self.remove(victim)
            victim.refuse(self._full("the queue is full, and others have less in it; try again later"))
        self._rate.run(self._clock())
        client = self._clients.setdefault(entry.client, _Client())
        client.entries[entry] = None
        for load in (client.load, self._all):
            load.grow(entry.num_requests, entry.num_tokens)

    def shrink(self, entry: Entry, *, num_requests: int, num_tokens: int, served: bool) -> None:
        """Some of the group has left the queue: for the engine (`served`), or since it has ended."""
        if served:
            self._rate.leave(self._clock(), num_tokens)
            entry.begun = True
        entry.num_requests -= num_requests
        entry.num_tokens -= num_tokens
        self._take(entry, num_requests, num_tokens)

    def remove(self, entry: Entry) -> None:
        """The group does not wait any more, for another reason. If it did not, nothing is done."""
        if entry.num_requests:
            num_requests, entry.num_requests = entry.num_requests, 0
            self._take(entry, num_requests, entry.num_tokens)

    # Inside

    def _take(self, entry: Entry, num_requests: int, num_tokens: int) -> None:
        client = self._clients[entry.client]
        for load in (client.load, self._all):
            load.grow(-num_requests, -num_tokens)
        if not entry.num_requests:
            del client.entries[entry]
            if not client.entries:
                del self._clients[entry.client]
        if not self._clients:
            self._rate.stop(self._clock())

    def _victims(self, entry: Entry) -> list[Entry]:
        """Who must leave for `entry` to come in: the newest of whoever then has most. Raises QueueFull.

        Nobody is left with less than the client of `entry` then has. What has begun stays, and what is more urgent.
        """
        rest = _Load(self.num_requests, self.num_tokens)
        victims: list[Entry] = []
        if self._fits(rest, entry):
            return victims
        own = self._clients.get(entry.client, _Client())
        least = self._share(_Load(own.load.num_requests + entry.num_requests, own.load.num_tokens + entry.num_tokens))
        most: list[tuple[float, str, _Load, Iterator[Entry]]] = [  # a heap, the greatest share first
            (-share, name, replace(client.load), reversed(client.entries))
            for name, client in self._clients.items()
            if client is not own and (share := self._share(client.load)) >= least
        ]
        heapify(most)
        while not self._fits(rest, entry):
            victim = self._newest(entry, least, most)
            if victim is None:
                raise self._full("the queue is full; try again later")
            victims.append(victim)
            rest.grow(-victim.num_requests, -victim.num_tokens)
        return victims

    def _fits(self, load: _Load, entry: Entry) -> bool:
        """Whether the group may wait beside what waits then."""
        limits = self._limits
        return not load.num_requests or (
            load.num_requests + entry.num_requests <= limits.max_requests
            and load.num_tokens + entry.num_tokens <= limits.max_tokens
        )

    def _newest(
        self, entry: Entry, least: float, most: list[tuple[float, str, _Load, Iterator[Entry]]]
    ) -> Entry | None:
        """The next that gives way, taken off its client in the heap; a client that has none leaves the heap."""
        while most:
            _, name, load, entries = heappop(most)
            for victim in entries:
                if victim.begun or victim.priority < entry.priority:
                    continue
                load.grow(-victim.num_requests, -victim.num_tokens)
                share = self._share(load)
                if share < least:
                    break
                heappush(most, (-share, name, load, entries))
                return victim
        return None

    def _share(self, load: _Load) -> float:
        """Of the bounds: the greater of the shares of requests and of tokens."""
        return max(load.num_requests / self._limits.max_requests, load.num_tokens / self._limits.max_tokens)

    def _full(self, message: str) -> QueueFull:
        return QueueFull(message, retry_after_seconds=self.retry_after_seconds)
