"""A language model without tensors: logits, samples and log-probabilities are pure functions of the context."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from service.model.batch import NUM_TOP, Float32, Int32

VOCAB_SIZE = 97
END_OF_TEXT = 96
REPEATS_FROM = 80  # contexts that begin with such a token are mostly copied from themselves, others are noise
_IDS = np.arange(VOCAB_SIZE, dtype=np.uint64)


def logits(context: Sequence[int]) -> Float32:
    """[VOCAB_SIZE], from -4 to 4, but for 12 of the token that repeats; not to be written to."""
    value = 17
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    period = 3 + context[0] % 5
    if context[0] < REPEATS_FROM or len(context) < period or len(context) * 7 % 11 == 0:
        return _noise(value)
    found = _noise(value).copy()
    found[context[-period]] = 12
    return found


@lru_cache(maxsize=20_000)
def _noise(value: int) -> Float32:
    mixed = (_IDS + np.uint64(value * 1009)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-21) - 4).astype(np.float32)


def penalize(
    scores: Float32,
    tokens: Sequence[int],
    generated: Sequence[int],
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> Float32:
    """Logits with the penalties for `tokens`, all so far, and those `generated` among them."""
    scores = scores.copy()
    seen = list(set(tokens))
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / repetition, scores[seen] * repetition)
    for token, count in Counter(generated).items():
        scores[token] -= frequency * count + presence
    return scores


def draw(scores: Float32, *, temperature: float, seed: int, choice: int, position: int) -> int:
    """The best token; unless greedy, by noise that depends on (seed, choice, position) alone."""
    if temperature > 0:
        scores = scores + _noise(hash((seed, choice, position)) % 1_000_003)
    return int(scores.argmax())


def top_logprobs(raw: Float32, token: int) -> tuple[Float32, Int32, Float32]:
    """The log-probability of `token`, and the NUM_TOP best with theirs."""
    values = raw - np.log(np.exp(raw).sum(dtype=np.float32))
    best = np.argsort(-values, kind="stable")[:NUM_TOP].astype(np.int32)
    return values[token], best, values[best]
