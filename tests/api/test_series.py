"""Our own counters and histograms are exposed as prometheus_client's are."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from service.api.series import Count, Distribution

BOUNDS = (0.001, 0.5, 1, 2048)


def samples(registry: CollectorRegistry) -> list[str]:
    """All lines but those that say when a series began."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 5000))), st.lists(st.integers(0, 2**40)))
def test_series_are_exposed_as_the_library_exposes_its_own(values: list[float], amounts: list[int]) -> None:
    """Names, help, types, bounds and values; a value on a bound belongs to it."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count, distribution = Count("some_total", "A help.", ours), Distribution("sizes", "Another.", ours, bounds=BOUNDS)
    counter, histogram = (
        Counter("some_total", "A help.", registry=theirs),
        Histogram("sizes", "Another.", registry=theirs, buckets=BOUNDS),
    )
    for amount in amounts:
        count.inc(amount)
        counter.inc(amount)
    for value in values:
        distribution.observe(value)
        histogram.observe(value)
    assert samples(theirs) == samples(ours)
