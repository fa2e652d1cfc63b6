"""The runner: batches of integers to the device, one token a sampled row back. Called by the engine process."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.model.attention import Decodes, KVCache, PagedAttention, Prefill
from service.model.batch import SAMPLING, Batch, DeviceLost, OutOfMemory, StepOutput
from service.model.gpt2 import GPT2
from service.model.sampler import SamplingTensors, sample

# Tokens of context that one gather of decodes copies: on a CPU what its caches hold, on a GPU what its memory does.
_MOST_GATHERED = {"cpu": 2048, "cuda": 2**19}
# How much longer than the shortest the longest of them may be: on a GPU another gather costs more than padding does.
_MOST_PADDING = {"cpu": 2, "cuda": 1024}
_SHORT = 64  # tokens of context, up to which padding costs less than another gather


class KVMemoryError(ValueError):
    """The KV cache would not hold one full context, or the device has no room for the steps that were asked for."""


@dataclass(frozen=True, slots=True)
class _Launched:
    tokens: Tensor  # [R] on the host, filled once `done` has happened
    done: torch.cuda.Event | None


class TorchRunner:
    """GPT-2 in torch operators on a CPU or a GPU. On a GPU a step is launched while the one before it computes."""

    def __init__(self, model: GPT2, *, num_blocks: int, block_size: int) -> None:
        config = model.config
        self.num_blocks = num_blocks
        self.depth = 1 if model.device.type == "cuda" else 0
        self._model = model
        self._device = model.device
        self._block_size = block_size
        self._cache = KVCache(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_heads=config.num_heads,
            head_size=config.head_size,
            dtype=model.dtype,
            device=model.device,
        )
        self._launched: deque[_Launched] = deque()
        self._previous = torch.zeros(1, dtype=torch.int64, device=self._device)  # the last launch's samples

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Start computing `batch`; on a CPU, compute it."""
        try:
            tokens = self._step(batch)
            if self._device.type == "cuda":
                host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
                host.copy_(tokens, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
                self._launched.append(_Launched(host, done))
            else:
                self._launched.append(_Launched(tokens, None))
            self._previous = tokens
        except RuntimeError as error:
            raise _translate(error) from error

    def collect(self) -> StepOutput:
        """The samples of the oldest launched batch; if that raises, everything launched is gone."""
        launched = self._launched.popleft()
        if launched.done is not None:
            try:
                launched.done.synchronize()
            except RuntimeError as error:
                self._launched.clear()
                raise _translate(error) from error
        return StepOutput(launched.tokens.numpy().astype(np.int32))

    def close(self) -> None:
        self._launched.clear()
        del self._cache, self._model

    def _step(self, batch: Batch) -> Tensor:
        sampling = batch.sampling
        (
            token_ids,
            sources,
            positions,
            slots,
            tables,
            lengths,
            indices,
            draw_positions,
            words,
        ) = self._upload(
            batch.token_ids,
            batch.token_sources,
            batch.positions,
            batch.slots,
            batch.block_tables.ravel(),
            batch.context_lengths,
            batch.sample_indices,
            batch.sample_positions,
            np.ascontiguousarray(sampling).view(np.int32),
        )
        token_ids = token_ids.long()
        if (batch.token_sources >= 0).any():
            # A row that could not be sampled is NOT_FINITE here; what is computed from it is dropped.
            sampled = self._previous[sources.clamp(min=0)].clamp(min=0)
            token_ids = torch.where(sources >= 0, sampled, token_ids)
        tables = tables.view(batch.block_tables.shape)
        attention = self._attention(batch, slots.long(), tables, lengths)
        hidden = self._model.hidden(token_ids, positions.long(), self._cache, attention)
        if not len(sampling):
            return self._previous[:0]
        logits = self._model.logits(hidden[indices.long()])
        drawn = sampling["temperature"] > 0
        filters = (sampling["top_k"] > 0) | (sampling["top_p"] < 1) | (sampling["min_p"] > 0)
        return sample(
            logits,
            _unpack(words.view(len(sampling), -1), draw_positions.long()),
            end_of_text_id=self._model.config.end_of_text_id,
            drawn=bool(drawn.any()),
            filtered=bool((drawn & filters).any()),
        )

    def _attention(self, batch: Batch, slots: Tensor, tables: Tensor, lengths: Tensor) -> PagedAttention:
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
        return PagedAttention(
            slots=slots,
            decodes=decodes,
            prefills=prefills,
            block_size=self._block_size,
        )

    def _upload(self, *arrays: npt.NDArray[np.int32]) -> Sequence[Tensor]:
        """The arrays on the device, by one copy."""
        sizes = [array.size for array in arrays]
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        np.concatenate(arrays, out=packed.numpy())
        return torch.split(packed.to(self._device, non_blocking=True), sizes)


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
    word = {name: offset // 4 for name, (_, offset, *_) in SAMPLING.fields.items()}  # type: ignore[union-attr]
    low, high = words[:, word["seed"]].long(), words[:, word["seed"] + 1].long()
    return SamplingTensors(
        temperature=words[:, word["temperature"]].view(torch.float32),
        top_k=words[:, word["top_k"]].long(),
        top_p=words[:, word["top_p"]].view(torch.float32),
        min_p=words[:, word["min_p"]].view(torch.float32),
        seed=high << 32 | low & 0xFFFFFFFF,
        choice=words[:, word["choice"]].long(),
        position=positions,
        may_end=positions >= words[:, word["min_length"]],
    )


def _translate(error: RuntimeError) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return OutOfMemory(str(error))
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return DeviceLost(str(error))
    return error


def block_bytes(model: GPT2, block_size: int) -> int:
    """Bytes of one KV block over all layers."""
    config = model.config
    return 2 * config.num_layers * block_size * config.hidden_size * model.dtype.itemsize


def count_blocks(model: GPT2, *, block_size: int, kv_memory: int) -> int:
    """How many blocks fit in `kv_memory` bytes. Raises KVMemoryError if that is less than one full context."""
    num_blocks = kv_memory // block_bytes(model, block_size)
    needed = -(-model.config.context_length // block_size)
    if num_blocks < needed:
        raise KVMemoryError(
            f"kv_memory: {kv_memory} bytes hold {num_blocks} blocks; one context of "
            f"{model.config.context_length} tokens needs {needed} ({needed * block_bytes(model, block_size)} bytes)"
        )
    return num_blocks


def measure_kv_memory(
    model: GPT2, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, utilization: float
) -> int:
    """Bytes of the GPU left for the KV cache, when `utilization` of its memory may be used in all.

    Runs the largest steps over a cache of one block, to see what they need besides.
    """
    free, total = torch.cuda.mem_get_info(model.device)
    others = total - free - torch.cuda.memory_reserved(model.device)
    probe = TorchRunner(model, num_blocks=1, block_size=block_size)
    torch.cuda.reset_peak_memory_stats(model.device)
    warm_up(probe, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    peak = torch.cuda.max_memory_reserved(model.device)
    probe.close()
    torch.cuda.empty_cache()
    return max(0, int(total * utilization) - others - peak)


def warm_up(runner: TorchRunner, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Run the largest prefill and the largest decode step once, on block 0: first calls are slow, and memory peaks."""
    context = runner._model.config.context_length
    lengths = [context] * (max_num_batched_tokens // context) or [max_num_batched_tokens]
    for counts in (lengths, [1] * max_num_seqs):
        runner.launch(_dummy(counts, context, runner._block_size))
        runner.collect()


def _dummy(counts: list[int], context_length: int, block_size: int) -> Batch:
    num_sequences = len(counts)
    query_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tokens = int(query_starts[-1])
    sampling = np.zeros(num_sequences, dtype=SAMPLING)
    sampling["temperature"], sampling["top_p"] = 1, 0.9
    decode = num_tokens == num_sequences
    lengths = np.full(num_sequences, context_length, np.int32) if decode else np.asarray(counts, np.int32)
    width = -(-int(lengths.max()) // block_size)
    return Batch(
        token_ids=np.zeros(num_tokens, np.int32),
        token_sources=np.full(num_tokens, -1, np.int32),
        positions=np.arange(num_tokens, dtype=np.int32) % context_length,
        slots=np.zeros(num_tokens, np.int32) if decode else np.arange(num_tokens, dtype=np.int32) % block_size,
        query_starts=query_starts,
        context_lengths=lengths,
        block_tables=np.zeros((num_sequences, width), np.int32),
        num_decodes=num_sequences if decode else 0,
        sample_indices=query_starts[1:] - 1,
        sample_positions=lengths,
        sampling=sampling,
    )
