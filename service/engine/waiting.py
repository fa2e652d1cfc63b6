"""The queue: which sequence is let in next. Used by the scheduler, and by the running ones when one is preempted.

The lowest priority number comes first, where AGE_SECONDS of waiting count as one number less. Within a priority,
clients take turns by tokens: start-time fair queueing (Goyal, Vin and Cheng, 1996). A sequence's turn is where the
tokens that its client has asked for before end, on a scale that stands still for clients that wait for nothing.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine.sequence import Sequence

AGE_SECONDS = 10.0
_SPARE = 1024  # entries of what does not wait any more, beside as many as there are of what does
_TURN = attrgetter("turn")


class Waiting:
    """Sequences that wait. `clock` gives seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all_lines: dict[int, _Line] = {}  # by priority
        self._lines: dict[int, _Line] = {}  # in which somebody waits
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, sequence: Sequence) -> None:
        """A sequence that comes gets its turn."""
        sequence.arrived_at = self._clock()
        self._all_lines.setdefault(sequence.request.priority, _Line()).give_turn(sequence)
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that had been let in keeps its turn."""
        priority = sequence.request.priority
        self._lines[priority] = line = self._all_lines[priority]
        line.put(sequence)
        self._num_waiting += 1

    def first(self) -> Sequence:
        """The next to be let in. There must be one."""
        now = self._clock()
        lines = self._lines.items()
        _, line = min(lines, key=lambda item: item[0] - (now - item[1].oldest.arrived_at) / AGE_SECONDS)
        return line.sequences[0]

    def remove(self, sequence: Sequence, *, served: bool) -> None:
        """It waits no more: it is let in (`served`), or has ended."""
        line = self._lines[sequence.request.priority]
        line.remove(sequence, served=served)
        self._num_waiting -= 1
        if not line.sequences:
            del self._lines[sequence.request.priority]


class _Line:
    """Those of one priority."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []  # by turn
        # The same, and some that have left; the first that waits is the oldest.
        self._arrivals: deque[Sequence] = deque()
        self._now = 0  # the turn that was served last
        self._ends: dict[str, int] = {}  # by client, where the tokens that it has asked for end; who asked last is last

    @property
    def oldest(self) -> Sequence:
        while not self._arrivals[0].waiting:
            self._arrivals.popleft()
        return self._arrivals[0]

    def give_turn(self, sequence: Sequence) -> None:
        client = sequence.group.client
        start = max(self._now, self._ends.pop(client, 0))
        self._ends[client] = start + sequence.cost
        sequence.turn = (start, sequence.order)
        if len(self._ends) > len(self.sequences) + _SPARE:
            del self._ends[next(iter(self._ends))]

    def put(self, sequence: Sequence) -> None:
        sequence.waiting = True
        insort(self.sequences, sequence, key=_TURN)
        if self._arrivals and sequence.arrived_at < self._arrivals[0].arrived_at:
            self._arrivals.appendleft(sequence)
        else:
            self._arrivals.append(sequence)
        if len(self._arrivals) > len(self.sequences) + _SPARE:
            self._arrivals = deque(sorted(self.sequences, key=attrgetter("arrived_at")))

    def remove(self, sequence: Sequence, *, served: bool) -> None:
        sequence.waiting = False
        del self.sequences[bisect_left(self.sequences, sequence.turn, key=_TURN)]
        if served:
            self._now = max(self._now, sequence.turn[0])
        elif (end := self._ends.get(client := sequence.group.client)) is not None:
            self._ends[client] = max(self._now, end - sequence.cost)  # it has not got these
        if not self.sequences:
            self._ends.clear()
