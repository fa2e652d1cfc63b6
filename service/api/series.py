"""Counters and histograms that one thread feeds: without prometheus_client's locks, at a tenth of its time.

Metrics has one of each for what is counted several thousand times a second.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

PREFIX = "megatron_gpt2"
# Bounds; a step of a 345M model takes 0.4 to 2 ms on a GPU and a full answer a minute on a CPU.
SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60),
)


class Count(Collector):
    """A total that never goes down. Without a registry, somebody else collects it."""

    def __init__(self, name: str, help: str, registry: CollectorRegistry | None = None) -> None:
        self._name, self._help = name, help
        self._created = time.time()
        self._value = 0
        if registry is not None:
            registry.register(self)

    def inc(self, amount: int = 1) -> None:
        assert amount >= 0, "a counter only grows"
        self._value += amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._help)
        family.add_metric((), self._value, created=self._created)
        yield family


class Distribution(Collector):
    """A histogram; a value belongs to the first of the ascending `bounds` that is not below it."""

    def __init__(
        self, name: str, help: str, registry: CollectorRegistry | None = None, *, bounds: Sequence[float]
    ) -> None:
        self._name, self._help = name, help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        if registry is not None:
            registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(self._name, self._help)
        family.add_metric((), buckets, self._sum)
        yield family
