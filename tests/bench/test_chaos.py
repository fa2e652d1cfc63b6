"""What faults excuse: only what was open while the engine was away, and only an end that says so."""

import random
from typing import Any, cast

import pytest

from bench.chaos import Chaos, Outage
from bench.mixture import Answer


@pytest.mark.parametrize(
    ("begin", "end", "excused"),
    [(0, 9, False), (0, 10, True), (11, 12, True), (0, 100, True), (20, 21, True), (20.1, 29, False), (31, 99, True)],
)
def test_an_outage_excuses_what_was_open_within_it(begin: float, end: float, excused: bool) -> None:
    """One that is not over yet excuses all that is open since."""
    chaos = Chaos(cast(Any, None), cast(Any, None), random.Random(0), outages=[Outage(10, 20), Outage(30)])
    assert excused == chaos.may_cut(begin, end)


@pytest.mark.parametrize(
    ("answer", "was_cut"),
    [
        (Answer(200), False),
        (Answer(200, error="{}"), True),
        (Answer(200, error="{}", done=False), False),
        (Answer(200, done=False), False),
        (Answer(503, error="{}"), True),
        (Answer(500, error="{}"), True),
        (Answer(500), False),
        (Answer(429, error="{}"), False),
    ],
)
def test_a_cut_answer_says_so(answer: Answer, was_cut: bool) -> None:
    """A stream that breaks off without an error event and [DONE] has no excuse."""
    assert was_cut == answer.was_cut
