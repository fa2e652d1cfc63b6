"""What stands around a proxy of Ray Serve: one whole answer a request, over an app that may lose its replica."""

import asyncio
import json
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.ray_proxy import Retries, middlewares

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
REFUSED: Message = {"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"5")]}

Try = Callable[[Receive, Send], Awaitable[None]]


def sends(*messages: Message) -> Try:
    """One try of the app, which reads the body and sends these."""

    async def answer(receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        for message in messages:
            await send(message)

    return answer


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


lost = sends()
refuses = sends(REFUSED, body(b"busy"))
answers = sends(START, body(b"{}"))


class App:
    """An app whose tries do as they are told, one after another; it notes what each could read."""

    def __init__(self, *tries: Try) -> None:
        self.left = list(tries)
        self.read: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = b""

        async def noting() -> Message:
            nonlocal content
            message = await receive()
            content += message.get("body", b"")
            return message

        scope["headers"].append((b"x-request-id", b"serve's"))
        assert 1 == len(scope["headers"]), "of another try"
        await self.left.pop(0)(noting, send)
        self.read.append(content)


async def ask(app: App, *, parts: tuple[bytes, ...] = (b"a", b"b"), leaves: bool = False) -> list[Message]:
    """Everything that is sent to a client with this body; it leaves after that, or waits."""
    request = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    sent: list[Message] = []

    async def receive() -> Message:
        if request:
            return request.pop(0)
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    await Retries(app, pauses=(0, 0, 0))(scope, receive, send)
    return sent


def status(sent: list[Message]) -> int:
    assert 1 == sum(message["type"] == "http.response.start" for message in sent)
    assert not sent[-1].get("more_body")
    found: int = sent[0]["status"]
    return found


def test_ray_serve_is_given_the_middleware() -> None:
    assert [Retries] == [middleware.cls for middleware in middlewares()]


async def test_an_answer_is_passed_on() -> None:
    """As it is, with one request id: the service's, not the one that Serve adds."""
    ids = [(b"x-request-id", b"mine"), (b"x-request-id", b"serve's")]
    app = App(sends({**START, "headers": [*START["headers"], *ids]}, body(b"{}")))
    sent = await ask(app)
    assert 200 == status(sent)
    assert [b"mine"] == [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    assert [b"ab"] == app.read


async def test_a_lost_request_is_asked_once_more_with_its_whole_body() -> None:
    app = App(lost, answers)
    assert 200 == status(await ask(app))
    assert [b"ab", b"ab"] == app.read


async def test_a_request_that_was_lost_halfway_through_its_body_is_whole_the_next_time() -> None:
    async def lost_early(receive: Receive, _send: Send) -> None:
        await receive()

    app = App(lost_early, answers)
    assert 200 == status(await ask(app))
    assert [b"a", b"ab"] == app.read


async def test_a_request_that_ends_every_replica_is_given_up() -> None:
    """After the second loss, with a 503 that says when to try again, in the envelope."""
    app = App(lost, lost, answers)
    sent = await ask(app)
    assert 503 == status(sent)
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert "service_unavailable" == json.loads(sent[1]["body"])["error"]["code"]
    assert 1 == len(app.left)


async def test_a_refused_request_is_asked_again() -> None:
    """As often as there are pauses; the last refusal is passed on as it is."""
    assert 200 == status(await ask(App(refuses, refuses, refuses, answers)))
    sent = await ask(App(refuses, refuses, refuses, refuses))
    assert 503 == status(sent)
    assert b"busy" == sent[1]["body"]
    assert (b"retry-after", b"5") in sent[0]["headers"]


async def test_other_errors_are_passed_on() -> None:
    sent = await ask(App(sends({**START, "status": 429}, body(b"{}")), answers))
    assert 429 == status(sent)


async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    """One event in the envelope, then [DONE]: it is not asked again, and cannot be taken for a whole one."""
    app = App(sends(STREAM, body(b"data: 1\n\n", more=True)), answers)
    sent = await ask(app)
    assert 200 == status(sent)
    error, done, nothing = sent[-1]["body"].decode().split("\n\n")
    assert "service_unavailable" == json.loads(error.removeprefix("data: "))["error"]["code"]
    assert ("data: [DONE]", "") == (done, nothing)
    assert 1 == len(app.left)


async def test_another_answer_that_breaks_off_stays_so() -> None:
    """The server breaks the connection, as the body has not ended."""
    sent = await ask(App(sends(START, body(b"{", more=True)), answers))
    assert [START["type"], "http.response.body"] == [message["type"] for message in sent]
    assert sent[-1]["more_body"]


async def test_nothing_is_asked_again_for_a_client_that_has_left() -> None:
    async def left(receive: Receive, _send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    app = App(left, answers)
    assert [] == await ask(app, leaves=True)
    assert 1 == len(app.left)


async def test_a_body_that_is_not_kept_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was let go of as it came, for a client must not fill a proxy's memory."""
    monkeypatch.setattr("service.ray_proxy._MAX_KEPT_BYTES", 1)
    app = App(lost, answers)
    assert 503 == status(await ask(app))
    assert [b"ab"] == app.read
    app = App(refuses, answers)
    sent = await ask(app)
    assert (503, b"busy") == (status(sent), sent[1]["body"])


@pytest.mark.parametrize("num_losses", [0, 1])
async def test_a_body_is_let_go_of_as_its_answer_begins(num_losses: int) -> None:
    """Also what another try had read before: an answer may take minutes, and is not asked for again."""

    class Part(dict[str, Any]):
        """A message, as it can be watched."""

    parts: list[Message] = [Part(type="http.request", body=b"a", more_body=False)]
    kept = weakref.ref(parts[0])
    seen: list[bool] = []

    async def watching(receive: Receive, send: Send) -> None:
        assert b"a" == (await receive())["body"]
        seen.append(kept() is not None)
        await send(START)
        seen.append(kept() is not None)
        await send(body(b"{}"))

    tries = [*num_losses * [lost], watching]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await tries.pop(0)(receive, send)

    async def receive() -> Message:
        return parts.pop()

    async def send(_message: Message) -> None:
        pass

    await Retries(app, pauses=(0,))({"type": "http", "path": "/", "headers": []}, receive, send)
    assert [True, False] == seen


async def test_an_answer_may_begin_before_its_body_is_read() -> None:
    """What an earlier try has read is there for the one that answers, to its end."""

    async def answers_first(receive: Receive, send: Send) -> None:
        await send(START)
        while (await receive()).get("more_body"):
            pass
        await send(body(b"{}"))

    app = App(lost, answers_first)
    assert 200 == status(await ask(app))
    assert [b"ab", b"ab"] == app.read


async def test_what_is_no_request_passes() -> None:
    """Lifespans and websockets are the proxy's own."""
    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def never() -> Message:
        raise AssertionError

    async def nothing(_message: Message) -> None:
        raise AssertionError

    await Retries(app)({"type": "websocket"}, never, nothing)
    assert ["websocket"] == seen
