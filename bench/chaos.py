"""Faults from outside, at random moments, against a running service. Used by soak.py.

Two kinds: those that take the engine away for a while, in which requests may end with an error that says so, and those
of other clients, which nobody else may notice.
"""

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import psutil

from bench.served import Service

STALL_SECONDS = 3.0  # of the service that is tried
_HOLD_SECONDS = 4.0  # that a client which does nothing stays
_MANY = 100  # connections at once
_READY_SECONDS = 120.0
_LINGER = struct.pack("ii", 1, 0)  # close with a reset


@dataclass(slots=True)
class Outage:
    """The engine was away; requests that were open within may have been cut short."""

    begin: float  # monotonic seconds
    end: float = float("inf")


@dataclass(slots=True)
class Chaos:
    """`run` until cancelled. `marks` are moments and names of what was done."""

    service: Service
    client: httpx.AsyncClient
    rng: random.Random
    marks: list[tuple[float, str]] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what did not end as it has to

    async def run(self, pause_seconds: tuple[float, float]) -> None:
        """All kinds in random order, one of those that take the engine away first, and again in another order."""
        engine: list[Callable[[], Awaitable[None]]] = [self._kill_engine, self._freeze_engine]
        others = [self._reset_connections, self._say_nothing, self._talk_nonsense, self._read_nothing]
        while True:
            self.rng.shuffle(engine)
            rest = [*engine[1:], *others]
            self.rng.shuffle(rest)
            for fault in (engine[0], *rest):
                await asyncio.sleep(self.rng.uniform(*pause_seconds))
                self.marks.append((time.monotonic(), fault.__name__.strip("_").replace("_", " ")))
                await fault()

    def may_cut(self, begin: float, end: float) -> bool:
        """Whether a request that was open from `begin` to `end` may have been cut short."""
        return any(outage.begin <= end and begin <= outage.end for outage in self.outages)

    async def _kill_engine(self) -> None:
        await self._without_engine(signal.SIGKILL)

    async def _freeze_engine(self) -> None:
        """Only work that is open shows that it is frozen."""
        await self._without_engine(signal.SIGSTOP)

    async def _without_engine(self, number: signal.Signals) -> None:
        engine = self.service.processes()["engine"]
        outage = Outage(time.monotonic())
        self.outages.append(outage)
        engine.send_signal(number)
        probe = asyncio.create_task(self._ask())  # there may be no load just now
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await asyncio.to_thread(psutil.wait_procs, [engine], _READY_SECONDS)
                while not await self._is_back():  # noqa: ASYNC110 - it is in other processes
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self.faults.append(f"not ready {_READY_SECONDS:g} s after the engine got {number.name}")
        await probe
        outage.end = time.monotonic() + 1  # an answer that is on its way

    async def _is_back(self) -> bool:
        values, _ = await self.service.metrics(self.client)
        return values["engine_restarts_total"] >= len(self.outages) and bool(values["ready"])

    async def _ask(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await self.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})

    async def _reset_connections(self) -> None:
        """In the middle of a head, of a body, and of an answer."""
        whole = self._request({"prompt": "The", "max_tokens": 100, "stream": True, "ignore_eos": True})
        for _ in range(_MANY):
            with await self._connect() as connection:
                await self._send(connection, whole[: self.rng.randrange(len(whole) + 1)])
                await asyncio.sleep(self.rng.random() / 20)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)

    async def _say_nothing(self) -> None:
        with contextlib.ExitStack() as held:
            for _ in range(_MANY):
                held.enter_context(await self._connect())
            await asyncio.sleep(_HOLD_SECONDS)

    async def _read_nothing(self) -> None:
        """Of answers that are larger than what sockets hold."""
        request = self._request({"prompt": "The", "max_tokens": 900, "stream": True, "logprobs": 5, "ignore_eos": True})
        with contextlib.ExitStack() as held:
            for _ in range(4):
                connection = held.enter_context(await self._connect(receive_bytes=4096))
                await self._send(connection, request)
            await asyncio.sleep(_HOLD_SECONDS)

    async def _talk_nonsense(self) -> None:
        for _ in range(_MANY):
            with await self._connect() as connection:
                await self._send(connection, self.rng.randbytes(self.rng.randrange(1, 2000)))

    async def _connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        address = urlsplit(self.service.url)
        connection = socket.socket()
        connection.setblocking(False)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
        except BaseException:
            connection.close()
            raise
        return connection

    async def _send(self, connection: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the service may have hung up already
            await asyncio.get_running_loop().sock_sendall(connection, data)

    def _request(self, body: dict[str, object]) -> bytes:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: chaos\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content
