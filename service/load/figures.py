"""From what the client processes measured to figures: rates, and percentiles of latencies. Used by command.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.load.plan import Level, Plan
from service.load.worker import Tally

Floats = NDArray[np.float64]
SATURATED = 0.85  # of a core: from here on a client's own waiting is in the figures
_NEAR_MOST = 0.9  # of the highest throughput
_KEPT_UP = 0.95  # of the requests that arrive
_GAIN = 1.05  # of throughput, by twice the clients


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one latency, milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Floats) -> Spread | None:
        """None without values. Percentiles lie between the two values around them."""
        if not len(seconds):
            return None
        values = 1000 * np.array([seconds.mean(), *np.percentile(seconds, (50, 90, 99))])
        return cls(*(round(float(value), 3) for value in values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One level. Latencies and tokens an event are of requests that began while it was measured and had an answer.

    Rates count of each request the share of its time that was measured, so those on the edges tilt nothing.
    """

    level: Level
    seconds: float  # measured
    requests: int  # begun in them, and answered
    errors: dict[str, int]
    requests_per_second: float
    tokens_per_second: float  # generated
    prompt_tokens_per_second: float
    tokens_per_event: float | None
    events_per_second: float
    ttft: Spread | None  # from the request to its first event
    tpot: Spread | None  # from the first event to the last, by the tokens after the first
    gap: Spread | None  # between events
    end_to_end: Spread | None
    refused: Spread | None  # from the request to a 429 or 503
    client_load: float  # of the busiest client process: processor time / time
    client_microseconds_per_event: float | None
    interrupted: bool

    @property
    def saturated(self) -> bool:
        """The client was as much at its end as the server."""
        return self.client_load >= SATURATED


def figures_of(level: Level, plan: Plan, tallies: Sequence[Tally], *, interrupted: bool) -> Figures:
    """Merge what the processes measured."""

    def merged(name: str) -> Floats:
        return np.concatenate([np.asarray(getattr(tally, name), np.float64) for tally in tallies])

    begun, ended, first, last = (merged(name) for name in ("begun_at", "ended_at", "first_at", "last_at"))
    tokens, events = merged("completion_tokens"), merged("num_events")
    start = min(tally.measured_from for tally in tallies)
    end = max(max(tally.measured_to for tally in tallies), start)
    if plan.requests is not None and len(begun):
        start, end = float(begun.min()), float(ended.max())
    seconds = end - start
    shares = np.clip(np.minimum(ended, end) - np.maximum(begun, start), 0, None) / np.maximum(ended - begun, 1e-9)

    def rate(counts: Floats) -> float:
        return round(float((counts * shares).sum()) / seconds, 3) if seconds else 0.0

    within = (begun >= start) & (begun <= end)
    several = within & (tokens > 1) & (events > 1)
    num_events = float(events[within].sum())
    processor_seconds = sum(tally.processor_seconds for tally in tallies)
    events_per_second = rate(events)
    return Figures(
        level=level,
        seconds=round(seconds, 3),
        requests=int(within.sum()),
        errors=dict(sum((tally.errors for tally in tallies), Counter[str]())),
        requests_per_second=rate(np.ones_like(begun)),
        tokens_per_second=rate(tokens),
        prompt_tokens_per_second=rate(merged("prompt_tokens")),
        tokens_per_event=round(float(tokens[within].sum()) / num_events, 3) if num_events else None,
        events_per_second=events_per_second,
        ttft=Spread.of((first - begun)[within]) if plan.stream else None,
        tpot=Spread.of((last - first)[several] / (tokens[several] - 1)),
        gap=Spread.of(merged("gaps")),
        end_to_end=Spread.of((ended - begun)[within]),
        refused=Spread.of(merged("refused")),
        client_load=round(max(t.processor_seconds for t in tallies) / seconds, 3) if seconds else 0.0,
        client_microseconds_per_event=(
            round(1e6 * processor_seconds / seconds / events_per_second, 2) if events_per_second else None
        ),
        interrupted=interrupted,
    )


def knee_of(rows: Sequence[Figures]) -> int | None:
    """Which level saturates the server: beyond it load adds latency and hardly any throughput. None where none does.

    Of clients, the fewest that get nine tenths of the most; of a rate, the highest that is kept up with.
    """
    rows = [row for row in rows if not row.interrupted]
    loads = [row.level.load for row in rows]
    if len(rows) < 2 or loads != sorted(set(loads)):
        return None
    if rows[0].level.loop == "open":
        kept = [_keeps_up(row) for row in rows]
        return None if all(kept) or not kept[0] else kept.index(False) - 1
    throughput = [row.tokens_per_second for row in rows]
    if not is_flat(rows):
        return None
    return next(place for place, rate in enumerate(throughput) if rate >= _NEAR_MOST * max(throughput))


def _keeps_up(row: Figures) -> bool:
    """Whether as many requests are answered as arrive, but for the chance in how many arrive (Poisson's, twice)."""
    expected = row.level.load * row.seconds
    return row.requests_per_second * row.seconds >= _KEPT_UP * expected - 2 * math.sqrt(expected)


def is_flat(rows: Sequence[Figures]) -> bool:
    """Whether the last level of clients got hardly more tokens a second than the best before it."""
    *before, last = [row.tokens_per_second for row in rows]
    return bool(before) and last < _GAIN * max(before)
