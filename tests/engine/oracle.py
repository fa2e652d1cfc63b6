"""What a request's sequences must be, computed one token at a time with no engine at all."""

from dataclasses import dataclass

import numpy as np

from service.engine.request import Finish, Logprobs, Request, SamplingParams
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE, draw, logits, penalize, top_logprobs


@dataclass(frozen=True)
class Ask:
    """A request, how its tokens are drawn, which can complete a stop string, and whether the others can wait."""

    request: Request
    params: SamplingParams
    completing_ids: bytes = b""
    patient: bool = False


@dataclass(frozen=True)
class Answer:
    """All of a sequence."""

    tokens: list[int]
    finish: Finish
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


def alone(ask: Ask) -> list[list[int]]:
    """The tokens of each choice."""
    return [answer.tokens for answer in answers(ask)]


def answers(ask: Ask) -> list[Answer]:
    """One a choice."""
    return [_answer(ask.request, ask.params, choice) for choice in range(ask.request.n)]


def _answer(request: Request, params: SamplingParams, choice: int) -> Answer:
    tokens = list(request.prompt)
    constraint = None if params.grammar is None else FakeConstraint(params.grammar)
    finish = None if params.max_tokens else Finish.LENGTH
    while finish is None:
        allowed = _allowed(params, tokens, len(tokens) - len(request.prompt), constraint)
        scores = penalize(
            logits(tokens),
            tokens,
            tokens[len(request.prompt) :],
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )
        for token, bias in params.logit_bias:
            scores[token] += np.float32(bias)
        scores[[token for token in range(VOCAB_SIZE) if token not in (allowed or {END_OF_TEXT})]] = -np.inf
        token = draw(scores, temperature=params.temperature, seed=params.seed, choice=choice, position=len(tokens))
        tokens.append(token)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos and allowed else (END_OF_TEXT,))}
        if token in ends:
            finish = Finish.STOP
        elif constraint is not None:
            constraint.accept(token)
            finish = Finish.STOP if constraint.finished else None
        if finish is None and len(tokens) == len(request.prompt) + params.max_tokens:
            finish = Finish.LENGTH
    scored = None
    if request.score_from is not None and choice == 0:
        scored = _logprobs(request.prompt, request.score_from, params.num_logprobs)
    logprobs = None
    if params.num_logprobs is not None and params.max_tokens:
        logprobs = _logprobs(tokens, len(request.prompt), params.num_logprobs)
    return Answer(tokens[len(request.prompt) :], finish, logprobs, scored)


def _allowed(
    params: SamplingParams, tokens: list[int], num_generated: int, constraint: FakeConstraint | None
) -> set[int]:
    allowed = set(range(VOCAB_SIZE) if params.allowed_token_ids is None else params.allowed_token_ids)
    allowed -= set(params.banned_token_ids)
    if num_generated < params.min_tokens:
        allowed -= {END_OF_TEXT, *params.stop_token_ids}
    allowed -= {last for *before, last in params.bad_words if tokens[-len(before) :] == before}
    return allowed if constraint is None else allowed & constraint.allowed


def _logprobs(tokens: list[int] | tuple[int, ...], first: int, num_best: int | None) -> Logprobs:
    """Those of tokens[first:]."""
    found = Logprobs()
    for position in range(first, len(tokens)):
        chosen, best_ids, best = top_logprobs(logits(tokens[:position]), tokens[position])
        num = num_best or 0
        found += Logprobs(np.float32(chosen).tobytes(), best_ids[:num].tobytes(), best[:num].tobytes())
    return found
