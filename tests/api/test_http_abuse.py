"""What is sent as HTTP and is none, or could be read in two ways: one answer in the envelope, or none, and an end."""

import asyncio
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.protocol import HttpLimits
from tests.api.conftest import Service, Start
from tests.api.raw_http import connect, exchange, reset_on_close

# What follows a request that is refused must not be taken for another one.
SMUGGLED = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"prompt": [1], "max_tokens": 1}'
CHUNKED_BODY = b"20\r\n" + BODY + b"\r\n0\r\n\r\n"
assert 0x20 == len(BODY)


def _chunked(body: bytes) -> bytes:
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + body


def _get(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in (b"GET /livez HTTP/1.1", b"Host: x", *lines, b""))


REFUSED = {
    "content-length and transfer-encoding": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "transfer-encoding and content-length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 32\r\nContent-Length: 33\r\n\r\n" + BODY,
    "one length twice": POST + b"Content-Length: 32\r\nContent-Length: 32\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 32, 32\r\n\r\n" + BODY,
    "length +": POST + b"Content-Length: +32\r\n\r\n" + BODY,
    "length -": POST + b"Content-Length: -32\r\n\r\n" + BODY,
    "length 0x": POST + b"Content-Length: 0x20\r\n\r\n" + BODY,
    "length with a space": POST + b"Content-Length: 3 2\r\n\r\n" + BODY,
    "length with an underscore": POST + b"Content-Length: 3_2\r\n\r\n" + BODY,
    "length with other digits": POST + "Content-Length: ٣٢\r\n\r\n".encode() + BODY,
    "empty length": POST + b"Content-Length:\r\n\r\n" + BODY,
    "length past 64 bits": POST + b"Content-Length: 18446744073709551648\r\n\r\n" + BODY,
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED_BODY,
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED_BODY,
    "chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNKED_BODY,
    "two encodings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED_BODY,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED_BODY,
    "quoted encoding": POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKED_BODY,
    "empty encoding": POST + b"Transfer-Encoding:\r\n\r\n" + CHUNKED_BODY,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED_BODY,
    "tab before the colon": POST + b"Transfer-Encoding\t: chunked\r\n\r\n" + CHUNKED_BODY,
    "vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKED_BODY,
    "folded encoding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKED_BODY,
    "chunked in HTTP/1.0": b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_BODY,
    "folded header": _get(b"A: b", b" c"),
    "bare LF": b"GET /livez HTTP/1.1\nHost: x\n\n",
    "bare LF after a header": b"GET /livez HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "bare CR after a header": b"GET /livez HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    "bare LF at the end": b"GET /livez HTTP/1.1\r\nHost: x\r\n\n",
    "NUL in a name": _get(b"A\0b: c"),
    "NUL in a value": _get(b"A: b\0c"),
    "control character in a value": _get(b"A: b\x07c"),
    "no colon": _get(b"header"),
    "no name": _get(b": value"),
    "space in a name": _get(b"A b: c"),
    "space before the first header": b"GET /livez HTTP/1.1\r\n Host: x\r\n\r\n",
    "negative chunk": _chunked(b"-1\r\n" + BODY),
    "chunk past 64 bits": _chunked(b"fffffffffffffffff\r\n" + BODY),
    "chunk in 0x": _chunked(b"0x20\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk without a size": _chunked(b"\r\n" + BODY),
    "no CRLF after a chunk": _chunked(b"20\r\n" + BODY + b"0\r\n\r\n"),
    "a longer chunk than it says": _chunked(b"1f\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "LF after a chunk's size": _chunked(b"20\n" + BODY + b"\n0\n\n"),
    "space after a chunk's size": _chunked(b"20 \r\n" + BODY + b"\r\n0\r\n\r\n"),
    "LF in a chunk's extension": _chunked(b"20;a\n" + BODY + b"\r\n0\r\n\r\n"),
    "a length among the trailers": _chunked(b"20\r\n" + BODY + b"\r\n0\r\nContent-Length: 3\r\n\r\n"),
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/0.9, said": b"GET /livez HTTP/0.9\r\nHost: x\r\n\r\n",
    "HTTP/1.2": b"GET /livez HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
    "http/1.1": b"GET /livez http/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "SOCKS": b"\x05\x01\x00",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "authority": b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute without a path": b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown method": b"BREW /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "method in small letters": b"get /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs in the request line": b"GET\t/livez\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "raw bytes in the path": b"GET /livez\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in the path": b"GET /livez\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no Host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two Hosts": _get(b"Host: x"),
    "upgrade of another version": b"GET /livez HTTP/2.0\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
async def test_what_is_no_request_gets_one_answer(api: Service, data: bytes) -> None:
    """A 4xx in the envelope, and the end: what follows on the connection is thrown away. The next one is served."""
    (answer,) = await exchange(api, data + SMUGGLED)
    assert 400 <= answer.status < 500
    assert "close" == answer.headers["connection"]
    assert answer.error["code"] in ("invalid_http", "method_not_allowed")
    assert [] == api.engine.submitted
    assert 200 == (await api.http.get("/readyz")).status_code


LEGAL = {
    "absolute": (b"GET http://elsewhere/livez HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "asterisk of a GET": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "known method": (b"PROPFIND /livez HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
    "TRACE": (b"TRACE /livez HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
    "%2e%2e": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "dots": (b"GET /docs/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "dots in a model's name": (b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "%2f": (b"GET /v1%2fmodels HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    "%00": (b"GET /livez%00 HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "%0d%0a": (b"GET /livez%0d%0aX:%20y HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "overlong UTF-8": (b"GET /%c0%ae%c0%ae/%c0%af HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "half a percent code": (b"GET /livez%2 HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "surrogate": (b"GET /%ed%a0%80 HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "two slashes": (b"GET //livez HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "empty lines before": (b"\r\n\r\n" + _get(), [200]),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\n\r\n", [200]),
    "bytes in a value": (_get(b"X-Request-Id: caf\xe9"), [200]),
    "space around a length": (POST + b"Content-Length:  32 \t\r\n\r\n" + BODY, [200]),
    "zeros before a length": (POST + b"Content-Length: 0032\r\n\r\n" + BODY, [200]),
    "chunked": (_chunked(CHUNKED_BODY), [200]),
    "CHUNKED": (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n" + CHUNKED_BODY, [200]),
    "chunk of one byte": (_chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"), [200]),
    "chunk extension": (_chunked(b'20;a=b;c="\\"d"\r\n' + BODY + b"\r\n0\r\n\r\n"), [200]),
    "zeros before a chunk's size": (_chunked(b"000020\r\n" + BODY + b"\r\n000\r\n\r\n"), [200]),
    "trailers": (_chunked(b"20\r\n" + BODY + b"\r\n0\r\nX-Request-Id: later\r\nAuthorization: x\r\n\r\n"), [200]),
    "websocket": (_get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"), [200]),
    "h2c": (_get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"), [200]),
    "h2c with a body": (POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 32\r\n\r\n" + BODY, [200]),
    "h2c in chunks": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_BODY,
        [200],
    ),
    "a body that asks to go on": (POST + b"Expect: 100-continue\r\nContent-Length: 32\r\n\r\n" + BODY, [100, 200]),
    "another expectation": (_get(b"Expect: the-unexpected"), [200]),
    "body of a GET": (_get(b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, [200]),
}


@pytest.mark.parametrize(("data", "statuses"), LEGAL.values(), ids=LEGAL)
async def test_what_is_odd_but_legal_is_served(api: Service, data: bytes, statuses: list[int]) -> None:
    """And what follows it on the connection is another request, with its own answer."""
    last = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    if b"HTTP/1.0" in data:  # the last of its connection
        statuses, last = [*statuses, 200], data + last
        assert 1 == len(await exchange(api, last))
        return
    *answers, closing = await exchange(api, data + last)
    assert statuses == [answer.status for answer in answers]
    assert all(answer.status < 400 or answer.error for answer in answers)
    assert all("later" != answer.headers.get("x-request-id") for answer in answers)
    assert (200, b"1.2.3") == (closing.status, closing.body[12:17])


@pytest.mark.parametrize("piece", [1, 7, 1000])
async def test_any_split_of_the_bytes_is_the_same(api: Service, piece: int) -> None:
    """The bytes of several requests, an upgrade among them, one at a time too."""
    upgrade = POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 32\r\n\r\n" + BODY
    data = _get() + upgrade + _chunked(CHUNKED_BODY) + b"GET /livez HTTP/1.0\r\n\r\n"
    connection = await connect(api)
    connection.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(data), piece):
        connection.writer.write(data[start : start + piece])
        await asyncio.sleep(0)
    assert [200] * 4 == [answer.status for answer in await connection.answers()]
    connection.writer.close()


async def test_pipelined_requests_are_answered_in_order(api: Service) -> None:
    """Each with its own answer, whatever kind it is; what one refuses ends the connection after those before it."""
    ids = [b"r%d" % number for number in range(12)]
    requests = []
    for number, request_id in enumerate(ids):
        body = b'{"prompt": [%d], "max_tokens": 3, "stream": %s}' % (number, b"true" if number % 3 else b"false")
        requests.append(POST + b"X-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (request_id, len(body)) + body)
    answers = await exchange(api, b"".join(requests) + b"broken\r\n\r\n" + SMUGGLED)
    assert [*[200] * 12, 400] == [answer.status for answer in answers]
    assert [request_id.decode() for request_id in ids] == [answer.headers["x-request-id"] for answer in answers[:-1]]
    for number, answer in enumerate(answers[:-1]):
        assert (b"data: [DONE]" in answer.body) == bool(number % 3)
    assert [(number,) for number in range(12)] == [request.prompt for request in api.engine.submitted]


async def test_what_breaks_behind_an_answer_does_not_break_it(api: Service) -> None:
    """A stream that is under way goes on to its end; the refusal of what was sent after it comes then."""
    api.engine.tokens_before_gate = 2
    api.engine.gate.clear()
    connection = await connect(api)
    body = b'{"prompt": [1], "max_tokens": 5, "stream": true}'
    connection.writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await api.wait_metric("megatron_gpt2_generated_tokens_total", 2)
    connection.writer.write(b"nonsense\r\n\r\n" + SMUGGLED)
    assert 200 == (await api.http.get("/readyz")).status_code  # by now it is read
    api.engine.gate.set()
    stream, refusal = await connection.answers()
    assert (200, 400) == (stream.status, refusal.status)
    assert stream.body.endswith(b"data: [DONE]\n\n")
    connection.writer.close()


async def test_so_many_requests_wait_on_a_connection(api: Service) -> None:
    """Those past the bound are not even read: memory does not grow with them."""
    api.engine.gate.clear()
    asking = asyncio.create_task(exchange(api, (POST + b"Content-Length: 32\r\n\r\n" + BODY) * 1000))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.gate.set()
    *answers, refusal = await asking
    assert [200] * 33 == [answer.status for answer in answers]
    assert (429, "overloaded_error") == (refusal.status, refusal.error["type"])
    assert 33 == len(api.engine.submitted)


async def test_a_client_that_leaves_takes_its_pipelined_requests_along(api: Service) -> None:
    """The one that is being answered is aborted, those behind it never begin."""
    api.engine.gate.clear()
    connection = await connect(api)
    connection.writer.write((POST + b"Content-Length: 32\r\n\r\n" + BODY) * 3)
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    connection.writer.close()
    await api.engine.wait_for(lambda: bool(api.engine.aborted))
    assert 200 == (await api.http.get("/readyz")).status_code
    assert 1 == len(api.engine.submitted)


async def test_an_answer_instead_of_100_is_the_last_of_its_connection(start: Start) -> None:
    """The client may send the body all the same, or another request: nobody could tell which."""
    api: Service = await start(max_body_bytes=10)
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    connection = await connect(api)
    connection.writer.write(head)
    answer = await connection.answer()
    assert answer is not None
    assert 413 == answer.status
    connection.writer.write(SMUGGLED)
    assert [] == await connection.answers()
    connection.writer.close()


async def test_a_body_that_is_shorter_than_it_says(api: Service) -> None:
    """The client is gone: nothing is submitted, and it is counted as such."""
    for end in (b"", BODY[:10]):
        connection = await connect(api)
        connection.writer.write(POST + b"Content-Length: 32\r\n\r\n" + end)
        connection.writer.close()
    await api.wait_metric('megatron_gpt2_http_responses_total{method="POST",route="/v1/completions",status="499"}', 2)
    assert [] == api.engine.submitted


async def test_a_reset_at_every_byte(api: Service) -> None:
    """Of a request with a body, and of what follows it: whatever has begun in the engine ends there."""
    data = POST + b"Content-Length: 32\r\n\r\n" + BODY + SMUGGLED
    api.engine.gate.clear()
    for end in range(len(data)):
        connection = await connect(api)
        connection.writer.write(data[:end])
        reset_on_close(connection.writer.get_extra_info("socket"))
        connection.writer.close()
    await api.engine.wait_for(lambda: len(api.engine.submitted) == len(api.engine.aborted))
    api.engine.gate.set()
    assert 1 == len((await api.complete(prompt=[1], max_tokens=1))["choices"])


WORDS = [
    b"GET ",
    b"POST ",
    b"CONNECT ",
    b"/livez",
    b"/v1/completions",
    b" HTTP/1.1\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"Host: x\r\n",
    b"Content-Length: ",
    b"5",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: upgrade\r\n",
    b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"0\r\n\r\n",
    b"20\r\n",
    BODY,
    b"%",
    b"\0",
]
_bytes = st.lists(st.sampled_from(WORDS) | st.binary(max_size=8), max_size=20).map(b"".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=_bytes, split=st.integers(0, 100))
async def test_any_bytes_do_no_harm(impatient: Service, data: bytes, split: int) -> None:
    """No answer to them is a 5xx, each is whole, errors are in the envelope, and the next request is served."""
    connection = await connect(impatient)
    connection.writer.write(data[:split])
    await asyncio.sleep(0)
    connection.writer.write(data[split:] + b"GET /livez HTTP/1.0\r\n\r\n")
    for answer in await connection.answers():
        assert answer.status < 500
        assert answer.status < 400 or answer.error
    connection.writer.close()
    (answer,) = await exchange(impatient, b"GET /readyz HTTP/1.0\r\n\r\n")
    assert 200 == answer.status


@pytest.fixture
async def impatient(start: Start) -> Service:
    """A service that soon gives up on the rest of a request."""
    running: Service = await start(limits=HttpLimits(header_seconds=0.05, body_seconds=0.05))
    return running
