"""Loops are found at the token that completes them, whatever the deliveries."""

from hypothesis import given
from hypothesis import strategies as st

from service.api.repetition import RepetitionStop


def brute(tokens: list[int], max_pattern_tokens: int, min_repeats: int) -> int | None:
    """The first end of `tokens` that is some pattern, `min_repeats` times."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, max_pattern_tokens + 1):
            size = period * min_repeats
            if size <= end and tokens[end - size : end] == tokens[end - period : end] * min_repeats:
                return end
    return None


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    max_pattern_tokens=st.integers(1, 6),
    min_repeats=st.integers(2, 5),
    data=st.data(),
)
def test_a_loop_is_found_where_it_is_complete(
    tokens: list[int], max_pattern_tokens: int, min_repeats: int, data: st.DataObject
) -> None:
    """Against a search of every beginning; the answer counts within the delivery that completed it."""
    watch = RepetitionStop(max_pattern_tokens, min_repeats)
    start, found = 0, None
    while start < len(tokens) and found is None:
        size = data.draw(st.integers(1, len(tokens) - start))
        place = watch.push(tokens[start : start + size])
        found = None if place is None else start + place
        start += size
    assert brute(tokens, max_pattern_tokens, min_repeats) == found
