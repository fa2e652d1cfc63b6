"""A sequence: one sample of a request, from admission to its finish. The scheduler alone changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from service.engine.blocks import ROOT, Node
from service.engine.masks import Mask
from service.engine.request import Finish, Logprobs, Request, SamplingParams
from service.model.batch import Float32, Int32

if TYPE_CHECKING:
    from service.engine.grammar import Constraint


class Group:
    """What the sequences of a group of requests share: its parameters, and what is read from them once."""

    __slots__ = (
        "bias_ids",
        "bias_values",
        "completing_ids",
        "mask",
        "num_logprobs",
        "params",
        "penalized",
        "stop_ids",
    )

    def __init__(self, params: SamplingParams, completing_ids: bytes, *, vocab_size: int, end_of_text_id: int) -> None:
        self.params = params
        self.completing_ids = completing_ids
        ends = () if params.ignore_eos else (end_of_text_id,)
        self.stop_ids = frozenset((*ends, *params.stop_token_ids))
        self.num_logprobs = params.num_logprobs if params.max_tokens else None
        self.mask: Mask | None = None
        if Mask.needed(params, end_of_text_id=end_of_text_id):
            self.mask = Mask(params, vocab_size=vocab_size, end_of_text_id=end_of_text_id)
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        self.penalized = penalties != (0.0, 0.0, 1.0)
        self.bias_ids: Int32 = np.asarray([token for token, _ in params.logit_bias], np.int32)
        self.bias_values: Float32 = np.asarray([bias for _, bias in params.logit_bias], np.float32)

    def completes(self, token: int) -> bool:
        """Whether the token can complete a stop string."""
        return bool(self.completing_ids[token >> 3] >> (token & 7) & 1) if self.completing_ids else False


class Sequence:
    """Tokens known, and how many of them the device has been asked to compute; steps close the gap."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "choice",
        "constraint",
        "error",
        "finish",
        "follows",
        "group",
        "history",
        "key",
        "limit",
        "next_score",
        "node",
        "num_in_flight",
        "num_prompt",
        "num_registered",
        "num_scheduled",
        "order",
        "pending",
        "plain",
        "request",
        "root",
        "row",
        "sample_row",
        "scores",
        "started",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, choice: int, group: Group, *, arrival: int) -> None:
        self.request = request
        self.choice = choice
        self.key = (request.id, choice)
        self.group = group
        self.order = (request.priority, arrival)  # in which sequences leave the queue; no two have the same
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.limit = self.num_prompt + max(1, group.params.max_tokens)  # a token is sampled also where none is wanted
        self.stop_ids = group.stop_ids
        self.pending = group.params.grammar is not None  # until its constraint is there
        self.constraint: Constraint | None = None
        self.follows = group.mask is not None and group.mask.follows
        self.history: Int32 | None = None  # the tokens again, where penalties count them
        if group.penalized:
            self.history = np.empty(self.limit, np.int32)
            self.history[: self.num_prompt] = request.prompt
        scored_from = request.score_from if choice == 0 else None
        self.scores = None if scored_from is None else Logprobs()  # of prompt[scored_from:next_score]
        self.next_score = self.num_prompt if scored_from is None else scored_from
        # Its rows need nothing that a step computes only where it is asked to.
        self.plain = (
            group.mask is None
            and self.history is None
            and self.scores is None
            and group.num_logprobs is None
            and not len(group.bias_ids)
            and not group.params.top_p_decay
        )
        self.num_scheduled = 0  # tokens whose keys and values are computed, or being computed
        self.num_in_flight = 0  # tokens sampled on the device that the host has not seen
        self.sample_row = 0  # the row of the last launch that samples for this sequence
        self.row = -1  # its row in the scheduler's arrays; -1 while it waits
        self.blocks: list[int] = []
        self.root: Node = request.cache_salt or ROOT
        self.node = self.root  # of the last registered block
        self.num_registered = 0  # blocks
        self.started = False  # it has left the queue before
        self.cached_tokens = 0
        self.error: str | None = None  # why it must end
        self.finish: Finish | None = None

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_to_schedule(self) -> int:
        """Tokens that still must be computed before the next can be sampled.

        0 when no more is wanted, and while the next mask depends on a token in flight.
        """
        length = self.length
        if length >= self.limit or (self.follows and self.num_in_flight):
            return 0
        return length - self.num_scheduled

    @property
    def findable(self) -> list[int]:
        """The tokens whose blocks, but for that of the last, may be found instead of computed.

        The token before one that is to be scored is computed.
        """
        return self.tokens if self.next_score >= self.num_prompt else self.tokens[: self.next_score]

    def mask(self, position: int) -> Int32 | None:
        """The mask of the token to be sampled at `position`; None: every token is allowed."""
        mask = self.group.mask
        assert mask is not None
        try:
            words = mask.words(self.tokens, position - self.num_prompt, self.constraint)
        except Exception as error:  # of the constraint's library: the others go on
            self.error = f"the grammar failed: {error}"
            return None
        if words is not None and mask.is_end(words):
            self.stop_ids |= {mask.end_of_text_id}  # also where it is ignored
        return words

    def append(self, token: int) -> Finish | None:
        """The next token was sampled; how it ends the sequence, if it does. With GRAMMAR, `error` says why."""
        if self.error is not None:
            return Finish.GRAMMAR
        if self.history is not None:
            self.history[len(self.tokens)] = token
        self.tokens.append(token)
        if token in self.stop_ids:
            return Finish.STOP
        if self.constraint is not None:
            try:
                self.constraint.accept(token)
                if self.constraint.finished:
                    return Finish.STOP
            except Exception as error:
                self.error = f"the grammar failed: {error}"
                return Finish.GRAMMAR
        return Finish.LENGTH if len(self.tokens) >= self.limit else None
