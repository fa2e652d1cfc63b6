"""Beam search by the rules of Megatron-LM's server, a request a beam and step to the engine. Called by megatron.py.

A step extends every open beam by its likeliest tokens and ranks all of them by the sum of log-probabilities. Of the
best `width` a stop token ends a hypothesis; of the others the best `width` stay open. A hypothesis scores
sum / length ** length_penalty, its length in generated tokens, the stop token among them; the best `width` are kept.
The search ends when so many are there and the step's best extension would not beat the worst of them at its present
length, or when `num_tokens` are generated, which ends the open beams where they stand.

transformers' num_beams counts lengths alike and differs in the early end alone: it compares the best beam that stays
open, not the step's best extension, which may be one that has just ended. Without a stop token on the way, or with a
length_penalty of 0 or less, both give the same; with a reward for length one may go on where the other ends.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.api import errors
from service.api.access import Caller
from service.api.metrics import Metrics
from service.engine.client import EngineClient
from service.engine.request import Logprobs, Request, SamplingParams

MAX_BEAMS = 32
# Of its likeliest tokens, a beam brings what all that stay open may be, a stop token, and one that may be banned.
NUM_MORE_CANDIDATES = 2
# Of the steps after the first: what has begun goes on, before others take the blocks that it shares.
Candidates = Iterable[tuple[int, float]]  # token ids with their log-probabilities, likeliest first


@dataclass(frozen=True, slots=True)
class Beam:
    """Generated tokens and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that has ended."""

    token_ids: tuple[int, ...]
    score: float
    stopped: bool  # by the stop token, which is its last


class BeamSearch:
    """`open` are the beams to extend by the next `advance`, empty once the search has ended; at first one of none."""

    def __init__(self, *, width: int, num_tokens: int, stop_token: int, length_penalty: float) -> None:
        assert 1 <= width <= MAX_BEAMS
        assert num_tokens >= 1
        self.open = [Beam()]
        self.width = width
        self._num_tokens = num_tokens
        self._stop_token = stop_token
        self._length_penalty = length_penalty
        self._finished: list[Hypothesis] = []

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """A step: `candidates` of each open beam, in their order."""
        extended = [
            (beam.total + logprob, token_id, beam)
            for beam, best in zip(self.open, candidates, strict=True)
            for token_id, logprob in best
            if math.isfinite(logprob)
        ]
        extended.sort(key=lambda each: -each[0])
        opened: list[Beam] = []
        for rank, (total, token_id, beam) in enumerate(extended):
            longer = Beam((*beam.token_ids, token_id), total)
            if token_id != self._stop_token:
                opened.append(longer)
            elif rank < self.width:
                self._finish(longer, stopped=True)
            if len(opened) == self.width:
                break
        length = len(self.open[0].token_ids) + 1
        self.open = opened
        if self._is_decided(extended[0][0], length):
            self.open = []
        elif length == self._num_tokens:
            for beam in opened:
                self._finish(beam, stopped=False)
            self.open = []

    def best(self) -> list[Hypothesis]:
        """The finished hypotheses, best first; `width` of them after the end."""
        return sorted(self._finished, key=lambda hypothesis: -hypothesis.score)

    def _finish(self, beam: Beam, *, stopped: bool) -> None:
        hypothesis = Hypothesis(beam.token_ids, self._score(beam.total, len(beam.token_ids)), stopped)
        if len(self._finished) == self.width:
            worst = min(self._finished, key=lambda kept: kept.score)
            if hypothesis.score <= worst.score:
                return
            self._finished.remove(worst)
        self._finished.append(hypothesis)

    def _is_decided(self, total: float, length: int) -> bool:
        """No open beam would get in at its present length; `total` is the step's best."""
        if len(self._finished) < self.width:
            return False
        return min(hypothesis.score for hypothesis in self._finished) >= self._score(total, length)

    def _score(self, total: float, length: int) -> float:
        power: float = length**self._length_penalty
        return total / power


async def search_beams(
    search: BeamSearch,
    client: EngineClient,
    metrics: Metrics,
    prompt: tuple[int, ...],
    *,
    banned: tuple[int, int] | None,
    caller: Caller,
    summary: dict[str, Any],
) -> list[Hypothesis]:
    """Run the search after `prompt`, where the second token of `banned` may not follow the first.

    A beam's context is a prompt to the engine, which finds all but the last tokens of it in the blocks that it shares
    with the beam it came from. Raises ApiError and EngineUnavailable.
    """
    num_best = search.width + NUM_MORE_CANDIDATES
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=num_best)

    def requests(priority: int) -> list[Request]:
        return [
            Request(
                client.new_request_id(), prompt + beam.token_ids, priority=priority, cache_salt=caller.cache_salt("")
            )
            for beam in search.open
        ]

    def candidates(request: Request) -> Candidates:
        for token_id, logprob in _best(found[request.id]):
            if (request.prompt[-1], token_id) != banned:
                yield token_id, logprob

    best: list[Hypothesis] = []
    group = requests(caller.priority(0))
    found: dict[int, Logprobs] = {}
    stream = client.submit(group, params, patient=True, client=caller.name)
    metrics.prompt_tokens.inc(len(prompt))
    try:
        with metrics.follow(stream, lambda: search.width - len(best)):
            async for deltas in stream:
                for delta in deltas:
                    errors.check_delta(delta)
                    assert delta.logprobs is not None
                    found[delta.request_id] = delta.logprobs
                if len(found) < len(group):
                    continue
                search.advance([candidates(request) for request in group])
                if search.open:
                    group = requests(caller.priority(0) - 1)  # before others, until these have waited for long
                    found = {}
                    stream.go_on(group)
            best = search.best()
            for hypothesis in best:
                metrics.finished.labels("stop" if hypothesis.stopped else "length").inc()
    finally:
        num_tokens = sum(len(hypothesis.token_ids) for hypothesis in best)
        metrics.generated_tokens.inc(num_tokens)  # when each came says nothing: until the end none is of an answer
        summary.update(
            num_choices=search.width,
            prompt_tokens=len(prompt),
            completion_tokens=num_tokens,
            num_unfinished=search.width - len(best),
        )
    return best


def _best(logprobs: Logprobs) -> Candidates:
    ids, values = np.frombuffer(logprobs.top_ids, np.int32), np.frombuffer(logprobs.top, np.float32)
    return zip(ids.tolist(), values.tolist(), strict=True)
