"""Requests that are under way on both replicas while something happens to one."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.ray.cluster import RayCluster
from tests.service.server import Client, Streamed, eventually

_MOST_STREAMS = 20
BODY: dict[str, Any] = {"prompt": "The people", "max_tokens": 600, "ignore_eos": True}


@dataclass
class Load:
    """Requests under way, and what became of them."""

    client: Client
    plain: list[asyncio.Task[httpx.Response]] = field(default_factory=list)
    streams: list[asyncio.Task[None]] = field(default_factory=list)
    streamed: list[Streamed] = field(default_factory=list)

    async def begin(self, cluster: RayCluster, *, num_plain: int = 8) -> None:
        """Return when each replica has streams, some of whose text is there, and plain requests are with them."""
        while len(self.streams) < 4 or min(await asyncio.to_thread(lambda: cluster.num_ongoing)) == 0:
            assert len(self.streams) < _MOST_STREAMS
            streamed = Streamed()
            self.streams.append(asyncio.create_task(self._follow(streamed)))
            self.streamed.append(streamed)

            async def has_begun(streamed: Streamed = streamed) -> bool:
                return streamed.text() != ""

            await eventually(has_begun)
        self.plain += [asyncio.create_task(self.client.post(**BODY)) for _ in range(num_plain)]

        async def all_there() -> bool:
            num_ongoing = await asyncio.to_thread(lambda: cluster.num_ongoing)
            return sum(num_ongoing) >= len(self.plain) + len(self.streams)

        await eventually(all_there)

    async def _follow(self, streamed: Streamed) -> None:
        async with self.client.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                streamed.take(line)

    async def check(self) -> None:
        """Every plain request has its whole answer; every stream ended with [DONE], some of them after an error."""
        for response in await asyncio.gather(*self.plain):
            assert 200 == response.status_code, response.text
            assert BODY["max_tokens"] == response.json()["usage"]["completion_tokens"]
        await asyncio.gather(*self.streams)
        assert all(streamed.done for streamed in self.streamed)
        whole = [streamed for streamed in self.streamed if streamed.error is None]
        cut = [streamed for streamed in self.streamed if streamed.error is not None]
        assert whole, "those of the other replica"
        assert cut, "those of the lost one"
        assert all({0: "length"} == streamed.finish_reasons for streamed in whole)
        assert all({} == streamed.finish_reasons for streamed in cut)
        assert {"service_unavailable"} == {(streamed.error or {})["code"] for streamed in cut}
