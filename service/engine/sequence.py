"""A sequence: one sample of a request, from admission to its finish. The scheduler alone changes it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from service.engine.blocks import ROOT, TOKEN_BYTES, Node
from service.engine.masks import Mask
from service.engine.request import Finish, Logprobs, Request, SamplingParams, count_tokens, is_scored_only
from service.engine.speculation import Chances
from service.model.batch import Float32, Int32

if TYPE_CHECKING:
    from service.engine.grammar import Constraint

NO_STOP = 2**31 - 1  # above every token's id


class Group:
    """What the sequences of a group of requests share: its parameters, and what is read from them once."""

    __slots__ = (
        "bias_ids",
        "bias_values",
        "client",
        "completing_ids",
        "mask",
        "num_logprobs",
        "params",
        "penalized",
        "plain",
        "stop_id",
        "stop_ids",
        "watched",
    )

    def __init__(
        self,
        params: SamplingParams,
        completing_ids: bytes,
        *,
        client: str = "",
        vocab_size: int,
        end_of_text_id: int,
    ) -> None:
        self.client = client  # whose turn it is when they leave the queue
        self.params = params
        self.completing_ids = completing_ids
        ends = () if params.ignore_eos else (end_of_text_id,)
        self.stop_id = NO_STOP if params.ignore_eos else end_of_text_id
        self.stop_ids = frozenset((*ends, *params.stop_token_ids))
        self.num_logprobs = params.num_logprobs if params.max_tokens else None
        self.mask: Mask | None = None
        if Mask.needed(params, end_of_text_id=end_of_text_id):
            self.mask = Mask(params, vocab_size=vocab_size, end_of_text_id=end_of_text_id)
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        self.penalized = penalties != (0.0, 0.0, 1.0)
        self.bias_ids: Int32 = np.asarray([token for token, _ in params.logit_bias], np.int32)
        self.bias_values: Float32 = np.asarray([bias for _, bias in params.logit_bias], np.float32)
        # Its rows need nothing that a step computes only where it is asked to.
        self.plain = (
            self.mask is None
            and not self.penalized
            and self.num_logprobs is None
            and not params.logit_bias
            and not params.top_p_decay
        )
        # More is to be done with a token than to compare it with stop_id: the host looks at each.
        self.watched = (
            self.mask is not None
            or self.num_logprobs is not None
            or bool(completing_ids)
            or not self.stop_ids <= {self.stop_id}
        )

    def is_of(self, params: SamplingParams, completing_ids: bytes, client: str) -> bool:
        return self.params is params and self.completing_ids == completing_ids and self.client == client

    def completes(self, token: int) -> bool:
        """Whether the token can complete a stop string."""
        return bool(self.completing_ids[token >> 3] >> (token & 7) & 1) if self.completing_ids else False


class Sequence:
    """What does not change with every token. Its tokens, and how far it has come, stand in its row of the Rows.

    While it has no row, nothing of it is computed or in flight, and `tokens` are those known, as int32 bytes.
    """

    __slots__ = (
        "arrived_at",
        "blocks",
        "cached_tokens",
        "chances",
        "choice",
        "constraint",
        "cost",
        "error",
        "finish",
        "follows",
        "group",
        "key",
        "limit",
        "logprobs",
        "next_score",
        "node",
        "num_prompt",
        "num_registered",
        "order",
        "patient",
        "pending",
        "plain",
        "request",
        "root",
        "row",
        "running",
        "score_to",
        "scores",
        "started",
        "stop_ids",
        "target",
        "tokens",
        "turn",
        "waiting",
    )

    def __init__(self, request: Request, choice: int, group: Group, *, arrival: int, patient: bool = False) -> None:
        self.request = request
        self.choice = choice
        self.key = (request.id, choice)
        self.group = group
        self.order = (request.priority, arrival)  # no two have the same; the highest is preempted first
        self.cost = count_tokens(request, group.params, choice)
        # Waiting's: whether it waits, since when (seconds), and its turn, by which its line is sorted.
        self.waiting = False
        self.arrived_at = 0.0
        self.turn = (0, self.order)
        scored_from = request.score_from if choice == 0 else None
        # Where nothing is to follow, the last token is only told how likely it is: it is not computed.
        self.target = request.prompt[-1] if is_scored_only(request, group.params) else None
        self.tokens = array("i", request.prompt if self.target is None else request.prompt[:-1]).tobytes()
        self.num_prompt = len(self.tokens) // TOKEN_BYTES
        self.patient = patient  # its tokens wait for its end, or an urgent one
        self.limit = self.num_prompt + max(1, group.params.max_tokens)  # a token is sampled also where none is wanted
        self.stop_ids = group.stop_ids
        self.pending = group.params.grammar is not None  # until its constraint is there
        self.constraint: Constraint | None = None
        self.follows = group.mask is not None and group.mask.follows
        self.scores = None if scored_from is None else Logprobs()  # of request.prompt[scored_from:next_score]
        self.score_to = len(request.prompt)
        self.next_score = self.score_to if scored_from is None else scored_from
        self.plain = group.plain and self.scores is None
        self.logprobs: Logprobs | None = None  # of the tokens that no Delta has told yet
        self.row = -1  # its row; also when it has left the running ones, until its last token in flight is back
        self.running = False
        self.blocks: list[int] = []
        self.root: Node = request.cache_salt or ROOT
        self.node = self.root  # of the last registered block
        self.num_registered = 0  # blocks
        self.started = False  # it has left the queue before
        self.cached_tokens = 0
        self.chances = Chances()  # of its drafts
        self.error: str | None = None  # why it must end
        self.finish: Finish | None = None

    @property
    def sampling(self) -> tuple[float, ...]:
        """Its record of SAMPLING."""
        params = self.group.params
        return (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            self.choice,
            0 if self.group.mask is not None else self.num_prompt + params.min_tokens,
            self.num_prompt,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )

    @property
    def findable(self) -> bytes:
        """The tokens, as bytes, whose blocks, but for that of the last, may be found instead of computed.

        The token before one that is to be scored is computed.
        """
        return self.tokens if self.next_score >= self.num_prompt else self.tokens[: self.next_score * TOKEN_BYTES]

    def mask(self, tokens: Int32, num_generated: int) -> Int32 | None:
        """The mask of the token that comes after `tokens`, all that are known; None: every token is allowed.

        It is the token after `num_generated` generated ones, those in flight included: unless the mask follows the
        tokens, some may be.
        """
        mask = self.group.mask
        assert mask is not None
        try:
            words = mask.words(tokens.tolist() if mask.follows else (), num_generated, self.constraint)
        except Exception as error:  # of the constraint's library: the others go on
            self.error = f"the grammar failed: {error}"
            return None
        if words is not None and mask.is_end(words):
            self.stop_ids |= {mask.end_of_text_id}  # also where it is ignored
        return words

    def take(self, token: int, length: int) -> Finish | None:
        """Its next token makes it `length` tokens long; how that ends it, if so. With GRAMMAR, `error` says why."""
        if self.error is not None:
            return Finish.GRAMMAR
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
        return Finish.LENGTH if length >= self.limit else None
