"""The same requests in other company: what each scenario asks when, and what came of it. Called by command.py."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from service.engine.core import Core
from service.engine.loading import Loaded
from service.engine.request import Delta
from service.engine.scheduler import Scheduler
from service.engine.speculation import Speculation
from service.selftest.asks import Ask

_USUAL = 256  # tokens of a step
_WAVE = 32  # requests that are asked twice, before the next are
_MOST_ARRIVING = 4  # between two steps
_DRAFTS = 8

Key = tuple[int, int]  # request, choice
Answers = dict[Key, Delta]  # each sequence's Deltas as one


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scheduler gets; the runner must have been made for as much."""

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """Waves of requests. Each wave comes when those before have ended, or else after one step more.

    Requests whose ids are not below the number of all of them are asked again: the id is theirs modulo that number.
    """

    name: str
    waves: list[list[Ask]]
    limits: Limits
    in_turn: bool = True
    needs: str = ""  # hits or preemptions, without which it shows nothing
    drafts: int = 0  # that a sequence may have in a step


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scenario gave."""

    scenario: str
    answers: list[tuple[Key, Delta]]  # of the requests by their first ids
    seconds: float
    most_at_once: int  # sequences that got a token in one step
    hits: int  # prompt tokens found in shared blocks
    preemptions: int
    needs: str


def usual(most: Limits) -> Limits:
    """A step as the service has it on a CPU."""
    return replace(most, max_num_batched_tokens=max(most.max_num_seqs, min(most.max_num_batched_tokens, _USUAL)))


def alone(loaded: Loaded, asks: Sequence[Ask], limits: Limits, on_end: Callable[[], object]) -> Outcome:
    """Each request in a scheduler of its own, so that nobody is there and nobody was before."""
    parts = [run(loaded, Scenario("alone", [[ask]], limits), num_requests=len(asks), on_end=on_end) for ask in asks]
    return Outcome(
        "alone",
        [answer for part in parts for answer in part.answers],
        sum(part.seconds for part in parts),
        max(part.most_at_once for part in parts),
        sum(part.hits for part in parts),
        sum(part.preemptions for part in parts),
        "",
    )


def scenarios(
    asks: Sequence[Ask], most: Limits, *, context_length: int, block_size: int, seed: int, drafting: bool
) -> Iterator[Scenario]:
    """In limits of `most` or less. `drafting`: the runner takes drafts.

    Nobody is preempted for want of blocks where one runs at a time, or a context is less than four blocks.
    """
    random = np.random.default_rng(seed)
    yield Scenario("all at once", [list(asks)], most)
    limits = usual(most)
    yield Scenario("arriving, another order", _arriving(random, asks), limits, in_turn=False)
    shuffled = [asks[number] for number in random.permutation(len(asks))]
    waves = [shuffled[start : start + _WAVE] for start in range(0, len(asks), _WAVE)]
    twice = [wave for first in waves for wave in (first, [_again(ask, len(asks)) for ask in first])]
    findable = any(len(ask.request.prompt) > block_size for ask in asks)
    yield Scenario("twice, prefixes found", twice, limits, needs="hits" if findable else "")
    least_blocks = -(-context_length // block_size)
    if limits.max_num_seqs > 1 and least_blocks >= 4:
        few = replace(limits, num_blocks=least_blocks)
        growing_first = sorted(shuffled, key=lambda ask: not ask.growing)
        yield Scenario("blocks for one context", [growing_first], few, needs="preemptions")
    pieces = replace(limits, max_num_seqs=min(limits.max_num_seqs, 13), max_num_batched_tokens=21)
    yield Scenario("21 tokens a step", [shuffled], pieces)
    if drafting:
        yield Scenario("with drafts", [shuffled], limits, drafts=_DRAFTS)


def _arriving(random: np.random.Generator, asks: Sequence[Ask]) -> list[list[Ask]]:
    left = [asks[number] for number in random.permutation(len(asks))]
    waves = []
    while left:
        count = int(random.integers(0, _MOST_ARRIVING + 1))
        waves.append(left[:count])
        left = left[count:]
    return waves


def _again(ask: Ask, num_requests: int) -> Ask:
    return Ask(msgspec.structs.replace(ask.request, id=ask.request.id + num_requests), ask.params, ask.growing)


def run(loaded: Loaded, scenario: Scenario, *, num_requests: int, on_end: Callable[[], object]) -> Outcome:
    """To the end of all; `on_end` is called as each sequence ends. Raises DeviceLost."""
    model, limits = loaded.model, scenario.limits
    scheduler = Scheduler(
        num_blocks=limits.num_blocks,
        block_size=model.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        end_of_text_id=model.end_of_text_id,
        speculation=Speculation(most=scenario.drafts),
    )
    core = Core(scheduler, loaded.runner)
    answers: Answers = {}
    most_at_once = 0

    def step() -> None:
        nonlocal most_at_once
        before = scheduler.num_sampled
        for delta in (*core.step(), *scheduler.take_held()):
            key = (delta.request_id, delta.choice)
            answers[key] = answers[key].then(delta) if key in answers else delta
            if delta.finish is not None:
                on_end()
        most_at_once = max(most_at_once, scheduler.num_sampled - before)

    began = time.perf_counter()
    for wave in scenario.waves:
        for ask in wave:
            scheduler.add(ask.request, ask.params)
        while scenario.in_turn and not core.idle:
            step()
        step()
    while not core.idle:
        step()
    stats = scheduler.stats()
    return Outcome(
        scenario.name,
        [((number % num_requests, choice), answer) for (number, choice), answer in answers.items()],
        time.perf_counter() - began,
        most_at_once,
        stats.num_prefix_hits,
        stats.num_preemptions,
        scenario.needs,
    )
