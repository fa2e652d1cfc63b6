"""Intervals, against known values and against what they claim."""

import math
import random

import pytest

from service.evaluation.statistics import loss_interval, wilson_interval


def test_wilson_of_known_values() -> None:
    """81 of 263 (Newcombe 1998, method 3); nothing and everything stay within 0 and 1."""
    assert (0.2553, 0.3662) == pytest.approx(wilson_interval(81, 263), abs=5e-5)
    assert (0.0, 0.1611) == pytest.approx(wilson_interval(0, 20), abs=5e-5)
    assert (0.8389, 1.0) == pytest.approx(wilson_interval(20, 20), abs=5e-5)


def test_a_loss_of_one_block_has_no_interval() -> None:
    assert loss_interval([5.0], [1000]) is None
    assert loss_interval([5.0, 5.0], [1023, 1]) is None


def test_the_interval_holds_the_mean() -> None:
    """Of 300 texts of 40 blocks whose tokens are alike within a block, nine tenths or more; blocks may be of parts."""
    noise = random.Random(0)
    num_held = 0
    for _ in range(300):
        losses, counts = [], []
        for _ in range(40):
            mean = noise.gauss(3, 0.5)
            for _ in range(32):
                losses.append(32 * mean + math.sqrt(32) * noise.gauss(0, 1))
                counts.append(32)
        interval = loss_interval(losses, counts)
        assert interval is not None
        num_held += interval[0] <= 3 <= interval[1]
    assert num_held >= 270
