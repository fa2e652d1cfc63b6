"""Drafts: what a sequence's own text suggests comes next, computed beside its next token. Called by the scheduler.

Where the last tokens stood before, in the prompt or in what was generated, what followed them there is proposed (prompt
lookup decoding, Saxena 2023; LLMA, Yang et al., arXiv:2304.04487). Each draft is one more row of the step. The token of
a position depends on nothing but logits, parameters, seed, choice and position, so a draft that equals what was sampled
in its place was right, and what was sampled after it counts; the rest is dropped. The text is the same as without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.model.batch import Int32

if TYPE_CHECKING:
    from service.engine.rows import Drafted, Indices, Plan, Rows
    from service.engine.running import Running
    from service.engine.sequence import Sequence

_SHORTEST, _LONGEST = 2, 4  # of the last tokens that are looked for
# Of a match of 2, 3 and 4 tokens: how often the token after it comes again, before anything is known of a sequence.
_FIRST_CHANCES = (0.2, 0.35, 0.6)
_FIRST_TRIALS = 2.0  # as many as these chances count for
_MEMORY = 7 / 8  # what is left of a trial's weight at the next
# What a step costs beside its rows, in rows, before it is measured (docs/performance.md, Speculation).
FIXED_ROWS = 14.0
_STEPS_MEMORY = 0.98
# A draft below this is none, whatever the rows cost: what is gained would be lost again where a chance is off.
_LEAST_CHANCE = 0.25
_LEAST_FIXED_ROWS, _MOST_FIXED_ROWS = 1.0, 64.0
# How much longer a step may take for drafts while somebody in it has none to gain by.
_MOST_DELAY = 1.25
MOST_SAMPLED = 64  # rows of a step with drafts: its logits, and what is made of them, take 1.6 MB each


def propose(tokens: Int32, *, most: int) -> tuple[int, Int32]:
    """How many of the last `tokens` stood before, 2 to 4 (0: not even two), and what came then: int32 [most], or none.

    The latest of the longest occurrences counts. What followed it may end with `tokens`: then it goes on from its own
    beginning, as a loop does.
    """
    if len(tokens) <= _SHORTEST:
        return 0, tokens[:0]
    # Where the last token of an occurrence is.
    ends = ((tokens[1:-1] == tokens[-1]) & (tokens[:-2] == tokens[-2])).nonzero()[0] + 1
    if not len(ends):
        return 0, tokens[:0]
    match = _SHORTEST
    while match < _LONGEST:
        longer = ends[(ends >= match) & (tokens[ends - match] == tokens[-1 - match])]
        if not len(longer):
            break
        ends, match = longer, match + 1
    start = int(ends[-1]) + 1
    return match, tokens[start + np.arange(most) % (len(tokens) - start)]


class Chances:
    """How often, in one sequence, what followed a match came again: by the length of the match, lately."""

    __slots__ = ("_hits", "_trials")

    def __init__(self) -> None:
        self._hits = [_FIRST_TRIALS * chance for chance in _FIRST_CHANCES]
        self._trials = [_FIRST_TRIALS] * len(_FIRST_CHANCES)

    def of(self, match: int) -> float:
        """That the token after a match of so many comes again."""
        kind = min(match, _LONGEST) - _SHORTEST
        return self._hits[kind] / self._trials[kind]

    def take(self, match: int, hit: bool) -> None:
        kind = min(match, _LONGEST) - _SHORTEST
        self._hits[kind] = self._hits[kind] * _MEMORY + hit
        self._trials[kind] = self._trials[kind] * _MEMORY + 1


class StepCost:
    """What a step costs beside its rows: a line through the seconds that steps of decodes took, lately.

    While they all have the same number of rows nothing is learnt, and what was assumed at first holds again.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_squared = self._product = 0.0

    def take(self, num_rows: int, seconds: float) -> None:
        if self._seconds:
            seconds = min(seconds, 3 * self._seconds / self._weight)  # something else had the processor
        self._weight = self._weight * _STEPS_MEMORY + 1
        self._rows = self._rows * _STEPS_MEMORY + num_rows
        self._seconds = self._seconds * _STEPS_MEMORY + seconds
        self._rows_squared = self._rows_squared * _STEPS_MEMORY + num_rows**2
        self._product = self._product * _STEPS_MEMORY + num_rows * seconds

    @property
    def fixed_rows(self) -> float:
        """The cost of a step without rows, in rows."""
        if not self._seconds:
            return FIXED_ROWS
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - rows**2
        covariance = self._product / self._weight - rows * seconds
        assumed = seconds / (FIXED_ROWS + rows)
        a_row = max((covariance + assumed) / (variance + 1), seconds / (_MOST_FIXED_ROWS + rows))
        return max(seconds / a_row - rows, _LEAST_FIXED_ROWS)


@dataclass(frozen=True, slots=True)
class _Proposal:
    sequence: Sequence
    row: int
    length: int  # of the sequence, its drafts not counted
    match: int
    tokens: Int32
    chances: list[float]  # that a draft is right, and all before it


class Speculation:
    """Which drafts a step computes, for a runner that computes a step before the next is scheduled (depth 0).

    A proposal is compared with what is sampled also where none of it was drafted, which costs a look and no row. So a
    sequence whose text does not repeat has no drafts soon, and has some again when it begins to.
    """

    def __init__(self, *, most: int, clock: Callable[[], float] = time.thread_time) -> None:
        """Up to `most` drafts a sequence and step, 0: none ever.

        `clock` gives seconds: of this thread, which computes a part of every product as the others do, so that what
        else the machine does is no cost of a row.
        """
        self._most = most
        self._clock = clock
        self._began_at = 0.0
        self._cost = StepCost()
        self._proposals: list[_Proposal] = []
        self.num_drafted = 0  # in steps that are committed
        self.num_accepted = 0  # of these

    def look(self, rows: Rows, running: Indices) -> None:
        """Make proposals for those that decode."""
        if not self._most:
            return
        self._began_at = self._clock()
        assert not rows.num_in_flight[running].any(), "speculation needs a runner of depth 0"
        decodes = running[rows.num_known[running] - rows.num_scheduled[running] == 1]
        found = (self._proposal(rows, sequence) for sequence in rows.sequences[decodes])
        self._proposals = [proposal for proposal in found if proposal is not None]

    def would_draft(self, num_decodes: int) -> bool:
        """Whether drafts are worth their rows in a step of so many decodes and nothing else."""
        return any(self._counts(num_tokens=num_decodes, room=self._most))

    def _proposal(self, rows: Rows, sequence: Sequence) -> _Proposal | None:
        known = rows.known(sequence)
        most = min(self._most, sequence.limit - 1 - len(known))  # one token at least is sampled after a draft
        if most < 1 or sequence.follows:  # no masks are made that depend on drafts
            return None
        match, tokens = propose(known, most=most)
        if not match:
            return None
        chances, chance = [], 1.0
        for number in range(most):  # a draft that is right makes the match longer
            chance *= sequence.chances.of(match + number)
            chances.append(chance)
        return _Proposal(sequence, sequence.row, len(known), match, tokens, chances)

    def drafts(self, running: Running, decodes: Indices, *, num_tokens: int, room: int) -> dict[int, Int32]:
        """By row of `decodes`, the tokens to compute beside the `num_tokens` of the step; `room` at most.

        There are blocks for them.
        """
        if not self._proposals:
            return {}
        decoding = set(decodes.tolist())
        self._proposals = [proposal for proposal in self._proposals if proposal.row in decoding]
        drafts = {}
        for proposal, count in zip(self._proposals, self._counts(num_tokens=num_tokens, room=room), strict=True):
            if count and (count := running.grow_draft(proposal.sequence, count)):
                drafts[proposal.row] = proposal.tokens[:count]
        return drafts

    def _counts(self, *, num_tokens: int, room: int) -> list[int]:
        """How many of each proposal are worth their rows.

        A step costs fixed + rows, in rows, and gives so many tokens. A draft, which costs a row and gives its chance,
        makes these come faster if chance / 1 > tokens / (fixed + rows). The best come first, until one does not, or a
        step becomes too long for those who have no drafts.
        """
        counts = [0] * len(self._proposals)
        candidates = [(chance, number) for number, each in enumerate(self._proposals) for chance in each.chances]
        fixed, rows, tokens = self._cost.fixed_rows, num_tokens, float(num_tokens)
        num_hopeful = sum(each.chances[0] >= _LEAST_CHANCE for each in self._proposals)
        most = _MOST_DELAY * (fixed + num_tokens) if num_hopeful < num_tokens else math.inf
        for chance, number in sorted(candidates, reverse=True)[: max(room, 0)]:
            if chance < _LEAST_CHANCE or chance * (fixed + rows) <= tokens or fixed + rows >= most:
                break
            counts[number] += 1
            rows, tokens = rows + 1, tokens + chance
        return counts

    def kept(self, rows: Rows, drafted: Drafted, token_ids: Int32) -> Iterator[Indices]:
        """Which of a step's samples `token_ids` count, by index: of each row the first, then of some the next, and on.

        The rows must have taken these when the next are asked for.
        """
        for number in range(int(drafted.numbers.max()) + 1):
            at = (drafted.numbers == number).nonzero()[0]
            if number:
                own, positions = drafted.rows[at], drafted.positions[at]
                # All before it count, and the last of them is what it was computed from.
                right = (rows.num_known[own] == positions) & (rows.tokens[own, positions - 1] == drafted.after[at])
                self.num_drafted += len(at)
                at = at[right]
                self.num_accepted += len(at)
            if len(at):
                yield at
        own = drafted.rows[drafted.numbers == 1]
        rows.num_scheduled[own] = rows.num_known[own] - 1

    def learn(self, rows: Rows, plan: Plan) -> None:
        """The tokens of a step are taken: compare them with what was proposed."""
        for proposal in self._proposals:
            sequence, match = proposal.sequence, proposal.match
            if sequence.finish is not None:
                continue
            said = rows.known(sequence)[proposal.length :]
            for token, draft in zip(said.tolist(), proposal.tokens.tolist(), strict=False):
                sequence.chances.take(match, token == draft)
                if token != draft:
                    break
                match += 1
        if self._most and plan.num_tokens == len(plan.sampled):  # nothing but decodes
            self._cost.take(plan.num_tokens, self._clock() - self._began_at)
