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


@dataclass(frozen=True, slots=True)
class Penalties:
    """What R rows have said so far and what saying it again costs them. 1, 0 and 0 leave a row as it is."""

    histories: Tensor  # [R, width] int64: column i has the token at position i, up to the last but one; then -1
    last: Tensor  # [R] int64: the token before the one to be drawn
    num_prompt: Tensor  # [R] int64: tokens from this position on were generated
    repetition: Tensor  # [R] fp32, counts every token
    frequency: Tensor  # [R] fp32, these two count generated ones
    presence: Tensor  # [R] fp32


@dataclass(frozen=True, slots=True)
class LogitBiases:
    """What is added to E logits; no (row, id) twice."""

    rows: Tensor  # [E] int64
    token_ids: Tensor  # [E] int64
    values: Tensor  # [E] fp32


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
    penalties: Penalties | None = None,
    biases: LogitBiases | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Token ids [R], int64, for fp32 logits [R, V]; NOT_FINITE for a row that holds a NaN or an infinity.

    Penalties come first, then biases, then `masks` [R, ceil(V / 32)], int32 (bit i % 32 of word i // 32: token i may
    be taken; a row has one at least) and the ban of end of text, then temperature and filters.
    `drawn` and `filtered` say whether any row draws, and whether any that draws has a filter: they and what is None
    choose the operators of the whole batch, never a row's result. The caller's logits stay as they are.
    """
    finite = torch.isfinite(logits.sum(-1))
    logits = adjust(logits, sampling.position, penalties=penalties, biases=biases, masks=masks)
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


def adjust(
    logits: Tensor,
    position: Tensor,
    *,
    penalties: Penalties | None = None,
    biases: LogitBiases | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """What `sample` does to logits [R, V] before temperature and filters, but for the ban of end of text."""
    if penalties is not None:
        logits = _penalize(logits, penalties, position)
    if biases is not None:
        at = (biases.rows, biases.token_ids)
        logits = logits.index_put(at, logits[at] + biases.values)
    if masks is not None:
        logits = logits.masked_fill(~_unpack_bits(masks, logits.shape[-1]), -torch.inf)
    return logits


def _penalize(logits: Tensor, penalties: Penalties, position: Tensor) -> Tensor:
    """Repetition, then frequency and presence, where a row has said an id; `position` [R] is the one to be drawn."""
    histories, last = penalties.histories, penalties.last[:, None]
    positions = torch.arange(histories.shape[1], device=logits.device)
    generated = (positions >= penalties.num_prompt[:, None]) & (histories >= 0)
    generated = torch.cat((generated, (position > penalties.num_prompt)[:, None]), -1)
    said = torch.cat((torch.where(histories >= 0, histories, last), last), -1)  # padding says the last again, uncounted
    counts = torch.zeros_like(logits).scatter_add_(-1, said, generated.float()).gather(-1, said)
    repetition, frequency, presence = (
        column[:, None] for column in (penalties.repetition, penalties.frequency, penalties.presence)
    )
    scores = logits.gather(-1, said)
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = scores - frequency * counts - presence * (counts > 0)
    return logits.scatter(-1, said, scores)  # an id said twice gets the same score twice


def _unpack_bits(words: Tensor, size: int) -> Tensor:
    """[R, size] bool of [R, ceil(size / 32)] int32 words, lowest bit first."""
    octets = words.view(torch.uint8)[:, :, None]  # of a little-endian machine
    bits = octets >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.bool().flatten(1)[:, :size]


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
