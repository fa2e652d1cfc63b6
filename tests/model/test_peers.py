"""What ranks store into each other's memory: sums and logits, in processes of their own, by interpreter or GPUs.

With fewer GPUs than ranks, all of them share one, which runs them in turns.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.conftest import Pair
from tests.model.kernels.conftest import ON_GPU
from tests.model.rank import check_logits, check_sums
from tests.model.test_parallel import run_ranks


@pytest.mark.parametrize(
    ("num_ranks", "num_sums", "most_rows"),
    [
        (2, 60, 16),
        (4, 10, 16),
        pytest.param(2, 1000, 16, marks=pytest.mark.gpu, id="many"),
        pytest.param(2, 50, 512, marks=pytest.mark.gpu, id="large"),
    ],
)
def test_sums_are_right_and_the_same_on_all_ranks(
    make_pair: Callable[..., Pair], tmp_path: Path, num_ranks: int, num_sums: int, most_rows: int
) -> None:
    """Of one to `most_rows` rows in turn, up to four a program, of whole products and split ones.

    With rows of NaN and of -0.0, and ranks that are late.

    The buffers are empty in the end.
    """
    make_pair()
    run_ranks(check_sums, num_ranks, tmp_path, ON_GPU, num_sums, most_rows)


@pytest.mark.parametrize("num_gathers", [12, pytest.param(300, marks=pytest.mark.gpu)])
def test_logits_stay_until_they_are_read(make_pair: Callable[..., Pair], tmp_path: Path, num_gathers: int) -> None:
    """Gathers one after the other, as of a prompt's scores, by ranks that read late; barriers' counts overflow."""
    make_pair()
    run_ranks(check_logits, 2, tmp_path, ON_GPU, num_gathers)
