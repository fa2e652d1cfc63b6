"""What is no HTTP request, over a raw socket; bounds on what is one, in size, time and number."""

import asyncio
import contextlib
import json
import socket

import pytest

from service.api.protocol import HttpLimits, write_of
from tests.api.conftest import Service, Start
from tests.api.raw_http import Answer, Connection, connect, exchange, request

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


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
    writer.write(request(body))
    pieces = await reader.read(100_000)
    writer.close()
    assert pieces.startswith(b"HTTP/1.1 200 OK\r\n")
    assert pieces.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert 1 == pieces.count(b'"choices":[]')


async def test_a_url_has_a_bound(start: Start) -> None:
    """One that is at it is served; one that is longer is refused before it ends, also in pieces, with 10 MB to come."""
    api: Service = await start(limits=HttpLimits(max_url_bytes=100, max_header_bytes=1000))
    path = b"/livez?" + b"a" * 93
    (answer,) = await exchange(api, b"GET %b HTTP/1.0\r\n\r\n" % path)
    assert 200 == answer.status
    for url in (path + b"a", b"/" * 10_000_000):
        (answer,) = await exchange(api, b"GET %b HTTP/1.0\r\n\r\n" % url)
        assert (414, "url_too_long") == (answer.status, answer.error["code"])
    connection = await connect(api)
    connection.writer.write(b"GET ")
    for _ in range(2):
        connection.writer.write(b"/" * 60)
        await asyncio.sleep(0.01)
    (answer,) = await connection.answers()
    assert 414 == answer.status
    connection.writer.close()


async def test_what_is_refused_here_is_counted(start: Start) -> None:
    """By its status, as other answers are: no HTTP, over a limit, and one connection too many."""
    api: Service = await start(limits=HttpLimits(max_url_bytes=100, max_connections=6))
    for sent, status in ((b"GET /%b HTTP/1.0\r\n\r\n" % (b"a" * 200), 414), (b"nonsense\r\n\r\n", 400)):
        (answer,) = await exchange(api, sent)
        assert status == answer.status
    await api.http.get("/livez")  # has a connection from now on
    crowd = [await connect(api) for _ in range(6)]
    (answer,) = await crowd[-1].answers()
    assert 503 == answer.status
    text = (await api.http.get("/metrics")).text
    for connection in crowd:
        connection.writer.close()
    for status in (414, 400, 503):
        assert f'http_responses_total{{method="other",route="other",status="{status}"}} ' in text


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 1_000_000,
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"b" * 1_000_000,
        b"GET " + b" " * 1_000_000,
        b"\r\n" * 1_000_000,
        POST + b"5;" + b"a" * 1_000_000,
        POST + b"5;a=" + b"b" * 1_000_000,
        POST + b"0\r\n" + b"A: b\r\n" * 100_000,
        POST + b"0\r\nA: " + b"b" * 1_000_000,
        POST + b"0" * 1_000_000,
    ],
    ids=["headers", "value", "name", "spaces", "lines", "extension", "its value", "trailers", "trailer", "zeros"],
)
@pytest.mark.parametrize("piece", [500, 100_000])
async def test_what_is_not_the_body_has_a_bound(start: Start, endless: bytes, piece: int) -> None:
    """Wherever it has no end: a 431, after no more than a read past the bound."""
    api: Service = await start(limits=HttpLimits(max_url_bytes=100, max_header_bytes=1000))
    connection = await connect(api)
    asking = asyncio.create_task(connection.answers())
    for start_ in range(0, len(endless), piece):
        connection.writer.write(endless[start_ : start_ + piece])
        await asyncio.sleep(0)
        if asking.done():
            break
    (answer,) = await asking
    assert (431, "headers_too_large") == (answer.status, answer.error["code"])
    connection.writer.close()


async def test_a_head_has_a_bound(start: Start) -> None:
    """To the byte, and a body does not count, nor do requests before it."""
    api: Service = await start(limits=HttpLimits(max_header_bytes=1000))
    connection = await connect(api)
    body = b'{"prompt": "' + b"a" * 3000 + b'", "truncate_prompt_tokens": 3, "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nA: " % len(body)
    fill = b"b" * (1000 - len("/v1/completions") - len("Host: x\r\nContent-Length: 3060\r\nA: \r\n"))
    for _ in range(3):
        connection.writer.write(head + fill + b"\r\n\r\n" + body)
        answer = await connection.answer()
        assert answer is not None
        assert 200 == answer.status
    connection.writer.write(head + fill + b"b\r\n\r\n" + body)
    (answer,) = await connection.answers()
    assert 431 == answer.status
    connection.writer.close()


async def trickle(connection: Connection, data: bytes, piece: bytes) -> list[Answer]:
    """All answers to `data`, after which `piece` is sent for as long as the connection is open."""
    asking = asyncio.create_task(connection.answers())
    connection.writer.write(data)
    while not asking.done():
        await asyncio.wait([asking], timeout=0.02)
        connection.writer.write(piece)
    connection.writer.close()
    return await asking


SLOW = {
    "head": (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: ", b"b", [408]),
    "request line": (b"G", b"", [408]),
    "empty lines": (b"", b"\r\n", [408]),
    "head of a second request": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"G", [200, 400]),
    "second request": (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /", b"a", [200, 408]),
    "body": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b" ", [408]),
    "silent body": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"", [408]),
    "chunks": (POST, b"1\r\n \r\n", [408]),
    "chunk size": (POST, b"0", [408]),
    "trailers": (POST + b"1\r\n \r\n0\r\n", b"A: b\r\n", [408]),
    "body of what has its answer": (
        b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
        b" ",
        [404],
    ),
}


@pytest.mark.parametrize(("data", "piece", "statuses"), SLOW.values(), ids=SLOW)
async def test_a_request_must_arrive_in_time(start: Start, data: bytes, piece: bytes, statuses: list[int]) -> None:
    """However it dawdles: a 408 if it has no answer yet, and the end. Nothing of it is left in the service."""
    api: Service = await start(limits=HttpLimits(header_seconds=0.3, body_seconds=0.3))
    answers = await trickle(await connect(api), data, piece)
    assert statuses == [answer.status for answer in answers]
    assert answers[-1].error["code"] in ("request_timeout", "invalid_http", "not_found")
    assert [] == api.engine.submitted
    assert 200 == (await api.http.get("/readyz")).status_code


async def test_a_connection_that_never_says_a_word_is_closed(start: Start) -> None:
    """Without an answer, as nothing was asked."""
    api: Service = await start(limits=HttpLimits(header_seconds=0.1))
    assert [] == await exchange(api, b"")


async def test_time_for_a_request_is_not_of_the_answers_before_it(start: Start) -> None:
    """A body that waits in the service, as its client sent it early, is not late; neither is a long answer."""
    api: Service = await start(limits=HttpLimits(header_seconds=0.1, body_seconds=0.1))
    api.engine.gate.clear()
    body = b'{"prompt": "' + b"a" * 200_000 + b'", "truncate_prompt_tokens": 3, "max_tokens": 1}'
    asking = asyncio.create_task(exchange(api, 2 * request(body) + b"GET /livez HTTP/1.0\r\n\r\n"))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    await asyncio.sleep(0.3)
    api.engine.gate.set()
    assert [200, 200, 200] == [answer.status for answer in await asking]


async def test_a_connection_too_many_is_turned_away(start: Start) -> None:
    """With a 503 that says when to try again; when another has ended, there is room."""
    api: Service = await start(limits=HttpLimits(max_connections=3))
    await api.http.aclose()  # which has made one
    connections = []
    for _ in range(3):
        connections.append(await connect(api))
        connections[-1].writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await connections[-1].answer()
        assert answer is not None
        assert 200 == answer.status
    for data in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"):
        (answer,) = await exchange(api, data)
        assert (503, "too_many_connections") == (answer.status, answer.error["code"])
        assert ("1", "close") == (answer.headers["retry-after"], answer.headers["connection"])
    connections[0].writer.write(b"GET /livez HTTP/1.0\r\n\r\n")
    assert 1 == len(await connections[0].answers())
    (answer,) = await exchange(api, b"GET /livez HTTP/1.0\r\n\r\n")
    assert 200 == answer.status
    for connection in connections:
        connection.writer.close()


# Who reads


@pytest.mark.parametrize(("num_bytes", "seconds"), [(30, 0.01), (65536, 0.0)], ids=["a trickle", "enough"])
async def test_a_reader_must_take_some_of_what_waits_for_it(start: Start, num_bytes: int, seconds: float) -> None:
    """One that takes a little now and then would keep a large answer in memory for days: it is cut off."""
    api: Service = await start(limits=HttpLimits(send_seconds=0.4))
    body = b'{"prompt": "x", "max_tokens": 1000, "n": 32, "logprobs": 5}'
    loop = asyncio.get_running_loop()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, num_bytes)
        reader.setblocking(False)
        await loop.sock_connect(reader, ("127.0.0.1", int(api.url.rpartition(":")[2])))
        head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        await loop.sock_sendall(reader, head + body)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := await loop.sock_recv(reader, num_bytes):
                answer += piece
                await asyncio.sleep(seconds)
    _, _, text = answer.partition(b"\r\n\r\n")
    assert text.startswith(b'{"id":')
    assert (num_bytes > 30) == text.endswith(b"}}")
    await api.complete(prompt="x", max_tokens=1)


async def test_too_many_pipelined_requests_are_told_when_to_come_again(api: Service) -> None:
    """As every 429."""
    api.engine.gate.clear()
    connection = await connect(api)
    post = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}'
    connection.writer.write(post * 40)
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.gate.set()
    *answers, refusal = await connection.answers()
    assert {200} == {answer.status for answer in answers}
    assert (429, "too_many_pipelined", "1") == (refusal.status, refusal.error["code"], refusal.headers["retry-after"])
    connection.writer.close()
