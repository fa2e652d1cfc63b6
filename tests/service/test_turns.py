"""Whose turn it is, in the real service: what comes while the engine stands still waits, and is answered in turn."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.service.scripted_model import ScriptedModel
from tests.service.server import Client, Server, until_drained

_KEYS = {"alice": "", "bob": "", "bulk": "priority_floor: 5, "}


@pytest.fixture(scope="module")
def keyed_server(scripted_model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One sequence at a time; its /metrics asks for no key."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in _KEYS}
    file.write_text("".join(f"- {{{more}name: {name}, sha256: {hashes[name]}}}\n" for name, more in _KEYS.items()))
    options = ("--max-num-seqs", "1", "--api-key-file", str(file), "--open-routes", "/metrics")
    yield from until_drained(Server(str(scripted_model.folder), *options, "--stall-seconds", "200"))


class Turns:
    """Requests that wait for an engine which stands still, and whose they were in the order of their answers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = Client(server.url)
        self._asking: list[asyncio.Task[None]] = []
        self._answered: list[str] = []

    async def ask(self, name: str, times: int, **body: Any) -> None:
        """Return when they wait with all that was asked before."""
        self._asking += [asyncio.create_task(self._ask(name, **body)) for _ in range(times)]
        await self._client.wait_metric("requests_open", len(self._asking))

    async def _ask(self, name: str, **body: Any) -> None:
        headers = {"Authorization": f"Bearer {name}"}
        body = {"prompt": "", "max_tokens": 10, **body}
        response = await self._client.http.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        self._answered.append(name)

    async def go_on(self) -> list[str]:
        self._server.engine.resume()
        await asyncio.gather(*self._asking)
        return self._answered

    async def close(self) -> None:
        self._server.engine.resume()
        await self._client.http.aclose()


@pytest.fixture
async def turns(keyed_server: Server) -> AsyncIterator[Turns]:
    keyed_server.engine.suspend()
    turns = Turns(keyed_server)
    yield turns
    await turns.close()


async def test_many_requests_of_one_key_do_not_keep_another_waiting(turns: Turns) -> None:
    """The other comes last, and is answered before most of them."""
    await turns.ask("alice", 60)
    await turns.ask("bob", 1)
    assert (await turns.go_on()).index("bob") < 10


async def test_a_key_with_a_floor_lets_others_go_first(turns: Turns) -> None:
    """Though it asks to be more urgent than they do, and has come before them."""
    await turns.ask("bulk", 20, priority=-100)
    await turns.ask("alice", 10)
    answered = await turns.go_on()
    assert 10 == answered[:15].count("alice")
