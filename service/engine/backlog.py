"""What waits for the engine, as the API process counts it: how much may, whose must give way, and when to try again."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_WINDOW_SECONDS = 10.0  # that the rate at which the queue is worked off is taken from, twice as long at most
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
class _Client:
    """What of one client's waits, the oldest first."""

    entries: dict[Entry, None] = field(default_factory=dict)
    num_requests: int = 0
    num_tokens: int = 0

    def grow(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens


class Backlog:
    """Everything that waits, within `limits`. `clock` gives seconds."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._clients: dict[str, _Client] = {}
        self._all = _Client()
        # Tokens that have left in this window and in the one before, and when these began.
        self._left, self._since = 0, clock()
        self._left_before, self._since_before = 0, self._since

    @property
    def num_requests(self) -> int:
        return self._all.num_requests

    @property
    def num_tokens(self) -> int:
        return self._all.num_tokens

    @property
    def retry_after_seconds(self) -> float:
        """About when what waits now will have left."""
        self._turn_window()
        seconds, left = self._clock() - self._since_before, self._left + self._left_before
        wait = self.num_tokens * seconds / left if left else _RETRY_SECONDS
        return min(max(wait, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def check(self, client: str) -> None:
        """Raises QueueFull if even the smallest and most urgent request of the client would be refused."""
        self._victims(Entry(client, -sys.maxsize, 1, 1, lambda _: None))

    def add(self, entry: Entry) -> None:
        """Let a group in. Raises QueueFull, unless the newest of a client that has more waiting can give way to it."""
        for victim in self._victims(entry):
            self.remove(victim)
            victim.refuse(self._full("the queue is full, and others have less in it; try again later"))
        client = self._clients.setdefault(entry.client, _Client())
        client.entries[entry] = None
        for each in (client, self._all):
            each.grow(entry.num_requests, entry.num_tokens)

    def shrink(self, entry: Entry, *, num_requests: int, num_tokens: int) -> None:
        """Some of the group has left the queue for the engine."""
        self._turn_window()
        self._left += num_tokens
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
        for each in (client, self._all):
            each.grow(-num_requests, -num_tokens)
        if not entry.num_requests:
            del client.entries[entry]
            if not client.entries:
                del self._clients[entry.client]

    def _victims(self, entry: Entry) -> list[Entry]:
        """Who must leave for `entry` to come in. Raises QueueFull."""
        rest = _Client({}, self.num_requests, self.num_tokens)
        victims: list[Entry] = []
        while rest.num_requests and (
            rest.num_requests + entry.num_requests > self._limits.max_requests
            or rest.num_tokens + entry.num_tokens > self._limits.max_tokens
        ):
            victim = self._newest_of_most(entry, victims)
            if victim is None:
                raise self._full("the queue is full; try again later")
            victims.append(victim)
            rest.grow(-victim.num_requests, -victim.num_tokens)
        return victims

    def _newest_of_most(self, entry: Entry, victims: list[Entry]) -> Entry | None:
        """The newest group of the client with most, if that then has no less than the client of `entry` with it."""
        shares = {name: self._share(client) for name, client in self._clients.items() if name != entry.client}
        for victim in victims:
            shares[victim.client] -= self._share(victim)
        most = max(shares, key=shares.__getitem__, default=None)
        if most is None:
            return None
        for victim in reversed(self._clients[most].entries):
            if not victim.begun and victim.priority >= entry.priority and victim not in victims:
                own = self._clients.get(entry.client, _Client())
                enough = shares[most] - self._share(victim) >= self._share(own) + self._share(entry)
                return victim if enough else None
        return None

    def _share(self, holder: Entry | _Client) -> float:
        """Of the bounds: the greater of its shares of requests and of tokens."""
        limits = self._limits
        return max(holder.num_requests / limits.max_requests, holder.num_tokens / limits.max_tokens)

    def _full(self, message: str) -> QueueFull:
        return QueueFull(message, retry_after_seconds=self.retry_after_seconds)

    def _turn_window(self) -> None:
        now = self._clock()
        if now - self._since >= _WINDOW_SECONDS:
            self._left_before, self._since_before = self._left, self._since
            self._left, self._since = 0, now
