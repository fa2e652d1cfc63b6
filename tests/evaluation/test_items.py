"""Windows over a text score each token but the first exactly once, as the paper's evaluation code does."""

from hypothesis import given
from hypothesis import strategies as st

from service.evaluation.items import Windows


def megatron_targets(num_tokens: int, *, width: int, stride: int) -> list[tuple[int, int]]:
    """(window, target) of each target that Megatron-LM's data set does not mask (tasks/zeroshot_gpt/datasets.py).

    A window is the `width` + 1 tokens from its number times the stride on, filled up; all but the first window have
    their mask zeroed but for the last `stride` places, unless the stride is the width.
    """
    total_targets = num_tokens - 1
    num_windows = max(-(-max(total_targets - stride, 0) // stride) + 1, 1)
    found = []
    for number in range(num_windows):
        start = number * stride
        mask = [start + place < num_tokens for place in range(1, width + 1)]
        if stride != width and number:
            mask[: width - stride] = [False] * (width - stride)
        found += [(number, start + place) for place, is_scored in enumerate(mask, 1) if is_scored]
    return found


@given(num_tokens=st.integers(2, 200), width=st.integers(1, 40), data=st.data())
def test_windows_are_those_of_megatron(num_tokens: int, width: int, data: st.DataObject) -> None:
    """The same targets in the same windows, with the same tokens before them; windows without any are left out."""
    stride = data.draw(st.integers(1, width))
    windows = Windows(range(num_tokens), width=width, stride=stride)
    found = []
    for number, item in enumerate(windows):
        assert tuple(range(number * stride, number * stride + len(item.ids))) == item.ids
        assert 1 <= item.score_from < len(item.ids) <= width + 1
        found += [(number, target) for target in item.ids[item.score_from :]]
    assert megatron_targets(num_tokens, width=width, stride=stride) == found
    assert list(range(1, num_tokens)) == [target for _, target in found]


def test_windows_are_a_sequence() -> None:
    """Counted, sliced, and ended by an IndexError."""
    windows = Windows(range(100), width=10, stride=4)
    assert len(windows) == len(list(windows)) == 24
    assert list(windows)[3:5] == windows[3:5]
