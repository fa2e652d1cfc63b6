"""PUT and POST /api: Megatron-LM's own text generation server, every field applied. Part of the app.

The order of events is that of the other routes: admit, submit, follow, answer. A text is its prompt and what follows
it, up to and including the token that ended it; an end of text in it is spelled out.
"""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, model_validator
from starlette.responses import Response

from service.api import errors
from service.api.beams import MAX_BEAMS, BeamSearch, search_beams
from service.api.body import Body, documented_body, parse_body, read_body, work_on
from service.api.connection import while_connected
from service.api.errors import MessageEnvelope, check_ids, invalid
from service.api.metrics import Metrics
from service.api.schemas import GREEDY_BELOW
from service.api.served import ServedModel
from service.api.text import Tokenizer
from service.api.texts import sample_texts
from service.engine.client import EngineClient
from service.engine.request import ModelInfo, SamplingParams

_MAX_PROMPTS = 128
_INT32, _INT64 = 2**31, 2**63
_MANY_TOKENS = 4096  # from here on an answer is written in a thread
_FOR_BEAMS = ("stop_token", "length_penalty")
_FOR_SAMPLING = ("logprobs", "temperature", "top_k", "top_p", "stop_on_double_eol", "stop_on_eol")
_json = msgspec.json.Encoder().encode


class MegatronRequest(Body):
    """What to generate, in Megatron-LM's words. Where it wants a JSON float, an integer will do."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)] = Field(
        description="The texts to go on with. An empty one needs add_BOS.", examples=[["The people of the United"]]
    )
    tokens_to_generate: int = Field(
        64, ge=0, lt=_INT32, description="After each prompt, at most. 0 scores the prompts and needs logprobs."
    )
    logprobs: bool = Field(False, description="Give log-probabilities, of the prompts' tokens too.")
    temperature: float = Field(1.0, gt=0, le=100, description="Divides the logits.")
    top_k: int = Field(
        0, ge=0, le=1000, description="Sample from this many likeliest tokens; 1 takes the likeliest, 0 is off."
    )
    top_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Sample from the likeliest tokens that reach this probability; 0 is off. Not with top_k.",
    )
    top_p_decay: float = Field(
        0.0, ge=0, le=1, description="Each generated token multiplies top_p by it; 0 is off. Needs top_p."
    )
    top_p_bound: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Where top_p_decay ends, by default nowhere; at most top_p, which it needs."
    )
    add_BOS: bool = Field(False, description="Put the end-of-text token before each prompt.")
    stop_on_double_eol: bool = Field(
        False, description="End at an empty line instead of the end of text; goes before stop_on_eol."
    )
    stop_on_eol: bool = Field(False, description="End at a newline instead of the end of text.")
    prevent_newline_after_colon: bool = Field(False, description="No newline token directly after a colon.")
    random_seed: int = Field(
        -1, ge=-1, lt=_INT64, description="The same seed gives the same texts; -1 is another one each time."
    )
    no_log: bool = Field(False, description="Taken; the log never has the text of a request.")
    beam_width: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = Field(
        None, description="Search with so many beams instead of sampling, and give as many texts. One prompt only."
    )
    stop_token: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The token id that ends a beam, by default the end of text. Needs beam_width."
    )
    length_penalty: float = Field(
        1.0,
        ge=-10,
        le=10,
        description="A beam's score is its log-probability over its length to this power. Needs beam_width.",
    )

    @model_validator(mode="before")
    @classmethod
    def _before(cls, value: object) -> object:
        if isinstance(value, dict):
            for old, new in (("max_len", "tokens_to_generate"), ("sentences", "prompts")):
                if value.get(old) is not None:
                    raise invalid(old, f"is no longer used: use {new}")
        return value

    @model_validator(mode="after")
    def _after(self) -> "MegatronRequest":
        if not self.add_BOS and not all(self.prompts):
            raise invalid("prompts", "an empty prompt needs add_BOS")
        if self.top_k and self.top_p:
            raise invalid("top_p", "cannot be set together with top_k")
        for name in ("top_p_decay", "top_p_bound"):
            if name in self.model_fields_set and not self.top_p:
                raise invalid(name, "needs top_p")
        if self.top_p_bound is not None and self.top_p_bound > self.top_p:
            raise invalid("top_p_bound", f"must be at most top_p, which is {self.top_p:g}")
        if self.beam_width is None:
            self._check_sampling()
        else:
            self._check_beams()
        return self

    def _check_sampling(self) -> None:
        for name in _FOR_BEAMS:
            if name in self.model_fields_set:
                raise invalid(name, "needs beam_width")
        if self.tokens_to_generate == 0 and not self.logprobs:
            raise invalid("tokens_to_generate", "0 is only possible with logprobs")

    def _check_beams(self) -> None:
        if len(self.prompts) > 1:
            raise invalid("beam_width", f"takes one prompt, and there are {len(self.prompts)}")
        if self.tokens_to_generate == 0:
            raise invalid("tokens_to_generate", "must be at least 1 with beam_width")
        for name in _FOR_SAMPLING:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise invalid(name, "cannot be set together with beam_width")


REQUEST_SCHEMAS = (MegatronRequest,)


class MegatronTexts(BaseModel):
    """Parallel lists, an entry a prompt."""

    text: list[str] = Field(description="Each prompt and what follows it.")
    segments: list[list[str]] = Field(description="The text of each of its tokens; U+FFFD for pieces of a character.")
    tokens: list[list[int]] = Field(description="Their ids.")
    logprobs: list[list[float]] | None = Field(description="Of each of its tokens but the first.")


class MegatronBeams(BaseModel):
    """Parallel lists, an entry a beam, best first."""

    text: list[str]
    segments: list[list[str]]
    tokens: list[list[int]]
    scores: list[float]


class _Lines:
    """The tokens that the rules about lines name, and what those rules make of them."""

    def __init__(self, ask: MegatronRequest, tokenizer: Tokenizer) -> None:
        # Of GPT-2: 198, 628 and 25. A tokenizer may lack them, and then has nothing that the rules could mean.
        newline, double, colon = (_id_of(data, tokenizer) for data in (b"\n", b"\n\n", b":"))
        ends = () if double is None else (double,)
        self.replace_end_of_text = ask.stop_on_double_eol or ask.stop_on_eol
        self.stop_token_ids: tuple[int, ...] = ()
        self.doubled: int | None = None  # ends a text where it follows itself
        self.completing_ids = b""
        if ask.stop_on_double_eol:
            self.stop_token_ids, self.doubled = ends, newline
            self.completing_ids = tokenizer.completing(["\n"])
        elif ask.stop_on_eol:
            self.stop_token_ids = ends if newline is None else (newline, *ends)
        self.banned: tuple[int, int] | None = None  # the second after the first
        if ask.prevent_newline_after_colon and colon is not None and newline is not None:
            self.banned = colon, newline


def _id_of(data: bytes, tokenizer: Tokenizer) -> int | None:
    """The token of exactly these bytes, if there is one."""
    return tokenizer.token_bytes.index(data) if data in tokenizer.token_bytes else None


def megatron_router(*, client: EngineClient, served: ServedModel, metrics: Metrics, max_choices: int) -> APIRouter:
    router = APIRouter()

    async def generate(request: Request) -> Response:
        model = client.check_ready()
        client.check_room(request.state.caller.name)
        body = await read_body(request)
        ask = await work_on(body, lambda body: parse_body(body, MegatronRequest))
        prompts = await work_on(body, lambda _: _prompt_ids(ask, served, model, max_choices=max_choices))
        lines = _Lines(ask, served.tokenizer)
        caller, summary = request.state.caller, request.state.summary
        figures: dict[str, Any]
        if ask.beam_width is None:
            texts = await while_connected(
                request.scope,
                sample_texts(
                    client,
                    metrics,
                    prompts,
                    _sampling_params(ask, lines, model),
                    doubled=lines.doubled,
                    completing_ids=lines.completing_ids,
                    caller=caller,
                    summary=summary,
                ),
            )
            tokens = [text.tokens for text in texts]
            figures = {"logprobs": [text.logprobs for text in texts] if ask.logprobs else None}
        else:
            search = BeamSearch(
                width=ask.beam_width,
                num_tokens=ask.tokens_to_generate,
                stop_token=served.tokenizer.end_of_text_id if ask.stop_token is None else ask.stop_token,
                length_penalty=ask.length_penalty,
            )
            best = await while_connected(
                request.scope,
                search_beams(search, client, metrics, prompts[0], banned=lines.banned, caller=caller, summary=summary),
            )
            tokens = [[*prompts[0], *hypothesis.token_ids] for hypothesis in best]
            figures = {"scores": [hypothesis.score for hypothesis in best]}
        long = sum(map(len, tokens)) >= _MANY_TOKENS
        answer = await work_on(body, lambda _: _encoded(tokens, served.tokenizer, figures), slow=long)
        return Response(answer, media_type="application/json")

    about: dict[str, Any] = {
        "summary": "Generate text, as Megatron-LM's server does",
        "description": "PUT and POST are the same. An error has the `message` that Megatron-LM's clients read.",
        "response_class": JSONResponse,
        "responses": {
            200: {"model": MegatronTexts | MegatronBeams},
            **errors.documented(400, 413, 429, 500, 503, 504, model=MessageEnvelope),
        },
        "openapi_extra": documented_body(MegatronRequest, prompts=["The people of the United"], tokens_to_generate=8),
    }
    # The first one answers: it has both methods, so that a 405 allows both. The schema wants one of each.
    router.add_api_route("/api", generate, methods=["PUT", "POST"], include_in_schema=False)
    router.add_api_route("/api", generate, methods=["PUT"], **about)
    router.add_api_route("/api", generate, methods=["POST"], **about)
    return router


def _prompt_ids(
    ask: MegatronRequest, served: ServedModel, model: ModelInfo, *, max_choices: int
) -> list[tuple[int, ...]]:
    """The ids of each prompt. Raises ApiError (400), naming the field that the model or a limit refuses."""
    num_choices = ask.beam_width or len(ask.prompts)
    if num_choices > max_choices:
        param = "prompts" if ask.beam_width is None else "beam_width"
        raise invalid(param, f"{num_choices} sequences are more than {max_choices}")
    check_ids("stop_token", () if ask.stop_token is None else (ask.stop_token,), model.vocab_size)
    # As upstream, the end of text spelled out is plain text.
    prompts, _ = served.prompt_ids(ask.prompts, model, split_special=True, param="prompts")
    if ask.add_BOS:  # an empty prompt is that token already
        begin = served.tokenizer.end_of_text_id
        prompts = [(begin, *ids) if text else ids for text, ids in zip(ask.prompts, prompts, strict=True)]
    longest = max(map(len, prompts))
    if longest + ask.tokens_to_generate > model.context_length:
        raise invalid(
            "tokens_to_generate" if longest < model.context_length else "prompts",
            f"This model's maximum context length is {model.context_length} tokens, prompt and generated ones "
            f"together; the prompt has {longest} and tokens_to_generate is {ask.tokens_to_generate}",
            code="context_length_exceeded",
        )
    return prompts


def _sampling_params(ask: MegatronRequest, lines: _Lines, model: ModelInfo) -> SamplingParams:
    """How the tokens after all prompts are drawn."""
    return SamplingParams(
        max_tokens=ask.tokens_to_generate,
        temperature=0.0 if ask.top_k == 1 or ask.temperature < GREEDY_BELOW else ask.temperature,
        top_k=ask.top_k if ask.top_k < model.vocab_size else 0,
        top_p=ask.top_p or 1.0,
        top_p_decay=ask.top_p_decay,
        top_p_bound=ask.top_p_bound or 0.0,
        seed=secrets.randbits(63) if ask.random_seed == -1 else ask.random_seed,
        ignore_eos=lines.replace_end_of_text,
        stop_token_ids=lines.stop_token_ids,
        bad_words=() if lines.banned is None else (lines.banned,),
        num_logprobs=0 if ask.logprobs else None,
    )


def _encoded(tokens: Sequence[Sequence[int]], tokenizer: Tokenizer, figures: dict[str, Any]) -> bytes:
    spelled = tokenizer.spelled_bytes
    answer = {
        "text": [tokenizer.decode(ids, spelled=True) for ids in tokens],
        "segments": [[spelled[token_id].decode("utf-8", "replace") for token_id in ids] for ids in tokens],
        "tokens": tokens,
    }
    return _json(answer | figures)
