"""The way out of one API process: whoever asks first begins it, and nobody takes it back. Used by process.py, admin.py.

From the first moment requests are refused and readiness is false; what is open goes on. The port stays open for
`unready_seconds` from then at least, so that balancers see the one before they see the other.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from service.engine.client import EngineClient

log = logging.getLogger(__name__)


class Drain:
    """Belongs to the event loop's thread, as the client does. `clock` gives seconds."""

    def __init__(
        self, client: EngineClient, *, unready_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._unready_seconds = unready_seconds
        self._clock = clock
        self._began_at: float | None = None

    @property
    def unready_seconds_left(self) -> float:
        """How much longer the port has to stay open."""
        if self._began_at is None:
            return self._unready_seconds
        return max(0.0, self._began_at + self._unready_seconds - self._clock())

    def begin(self) -> None:
        """Take no more requests. It has begun but once."""
        if self._began_at is None:
            self._began_at = self._clock()
            self._client.drain()
            log.info("draining: %d requests are open; new ones are refused", self._client.num_open)

    async def wait(self, seconds: float) -> None:
        """Until nothing is open, for `seconds` at most; and until the port may close."""
        await self._idle(seconds)
        await asyncio.sleep(self.unready_seconds_left)

    async def finish(self, seconds: float) -> None:
        """The same, but what is still open after `seconds` ends with an error."""
        self.begin()
        num_cut = 0
        if not await self._idle(seconds):
            num_cut = self._client.abandon("the service is shutting down")
        log.log(logging.WARNING if num_cut else logging.INFO, "drained: %d requests were cut", num_cut)
        await asyncio.sleep(self.unready_seconds_left)

    async def _idle(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._client.wait_idle(), seconds)
        except TimeoutError:
            return False
        return True
