"""Requests of many kinds, at random: what the self-test asks. Their ids count from 0. Called by command.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.request import Request, SamplingParams
from service.model.batch import NUM_TOP

_MOST_GROWING = 16
_NUM_BASES = 6  # that prompts share prefixes of


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and how its tokens are drawn. `growing`: a short prompt with a long answer."""

    request: Request
    params: SamplingParams
    growing: bool = False


def random_asks(
    count: int, *, seed: int, context_length: int, block_size: int, vocab_size: int, max_num_seqs: int
) -> list[Ask]:
    """`count` requests, at least 2, the same for the same numbers; the growing ones fill more than a context together.

    So in the blocks of one context they are let in together, where `max_num_seqs` is 2 or more and a context has four
    blocks, do not fit, and some are preempted. The first of the others has more than a block to be found. They have
    prompts of up to 320 tokens, half of which begin as others do, and up to 8 new tokens. All but one in eight ask for
    log-probabilities, and some for those of their prompts.
    """
    random = np.random.default_rng(seed)
    # Each is let in with a block, and one more to grow into.
    num_growing = max(2, min(_MOST_GROWING, count // 4, context_length // block_size // 2, max_num_seqs))
    bases = random.integers(0, vocab_size, (_NUM_BASES, context_length // 4)).tolist()
    asks = []
    for number in range(count):
        if number % (count // num_growing) == 0 and number // (count // num_growing) < num_growing:
            prompt = _ids(random, vocab_size, random.integers(1, 5))
            max_tokens = 5 * context_length // (4 * num_growing)
            params = _params(random, max_tokens=max_tokens, vocab_size=vocab_size, prompt=prompt, ignore_eos=True)
            asks.append(Ask(Request(number, prompt), params, growing=True))
            continue
        first = all(ask.growing for ask in asks)
        if first:
            prompt = _ids(random, vocab_size, min(2 * block_size + 1, context_length - 8))
        else:
            prompt = _prompt(random, bases, context_length=context_length, vocab_size=vocab_size)
        scored = random.random() < 0.2 and not first
        max_tokens = 0 if scored and random.random() < 0.5 else int(random.integers(1, 9))
        score_from = int(random.integers(1, len(prompt))) if scored and len(prompt) > 1 else None
        if score_from is None:
            max_tokens = max(1, max_tokens)
        params = _params(random, max_tokens=max_tokens, vocab_size=vocab_size, prompt=prompt)
        n = 2 if max_tokens and random.random() < 0.1 else 1
        asks.append(Ask(Request(number, prompt, n, score_from=score_from), params))
    return asks


def _ids(random: np.random.Generator, vocab_size: int, count: int | np.integer) -> tuple[int, ...]:
    return tuple(random.integers(0, vocab_size, count).tolist())


def _prompt(
    random: np.random.Generator, bases: list[list[int]], *, context_length: int, vocab_size: int
) -> tuple[int, ...]:
    most = context_length - 8
    if random.random() < 1 / 16:
        return _ids(random, vocab_size, random.integers(most // 4, min(320, most)))
    own = _ids(random, vocab_size, random.integers(1, min(33, most // 2)))
    if random.random() < 0.5:
        return own
    base = bases[random.integers(len(bases))]
    return (*base[: random.integers(1, min(64, len(base)) + 1)], *own)[:most]


def _params(
    random: np.random.Generator,
    *,
    max_tokens: int,
    vocab_size: int,
    prompt: tuple[int, ...],
    ignore_eos: bool = False,
) -> SamplingParams:
    """Greedy or drawn with a seed, and each of the other fields now and then."""
    fields: dict[str, Any] = {"temperature": 0.0}
    if random.random() < 0.6:
        fields = {"temperature": round(float(random.uniform(0.3, 1.5)), 2), "seed": int(random.integers(2**62))}
        fields |= {"top_k": int(random.integers(1, 100))} if random.random() < 0.4 else {}
        fields |= {"top_p": round(float(random.uniform(0.5, 1)), 2)} if random.random() < 0.4 else {}
        fields |= {"min_p": round(float(random.uniform(0, 0.1)), 3)} if random.random() < 0.2 else {}
    if random.random() < 0.3:
        fields |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.2}
    if random.random() < 0.2:
        fields["logit_bias"] = tuple((token, 1.5) for token in sorted(set(prompt[:5])))
    if random.random() < 0.1:
        fields["banned_token_ids"] = tuple(sorted(set(_ids(random, vocab_size, 8))))
    if random.random() < 0.1:
        fields["min_tokens"] = max_tokens // 2
    if random.random() < 7 / 8:
        fields["num_logprobs"] = int(random.choice((0, 1, 5, 20, NUM_TOP)))
    return SamplingParams(max_tokens, ignore_eos=ignore_eos, **fields)
