"""Prompts and what is sampled after them, as token ids: submitted, followed, ended. Called by megatron.py."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from service.api import errors
from service.api.access import Caller
from service.api.metrics import Metrics
from service.engine.client import EngineClient
from service.engine.request import Delta, Finish, Request, SamplingParams


class Text:
    """One prompt and what follows it, up to and including the token that ends it."""

    def __init__(self, prompt: Sequence[int], *, doubled: int | None) -> None:
        """`doubled` is a token that ends the text where it follows itself, which may be across the prompt's end."""
        self.tokens = list(prompt)
        self.logprobs: list[float] = []  # where they are asked for: of all tokens but the first
        self.finish: Finish | None = None
        self.delivered_at = 0.0  # its last tokens, in monotonic seconds; 0 is none so far
        self._doubled = doubled

    def take(self, delta: Delta) -> int:
        """The next tokens; how many of them belong to the text. `finish` is set where it has ended."""
        num_taken = len(delta.token_ids)
        self.finish = delta.finish
        for place, token_id in enumerate(delta.token_ids, 1):
            ends = token_id == self._doubled == self.tokens[-1]
            self.tokens.append(token_id)
            if ends:
                self.finish, num_taken = Finish.STOP, place
                break
        if delta.logprobs is not None:
            self.logprobs += _floats(delta.logprobs.chosen)[:num_taken]
        return num_taken


async def sample_texts(
    client: EngineClient,
    metrics: Metrics,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    doubled: int | None,
    completing_ids: bytes,
    caller: Caller,
    summary: dict[str, Any],
) -> list[Text]:
    """The text of each prompt, in their order; its prompt's log-probabilities too, where `params` have any.

    Equal prompts are samples of one, so that the same seed does not give the same text to all. Raises ApiError and
    EngineUnavailable.
    """
    scored = params.num_logprobs is not None
    requests = {
        prompt: Request(
            client.new_request_id(),
            prompt,
            count,
            score_from=1 if scored and len(prompt) > 1 else None,
            priority=caller.priority(0),
            cache_salt=caller.cache_salt(""),
        )
        for prompt, count in Counter(prompts).items()
    }
    texts: dict[tuple[int, int], Text] = {}
    num_samples = Counter[int]()
    for prompt in prompts:
        request_id = requests[prompt].id
        texts[request_id, num_samples[request_id]] = Text(prompt, doubled=doubled)
        num_samples[request_id] += 1
    scores: dict[int, list[float]] = {}
    num_prompt_tokens = sum(map(len, prompts))

    def count_unfinished() -> int:
        return sum(text.finish is None for text in texts.values())

    stream = client.submit(
        list(requests.values()), params, completing_ids=completing_ids, patient=True, client=caller.name
    )
    metrics.prompt_tokens.inc(num_prompt_tokens)
    try:
        with metrics.follow(stream, count_unfinished):
            async for deltas in stream:
                for delta in deltas:
                    errors.check_delta(delta)
                    text = texts[delta.request_id, delta.choice]
                    num_taken = text.take(delta)
                    text.delivered_at = metrics.take_tokens(
                        num_taken,
                        num_dropped=len(delta.token_ids) - num_taken,
                        stream=stream,
                        delivered_at=text.delivered_at,
                    )
                    if delta.prompt_logprobs is not None:
                        scores[delta.request_id] = _floats(delta.prompt_logprobs.chosen)
                    if text.finish is not None:
                        metrics.finished.labels(text.finish.value).inc()
                        if delta.finish is None:
                            stream.abort(delta.request_id, delta.choice)
    finally:
        summary.update(
            num_choices=len(texts),
            prompt_tokens=num_prompt_tokens,
            completion_tokens=sum(len(text.tokens) for text in texts.values()) - num_prompt_tokens,
            num_unfinished=count_unfinished(),
        )
    for (request_id, _), text in texts.items():
        text.logprobs = [*scores.get(request_id, ()), *text.logprobs]
    return list(texts.values())


def _floats(values: bytes) -> list[float]:
    found: list[float] = np.frombuffer(values, np.float32).tolist()
    return found
