"""The kernels on a GPU, in 16 bits and at the sizes that are served, against plain operators: see test_gpu.py."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.random_model import gpt2_345m
from service.model.batch import Batch, Scored, StepOutput
from service.model.gpt2 import GPT2
from service.model.graphs import GraphRunner, decode_sizes
from service.model.kernels.cuda.hopper import kernels_for
from service.model.runner import TorchRunner
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch

pytestmark = pytest.mark.gpu

MOST_TOKENS = 2048  # of a step, as served
# The longest have the room of four others.
PLACES = [*range(248), *range(248, 280, 4)]
LENGTHS = [*np.linspace(2, 120, 248).astype(int).tolist(), *range(300, 460, 20)]


class PlainRunner(TorchRunner):
    """Keeps the logits [R, V] of its last step."""

    logits: Tensor

    def _sample(self, batch: Batch, inputs: Mapping[str, Tensor], *, logits: Tensor, token_ids: Tensor) -> Tensor:
        self.logits = logits
        return super()._sample(batch, inputs, logits=logits, token_ids=token_ids)


def random_models(dtype: torch.dtype, *, sharper: float) -> tuple[GPT2, GPT2]:
    """The 345M's shape in `dtype`, and the same weights in fp32; queries and keys are `sharper` times as large."""
    generator = torch.Generator("cuda").manual_seed(7)
    state: dict[str, Tensor] = {}

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device="cuda").normal_(float("norm.weight" in name), 0.02, generator=generator)
        if "qkv.weight" in name:
            tensor[: 2 * shape[1]] *= sharper
        state[name] = tensor.to(dtype)
        return state[name]

    return gpt2_345m(make, num_layers=24), gpt2_345m(lambda name, _: state[name].float(), num_layers=24)


def score_all(*parts: Part) -> Batch:
    """A step that scores each of its prompts' tokens after the first."""
    starts = np.cumsum([0, *(len(part.tokens) - part.start for part in parts)])
    indices = np.concatenate([np.arange(start, end - 1) for start, end in itertools.pairwise(starts)])
    targets = np.concatenate([part.tokens[part.start + 1 :] for part in parts])
    return make_batch(*parts, scored=Scored(indices.astype(np.int32), targets.astype(np.int32)))


def check_step(kernels: GraphRunner, plain: Sequence[PlainRunner], batch: Batch, *, tolerance: float) -> None:
    """Logits and scores within `tolerance` of each of `plain`, by norms; the tokens are the best of the logits.

    They are those of the last of `plain`, but where its two best are closer than five times the error allowed.
    """
    runners = (kernels, *plain)
    for runner in runners:
        runner.launch(batch)
    output, *outputs = (runner.collect() for runner in runners)
    logits = kernels._tail._logits[: len(batch.sampling), : kernels.model.config.vocab_size]
    tokens = torch.tensor(output.token_ids, device=logits.device).long()[:, None]
    assert torch.equal(logits.max(-1).values, logits.gather(-1, tokens)[:, 0])
    for runner, expected in zip(plain, outputs, strict=True):
        error = float((logits - runner.logits).norm() / runner.logits.norm())
        scores = _score_error(expected, output, spread=float(runner.logits.std()))
        exact = runner.logits
        print(
            f"{len(batch.token_ids)} tokens, {len(logits)} rows, against {runner._model.dtype}: logits {error:.1e}, "
            f"scores {scores:.1e}, equal picks {(exact.argmax(-1) == tokens[:, 0]).float().mean():.3f}"
        )
        assert error < tolerance
        assert scores < tolerance
    gaps = exact.max(-1).values - exact.gather(-1, tokens)[:, 0]
    assert float(gaps.max()) < 5 * tolerance * float(exact.std())


def _score_error(expected: StepOutput, got: StepOutput, *, spread: float) -> float:
    """As a share of how far logits lie from their mean; scores of a few tokens may all be alike."""
    if expected.scores is None or got.scores is None:
        assert expected.scores is got.scores
        return 0.0
    there = expected.scores.chosen
    return float(np.sqrt(np.mean((got.scores.chosen - there) ** 2))) / spread


@pytest.mark.parametrize(
    ("dtype", "sharper", "tolerance"),
    [(torch.bfloat16, 1, 2e-2), (torch.float16, 3, 1e-2)],
    ids=["bf16", "fp16"],
)
def test_16_bit_kernels_are_close_to_plain_operators(dtype: torch.dtype, sharper: float, tolerance: float) -> None:
    """A prompt alone, packs of prompts, decodes of 1, 8, 64 and 256 rows in flight, and both in one step.

    Against plain operators on the same weights, in the same dtype and in fp32. In fp16 attention is sharp, so that a
    token left out shows; in bf16 the operators themselves would be 2e-2 off then.
    """
    model, exact = random_models(dtype, sharper=sharper)
    check_model(model, exact, PLACES, LENGTHS, rows=(1, 8, 64, 256), tolerance=tolerance)


def check_model(
    model: GPT2, exact: GPT2, places: Sequence[int], lengths: Sequence[int], *, rows: Sequence[int], tolerance: float
) -> None:
    """`lengths` of the prompts, which are as many as the most of `rows`, do not fall."""
    num_blocks = (places[-1] + 4) * MOST_BLOCKS
    plain = [PlainRunner(each, num_blocks=num_blocks, block_size=BLOCK_SIZE) for each in (model, exact)]
    kernels = GraphRunner(
        model,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=len(places),
        max_num_batched_tokens=MOST_TOKENS,
        cuda=kernels_for(model, decode_sizes(len(places), MOST_TOKENS), block_size=BLOCK_SIZE, folder=None),
    )
    kernels.capture()
    random = np.random.default_rng(8)

    def draw(count: int) -> list[int]:
        return random.integers(model.config.vocab_size, size=count).tolist()

    contexts = [draw(length) for length in lengths]
    prompts = [Part(tokens, place=place) for tokens, place in zip(contexts, places, strict=True)]
    packs, room = [prompts[-1:]], 0
    for prompt in prompts[:-1]:
        if len(prompt.tokens) > room:
            packs.append([])
            room = MOST_TOKENS
        packs[-1].append(prompt)
        room -= len(prompt.tokens)
    for pack in packs:
        check_step(kernels, plain, score_all(*pack), tolerance=tolerance)

    def decodes(count: int) -> list[Part]:
        """Of the last sequences, each with a token that nobody but the runners' last step knows."""
        sampled = draw(count)
        for tokens, token in zip(contexts[-count:], sampled, strict=True):
            tokens.append(token)
        kernels._tail.sampled[:count] = torch.tensor(sampled)
        for runner in plain:
            runner._previous = torch.tensor(sampled, device=model.device)
        unknown = zip(contexts[-count:], places[-count:], strict=True)
        return [
            Part([*tokens[:-1], 0], start=len(tokens) - 1, place=place, source=row)
            for row, (tokens, place) in enumerate(unknown)
        ]

    for count in rows:
        check_step(kernels, plain, make_batch(*decodes(count)), tolerance=tolerance)
    chunked = Part(draw(100), start=37, place=places[0])
    begun = Part(chunked.tokens[:37], place=places[0])
    check_step(kernels, plain, score_all(begun), tolerance=tolerance)
    mixed = [*decodes(len(places) // 4), chunked, Part(draw(90), place=places[1])]
    check_step(kernels, plain, score_all(*mixed), tolerance=tolerance)
