"""timeout_seconds and queue_timeout_seconds: an answer in time or an error that says so, and the engine's work ends."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.conftest import Service


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_does_not_begin_in_time_is_a_504(api: Service, stream: bool) -> None:
    """The same status in both modes; the engine is told to stop."""
    api.engine.gate.clear()
    response = await api.http.post("/v1/completions", json={"timeout_seconds": 0.1, "stream": stream})
    error = response.json()["error"]
    assert (504, "timeout_error", "deadline_exceeded") == (response.status_code, error["type"], error["code"])
    await api.engine.wait_for(lambda: bool(api.engine.aborted))
    assert 0 == api.engine.num_open


async def test_a_stream_that_does_not_end_in_time_ends_with_an_error(api: Service) -> None:
    """What was generated has been sent; an error event follows, and no finish."""
    api.engine.tokens_before_gate = 2
    api.engine.gate.clear()
    response = await api.http.post("/v1/completions", json={"timeout_seconds": 0.2, "stream": True, "logprobs": 0})
    *chunks, error, done, _ = response.text.split("\n\n")
    assert (200, "data: [DONE]") == (response.status_code, done)
    assert "deadline_exceeded" == json.loads(error.removeprefix("data: "))["error"]["code"]
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert 2 == sum(len(choice["logprobs"]["tokens"]) for choice in choices)
    assert all(choice["finish_reason"] is None for choice in choices)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score"])
async def test_the_time_runs_from_the_arrival_of_the_request(api: Service, path: str) -> None:
    """A body that takes longer than its own deadline is late, however quick the engine is."""

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"timeout_seconds": 0.05, "prompt": "a", '
        await asyncio.sleep(0.2)
        yield b'"items": [{"continuation": "a"}]}'

    response = await api.http.post(path, content=slow_body())
    assert (504, "deadline_exceeded") == (response.status_code, response.json()["error"]["code"])


async def test_tokens_that_keep_coming_do_not_put_it_off(api: Service) -> None:
    """The deadline is of the whole answer, not of the silence."""
    api.engine.seconds_per_delta = 0.01
    response = await api.http.post("/v1/completions", json={"timeout_seconds": 0.2, "max_tokens": 1000})
    assert 504 == response.status_code


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waits_too_long_is_a_429(api: Service, stream: bool) -> None:
    """With Retry-After, in both modes; what has begun in time is not touched."""
    body: dict[str, Any] = {"queue_timeout_seconds": 0.1, "stream": stream, "max_tokens": 2}
    api.engine.announce_started = False
    api.engine.gate.clear()
    response = await api.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (429, "overloaded_error", "queue_timeout") == (response.status_code, error["type"], error["code"])
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert 0 == api.engine.num_open
    api.engine.announce_started = True
    api.engine.gate.set()
    api.engine.seconds_per_delta = 0.15
    response = await api.http.post("/v1/completions", json=body)
    assert 200 == response.status_code


async def test_deadlines_that_are_not_met_change_nothing(api: Service) -> None:
    """The same answer as without them."""
    body = {"prompt": "a", "seed": 1}
    plain = await api.complete(**body)
    timed = await api.complete(**body, timeout_seconds=60, queue_timeout_seconds=60)
    assert plain["choices"] == timed["choices"]
