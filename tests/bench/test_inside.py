"""The step's time from what clients read: it is the step's, however streams are apart and tokens put together."""

import itertools
import random

import pytest

from bench.inside import Marks, window

STEP = 0.003


def stream(begin: int, tokens_an_event: int, *, num_steps: int = 300) -> Marks:
    """Its first token comes from step `begin`; before that the steps of prompts take ten times as long."""
    counts = itertools.chain([1], range(1 + tokens_an_event, num_steps, tokens_an_event))
    return [(at(begin + count), 100 + count) for count in counts]


def at(step: int) -> float:
    return STEP * (step + 9 * min(step, 40))


@pytest.mark.parametrize("num_streams", [1, 7, 256])
@pytest.mark.parametrize("tokens_an_event", [1, 5])
def test_the_step_is_found_between_the_last_to_begin_and_the_first_to_end(
    num_streams: int, tokens_an_event: int
) -> None:
    """What the first did while others were in prefill is in no figure, and the mean context is within the bounds."""
    rng = random.Random(num_streams)
    begins = [rng.randrange(40) for _ in range(num_streams - 1)] + [40]
    seconds, num_steps = window([stream(begin, tokens_an_event) for begin in begins], 128, 256)
    assert STEP == pytest.approx(seconds)
    assert 128 - 40 - 2 * tokens_an_event <= num_steps <= 128


def test_streams_that_are_never_together_are_told() -> None:
    with pytest.raises(ValueError, match="2 streams never decoded together at 128 to 256"):
        window([stream(0, 1, num_steps=100), stream(200, 1)], 128, 256)
