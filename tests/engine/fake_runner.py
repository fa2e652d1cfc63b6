"""A runner without tensors: it stores each token at its slot and computes the next from what it reads back."""

from collections import deque

import numpy as np

from service.model.batch import Batch, Float32, Int32, OutOfMemory, StepOutput, TopLogprobs
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE, draw, logits, penalize, top_logprobs

EMPTY = -7


class FakeRunner:
    """Its memory holds a token a slot; reading a slot that nothing wrote is an error."""

    def __init__(self, num_blocks: int, block_size: int, *, depth: int = 0) -> None:
        self.num_blocks = num_blocks
        self.depth = depth
        self.fail_at: dict[int, Exception] = {}  # launch number -> what it raises
        self.fail_collect_at: dict[int, Exception] = {}
        self.max_tokens: int | None = None  # more in a batch is out of memory
        self.launches: list[Batch] = []
        self._block_size = block_size
        self._memory = np.full(num_blocks * block_size, EMPTY, np.int64)
        self._outputs: deque[tuple[int, StepOutput]] = deque()
        self._previous = np.zeros(0, np.int32)

    def launch(self, batch: Batch) -> None:
        number = len(self.launches)
        self.launches.append(batch)
        if number in self.fail_at:
            raise self.fail_at[number]
        if self.max_tokens is not None and len(batch.token_ids) > self.max_tokens:
            raise OutOfMemory
        known = batch.token_sources < 0
        tokens = np.where(known, batch.token_ids, 0)
        tokens[~known] = self._previous[batch.token_sources[~known]]
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens at one slot"
        self._memory[batch.slots] = tokens
        counts = np.diff(batch.query_starts)
        assert (counts[: batch.num_decodes] == 1).all()
        assert (np.diff(batch.context_lengths[: batch.num_decodes]) >= 0).all()
        contexts = [self._context(batch, index) for index in batch.sample_indices.tolist()]
        sampled = [self._sample(batch, row, context) for row, context in enumerate(contexts)]
        self._previous = np.asarray(sampled, np.int32)
        logprobs = scores = None
        if batch.logprobs:
            logprobs = _top(contexts, sampled)
        if batch.scored is not None:
            targets = batch.scored.targets.tolist()
            assert targets
            scores = _top([self._context(batch, index) for index in batch.scored.indices.tolist()], targets)
        self._outputs.append((number, StepOutput(self._previous, logprobs, scores)))

    def collect(self) -> StepOutput:
        number, output = self._outputs.popleft()
        if number in self.fail_collect_at:
            self._outputs.clear()
            raise self.fail_collect_at[number]
        return output

    def close(self) -> None:
        self._outputs.clear()

    def _context(self, batch: Batch, index: int) -> list[int]:
        """The tokens that token `index` of the batch attends to, itself the last."""
        number = int(np.searchsorted(batch.query_starts, index, side="right")) - 1
        length = int(batch.positions[index]) + 1
        assert length <= batch.context_lengths[number]
        at = np.arange(length)
        slots = batch.block_tables[number][at // self._block_size] * self._block_size + at % self._block_size
        context: list[int] = self._memory[slots].tolist()
        assert EMPTY not in context, "a slot was read that nothing wrote"
        return context

    def _sample(self, batch: Batch, row: int, context: list[int]) -> int:
        assert len(context) == batch.sample_positions[row]
        sampling = batch.sampling[row]
        scores = logits(context).copy()
        if batch.histories is not None:
            scores = _penalized(scores, batch.histories[row], context[-1], sampling)
        if batch.biases is not None:
            mine = batch.biases.rows == row
            scores[batch.biases.token_ids[mine]] += batch.biases.values[mine]
        if len(context) < sampling["min_length"]:
            scores[END_OF_TEXT] = -np.inf
        if batch.masks is not None:
            bits = np.unpackbits(batch.masks[row].view(np.uint8), bitorder="little")[:VOCAB_SIZE]
            assert bits.any(), "a mask that leaves nothing"
            assert bits.all() or sampling["min_length"] == 0, "two say whether the text may end"
            scores[bits == 0] = -np.inf
        return draw(
            scores,
            temperature=float(sampling["temperature"]),
            seed=int(sampling["seed"]),
            choice=int(sampling["choice"]),
            position=len(context),
        )


def _penalized(scores: Float32, history: Int32, last: int, sampling: np.void) -> Float32:
    tokens = history[history >= 0].tolist()
    assert (history[len(tokens) :] == -1).all()
    penalties = {name: float(sampling[f"{name}_penalty"]) for name in ("repetition", "frequency", "presence")}
    if not tokens and penalties == {"repetition": 1, "frequency": 0, "presence": 0}:
        return scores
    tokens.append(last)
    return penalize(scores, tokens, tokens[sampling["num_prompt"] :], **penalties)


def _top(contexts: list[list[int]], tokens: list[int]) -> TopLogprobs:
    found = [top_logprobs(logits(context), token) for context, token in zip(contexts, tokens, strict=True)]
    chosen, top_ids, top = ([each[part] for each in found] for part in range(3))
    return TopLogprobs(np.asarray(chosen, np.float32), np.asarray(top_ids, np.int32), np.asarray(top, np.float32))
