"""When an engine is started again, and when no more."""

import time

import pytest

from service.supervised import SupervisedEngine


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def supervised(*, max_restarts: int) -> SupervisedEngine:
    def never(*_: object) -> None:
        raise AssertionError

    return SupervisedEngine(
        0,
        name="the engine",
        config=never,  # type: ignore[arg-type]
        max_restarts=max_restarts,
        restart_window_seconds=100,
        on_start=never,
        on_end=never,
    )


def test_back_off(clock: Clock) -> None:
    """At once, then after 1, 2, 4 … 30 seconds; then it is given up."""
    engine = supervised(max_restarts=8)
    delays = [engine.next_delay(1) for _ in range(9)]
    assert [0, 1, 2, 4, 8, 16, 30, 30, None] == delays
    assert engine.given_up


def test_what_was_long_ago_is_forgiven(clock: Clock) -> None:
    """Ends count for as long as the window is."""
    engine = supervised(max_restarts=1)
    for _ in range(5):
        assert 0 == engine.next_delay(1)
        clock.now += 101
    assert not engine.given_up
    assert [0, None] == [engine.next_delay(1), engine.next_delay(1)]
