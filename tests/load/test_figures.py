"""From measured moments to figures: percentiles by their definition, rates by the share of time that was measured."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.load.connection import Answer
from service.load.figures import Figures, Spread, figures_of, knee_of
from service.load.plan import Level, Plan, Server, share
from service.load.worker import Tally

PLAN = Plan(server=Server.at("http://h"), fields={"stream": True}, seconds=10)


@given(st.lists(st.floats(0, 1000), min_size=1))
def test_percentiles_divide_the_values(seconds: list[float]) -> None:
    """At p50, p90 and p99 so much of the way from the least to the greatest value, in order, lies below."""
    spread = Spread.of(np.array(seconds))
    assert spread is not None
    values = sorted(1000 * value for value in seconds)
    for part, percentile in ((0.5, spread.p50), (0.9, spread.p90), (0.99, spread.p99)):
        place = part * (len(values) - 1)
        assert values[math.floor(place)] - 0.001 <= percentile <= values[math.ceil(place)] + 0.001
    assert values[0] - 0.001 <= spread.mean <= values[-1] + 0.001


def test_no_values_have_no_percentiles() -> None:
    assert Spread.of(np.array([])) is None


def tally(*answers: Answer, processor_seconds: float = 0) -> Tally:
    """Of what was measured in [100, 110]."""
    tally = Tally(measured_from=100, measured_to=110, processor_seconds=processor_seconds)
    for answer in answers:
        tally.add(answer)
    return tally


def answer(begun: float, ended: float, tokens: int) -> Answer:
    """With an event half a second after its begin and one at its end."""
    return Answer(begun, ended, [begun + 0.5, ended], prompt_tokens=10, completion_tokens=tokens)


def test_refusals_have_their_own_latency() -> None:
    """429 and 503, and nothing else that went wrong; they are in no other figure."""
    refused = [Answer(100 + place, 100 + place + seconds, [], error="429") for place, seconds in enumerate((0.1, 0.3))]
    others = [Answer(101, 105, [], error="timeout"), Answer(101, 106, [], error="500"), answer(101, 102, 4)]
    row = figures_of(Level("open", 5), PLAN, [tally(*refused), tally(*others)], interrupted=False)
    assert row.refused is not None
    assert 200 == pytest.approx(row.refused.p50)
    assert {"429": 2, "timeout": 1, "500": 1} == row.errors
    assert 1 == row.requests
    assert figures_of(Level("open", 5), PLAN, [tally(*others)], interrupted=False).refused is None


def test_a_request_on_the_edge_counts_by_its_share() -> None:
    """Half of one before the time, a quarter of one after it; latencies are of those that began within it."""
    tallies = [tally(answer(98, 102, 40)), tally(answer(109, 113, 80), processor_seconds=5)]
    tallies[0].errors["429"] += 2
    tallies[1].errors["429"] += 1
    figures = figures_of(Level("closed", 2), PLAN, tallies, interrupted=False)
    assert (40 * 0.5 + 80 * 0.25) / 10 == pytest.approx(figures.tokens_per_second)
    assert (0.5 + 0.25) / 10 == pytest.approx(figures.requests_per_second)
    assert (1, {"429": 3}, 40.0) == (figures.requests, figures.errors, figures.tokens_per_event)
    assert figures.ttft is not None
    assert figures.tpot is not None
    assert (500, round(3500 / 79, 3)) == (figures.ttft.p99, figures.tpot.p50)
    assert (0.5, False) == (figures.client_load, figures.saturated)


@given(st.lists(st.tuples(st.floats(80, 99.9), st.lists(st.floats(0, 5), max_size=9), st.integers(1, 99))))
def test_what_began_in_the_warm_up_is_in_no_latency(warming: list[tuple[float, list[float], int]]) -> None:
    """However it was answered, and however long after: it counts by its share in rates alone."""
    measured = [answer(101, 103, 5), answer(102, 109, 30)]
    early = []
    for begun, gaps, tokens in warming:
        times = [begun + after for after in itertools.accumulate(gaps)]
        early.append(Answer(begun, max(times, default=begun), times, prompt_tokens=3, completion_tokens=tokens))

    def latencies(*tallies: Tally) -> list[object]:
        figures = figures_of(Level("closed", 2), PLAN, tallies, interrupted=False)
        names = ("requests", "ttft", "tpot", "gap", "end_to_end", "tokens_per_event")
        return [getattr(figures, name) for name in names]

    expected = latencies(tally(*measured))
    assert expected == latencies(tally(*early, *measured))
    assert expected == latencies(tally(*early), tally(*measured))
    assert None not in expected


def test_an_answer_in_one_event_has_no_time_a_token() -> None:
    """All its tokens came at once: that is no latency of 0, and no gap."""
    alone = tally(Answer(101, 102, [102], completion_tokens=8))
    figures = figures_of(Level("closed", 1), PLAN, [alone], interrupted=False)
    assert (None, None, 8.0) == (figures.tpot, figures.gap, figures.tokens_per_event)
    figures = figures_of(Level("closed", 1), PLAN, [alone, tally(answer(101, 103.5, 5))], interrupted=False)
    assert figures.tpot is not None
    assert 500 == figures.tpot.mean


def test_nothing_measured_has_no_figures() -> None:
    """A server that refused all leaves zeros and errors, and no division by zero."""
    figures = figures_of(Level("open", 1), PLAN, [Tally(100, 110), Tally(100, 110)], interrupted=True)
    assert (0, 0, None, None) == (figures.requests, figures.tokens_per_second, figures.ttft, figures.tokens_per_event)


def levels(loop: str, rates: dict[float, float]) -> list[Figures]:
    """By load, which is negative where it was interrupted: tokens and requests a second."""
    nothing = figures_of(Level("closed", 1), PLAN, [Tally(100, 110)], interrupted=False)
    return [
        replace(
            nothing,
            level=Level(loop, abs(load)),  # type: ignore[arg-type]
            seconds=20,
            tokens_per_second=rate,
            requests_per_second=rate,
            interrupted=load < 0,
        )
        for load, rate in rates.items()
    ]


@pytest.mark.parametrize(
    ("loop", "rates", "knee"),
    [
        ("closed", {1: 10, 2: 20, 4: 39, 8: 40}, 2),
        ("closed", {1: 10, 2: 20, 4: 36, 8: 40, 16: 30}, 2),
        ("closed", {1: 10, 2: 20, 4: 40}, None),  # it goes on rising
        ("closed", {1: 10}, None),
        ("closed", {1: 10, 2: 10}, 0),
        ("closed", {1: 10, 2: 20, 4: 39, -8: 0}, None),
        ("closed", {64: 40, 1: 10}, None),
        ("open", {5: 5, 10: 9.9, 20: 12}, 1),
        ("open", {5: 5, 10: 9.9}, None),
        ("open", {1: 0.7, 2: 1.5, 4: 3.3}, None),  # as few may come by chance
        ("open", {5: 3, 10: 3}, None),  # even the least is too much
    ],
)
def test_the_knee_is_where_more_load_gains_nothing(loop: str, rates: dict[float, float], knee: int | None) -> None:
    """Of clients, the fewest with nine tenths of the most throughput; of rates, the highest that is kept up with."""
    assert knee == knee_of(levels(loop, rates))


@given(st.integers(0, 1000), st.integers(1, 9))
def test_shares_add_up_and_differ_by_one(count: int, processes: int) -> None:
    shares = [share(count, number, processes) for number in range(processes)]
    assert count == sum(shares)
    assert 1 >= max(shares) - min(shares)
