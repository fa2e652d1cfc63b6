"""One to 128 tokens by the CUDA kernels, as the runner uses them, against plain operators: on a Hopper GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.model.graphs import GraphRunner, decode_sizes
from service.model.kernels.cuda.hopper import kernels_for
from service.model.kernels.plans import CHAINS, WIDES
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.test_gpu_kernels import PlainRunner, check_step, random_models, score_all

pytestmark = pytest.mark.gpu

MOST_TOKENS = 1024
PLACES = 8  # a sequence of more than 128 tokens has the room of several
KINDS = pytest.mark.parametrize(
    ("dtype", "sharper", "tolerance"),
    [(torch.bfloat16, 1, 2e-2), (torch.float16, 3, 1e-2)],
    ids=["bf16", "fp16"],
)


def runners(
    dtype: torch.dtype, *, sharper: float, folder: Path, num_blocks: int, most: int
) -> tuple[GraphRunner, list[PlainRunner]]:
    """Of steps of up to `most` sequences: by the kernels, and by plain operators in `dtype` and in fp32."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    model, exact = random_models(dtype, sharper=sharper)
    sizes = decode_sizes(most, MOST_TOKENS)
    cuda = kernels_for(model, sizes, block_size=BLOCK_SIZE, folder=folder)
    assert list(cuda.chains) == sizes
    assert list(cuda.heads) == [size for size in sizes if size in CHAINS]
    kernels = GraphRunner(
        model,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=most,
        max_num_batched_tokens=MOST_TOKENS,
        cuda=cuda,
    )
    kernels.capture()
    return kernels, [PlainRunner(each, num_blocks=num_blocks, block_size=BLOCK_SIZE) for each in (model, exact)]


@KINDS
def test_a_lone_token_of_any_length(dtype: torch.dtype, sharper: float, tolerance: float, tmp_path: Path) -> None:
    """Of the token alone, of one block, of parts of a pass and of more than the kernels ask for early.

    Against plain operators on the same weights, in the same dtype and in fp32, token after token.
    """
    num_blocks = PLACES * MOST_BLOCKS
    kernels, plain = runners(dtype, sharper=sharper, folder=tmp_path, num_blocks=num_blocks, most=1)
    assert list(tmp_path.iterdir())  # what is compiled is kept
    vocab_size = kernels.model.config.vocab_size
    random = np.random.default_rng(8)
    for length in (0, 8, 63, 200, 300, 600, 1018):
        tokens: list[int] = random.integers(vocab_size, size=length).tolist()
        if tokens:
            check_step(kernels, plain, score_all(Part(tokens)), tolerance=tolerance)
        for _ in range(3):
            tokens.append(int(random.integers(vocab_size)))
            check_step(kernels, plain, make_batch(Part(tokens, start=len(tokens) - 1)), tolerance=tolerance)


@KINDS
@pytest.mark.parametrize(
    ("most", "counts"), [(8, (8, 5, 4, 3, 2, 1)), (27, (27, 24, 20, 16, 9)), (128, (128, 100, 75, 60, 40))]
)
def test_few_tokens_of_any_lengths(
    dtype: torch.dtype, sharper: float, tolerance: float, most: int, counts: tuple[int, ...], tmp_path: Path
) -> None:
    """As many as a bucket has room for and fewer, of lengths as above; token after token, three times."""
    places = [PLACES * number for number in range(most)]
    num_blocks = PLACES * MOST_BLOCKS * len(places)
    kernels, plain = runners(dtype, sharper=sharper, folder=tmp_path, num_blocks=num_blocks, most=most)
    vocab_size = kernels.model.config.vocab_size
    random = np.random.default_rng(8)
    lengths = [0, 3, 8, 63, 129, 300, 600, 1000, *random.integers(2, 400, size=most)][:most]
    contexts = [random.integers(vocab_size, size=length).tolist() for length in lengths]
    for tokens, place in zip(contexts, places, strict=True):
        if tokens:
            check_step(kernels, plain, score_all(Part(tokens, place=place)), tolerance=tolerance)
    for count in counts:
        for first in sorted({0, most - count}):
            for _ in range(3 if count in (*CHAINS, *WIDES) else 1):
                parts = []
                for number in range(first, first + count):
                    contexts[number].append(int(random.integers(vocab_size)))
                    tokens = contexts[number]
                    parts.append(Part(list(tokens), start=len(tokens) - 1, place=places[number]))
                parts.sort(key=lambda part: part.start)
                check_step(kernels, plain, make_batch(*parts), tolerance=tolerance)


@KINDS
def test_prompts_beside_single_tokens(dtype: torch.dtype, sharper: float, tolerance: float, tmp_path: Path) -> None:
    """In one step of 64 tokens: whole prompts, and the rest of one."""
    most = 64
    places = [PLACES * number for number in range(most)]
    num_blocks = PLACES * MOST_BLOCKS * most
    kernels, plain = runners(dtype, sharper=sharper, folder=tmp_path, num_blocks=num_blocks, most=most)
    vocab_size = kernels.model.config.vocab_size
    random = np.random.default_rng(8)
    contexts = [random.integers(vocab_size, size=length).tolist() for length in range(2, 162, 4)]
    for tokens, place in zip(contexts, places, strict=False):
        check_step(kernels, plain, score_all(Part(tokens, place=place)), tolerance=tolerance)
    for single, *prompts in ((40, (20, 0)), (40, (9, 0), (15, 0)), (1, (60, 0)), (30, (90, 60))):
        parts = []
        for number in range(single):
            contexts[number].append(int(random.integers(vocab_size)))
            parts.append(Part(list(contexts[number]), start=len(contexts[number]) - 1, place=places[number]))
        for place, (size, start) in zip(reversed(places), prompts, strict=False):
            tokens = random.integers(vocab_size, size=size).tolist()
            if start:
                check_step(kernels, plain, score_all(Part(tokens[:start], place=place)), tolerance=tolerance)
            parts.append(Part(tokens, start=start, place=place))
        check_step(kernels, plain, make_batch(*parts), tolerance=tolerance)
