"""What one key may ask for: so many requests a minute, and so many at a time. Used by access.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.api.errors import over_quota
from service.api.keys import Key

_NEARLY = 1 - 1e-6  # of a request: waiting for as long as was told is enough, in floating point too


class Quota:
    """A bucket of a minute's requests, which fills all the time; and a count of the requests that are open.

    `key` has the limits, and may be replaced by the same key with others.
    """

    def __init__(self, key: Key, *, clock: Callable[[], float]) -> None:
        """`clock` is in monotonic seconds."""
        self.key = key
        self._clock = clock
        self._num_open = 0
        self._mean_seconds = 0.0  # of requests, the last ones weighing most
        self._filled_at = clock()
        self._left = float("inf")  # cut to the bucket's size at once

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it one more request is open. Raises ApiError (429); what is refused counts for nothing."""
        self._take()
        began_at = self._clock()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
            self._mean_seconds += (self._clock() - began_at - self._mean_seconds) / 8

    def _take(self) -> None:
        now = self._clock()
        at_a_time, a_minute = self.key.max_concurrent, self.key.requests_per_minute
        if at_a_time is not None and self._num_open >= at_a_time:
            message = f"This key may have {at_a_time} requests open at a time."
            raise over_quota("concurrency_limit_exceeded", message, seconds=self._mean_seconds / at_a_time)
        if a_minute is None:
            return
        rate = a_minute / 60
        self._left = min(a_minute, self._left + (now - self._filled_at) * rate)
        self._filled_at = now
        if self._left < _NEARLY:
            message = f"This key may send {a_minute} requests a minute."
            raise over_quota("rate_limit_exceeded", message, seconds=(1 - self._left) / rate)
        self._left -= 1
