"""Every answer that is no success is in the one envelope, and what fails in the engine ends as an error."""

import asyncio
import json

import pytest

from service.engine.request import Finish
from tests.api.conftest import Service
from tests.api.fake_engine import random_tokens

PATHS = [
    "/",
    "/v1",
    "/v1/completions",
    "/v1/completions/",
    "/v1/models",
    "/v1/models/demo",
    "/v1/models/",
    "/livez",
    "/readyz",
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/%00",
    "/v1/chat/completions",
    "/v1/score",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
async def test_every_route_and_method(api: Service, method: str) -> None:
    """404 and 405 included; a 405 says what is allowed; nothing is redirected; FastAPI's detail is nowhere."""
    for path in PATHS:
        response = await api.http.request(method, path)
        if response.status_code == 200 or (response.status_code == 400 and method == "POST"):  # without a body
            continue
        assert response.status_code in (404, 405), path
        assert {"error"} == response.json().keys(), path
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} == error.keys()
        assert "invalid_request_error" == error["type"]
        assert response.headers["x-request-id"]
        if response.status_code == 405:
            assert "method_not_allowed" == error["code"]
            assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/v1/chat/completions", "base model without a chat template"),
        ("/v1/responses", "base model without a chat template"),
        ("/v1/embeddings", "gives no embeddings"),
        ("/v1/v1/completions", "ends in /v1, once"),
        ("/completions", "ends in /v1, once"),
        ("/v1/completions/completions", "ends in /v1, once"),
    ],
)
async def test_what_a_base_model_does_not_offer(api: Service, path: str, why: str) -> None:
    """The 404 says why, and which route to use."""
    response = await api.http.post(path, json={"messages": []})
    assert 404 == response.status_code
    message = response.json()["error"]["message"]
    assert why in message
    assert "/v1/completions" in message


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_error_before_the_first_token_is_a_500(api: Service, stream: bool) -> None:
    """The same status in both modes; the service goes on."""
    api.engine.gate.clear()
    asking = asyncio.ensure_future(api.http.post("/v1/completions", json={"prompt": "x", "stream": stream}))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.fail(api.engine.submitted[0], "a step failed: division by zero")
    response = await asking
    assert 500 == response.status_code
    expected = {"type": "server_error", "code": "internal_error", "param": None}
    assert expected | {"message": "a step failed: division by zero"} == response.json()["error"]
    api.engine.gate.set()
    await api.complete(prompt="x")


async def test_an_error_within_a_stream_is_an_event(api: Service) -> None:
    """One error event, [DONE], and no finish; a plain request never shows its part of the text."""
    api.engine.tokens_before_gate = 2
    api.engine.gate.clear()
    async with api.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        assert 200 == response.status_code
        lines = response.aiter_lines()
        first = json.loads((await anext(lines)).removeprefix("data: "))
        assert first["choices"][0]["text"]
        api.engine.fail(api.engine.submitted[0], "a step failed")
        rest = [line async for line in lines if line]
    assert "data: [DONE]" == rest[-1]
    assert "a step failed" == json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
    assert not any('"length"' in line or '"stop"' in line for line in rest)


async def test_an_aborted_sequence_is_unavailable(api: Service) -> None:
    """When the engine ends a sequence that we did not abort, the service is going down: try another one."""
    api.engine.gate.clear()
    asking = asyncio.ensure_future(api.http.post("/v1/completions", json={}))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.end(api.engine.submitted[0], Finish.ABORT)
    response = await asking
    assert (503, "1") == (response.status_code, response.headers["retry-after"])


async def test_engine_death_and_recovery(api: Service) -> None:
    """Open requests get an error, new ones a 503 with Retry-After, and a new engine serves again."""
    api.engine.tokens_before_gate = 1
    api.engine.gate.clear()

    async def streamed() -> str:
        response = await api.http.post("/v1/completions", json={"stream": True})
        return response.text

    streaming = asyncio.ensure_future(streamed())
    plain = asyncio.ensure_future(api.http.post("/v1/completions", json={}))
    await api.wait_metric("megatron_gpt2_generated_tokens_total", 2)
    await api.engine.die()
    error = (await plain).json()["error"]
    assert (500, "internal_error") == ((await plain).status_code, error["code"])
    assert error["message"] in await streaming
    assert (await streaming).endswith("data: [DONE]\n\n")

    for stream in (False, True):
        refused = await api.http.post("/v1/completions", json={"stream": stream})
        assert (503, "service_unavailable") == (
            refused.status_code,
            refused.json()["error"]["code"],
        )
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert 503 == (await api.http.get("/readyz")).status_code
    assert 200 == (await api.http.get("/livez")).status_code

    (await api.restart()).ready()
    await api.wait_phase("ready")
    await api.complete(prompt="again")
    assert "megatron_gpt2_engine_restarts_total 1.0" in (await api.http.get("/metrics")).text


async def test_a_request_that_the_lost_engine_had_not_begun_is_served_by_the_next(
    api: Service,
) -> None:
    """It waits through the restart and never sees an error."""
    api.engine.announce_started = False
    api.engine.gate.clear()
    asking = asyncio.ensure_future(api.complete(prompt="x", seed=1))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    await api.engine.die()
    (await api.restart()).ready()
    answer = await asking
    assert (
        api.tokenizer.decode(random_tokens(api.engine.submitted[0], api.engine.submits[0].params, 0))
        == answer["choices"][0]["text"]
    )
