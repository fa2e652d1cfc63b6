"""From the residual stream to tokens: final norm, head, sampling, log-probabilities. Called by model/graphs.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.batch import SAMPLING
from service.model.gpt2 import GPT2
from service.model.kernels import adjusting, norms, sampling
from service.model.kernels.plan import Product, Vector
from service.model.kernels.products import NORM
from service.model.matrix import Matrix, power_of_two

_WORDS = SAMPLING.itemsize // 4
_CHUNK = 2048  # logits of a row that one program scans
_BLOCK = 8192  # that one program reads at once of a row that has filters
_FEW_ROWS = 16  # up to which a row's programs get more warps


@dataclass(frozen=True, slots=True)
class AskedTensors:
    """What adjusts the rows that ask for it, on the device: int32 but for `bias_values`. See kernels/adjusting.py."""

    mask_rows: Tensor
    masks: Tensor
    history_starts: Tensor
    history: Tensor
    bias_starts: Tensor
    bias_ids: Tensor
    bias_values: Tensor  # fp32


@dataclass(frozen=True, slots=True)
class RowTensors:
    """What a tail of R rows reads, on the device: int32, at addresses that a graph may keep."""

    indices: Tensor  # [R] which of the step's tokens
    positions: Tensor  # [R]
    records: Tensor  # [R, words of SAMPLING]


class Tail:
    """The head of `model` over buffers for `max_rows` rows; the tokens stay in `sampled`, -1 where there is none."""

    def __init__(self, model: GPT2, *, max_rows: int, pdl: bool) -> None:
        self._model = model
        self._chain = {"PDL": pdl, "launch_pdl": pdl}
        config, device = model.config, model.device
        head = model.padded_head  # [V', H], a multiple of 64 rows: the products' tiles are whole
        self._head = Matrix(
            head, torch.zeros(len(head), dtype=model.dtype, device=device), activation="relu", norm=model.final_norm
        )
        self._num_chunks = -(-config.vocab_size // _CHUNK)
        self._normed = torch.zeros(max_rows, config.hidden_size, dtype=model.dtype, device=device)
        self._logits = torch.zeros(max_rows, len(head), dtype=torch.float32, device=device)
        self._adjusted = torch.zeros_like(self._logits)
        self._finite = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._peaks = torch.zeros(max_rows, self._num_chunks, dtype=torch.float32, device=device)
        self._masses = torch.zeros_like(self._peaks)
        self._winners = torch.zeros(max_rows, self._num_chunks, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def logits(self, x: Tensor, indices: Tensor, head: Product) -> Tensor:
        """fp32 [R, V] of the rows `indices` [R] of the residual stream."""
        config, num_rows = self._model.config, len(indices)
        norm, pdl = self._model.final_norm, self._chain["PDL"]
        if isinstance(head, Vector):
            self._head.product(head, x, self._logits, num_tokens=1, pdl=pdl, read=NORM.value, index=indices)
            return self._logits[:1, : config.vocab_size]
        norms.gather_and_norm[(num_rows,)](
            x,
            indices,
            norm.weight,
            norm.bias,
            self._normed,
            norm.epsilon,
            H=config.hidden_size,
            WIDTH=power_of_two(config.hidden_size),
            **self._chain,
        )
        self._head.product(head, self._normed, self._logits, num_tokens=num_rows, pdl=pdl)
        return self._logits[:num_rows, : config.vocab_size]

    def sample(self, logits: Tensor, rows: RowTensors, *, adjusted: bool = False) -> None:
        """`sampled` from logits [R, V] whose rows are as far apart as in the buffer; `adjusted`: some are -inf."""
        config, num_rows = self._model.config, len(rows.indices)
        shape = {
            "V": config.vocab_size,
            "STRIDE": logits.stride(0),
            "CHUNKS": self._num_chunks,
            "CHUNK": _CHUNK,
            "WORDS": _WORDS,
            **self._chain,
        }
        partials = (self._peaks, self._winners, self._masses)
        sampling.scan_logits[(self._num_chunks, num_rows)](
            logits,
            rows.records,
            rows.positions,
            *partials,
            config.end_of_text_id,
            **shape,
            ADJUSTED=adjusted,
        )
        sampling.pick_tokens[(num_rows,)](
            logits,
            rows.records,
            rows.positions,
            *partials,
            self.sampled,
            config.end_of_text_id,
            **shape,
            CHUNKS_WIDTH=power_of_two(self._num_chunks),
            BLOCK=_BLOCK,
            num_warps=16 if num_rows <= _FEW_ROWS else 8,
        )

    def adjust(self, logits: Tensor, rows: RowTensors, asked: AskedTensors, resolved: Tensor) -> Tensor:
        """Logits [R, V] with the penalties, biases and masks of `asked`; `resolved` [T] are the step's token ids."""
        config, num_rows = self._model.config, len(rows.indices)
        adjusted = self._adjusted[:num_rows, : config.vocab_size]
        adjusting.adjust_logits[(num_rows,)](
            logits,
            adjusted,
            rows.records,
            rows.positions,
            rows.indices,
            resolved,
            asked.mask_rows,
            asked.masks,
            asked.history_starts,
            asked.history,
            asked.bias_starts,
            asked.bias_ids,
            asked.bias_values,
            self._finite,
            V=config.vocab_size,
            STRIDE=logits.stride(0),
            WORDS=_WORDS,
            BLOCK=_BLOCK // 4,
            HISTORY=power_of_two(config.context_length),
            COMPARED=16,
            BIASES=128,
            num_warps=8,
            **self._chain,
        )
        return adjusted

    def drop_wrong(self, num_rows: int) -> None:
        """No token for a row whose logits were not all finite before `adjust`."""
        adjusting.drop_wrong[(-(-num_rows // 128),)](self.sampled, self._finite, num_rows, BLOCK=128, **self._chain)
