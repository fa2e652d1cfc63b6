"""Client processes that end by themselves: whenever they do, it is a CrowdError, and nothing of them stays."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from service.load import worker
from service.load.command import main
from service.load.crowd import Crowd, CrowdError
from service.load.plan import Level, Plan, Server
from tests.load.fake_server import FakeServer

LEVEL = Level("closed", 2)
EACH = pytest.mark.parametrize("number", [0, 1])


def kill(number: int) -> None:
    sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)[number].kill()


def plan(server: FakeServer) -> Plan:
    fields = {"model": "fake", "max_tokens": 4, "stream": True}
    return Plan(server=Server.at(server.url), fields=fields, seconds=10_000, processes=2)


@pytest.fixture(autouse=True)
def none_stay() -> Iterator[None]:
    """In the end no client process is there."""
    yield
    assert [] == multiprocessing.active_children()


@EACH
def test_one_that_ends_while_it_starts(number: int) -> None:
    with FakeServer() as server:
        crowd = Crowd(plan(server))
        kill(number)
        with pytest.raises(CrowdError), crowd:
            pytest.fail("it is not there")


@EACH
def test_one_that_ends_before_a_level(number: int) -> None:
    with FakeServer() as server, Crowd(plan(server)) as crowd:
        kill(number)
        with pytest.raises(CrowdError):
            crowd.measure(LEVEL)


@EACH
def test_one_that_ends_within_a_level(number: int) -> None:
    """It is heard of at once, though the level of the others lasts for hours."""

    def fault(count: int, body: dict[str, object]) -> None:
        if count == 1:
            kill(number)

    with FakeServer(0.001, 0.001, fault=fault) as server, Crowd(plan(server)) as crowd, pytest.raises(CrowdError):
        crowd.measure(LEVEL)


def first_ends_at_once(plan: Plan, number: int, pipe: Connection) -> None:
    if number == 0:
        os._exit(1)
    worker.main(plan, number, pipe)


def test_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With exit code 2; the processes that it leaves alone have nothing to say."""
    monkeypatch.setattr(worker, "main", first_ends_at_once)
    with FakeServer() as server:
        assert 2 == main(["--url", server.url])
    assert ["megatron-gpt2 bench: a client process has ended by itself"] == capfd.readouterr().err.splitlines()
