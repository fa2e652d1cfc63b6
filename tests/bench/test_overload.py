"""What the overload is judged by."""

from dataclasses import replace

import pytest

from bench.overload import growth, judged
from service.load.figures import Figures, Spread, figures_of
from service.load.plan import Level, Plan, Server
from service.load.worker import Tally

PLAN = Plan(server=Server.at("http://h"), fields={"stream": True}, seconds=10)


def figures(tokens_per_second: float, p99: float | None) -> Figures:
    row = figures_of(Level("open", 5), PLAN, [Tally(measured_from=100, measured_to=110)], interrupted=False)
    refused = None if p99 is None else Spread(1, 1, 1, p99)
    return replace(row, tokens_per_second=tokens_per_second, refused=refused)


@pytest.mark.parametrize(
    ("tokens_per_second", "p99", "num_faults"), [(900, 50, 0), (1200, 1, 0), (899, 50, 1), (900, 51, 1), (800, None, 2)]
)
def test_goodput_and_refusals_are_judged(tokens_per_second: float, p99: float | None, num_faults: int) -> None:
    """90 % of the peak at least, and 50 ms at most; an overload in which nothing was refused was none."""
    assert num_faults == len(judged(figures(1000, None), figures(tokens_per_second, p99)))


def test_what_grows_once_is_kept_and_what_grows_always_is_a_leak() -> None:
    """As much as each load added, at least."""
    assert 0 == growth([1000, 1040, 1040])
    assert 20 == growth([1000, 1040, 1060])
    assert -5 == growth([1000, 995, 1040])
