"""Attention of single tokens by the CUDA kernel, as the runner uses it, against plain operators: on a Hopper GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.model.attention import KVCache
from service.model.graphs import GraphRunner
from service.model.kernels import plans
from service.model.kernels.cuda.decode import load_decode
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import CudaDecode
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.test_gpu_kernels import PlainRunner, check_step, random_models

pytestmark = pytest.mark.gpu

SHAPES = ((4, CudaDecode(8, 4, splits=4)), (16, CudaDecode(4, 4, splits=2)), (192, CudaDecode(2, 2)))
# The token alone, whole and begun blocks, begun rounds and many of them.
LENGTHS = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 100, 120, 129, 200, 257, 400, 513, 700, 900, 1000, *range(2, 112)]


@pytest.mark.parametrize(
    ("dtype", "sharper", "tolerance"),
    [(torch.bfloat16, 1, 2e-2), (torch.float16, 3, 1e-2)],
    ids=["bf16", "fp16"],
)
def test_rows_of_any_lengths(
    dtype: torch.dtype, sharper: float, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With splits and without, in buckets that are full and that are not, by every kind of product before it.

    Against plain operators on the same weights, in the same dtype and in fp32, token after token.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    monkeypatch.setattr(plans, "CUDA_DECODES", SHAPES)
    model, exact = random_models(dtype, sharper=sharper)
    decode = load_decode(model, [shape for _, shape in SHAPES], block_size=BLOCK_SIZE, folder=tmp_path)
    assert len(SHAPES) == len(list(tmp_path.iterdir()))  # what is compiled is kept
    room = [-(-(length + 8) // (MOST_BLOCKS * BLOCK_SIZE)) for length in LENGTHS]
    places = np.cumsum([0, *room]).tolist()
    num_blocks = places.pop() * MOST_BLOCKS
    kernels = GraphRunner(
        model,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=len(LENGTHS),
        max_num_batched_tokens=len(LENGTHS),
        cuda=CudaKernels(decode=decode),
    )
    kernels.capture()
    plain = [PlainRunner(each, num_blocks=num_blocks, block_size=BLOCK_SIZE) for each in (model, exact)]
    random = np.random.default_rng(8)
    contexts = [random.integers(model.config.vocab_size, size=length - 1).tolist() for length in LENGTHS]
    with torch.inference_mode():  # any numbers, the same for all, instead of prompts
        filled = kernels._fused._cache._cache.normal_(0, 0.5)
        for runner in plain:
            assert isinstance(runner._cache, KVCache)
            runner._cache._cache.copy_(filled[:, :, :num_blocks])
    order = random.permutation(len(LENGTHS)).tolist()
    for count in (len(LENGTHS), 2, 3, 13, 30, 64, 100, len(LENGTHS)):
        rows = order[:count]
        for row in rows:
            contexts[row].append(int(random.integers(model.config.vocab_size)))
        rows.sort(key=lambda row: len(contexts[row]))
        parts = [Part(contexts[row], start=len(contexts[row]) - 1, place=places[row]) for row in rows]
        check_step(kernels, plain, make_batch(*parts), tolerance=tolerance)
