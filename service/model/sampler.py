"""One token a row from logits: a fixed-shape function of tensors, without a loop over rows or a branch on values.

The draw is a pure function of (logits, parameters, seed, choice, position): one uniform number a row from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), then the inverse of the
cumulative distribution in token-id order over the filtered probabilities. Called by the runner.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.model.batch import NOT_FINITE

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Parameters of R rows, each [R] on the logits' device."""

    temperature: Tensor  # fp32; 0 is greedy
    top_k: Tensor  # int64; 0 is off
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    seed: Tensor  # int64
    choice: Tensor  # int64
    position: Tensor  # int64, of the token to be drawn
    may_end: Tensor  # bool: end of text may be drawn


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words for a counter of four and a key of two; a word is an int64 tensor in 0..2^32-1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap around at 2^64, which leaves their bits right; the shift is arithmetic, hence the mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def uniform(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One fp32 number in [0, 1) a row, a multiple of 2^-24: counter (position, choice, 0, 0), key the seed's words."""
    zero = torch.zeros_like(position)
    word = philox((position, choice, zero, zero), (seed & _WORD, seed >> 32 & _WORD))[0]
    return (word >> 8).float() * 2.0**-24


def sample(
    logits: Tensor,
    sampling: SamplingTensors,
    *,
    end_of_text_id: int,
    drawn: bool = True,
    filtered: bool = True,
) -> Tensor:
    """Token ids [R], int64, for fp32 logits [R, V]; NOT_FINITE for a row that holds a NaN or an infinity.

    `drawn` and `filtered` say whether any row draws, and whether any that draws has a filter: they choose the
    operators of the whole batch, never a row's result.
    """
    finite = torch.isfinite(logits.sum(-1))
    banned = torch.where(sampling.may_end, logits[:, end_of_text_id], -torch.inf)
    logits = logits.clone()
    logits[:, end_of_text_id] = banned
    tokens = logits.argmax(-1)
    if drawn:
        greedy = sampling.temperature == 0
        temperature = torch.where(greedy, 1.0, sampling.temperature)
        probabilities = torch.softmax(logits / temperature[:, None], -1)
        if filtered:
            probabilities = _filter(probabilities, sampling)
        draw = _invert(probabilities, uniform(sampling.seed, sampling.choice, sampling.position))
        tokens = torch.where(greedy, tokens, draw)
    return torch.where(finite, tokens, NOT_FINITE)


def _filter(probabilities: Tensor, sampling: SamplingTensors) -> Tensor:
    """Zero what top_k, then top_p, then min_p leave out; the token that crosses top_p stays, and equals of the last."""
    ordered = _descending(probabilities)
    size = probabilities.shape[-1]
    count = torch.where(sampling.top_k > 0, sampling.top_k, size).clamp(max=size)
    least = ordered.gather(-1, count[:, None] - 1)
    ordered = torch.where(ordered >= least, ordered, 0.0)
    cumulative = ordered.cumsum(-1)
    top_p = sampling.top_p[:, None]
    inside = (cumulative - ordered < top_p * cumulative[:, -1:]) | (top_p >= 1)
    count = (inside & (ordered > 0)).sum(-1, keepdim=True).clamp(min=1)
    least = torch.maximum(ordered.gather(-1, count - 1), sampling.min_p[:, None] * ordered[:, :1])
    return torch.where(probabilities >= least, probabilities, 0.0)


def _descending(values: Tensor) -> Tensor:
    """Rows sorted, largest first."""
    if values.device.type == "cpu":  # numpy's vectorised sort takes a tenth of torch's time on 50,257 values
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(-1, descending=True).values


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index a row whose cumulative weight exceeds uniform * total; never one of zero weight."""
    # A GPU's parallel scan rounds by tile: in fp32 its sums could fall by the last bit where a weight is zero.
    cumulative = weights.cumsum(-1, dtype=torch.float64 if weights.is_cuda else None)
    total = cumulative[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
