"""Intervals that hold the true value 95 times of 100."""

import math
from collections.abc import Sequence

_Z = 1.959964
_LEAST_TOKENS = 1024  # of a block: neighbouring tokens are alike, blocks of so many hardly are


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Of a share, by Wilson's score; `total` >= 1."""
    share, spread = hits / total, _Z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / total + spread / 4 / total) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def loss_interval(losses: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """Of the mean loss a token, from sums of losses and their tokens, in order of the text.

    Means of blocks of 1,024 tokens or more, taken as independent (a ratio's variance); None with fewer than two.
    """
    blocks: list[list[float]] = []
    for loss, count in zip(losses, counts, strict=True):
        if not blocks or blocks[-1][1] >= _LEAST_TOKENS:
            blocks.append([0.0, 0])
        blocks[-1][0] += loss
        blocks[-1][1] += count
    if len(blocks) < 2:
        return None
    total = sum(count for _, count in blocks)
    mean = math.fsum(loss for loss, _ in blocks) / total
    squares = math.fsum((loss - mean * count) ** 2 for loss, count in blocks)
    half = _Z * math.sqrt(squares * len(blocks) / (len(blocks) - 1)) / total
    return mean - half, mean + half
