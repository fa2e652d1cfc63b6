"""The runner: batches of integers to the device, sampled tokens and log-probabilities back. Called by the engine."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.model.attention import Attention, Decodes, Prefill
from service.model.batch import (
    SAMPLING,
    SAMPLING_WORD,
    Batch,
    Biases,
    DeviceLost,
    Int32,
    OutOfMemory,
    Scored,
    StepOutput,
)
from service.model.config import ModelConfig
from service.model.gpt2 import GPT2
from service.model.logprobs import logprob_words, unpack_logprobs
from service.model.sampler import LogitBiases, Penalties, SamplingTensors, sample

# Tokens of context that one rectangle of decodes has: on a GPU it is copied.
_MOST_GATHERED = {"cpu": 2**16, "cuda": 2**19}
# How much longer than the shortest the longest of them may be: on a GPU another gather costs more than padding does.
_MOST_PADDING = {"cpu": 2, "cuda": 1024}
_SHORT = 64  # tokens of context, up to which padding costs less than another gather
# Prompt tokens whose logits stand in memory at once (200 KB each): enough to keep the head's product busy.
_MOST_SCORED = {"cpu": 128, "cuda": 512}


@dataclass(frozen=True, slots=True)
class _Results:
    tokens: Tensor  # [R] int64
    logprobs: Tensor | None  # [R, ...] words of model/logprobs.py
    scores: Tensor | None  # [P, ...] the same

    def to_host(self) -> "_Results":
        """Copies that are filled once what is queued on the GPU so far is done."""
        logprobs, scores = (None if words is None else to_host(words) for words in (self.logprobs, self.scores))
        return _Results(to_host(self.tokens), logprobs, scores)


@dataclass(frozen=True, slots=True)
class _Launched:
    results: _Results  # on the host, filled once `done` has happened
    done: torch.cuda.Event | None


class TorchRunner:
    """GPT-2 in torch operators on a CPU or a GPU. On a GPU a step is launched while the one before it computes."""

    def __init__(self, model: GPT2, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.depth = 1 if model.device.type == "cuda" else 0
        self._model = model
        self._device = model.device
        self._block_size = block_size
        self._cache = model.new_plain_cache(num_blocks=num_blocks, block_size=block_size)
        self._launched: deque[_Launched] = deque()
        self._previous = torch.zeros(1, dtype=torch.int64, device=self._device)  # the last launch's samples

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Start computing `batch`; on a CPU, compute it."""
        try:
            results = self._step(batch)
            if self._device.type == "cuda":
                host = results.to_host()
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
                self._launched.append(_Launched(host, done))
            else:
                self._launched.append(_Launched(results, None))
            self._previous = results.tokens
        except RuntimeError as error:
            raise translate(error) from error

    def collect(self) -> StepOutput:
        """The results of the oldest launched batch; if that raises, everything launched is gone."""
        launched = self._launched.popleft()
        if launched.done is not None:
            try:
                launched.done.synchronize()
            except RuntimeError as error:
                self._launched.clear()
                raise translate(error) from error
        results = launched.results
        return StepOutput(
            results.tokens.numpy().astype(np.int32),
            logprobs=None if results.logprobs is None else unpack_logprobs(results.logprobs.numpy()),
            scores=None if results.scores is None else unpack_logprobs(results.scores.numpy()),
        )

    def close(self) -> None:
        self._launched.clear()
        del self._cache, self._model

    def _step(self, batch: Batch) -> _Results:
        arrays = {
            "token_ids": batch.token_ids,
            "sources": batch.token_sources,
            "positions": batch.positions,
            "slots": batch.slots,
            "tables": batch.block_tables.ravel(),
            "lengths": batch.context_lengths,
            "indices": batch.sample_indices,
            "sample_positions": batch.sample_positions,
            "sampling": np.ascontiguousarray(batch.sampling).view(np.int32),
        }
        inputs = self._upload(arrays | _asked(batch))
        token_ids, sources = inputs["token_ids"].long(), inputs["sources"]
        if (batch.token_sources >= 0).any():
            # A row that could not be sampled is NOT_FINITE here; what is computed from it is dropped.
            sampled = self._previous[sources.clamp(min=0)].clamp(min=0)
            token_ids = torch.where(sources >= 0, sampled, token_ids)
        hidden = self._hidden(batch, inputs, token_ids=token_ids)
        scores = None
        if batch.scored is not None:
            scores = self._score(hidden, inputs["scored_indices"].long(), inputs["scored_targets"].long())
        if not len(batch.sampling):
            return _Results(self._previous[:0], None, scores)
        logits = self._logits(hidden, inputs["indices"].long())
        tokens = self._sample(batch, inputs, logits=logits, token_ids=token_ids)
        return _Results(tokens, self._words(logits, tokens) if batch.logprobs else None, scores)

    def _hidden(self, batch: Batch, inputs: Mapping[str, Tensor], *, token_ids: Tensor) -> Tensor:
        """The residual stream [T, H] of the step's tokens [T], those in flight included."""
        tables = inputs["tables"].view(batch.block_tables.shape)
        attention = self._attention(batch, inputs["slots"].long(), tables, inputs["lengths"])
        return self._model.hidden(token_ids, inputs["positions"].long(), self._cache, attention)

    def _logits(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """[N, V] of rows `indices` [N] of the residual stream."""
        return self._model.logits(hidden[indices])

    def _words(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Words [N, ...] of model/logprobs.py."""
        return logprob_words(logits, token_ids)

    def _sample(self, batch: Batch, inputs: Mapping[str, Tensor], *, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Tokens [R] from logits [R, V]; `token_ids` [T] are the step's, those in flight included."""
        sampling = batch.sampling
        words, positions = inputs["sampling"].view(len(sampling), -1), inputs["sample_positions"].long()
        drawn = sampling["temperature"] > 0
        filters = (sampling["top_k"] > 0) | (sampling["top_p"] < 1) | (sampling["min_p"] > 0)
        penalties = biases = masks = None
        if batch.histories is not None:
            last = token_ids[inputs["indices"].long()]
            penalties = _unpack_penalties(words, inputs["histories"].view(batch.histories.shape), last)
        if batch.biases is not None:
            rows, ids, values = (inputs[name] for name in ("bias_rows", "bias_ids", "bias_values"))
            biases = LogitBiases(rows.long(), ids.long(), values.view(torch.float32))
        if batch.masks is not None:
            masks = inputs["masks"].view(batch.masks.shape)
        return sample(
            logits,
            _unpack(words, positions),
            end_of_text_id=self._model.config.end_of_text_id,
            drawn=bool(drawn.any()),
            filtered=bool((drawn & filters).any()),
            penalties=penalties,
            biases=biases,
            masks=masks,
        )

    def _score(self, hidden: Tensor, indices: Tensor, targets: Tensor) -> Tensor:
        """Words [P, ...] of model/logprobs.py for P targets. Never holds the logits of more than a slice of them."""
        size = _MOST_SCORED[self._device.type]
        slices = zip(torch.split(indices, size), torch.split(targets, size), strict=True)
        return torch.cat([self._words(self._logits(hidden, rows), ids) for rows, ids in slices])

    def _attention(self, batch: Batch, slots: Tensor, tables: Tensor, lengths: Tensor) -> Attention:
        num_decodes = batch.num_decodes
        decodes = []
        for start, end in cut_decodes(batch.context_lengths[:num_decodes].tolist(), self._device.type):
            width = -(-int(batch.context_lengths[end - 1]) // self._block_size)
            shortest = int(batch.context_lengths[start])
            decodes.append(Decodes(start, end, shortest, tables[start:end, :width], lengths[start:end]))
        prefills = []
        for number in range(num_decodes, len(batch.context_lengths)):
            start, end = batch.query_starts[number : number + 2].tolist()
            length = int(batch.context_lengths[number])
            visible = None
            if length > end - start:
                queries = torch.arange(length - (end - start), length, device=self._device)
                visible = torch.arange(length, device=self._device) <= queries[:, None]
            blocks = tables[number, : -(-length // self._block_size)]
            prefills.append(Prefill(start, end, length, blocks, visible))
        return self._cache.attention(slots=slots, decodes=decodes, prefills=prefills)

    def _upload(self, arrays: Mapping[str, Int32]) -> dict[str, Tensor]:
        """The flat arrays on the device, by one copy."""
        sizes = [array.size for array in arrays.values()]
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        np.concatenate(list(arrays.values()), out=packed.numpy())
        return dict(zip(arrays, torch.split(packed.to(self._device, non_blocking=True), sizes), strict=True))


def _asked(batch: Batch) -> dict[str, Int32]:
    """What only some batches have, as flat arrays of 32-bit words."""
    arrays: dict[str, Int32] = {}
    if batch.masks is not None:
        arrays["masks"] = batch.masks.ravel()
    if batch.histories is not None:
        arrays["histories"] = batch.histories.ravel()
    if batch.biases is not None:
        arrays["bias_rows"], arrays["bias_ids"] = batch.biases.rows, batch.biases.token_ids
        arrays["bias_values"] = batch.biases.values.view(np.int32)
    if batch.scored is not None:
        arrays["scored_indices"], arrays["scored_targets"] = batch.scored.indices, batch.scored.targets
    return arrays


def to_host(tensor: Tensor) -> Tensor:
    """A copy, which from a GPU is filled once what is queued there so far is done."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def cut_decodes(lengths: Sequence[int], device_type: str) -> list[tuple[int, int]]:
    """Where to cut decodes, in order of their lengths, so that no rectangle is too large or mostly padding."""
    groups = []
    start = 0
    for end, length in enumerate(lengths[1:], 1):
        padded = length > max(_MOST_PADDING[device_type] * lengths[start], _SHORT)
        if padded or (end + 1 - start) * length > _MOST_GATHERED[device_type]:
            groups.append((start, end))
            start = end
    return [*groups, (start, len(lengths))] if lengths else []


def _unpack(words: Tensor, positions: Tensor) -> SamplingTensors:
    """SAMPLING's records, as rows of 32-bit words, in tensors."""
    low, high = words[:, SAMPLING_WORD["seed"]].long(), words[:, SAMPLING_WORD["seed"] + 1].long()
    return SamplingTensors(
        temperature=words[:, SAMPLING_WORD["temperature"]].view(torch.float32),
        top_k=words[:, SAMPLING_WORD["top_k"]].long(),
        top_p=words[:, SAMPLING_WORD["top_p"]].view(torch.float32),
        min_p=words[:, SAMPLING_WORD["min_p"]].view(torch.float32),
        seed=high << 32 | low & 0xFFFFFFFF,
        choice=words[:, SAMPLING_WORD["choice"]].long(),
        position=positions,
        may_end=positions >= words[:, SAMPLING_WORD["min_length"]],
    )


def _unpack_penalties(words: Tensor, histories: Tensor, last: Tensor) -> Penalties:
    return Penalties(
        histories=histories.long(),
        last=last,
        num_prompt=words[:, SAMPLING_WORD["num_prompt"]].long(),
        repetition=words[:, SAMPLING_WORD["repetition_penalty"]].view(torch.float32),
        frequency=words[:, SAMPLING_WORD["frequency_penalty"]].view(torch.float32),
        presence=words[:, SAMPLING_WORD["presence_penalty"]].view(torch.float32),
    )


def translate(error: RuntimeError) -> Exception:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # the allocator's, or the driver's
        torch.cuda.empty_cache()
        return OutOfMemory(str(error))
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return DeviceLost(str(error))
    return error


def warm_up(runner: TorchRunner, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Run the largest prefill and the largest decode step once, on block 0: first calls are slow, and memory peaks.

    Both ask for all that a batch can ask for, which takes the most memory.
    """
    config = runner._model.config
    lengths = [config.context_length] * (max_num_batched_tokens // config.context_length) or [max_num_batched_tokens]
    for counts in (lengths, [1] * max_num_seqs):
        runner.launch(_dummy(counts, config, runner._block_size))
        runner.collect()


def _dummy(counts: list[int], config: ModelConfig, block_size: int) -> Batch:
    num_sequences = len(counts)
    query_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tokens = int(query_starts[-1])
    sampling = np.zeros(num_sequences, dtype=SAMPLING)
    sampling["temperature"], sampling["top_p"], sampling["repetition_penalty"] = 1, 0.9, 1.1
    rows = np.arange(num_sequences, dtype=np.int32)
    decode = num_tokens == num_sequences
    lengths = np.full(num_sequences, config.context_length, np.int32) if decode else np.asarray(counts, np.int32)
    width = -(-int(lengths.max()) // block_size)
    return Batch(
        token_ids=np.zeros(num_tokens, np.int32),
        token_sources=np.full(num_tokens, -1, np.int32),
        positions=np.arange(num_tokens, dtype=np.int32) % config.context_length,
        slots=np.zeros(num_tokens, np.int32) if decode else np.arange(num_tokens, dtype=np.int32) % block_size,
        query_starts=query_starts,
        context_lengths=lengths,
        block_tables=np.zeros((num_sequences, width), np.int32),
        num_decodes=num_sequences if decode else 0,
        sample_indices=query_starts[1:] - 1,
        sample_positions=lengths,
        sampling=sampling,
        masks=np.full((num_sequences, -(-config.vocab_size // 32)), -1, np.int32),
        biases=Biases(rows, np.zeros_like(rows), np.ones(num_sequences, np.float32)),
        histories=np.zeros((num_sequences, config.context_length - 1), np.int32),
        logprobs=True,
        scored=Scored(np.arange(num_tokens, dtype=np.int32), np.zeros(num_tokens, np.int32)),
    )
