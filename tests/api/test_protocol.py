"""What is no HTTP request, over a raw socket."""

import asyncio
import json

import pytest

from service.api.protocol import write_of
from tests.api.conftest import Service


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"FOO /readyz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /readyz HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_no_request_is_answered_in_the_envelope(api: Service, request_bytes: bytes) -> None:
    """A 400 with an id, and the connection is closed; the next request, on another one, is served."""
    reader, writer = await asyncio.open_connection(api.http.base_url.host, api.http.base_url.port)
    writer.write(request_bytes)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 400 Bad Request"
    assert len(body) == int(headers["content-length"])
    assert ("application/json", "close") == (headers["content-type"], headers["connection"])
    assert headers["x-request-id"]
    error = json.loads(body)["error"]
    assert ("invalid_request_error", None, "invalid_http") == (error["type"], error["param"], error["code"])
    assert (await api.http.get("/readyz")).status_code == 200


def test_another_server_has_no_shortcut() -> None:
    """Then a body goes through ASGI's send."""
    assert not write_of({"type": "http"})(b"data")


async def test_what_one_turn_has_to_say_comes_in_one_piece(api: Service) -> None:
    """The status line with the first event, and the last event, [DONE] and the end of the body; the rest between."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt": [1], "max_tokens": 1, "stream": true, "stream_options": {"include_usage": true}}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    pieces = await reader.read(100_000)
    writer.close()
    assert pieces.startswith(b"HTTP/1.1 200 OK\r\n")
    assert pieces.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert 1 == pieces.count(b'"choices":[]')
