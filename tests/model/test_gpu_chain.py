"""A lone token by the CUDA kernels, as the runner uses them, against plain operators: on a Hopper GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.model.graphs import GraphRunner
from service.model.kernels.cuda.chain import chain_for
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.test_gpu_kernels import PlainRunner, check_step, random_models, score_all

pytestmark = pytest.mark.gpu

PLACES = 8  # a sequence of more than 128 tokens has the room of several


@pytest.mark.parametrize(
    ("dtype", "sharper", "tolerance"),
    [(torch.bfloat16, 1, 2e-2), (torch.float16, 3, 1e-2)],
    ids=["bf16", "fp16"],
)
def test_a_lone_token_of_any_length(dtype: torch.dtype, sharper: float, tolerance: float, tmp_path: Path) -> None:
    """Of the token alone, of one block, of parts of a pass and of more than the kernels ask for early.

    Against plain operators on the same weights, in the same dtype and in fp32, token after token.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    model, exact = random_models(dtype, sharper=sharper)
    num_blocks = PLACES * MOST_BLOCKS
    cuda = chain_for(model, block_size=BLOCK_SIZE, folder=tmp_path)
    assert cuda is not None
    assert 5 == len(list(tmp_path.iterdir()))  # what is compiled is kept
    kernels = GraphRunner(
        model, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=1, max_num_batched_tokens=1024, cuda=cuda
    )
    kernels.capture()
    plain = [PlainRunner(each, num_blocks=num_blocks, block_size=BLOCK_SIZE) for each in (model, exact)]
    random = np.random.default_rng(8)
    for length in (0, 8, 63, 200, 300, 600, 1018):
        tokens: list[int] = random.integers(model.config.vocab_size, size=length).tolist()
        if tokens:
            check_step(kernels, plain, score_all(Part(tokens)), tolerance=tolerance)
        for _ in range(3):
            tokens.append(int(random.integers(model.config.vocab_size)))
            check_step(kernels, plain, make_batch(Part(tokens, start=len(tokens) - 1)), tolerance=tolerance)
