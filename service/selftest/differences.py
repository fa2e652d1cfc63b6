"""Two answers to one request, beside each other to the bit. Called by command.py."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from service.engine.request import Delta, Finish, Logprobs
from service.selftest.scenarios import Answers, Outcome


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scenario showed."""

    scenario: str
    compared: int  # sequences' answers
    differing: int
    first: str | None  # the first difference, or what was to happen and did not
    most_at_once: int
    hits: int
    preemptions: int
    seconds: float


def compare(expected: Answers, outcome: Outcome) -> Finding:
    """`expected` are the answers that everybody got alone; each must have come again."""
    missing = sorted(expected.keys() - {key for key, _ in outcome.answers})
    found = [((request, choice), "no answer") for request, choice in missing]
    found += [
        (key, difference)
        for key, answer in sorted(outcome.answers, key=lambda pair: pair[0])
        if (difference := first_difference(expected[key], answer)) is not None
    ]
    first = None
    if found:
        (request, choice), difference = found[0]
        first = f"request {request}, choice {choice}, {difference}"
    elif outcome.needs and not getattr(outcome, outcome.needs):
        first = f"there were no {outcome.needs}, so that nothing is shown"
    return Finding(
        outcome.scenario,
        len(outcome.answers),
        len(found),
        first,
        outcome.most_at_once,
        outcome.hits,
        outcome.preemptions,
        outcome.seconds,
    )


def first_difference(alone: Delta, here: Delta) -> str | None:
    """Where two whole answers differ first, in words; an error is a difference even from itself."""
    for answer in (alone, here):
        if answer.finish not in (Finish.STOP, Finish.LENGTH):
            return f"end: {answer.finish}: {answer.error}"
    place = _first(alone.prompt_logprobs, here.prompt_logprobs)
    if place is not None:
        told = [_told(answer.prompt_logprobs, place, None) for answer in (alone, here)]
        return f"scored prompt token {place}: {told[0]} alone, {told[1]} here"
    places = [_first(alone.logprobs, here.logprobs), _first_other(alone.token_ids, here.token_ids)]
    if any(place is not None for place in places):
        place = min(place for place in places if place is not None)
        tokens = [answer.token_ids[place] if place < len(answer.token_ids) else None for answer in (alone, here)]
        return (
            f"token {place}: {_told(alone.logprobs, place, tokens[0])} alone, "
            f"{_told(here.logprobs, place, tokens[1])} here"
        )
    return None if alone.finish == here.finish else f"end: {alone.finish} alone, {here.finish} here"


def _first_other(one: Iterable[object], other: Iterable[object]) -> int | None:
    one, other = list(one), list(other)
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _first(one: Logprobs | None, other: Logprobs | None) -> int | None:
    """The first place at which they are not the same bits."""
    return _first_other(_records(one), _records(other))


def _records(logprobs: Logprobs | None) -> list[bytes]:
    """What is told of each place, as bytes."""
    if logprobs is None:
        return []
    count = len(logprobs.chosen) // 4
    size = len(logprobs.top) // count if count else 0
    return [
        logprobs.chosen[4 * place : 4 * place + 4]
        + logprobs.top_ids[size * place : size * (place + 1)]
        + logprobs.top[size * place : size * (place + 1)]
        for place in range(count)
    ]


def _told(logprobs: Logprobs | None, place: int, token: int | None) -> str:
    """The token and its log-probability, with all the digits that tell fp32 numbers apart; the best where they are."""
    words = [] if token is None else [f"id {token}"]
    if logprobs is not None and 4 * place < len(logprobs.chosen):
        size = len(logprobs.top) // (len(logprobs.chosen) // 4) // 4
        words.append(f"{np.frombuffer(logprobs.chosen, np.float32)[place]:.9g}")
        if size:
            best = np.frombuffer(logprobs.top_ids, np.int32)[size * place], np.frombuffer(logprobs.top, np.float32)
            words.append(f"(best: id {best[0]}, {best[1][size * place]:.9g})")
    return " ".join(words) or "nothing"
