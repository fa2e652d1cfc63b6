"""More than the queue holds: refused at once, the same on every route and in both modes, and all else is answered."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from service.engine.backlog import QueueLimits
from tests.api.conftest import Service, Start

_ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("/v1/completions", {"prompt": "a", "max_tokens": 9}),
    "stream": ("/v1/completions", {"prompt": "a", "max_tokens": 9, "stream": True}),
    "score": ("/v1/score", {"items": [{"continuation": "a"}]}),
    "megatron": ("/api", {"prompts": ["a"], "tokens_to_generate": 9}),
    "beams": ("/api", {"prompts": ["a"], "tokens_to_generate": 9, "beam_width": 2}),
}


async def crowded(start: Start, **limits: Any) -> Service:
    """A service whose engine begins nothing, for as long as its gate is shut."""
    service: Service = await start(queue=QueueLimits(**limits))
    service.engine.announce_started = False
    service.engine.gate.clear()
    return service


@pytest.mark.parametrize("kind", _ASKS)
async def test_a_full_queue_is_a_429_at_once(start: Start, kind: str) -> None:
    """With Retry-After, nothing of it reaches the engine; what waits is answered when its turn comes."""
    service = await crowded(start, max_requests=3)
    waiting = [asyncio.create_task(service.complete(prompt="b", max_tokens=2)) for _ in range(3)]
    await service.engine.wait_for(lambda: len(service.engine.submitted) == 3)
    path, body = _ASKS[kind]
    response = await service.http.request("PUT" if path == "/api" else "POST", path, json=body)
    error = response.json()["error"]
    assert (429, "overloaded_error", "queue_full") == (response.status_code, error["type"], error["code"])
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert 3 == len(service.engine.submitted)
    assert (await service.http.get("/readyz")).status_code == 200, "a full queue is no reason to be taken out"
    service.engine.gate.set()
    assert all(answer["choices"][0]["finish_reason"] for answer in await asyncio.gather(*waiting))
    response = await service.http.request("PUT" if path == "/api" else "POST", path, json=body)
    assert 200 == response.status_code


async def test_tokens_are_bounded_too(start: Start) -> None:
    """Of the prompt once, and of each sample; a metric shows them."""
    service = await crowded(start, max_tokens=1000)
    waiting = asyncio.create_task(service.complete(prompt=[1, 2, 3], max_tokens=300, n=3))
    await service.engine.wait_for(lambda: bool(service.engine.submitted))
    await service.wait_metric("megatron_gpt2_queued_tokens", 903)
    assert 429 == (await service.http.post("/v1/completions", json={"prompt": [1], "max_tokens": 100})).status_code
    fits = asyncio.create_task(service.complete(prompt=[1], max_tokens=96))
    await service.engine.wait_for(lambda: len(service.engine.submitted) == 2)
    service.engine.gate.set()
    await asyncio.gather(waiting, fits)
    assert "megatron_gpt2_queued_tokens 0.0" in (await service.http.get("/metrics")).text


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_waits_longer_than_the_service_lets_them(start: Start, stream: bool) -> None:
    """Also where the request asks for more."""
    service = await crowded(start, timeout_seconds=0.05)
    for asked in (None, 3600):
        body = {"prompt": "a", "stream": stream, "queue_timeout_seconds": asked}
        response = await service.http.post("/v1/completions", json=body)
        assert (429, "queue_timeout") == (response.status_code, response.json()["error"]["code"])
        assert 1 <= int(response.headers["retry-after"]) <= 60


async def test_a_stream_says_that_it_waits(start: Start) -> None:
    """A comment line at every interval, with the status; a refusal that comes after it is an event."""
    service: Service = await start(queue=QueueLimits(timeout_seconds=0.3), stream_keep_alive_seconds=0.1)
    service.engine.announce_started = False
    service.engine.gate.clear()
    response = await service.http.post("/v1/completions", json={"prompt": "a", "stream": True})
    *comments, error, done, rest = response.text.split("\n\n")
    assert {": keep-alive"} == set(comments)
    assert (200, "data: [DONE]", "") == (response.status_code, done, rest)
    assert "queue_timeout" == json.loads(error.removeprefix("data: "))["error"]["code"]


async def test_ten_times_as_many_as_fit_are_all_answered(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a 200 or a 429, bounds hold throughout, and nothing is held in the end.

    Waves of requests come while the queue is full, and while it empties; whenever one is let in, the bounds hold.
    """
    service = await crowded(start, max_requests=20, max_tokens=70)
    backlog, add = service.client.backlog, service.client.backlog.add
    seen: list[tuple[int, int]] = []

    def add_and_look(entry: Any) -> None:
        try:
            add(entry)
        finally:
            seen.append((backlog.num_requests, backlog.num_tokens))

    monkeypatch.setattr(backlog, "add", add_and_look)

    def wave() -> list["asyncio.Task[httpx.Response]"]:
        """Sequences of 2 to 5 tokens, so that either bound is met first now and then."""
        return [
            asyncio.create_task(
                service.http.post(
                    "/v1/completions", json={"prompt": "a", "max_tokens": 1 + number % 4, "stream": number % 2 == 0}
                )
            )
            for number in range(100)
        ]

    crowd = wave()
    await asyncio.wait(crowd, return_when=asyncio.FIRST_COMPLETED)
    shut = len(seen)
    service.engine.gate.set()
    crowd += wave()
    statuses = [response.status_code for response in await asyncio.gather(*crowd)]
    assert {200, 429} == set(statuses)
    assert statuses.count(200) >= 20
    assert shut < len(seen), "some came after the gate had opened"
    most_requests, most_tokens = (max(figures) for figures in zip(*seen, strict=True))
    assert 15 <= most_requests <= 20, "it has been full"
    assert 60 <= most_tokens <= 70
    assert 0 == backlog.num_requests == backlog.num_tokens == service.engine.num_open
