"""What is scored: token ids, and from which of them on. Made by the tasks, read by the scorers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True)
class Item:
    """`ids[score_from:]` are scored, each after all that come before it; 1 <= score_from < len(ids)."""

    ids: tuple[int, ...]
    score_from: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of an item."""

    logprob: float  # natural; the sum over what is scored
    is_greedy: bool  # each of them is the likeliest at its place


class Windows(Sequence[Item]):
    """A text in windows that score each of its tokens but the first exactly once.

    A window has up to `width` targets, and one token before them. The next begins `stride` tokens on, and scores its
    last `stride` targets only, which have the others as context; the last window may have fewer.
    """

    def __init__(self, ids: Sequence[int], *, width: int, stride: int) -> None:
        """At least two ids; 1 <= stride <= width."""
        assert len(ids) > 1
        assert 1 <= stride <= width
        self._ids, self._width, self._stride = ids, width, stride

    def __len__(self) -> int:
        return 1 + -(-max(0, len(self._ids) - 1 - self._width) // self._stride)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self._stride
        ids = tuple(self._ids[start : start + self._width + 1])
        return Item(ids, self._width - self._stride + 1 if number else 1)
