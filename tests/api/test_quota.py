"""What one key may ask for, by a clock that the test moves."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.errors import ApiError
from service.api.keys import Key
from service.api.quota import Quota
from tests.api.clock import Clock


def key(**limits: int) -> Key:
    return Key(name="a", sha256="0" * 64, **limits)


def ask(quota: Quota) -> int:
    """0 if a request is let in, else the Retry-After of its refusal."""
    try:
        with quota.held():
            return 0
    except ApiError as error:
        refused = error
    assert (429, "rate_limit_error") == (refused.status, refused.body["error"]["type"])
    return int(refused.headers["Retry-After"])


@given(limit=st.integers(1, 500), waits=st.lists(st.floats(0, 90), max_size=60), more=st.lists(st.integers(1, 20)))
def test_no_more_than_a_minutes_requests_and_what_flows_in(limit: int, waits: list[float], more: list[int]) -> None:
    """In any time: the bucket and its inflow. Whoever waits as long as was told is let in."""
    clock = Clock()
    quota = Quota(key(requests_per_minute=limit), clock=clock)
    times = []
    for place, wait in enumerate(waits):
        clock.now += wait
        for _ in range(more[place % len(more)] if more else 1):
            if told := ask(quota):
                assert 1 <= told <= 60
                clock.now += told
                assert 0 == ask(quota)
            times.append(clock.now)
    for start in range(len(times)):
        for end in range(start, len(times)):
            assert end - start + 1 <= limit + (times[end] - times[start]) * limit / 60 + 1e-3


def test_a_burst_and_what_comes_after() -> None:
    """The bucket's size at once, then one every 60 / N seconds; a quota with other limits keeps what it has used."""
    clock = Clock()
    quota = Quota(key(requests_per_minute=6), clock=clock)
    assert [0] * 6 + [10] * 2 == [ask(quota) for _ in range(8)]
    clock.now += 9
    assert 1 == ask(quota)
    clock.now += 1
    assert [0, 10] == [ask(quota) for _ in range(2)]
    quota.key = key(requests_per_minute=60)
    assert 1 == ask(quota)
    quota.key = key()
    assert [0] * 100 == [ask(quota) for _ in range(100)]


def test_requests_at_a_time() -> None:
    """A place is free as soon as one ends, however it ends; when that may be follows from how long they took."""
    clock = Clock()
    quota = Quota(key(max_concurrent=2), clock=clock)
    with ExitStack() as open_requests:
        for _ in range(2):
            open_requests.enter_context(quota.held())
        assert [1, 1] == [ask(quota), ask(quota)]
        clock.now += 160
    assert 0 == ask(quota)
    with pytest.raises(KeyError), quota.held():
        raise KeyError
    with quota.held(), quota.held():
        assert 10 <= ask(quota) <= 20  # seconds each: of the last ones, the most were quick


def test_a_refusal_for_its_number_at_a_time_takes_nothing_of_the_minute() -> None:
    clock = Clock()
    quota = Quota(key(max_concurrent=1, requests_per_minute=2), clock=clock)
    with quota.held():
        assert {1} == {ask(quota) for _ in range(10)}
    assert [0, 30] == [ask(quota), ask(quota)]
