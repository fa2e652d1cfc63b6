"""Grammars compiled beside the engine's steps, in one worker thread. Used by the engine process's loop."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine.grammar import Constraint

Compile = Callable[[str], "Constraint"]


class GrammarCompiler:
    """One grammar after the other, in the order they came."""

    def __init__(self, compile_grammar: Compile, is_wanted: Callable[[int], bool]) -> None:
        """`is_wanted` says, in the worker thread, whether a request still waits for its grammar."""
        self._compile_grammar = compile_grammar
        self._is_wanted = is_wanted
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._done: deque[tuple[tuple[int, ...], Future[Constraint | None]]] = deque()
        self.wake, self._waker = socket.socketpair()  # `wake` has something to read when `take` has something to give
        self._waker.setblocking(False)

    def submit(self, request_ids: tuple[int, ...], grammar: str) -> None:
        """Compile `grammar` for these requests, unless all have ended by the time its turn comes."""
        future = self._worker.submit(self._compile, request_ids, grammar)
        future.add_done_callback(lambda future: self._finish(request_ids, future))

    def take(self) -> list[tuple[tuple[int, ...], Constraint | BaseException]]:
        """What was compiled since the last call, or why it could not be. Never waits."""
        taken: list[tuple[tuple[int, ...], Constraint | BaseException]] = []
        while self._done:
            request_ids, future = self._done.popleft()
            compiled = future.exception() or future.result()
            if compiled is not None:
                taken.append((request_ids, compiled))
        return taken

    def close(self) -> None:
        """Drop what has not begun; what has is bounded in time, and ends with nobody to hear of it."""
        self._worker.shutdown(cancel_futures=True)
        self.wake.close()
        self._waker.close()

    def _compile(self, request_ids: tuple[int, ...], grammar: str) -> Constraint | None:
        return self._compile_grammar(grammar) if any(map(self._is_wanted, request_ids)) else None

    def _finish(self, request_ids: tuple[int, ...], future: Future[Constraint | None]) -> None:
        if future.cancelled():
            return
        self._done.append((request_ids, future))
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return  # full of wake-ups that nobody has taken yet
