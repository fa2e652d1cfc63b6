"""A runner without tensors: it stores each token at its slot and computes the next one from what it reads back."""

from collections import deque

import numpy as np

from service.model.batch import Batch, OutOfMemory, StepOutput

EMPTY = -7
VOCAB_SIZE = 97
END_OF_TEXT = 96


def next_token(context: list[int], *, temperature: float, seed: int, choice: int, may_end: bool) -> int:
    """A pure function of the context, and of (seed, choice, position) unless greedy."""
    value = 17
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    if temperature > 0:
        value += hash((seed, choice, len(context))) % 1_000_003
    token = value % VOCAB_SIZE
    return (token + 1) % VOCAB_SIZE if token == END_OF_TEXT and not may_end else token


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
        self._outputs: deque[tuple[int, np.ndarray]] = deque()
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
        sampled = []
        for row, index in enumerate(batch.sample_indices.tolist()):
            number_of_sequence = int(np.searchsorted(batch.query_starts, index, side="right")) - 1
            length = int(batch.context_lengths[number_of_sequence])
            assert length == batch.sample_positions[row] == batch.positions[index] + 1
            at = np.arange(length)
            table = batch.block_tables[number_of_sequence]
            context = self._memory[table[at // self._block_size] * self._block_size + at % self._block_size].tolist()
            assert EMPTY not in context, "a slot was read that nothing wrote"
            sampling = batch.sampling[row]
            sampled.append(
                next_token(
                    context,
                    temperature=float(sampling["temperature"]),
                    seed=int(sampling["seed"]),
                    choice=int(sampling["choice"]),
                    may_end=length >= int(sampling["min_length"]),
                )
            )
        self._previous = np.asarray(sampled, np.int32)
        self._outputs.append((number, self._previous))

    def collect(self) -> StepOutput:
        number, tokens = self._outputs.popleft()
        if number in self.fail_collect_at:
            self._outputs.clear()
            raise self.fail_collect_at[number]
        return StepOutput(tokens)

    def close(self) -> None:
        self._outputs.clear()
