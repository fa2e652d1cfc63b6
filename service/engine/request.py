"""The records that cross between the API and the engine process: plain numbers, frozen, encoded with msgpack.

Every record is a `msgspec.Struct` written as an array, so a message is a few bytes a field. The garbage collector
passes over those that come in numbers: they hold nothing that could refer back to them.
"""

import enum
from array import array
from collections.abc import Sequence

import msgspec

MAX_LOGPROBS = 20  # best tokens that /v1/completions reports; a step gives NUM_TOP (model/batch.py)


class Finish(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end of text, or a stop token id
    LENGTH = "length"  # max_tokens, or the context's edge
    ABORT = "abort"  # the API asked: client left, stop string found, deadline, shutdown
    ERROR = "error"  # a step failed, or the engine died; `Delta.error` says which
    GRAMMAR = "grammar"  # the request's grammar cannot be used, or became too complex on the way; likewise


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How the tokens of a group of requests are drawn. Range checks are the API's; the engine trusts these numbers."""

    max_tokens: int  # 0: nothing is generated, the prompt is scored
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    top_p_decay: float = 0.0  # each generated token multiplies top_p by it; 0 is off
    top_p_bound: float = 0.0  # below which that does not take top_p
    min_p: float = 0.0
    seed: int = 0  # int64; the draw depends on (seed, choice, position) alone
    min_tokens: int = 0  # end of text and stop ids are banned before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0  # these two count generated tokens
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # counts the prompt too
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), each id once
    allowed_token_ids: tuple[int, ...] | None = None  # None allows all
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # of two ids or more; the last is banned where the others stand before
    grammar: str | None = None  # of llguidance; the text must match it
    num_logprobs: int | None = None  # report each token's log-probability, and so many of the best (0..NUM_TOP)


SCORING = SamplingParams(max_tokens=0, temperature=0.0, num_logprobs=1)  # of prompts that are scored only


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One prompt and the `n` sequences wanted from it. len(prompt) >= 1; len(prompt) + max_tokens <= context.

    One that is scored only may have a token more: nothing is computed from its last.
    """

    id: int
    prompt: tuple[int, ...]
    n: int = 1
    score_from: int | None = None  # prompt tokens from this index (>= 1) on get log-probabilities
    priority: int = 0  # lower leaves the queue first
    cache_salt: str = ""  # blocks are shared only with requests of the same salt


def is_scored_only(request: Request, params: SamplingParams) -> bool:
    """Whether log-probabilities of the prompt are all that is asked."""
    scores = request.score_from is not None and request.score_from < len(request.prompt)
    return scores and request.n == 1 and not params.max_tokens


def count_tokens(request: Request, params: SamplingParams, choice: int) -> int:
    """Tokens that one sequence of a request asks for at most; samples share a prompt."""
    return params.max_tokens + (0 if choice else len(request.prompt))


class Logprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural logs of the raw distribution at T tokens: before temperature, filters, bias and penalties. Finite."""

    chosen: bytes = b""  # fp32 [T], of the token that stands there
    top_ids: bytes = b""  # int32 [T, N], the N best, best first
    top: bytes = b""  # fp32 [T, N]

    def __add__(self, other: "Logprobs") -> "Logprobs":
        return Logprobs(self.chosen + other.chosen, self.top_ids + other.top_ids, self.top + other.top)


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sequence. Each sequence gets exactly one Delta with a finish, its last."""

    request_id: int
    choice: int  # 0..n-1
    token_ids: tuple[int, ...]
    finish: Finish | None = None
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens taken from shared blocks; told with the sequence's first tokens
    logprobs: Logprobs | None = None  # of token_ids, where they were asked for
    prompt_logprobs: Logprobs | None = None  # of prompt[score_from:], whole, with the first Delta of choice 0
    urgent: bool = False  # a token may complete a stop string: publish at once

    def then(self, later: "Delta") -> "Delta":
        """This and the next Delta of the same sequence as one."""
        logprobs = later.logprobs if self.logprobs is None else self.logprobs + (later.logprobs or Logprobs())
        return Delta(
            self.request_id,
            self.choice,
            self.token_ids + later.token_ids,
            later.finish,
            later.error,
            self.cached_tokens,
            logprobs,
            self.prompt_logprobs or later.prompt_logprobs,
            later.urgent,
        )


def scores_of(delta: Delta, targets: Sequence[int]) -> tuple[list[float], bool]:
    """Of a request drawn by SCORING: the log-probability of each target, and whether each is the likeliest there."""
    scores = delta.prompt_logprobs
    assert scores is not None, "score_from was asked for"
    logprobs = array("f", scores.chosen).tolist()
    assert len(logprobs) == len(targets)
    return logprobs, array("i", scores.top_ids).tolist() == list(targets)


class EngineStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The engine's gauges and running totals at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_dropped_tokens: int = 0  # computed past a stop, never sent
    num_prefix_queries: int = 0  # prompt tokens looked up
    num_prefix_hits: int = 0  # of these, found in shared blocks
    num_draft_tokens: int = 0  # computed on speculation
    num_accepted_tokens: int = 0  # of these, what was sampled in their places
    step_seconds: tuple[float, ...] = ()  # one entry a step since the last stats
    batch_sizes: tuple[int, ...] = ()  # sequences in each of these steps

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Of two engines together."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return EngineStats(*(one + another for one, another in pairs))


class ModelInfo(msgspec.Struct, frozen=True, array_like=True):
    """What the engine loaded: enough for the API to admit requests and describe the model."""

    folder: str  # local folder with the tokenizer's files
    context_length: int
    vocab_size: int
    end_of_text_id: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    dtype: str
    device: str
    num_layers: int
    hidden_size: int
    num_heads: int
    deterministic: bool = False


# API -> engine


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A group of requests, drawn alike."""

    requests: tuple[Request, ...]
    params: SamplingParams
    completing_ids: bytes = b""  # bit i % 8 of byte i // 8: token i can complete a stop string; empty: none can
    patient: bool = False  # of its tokens, the first, urgent ones and the end are told at once, the others with these
    client: str = ""  # clients take turns in the queue


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End one choice of a request, or all of them (`choice` is None). Unknown ids are passed over."""

    request_id: int
    choice: int | None = None


# engine -> API


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """Progress before ready: `phase` is download, convert, load or warmup; `progress` runs from 0 to 1."""

    phase: str
    progress: float


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Loaded and warm: requests are taken from now on."""

    model: ModelInfo


class Publish(msgspec.Struct, frozen=True, array_like=True, tag="publish"):
    """One publish: which requests left the queue, new tokens, and now and then the gauges."""

    started: tuple[int, ...] = ()
    deltas: tuple[Delta, ...] = ()
    stats: EngineStats | None = None


ToEngine = Submit | Abort
ToApi = Status | Ready | Publish
