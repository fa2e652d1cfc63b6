"""The runner of graphs with weights in 8 bits, beside the plain one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.model.formats import format_for
from tests.model.conftest import Pair
from tests.model.test_graphs import DTYPES, check_close_to_plain, read


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("tied", [True, False])
def test_8_bits_are_close_to_the_plain_runner(
    make_pair: Callable[..., Pair], tmp_path: Path, name: str, tied: bool, dtype: torch.dtype
) -> None:
    """The same weights in 8 bits and in 16: what quantisation costs is in both."""
    config = make_pair(n_layer=1, n_embd=32, n_head=2, tie_word_embeddings=tied)[1].config
    weights = format_for(name, torch.device("cuda"), stored=str(dtype).removeprefix("torch."))
    model = read(tmp_path, config, torch.float32, weights)
    assert dtype == model.dtype
    check_close_to_plain(model)
