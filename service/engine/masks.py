"""Which tokens a sequence may sample next, as bits. Made by the scheduler for groups that restrict them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from service.engine.request import SamplingParams
from service.model.batch import Int32

if TYPE_CHECKING:
    from service.engine.grammar import Constraint


class Mask:
    """What a group's parameters allow: the ids by themselves, and those that may not follow others.

    Bit i % 32 of int32 word i // 32 stands for token i. Where nothing is left, end of text alone is allowed.
    """

    def __init__(self, params: SamplingParams, *, vocab_size: int, end_of_text_id: int) -> None:
        self.end_of_text_id = end_of_text_id
        self._min_tokens = params.min_tokens
        allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
        if params.allowed_token_ids is None:
            allowed[:vocab_size] = True
        else:
            allowed[list(params.allowed_token_ids)] = True
        allowed[list(params.banned_token_ids)] = False
        end = np.zeros_like(allowed)
        end[end_of_text_id] = True
        early = allowed.copy()
        early[[end_of_text_id, *params.stop_token_ids]] = False
        self._end = _words(end)
        self._allowed, self._early = (_words(bits) if bits.any() else self._end for bits in (allowed, early))
        self._restricts = params.allowed_token_ids is not None or bool(params.banned_token_ids)
        self._last_ids: dict[int, list[tuple[list[int], int]]] = defaultdict(list)  # by the last of what stands before
        for *before, last in params.bad_words:
            self._last_ids[before[-1]].append((before, last))
        # The mask depends on the newest token.
        self.follows = bool(params.bad_words) or params.grammar is not None

    @staticmethod
    def needed(params: SamplingParams, *, end_of_text_id: int) -> bool:
        """Whether the parameters say more than what a row's min_length says."""
        return (
            params.allowed_token_ids is not None
            or bool(params.banned_token_ids)
            or bool(params.bad_words)
            or params.grammar is not None
            or (params.min_tokens > 0 and any(token != end_of_text_id for token in params.stop_token_ids))
        )

    def words(self, tokens: Sequence[int], num_generated: int, constraint: Constraint | None) -> Int32 | None:
        """The mask of the token after `num_generated` generated ones, ceil(V / 32) words; None: every token is allowed.

        `tokens` are all before it, and are read only if the mask follows them. Raises what the constraint raises.
        """
        early = num_generated < self._min_tokens
        words = self._early if early else self._allowed
        if self.follows and words is not self._end:
            allowed, words = words, words.copy()
            if constraint is not None:
                constraint.fill(words)
                words &= allowed
            for before, last in self._last_ids.get(tokens[-1], ()):
                if tokens[-len(before) :] == before:
                    words[last // 32] &= ~np.left_shift(np.int32(1), last % 32)
            return words if words.any() else self._end
        return words if early or self._restricts else None

    def is_end(self, words: Int32) -> bool:
        """Whether these are the words of a mask that left nothing: what is sampled by them ends the text."""
        return words is self._end


def _words(allowed: npt.NDArray[np.bool_]) -> Int32:
    return np.packbits(allowed, bitorder="little").view("<i4")
