"""Grammars compiled in a thread of their own: in order, without a lost wake-up, and never in the caller's way."""

import select
import socket
import threading

import pytest

from service.engine.compiler import GrammarCompiler
from tests.engine.fake_grammar import FakeConstraint


def woken(compiler: GrammarCompiler, seconds: float = 10) -> bool:
    """Whether `wake` rings in time; takes what rang, as the channel does."""
    ready, _, _ = select.select([compiler.wake], [], [], seconds)
    return bool(ready) and bool(compiler.wake.recv(4096))


def always(_: int) -> bool:
    return True


def test_every_grammar_comes_out_once_in_order() -> None:
    """With the requests it was for; each is announced by a wake-up that comes after it can be taken."""
    compiler = GrammarCompiler(FakeConstraint, always)
    texts = [f"grammar {number}" for number in range(50)]
    for number, text in enumerate(texts):
        compiler.submit((number, number + 100), text)
    taken = []
    while len(taken) < len(texts):
        assert woken(compiler)
        taken += compiler.take()
    assert [(number, number + 100) for number in range(50)] == [request_ids for request_ids, _ in taken]
    for text, (_, constraint) in zip(texts, taken, strict=True):
        assert isinstance(constraint, FakeConstraint)
        assert FakeConstraint(text).allowed == constraint.allowed
    assert [] == compiler.take()
    compiler.close()


class Panic(BaseException):
    """What a compiled library raises for its own faults is no Exception."""


@pytest.mark.parametrize("error", [ValueError("line 1"), Panic("index out of range")])
def test_what_a_compile_raises_is_handed_over(error: BaseException) -> None:
    """As a value; the next one is compiled."""

    def compile_grammar(text: str) -> FakeConstraint:
        if text == "bad":
            raise error
        return FakeConstraint(text)

    compiler = GrammarCompiler(compile_grammar, always)
    compiler.submit((1,), "bad")
    compiler.submit((2,), "good")
    taken = []
    while len(taken) < 2:
        assert woken(compiler)
        taken += compiler.take()
    assert ((1,), error) == taken[0]
    assert isinstance(taken[1][1], FakeConstraint)
    compiler.close()


def test_nothing_of_it_waits_for_a_compile() -> None:
    """Neither submit nor take; one runs at a time."""
    open_gate = threading.Event()
    begun = threading.Semaphore(0)

    def compile_grammar(text: str) -> FakeConstraint:
        begun.release()
        assert open_gate.wait(10)
        return FakeConstraint(text)

    compiler = GrammarCompiler(compile_grammar, always)
    for number in range(2):
        compiler.submit((number,), "x")
    assert begun.acquire(timeout=10)
    assert [] == compiler.take()
    assert not begun.acquire(blocking=False)
    assert not woken(compiler, 0)
    open_gate.set()
    assert begun.acquire(timeout=10)
    compiler.close()


def test_more_wake_ups_than_the_sockets_hold_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """While nobody takes them; one is enough to take all."""
    last = threading.Event()

    def compile_grammar(text: str) -> FakeConstraint:
        if text == "last":
            last.set()
        return FakeConstraint(text)

    compiler = GrammarCompiler(compile_grammar, always)
    compiler._waker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for number in range(2000):
        compiler.submit((number,), "x")
    compiler.submit((2000,), "last")
    assert last.wait(10)
    assert woken(compiler)
    taken = compiler.take()
    compiler.close()
    assert 2001 == len(taken + compiler.take())
    assert [] == caplog.records


def test_closing_drops_what_has_not_begun() -> None:
    """And waits for what has."""
    open_gate = threading.Event()
    begun = threading.Semaphore(0)
    compiled = []

    def compile_grammar(text: str) -> FakeConstraint:
        begun.release()
        assert open_gate.wait(10)
        compiled.append(text)
        return FakeConstraint(text)

    compiler = GrammarCompiler(compile_grammar, always)
    for text in ("first", "second", "third"):
        compiler.submit((1,), text)
    assert begun.acquire(timeout=10)
    threading.Timer(0.05, open_gate.set).start()
    compiler.close()
    assert ["first"] == compiled


def test_what_nobody_waits_for_any_more_is_not_compiled() -> None:
    """One of the requests is enough to want it."""
    open_gate = threading.Event()
    compiled = []

    def compile_grammar(text: str) -> FakeConstraint:
        assert open_gate.wait(10)
        compiled.append(text)
        return FakeConstraint(text)

    wanted = {1, 2, 3, 4, 5}
    compiler = GrammarCompiler(compile_grammar, wanted.__contains__)
    for request_ids in ((1,), (2, 3), (4,), (5,)):
        compiler.submit(request_ids, f"for {request_ids}")
    wanted -= {3, 4}
    open_gate.set()
    taken = []
    while len(taken) < 3:
        assert woken(compiler)
        taken += compiler.take()
    compiler.close()
    assert [(1,), (2, 3), (5,)] == [request_ids for request_ids, _ in taken]
    assert ["for (1,)", "for (2, 3)", "for (5,)"] == compiled
