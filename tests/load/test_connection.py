"""Reading events: however the bytes are cut, and whatever ends a line, the same events are counted."""

import pytest

from service.load.connection import Connection
from service.load.plan import Plan, Server
from tests.load.fake_server import FakeServer

FIELDS = {"model": "fake", "max_tokens": 20, "stream": True}


def plan(server: FakeServer) -> Plan:
    return Plan(server=Server.at(server.url), fields=FIELDS, prompt_tokens=5, requests=1)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64, 10_000])
async def test_events_are_the_same_however_they_are_cut(newline: str, piece_bytes: int) -> None:
    """Comments, the usage and [DONE] are no events; one connection carries one request after another."""
    with FakeServer(0, 0, newline=newline, piece_bytes=piece_bytes) as server:
        asked = plan(server)
        connection = await Connection.open(asked.server)
        bodies = asked.bodies(0)
        for _ in range(3):
            request = asked.server.request("/v1/completions", next(bodies))
            answer = await connection.ask(request, stream=True, begun_at=0, timeout_seconds=10)
            assert (None, 5, 5, 20) == (
                answer.error,
                len(answer.event_times),
                answer.prompt_tokens,
                answer.completion_tokens,
            )
        connection.abort()


async def test_a_request_that_takes_too_long_ends_as_a_timeout() -> None:
    with FakeServer(first_seconds=5) as server:
        asked = plan(server)
        connection = await Connection.open(asked.server)
        request = asked.server.request("/v1/completions", next(asked.bodies(0)))
        answer = await connection.ask(request, stream=True, begun_at=0, timeout_seconds=0.05)
    assert "timeout" == answer.error
    assert connection.closed


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", ("h", 80, False, "")),
        ("http://h:8000/v1/", ("h", 8000, False, "")),
        ("https://h/some/v1", ("h", 443, True, "/some")),
        ("http://[::1]:7", ("::1", 7, False, "")),
    ],
)
def test_a_base_url_may_end_in_v1(url: str, expected: tuple[str, int, bool, str]) -> None:
    server = Server.at(url)
    assert expected == (server.host, server.port, server.tls, server.prefix)
