"""Around every request: its id, the bound on its body, its log line."""

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.conftest import Service, Start
from tests.api.raw_http import connect


async def test_request_id_is_echoed(api: Service) -> None:
    """The client's id comes back on every answer, good or bad, plain or streamed; without one each gets a new one."""
    for path, body in (("/v1/completions", {}), ("/v1/completions", {"stream": True}), ("/v1/completions", {"n": 0})):
        response = await api.http.post(path, json=body, headers={"X-Request-Id": "my id 7"})
        assert "my id 7" == response.headers["x-request-id"]
    new = [(await api.http.get("/livez")).headers["x-request-id"] for _ in range(2)]
    assert 2 == len(set(new))
    assert all(new)


@pytest.mark.parametrize("request_id", [b"x" * 129, b"caf\xc3\xa9", b"a\tb", b""])
async def test_an_unfit_request_id_is_replaced(api: Service, request_id: bytes) -> None:
    """More than 128 characters, or some that are not printable ASCII."""
    response = await api.http.get("/nothing", headers=[(b"X-Request-Id", request_id)])
    assert request_id != response.headers["x-request-id"].encode()
    assert response.headers["x-request-id"].isalnum()


async def test_two_live_requests_with_one_id_do_not_mix(api: Service) -> None:
    """The id is a label only."""
    bodies = [{"prompt": [i], "seed": i, "temperature": 1} for i in (1, 2)]
    alone = [(await api.complete(**body))["choices"] for body in bodies]
    headers = {"X-Request-Id": "same"}
    asking = [api.http.post("/v1/completions", json=body, headers=headers) for body in bodies]
    assert alone == [response.json()["choices"] for response in await asyncio.gather(*asking)]


async def test_a_body_over_the_limit_is_refused(start: Start) -> None:
    """By its declared length before it is read, and in chunks at the first byte too many; the limit itself passes."""
    api: Service = await start(max_body_bytes=1000)
    within = b'{"prompt": "' + b" " * (1000 - 14) + b'"}'
    assert 1000 == len(within)
    assert 200 == (await api.http.post("/v1/completions", content=within)).status_code

    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(20):
            sent += 100
            yield b" " * 100

    for content in (b" " * 1001, b" " * 1_000_000, chunks()):
        response = await api.http.post("/v1/completions", content=content)
        assert (413, "request_too_large") == (response.status_code, response.json()["error"]["code"])
        assert "1000" in response.json()["error"]["message"]
    assert 2000 == sent


@pytest.mark.parametrize("missing", [10, 0], ids=["on their way", "whole"])
async def test_bodies_of_open_requests_have_a_bound_together(start: Start, missing: int) -> None:
    """32 of the largest: past that one is refused, and when they have gone, by any end, there is room again."""
    api: Service = await start(max_body_bytes=1000)
    api.engine.gate.clear()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    body = b'{"prompt": "x"}'.ljust(1000)
    connections = [await connect(api) for _ in range(33)]
    for connection in connections:
        connection.writer.write(head + body[: 1000 - missing])
    done, _ = await asyncio.wait(
        [asyncio.create_task(connection.answer()) for connection in connections],
        return_when=asyncio.FIRST_COMPLETED,
    )
    answer = done.pop().result()
    assert answer is not None
    assert (503, "too_many_bodies") == (answer.status, answer.error["code"])
    assert "1" == answer.headers["retry-after"]
    assert 400 == (await api.http.post("/v1/completions", content=b"{")).status_code  # small ones are not kept out
    for connection in connections:
        connection.writer.close()
    await api.wait_metric('megatron_gpt2_http_responses_total{method="POST",route="/v1/completions",status="499"}', 32)
    api.engine.gate.set()
    for _ in range(40):
        await api.complete(prompt=[1] * 300, max_tokens=1)


async def test_a_declared_length_is_refused_before_a_byte_is_sent(start: Start) -> None:
    """A client that waits for 100 Continue gets 413 instead."""
    api: Service = await start(max_body_bytes=1000)
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
    assert b"413" in await reader.readline()
    writer.close()


async def test_the_log_line_has_figures_and_no_text(api: Service, caplog: pytest.LogCaptureFixture) -> None:
    """One line a request, at debug for what machines ask all the time."""
    with caplog.at_level(logging.DEBUG, "service.api.middleware"):
        await api.complete(prompt="my secret", max_tokens=3, n=2)
        await api.http.get("/readyz")
        await api.http.get("/nothing/secret")
    completion, health, missing = caplog.records
    figures = completion.__dict__["figures"]
    expected = {"method": "POST", "route": "/v1/completions", "status": 200, "stream": False, "num_choices": 2}
    expected |= {"prompt_tokens": 2, "completion_tokens": 6, "num_unfinished": 0}
    assert expected == {name: figures[name] for name in expected}
    assert "completion_tokens=6" in completion.getMessage()
    assert [logging.INFO, logging.DEBUG, logging.INFO] == [record.levelno for record in caplog.records]
    assert ("/readyz", "other") == (health.__dict__["figures"]["route"], missing.__dict__["figures"]["route"])
    assert "secret" not in caplog.text


async def test_an_unexpected_exception_is_a_500(
    api: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the envelope, with its request id, without its message, logged once with its trace; also within a stream."""

    def broken() -> int:
        raise KeyError("inner detail")

    monkeypatch.setattr(api.client, "check_ready", broken)
    response: httpx.Response = await api.http.post("/v1/completions", json={}, headers={"X-Request-Id": "r1"})
    assert (500, "r1") == (response.status_code, response.headers["x-request-id"])
    assert "internal_error" == response.json()["error"]["code"]
    assert "inner detail" not in response.text
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["service.api.errors"] == [record.name for record in errors]
    assert errors[0].exc_info is not None

    monkeypatch.undo()
    monkeypatch.setattr(api.client, "submit", lambda _: broken())
    for stream in (False, True):
        response = await api.http.post("/v1/completions", json={"stream": stream})
        assert (500, "internal_error") == (response.status_code, response.json()["error"]["code"])
