"""What is no HTTP request, over a raw socket."""

import asyncio
import json

import pytest

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
