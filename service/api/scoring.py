"""POST /v1/score: log-probabilities of continuations, in one pass over all items, each shared context computed once."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.api import answers, errors
from service.api.access import Caller
from service.api.body import Body, documented_body, parse_body, read_body, work_on
from service.api.completions import usage_of
from service.api.connection import while_connected
from service.api.errors import check_ids, invalid
from service.api.metrics import Metrics
from service.api.schemas import Id
from service.api.served import ServedModel
from service.engine.client import EngineClient
from service.engine.request import SCORING, Delta, ModelInfo, scores_of
from service.engine.request import Request as EngineRequest

_json = msgspec.json.Encoder().encode


class ScoreItem(Body):
    """A context and what may follow it, both text or both token ids."""

    context: str | list[Id] = Field(
        "", description="Empty is the start of a document.", examples=["The capital of France is"]
    )
    continuation: Annotated[str, Field(min_length=1)] | Annotated[list[Id], Field(min_length=1)] = Field(
        description="What is scored; not empty.", examples=[" Paris"]
    )


class ScoreRequest(Body):
    """Continuations to score."""

    model: str | None = Field(None, description="A served name; see GET /v1/models.")
    items: list[ScoreItem] = Field(min_length=1, description="Pairs of a context and what may follow it.")
    timeout_seconds: float | None = Field(
        None, gt=0, le=86_400, description="Give up, with a 504, when the answer takes longer."
    )


REQUEST_SCHEMAS = (ScoreRequest,)


class ScoreResult(BaseModel):
    logprob: float = Field(description="Sum of token_logprobs.")
    token_logprobs: list[float]
    tokens: list[str]
    token_ids: list[int]
    is_greedy: bool = Field(description="Each token is the likeliest at its place.")
    context_tokens: int
    continuation_tokens: int


class Scores(BaseModel):
    """Results in the order of the items."""

    id: str
    object: Literal["score"] = "score"
    created: int
    model: str
    results: list[ScoreResult]
    usage: answers.Usage
    system_fingerprint: str


@dataclass(frozen=True, slots=True)
class _Pair:
    context: tuple[int, ...]
    continuation: tuple[int, ...]


def scoring_router(*, client: EngineClient, served: ServedModel, metrics: Metrics, max_items: int) -> APIRouter:
    router = APIRouter()

    def read(body: bytes, model: ModelInfo) -> tuple[ScoreRequest, list[_Pair]]:
        ask = parse_body(body, ScoreRequest)
        served.check_name(ask.model)
        if len(ask.items) > max_items:
            raise invalid("items", f"{len(ask.items)} are more than {max_items}")
        return ask, _pairs(ask.items, served, model)

    @router.post(
        "/v1/score",
        summary="Score continuations",
        description="How likely each continuation is after its context, by the model's own distribution. Text is "
        "split into tokens as lm-evaluation-harness does it: a context's last spaces belong to the continuation.",
        response_class=JSONResponse,
        responses={200: {"model": Scores}, **errors.documented(400, 404, 413, 429, 500, 503, 504)},
        openapi_extra=documented_body(ScoreRequest),
    )
    async def score(request: Request) -> Response:
        arrived_at = time.monotonic()
        model = client.check_ready()
        client.check_room(request.state.caller.name)
        body = await read_body(request)
        ask, pairs = await work_on(body, lambda body: read(body, model))
        work = _scored(
            client,
            metrics,
            pairs,
            timeout_seconds=ask.timeout_seconds,
            arrived_at=arrived_at,
            caller=request.state.caller,
            summary=request.state.summary,
        )
        deltas = await while_connected(request.scope, work)
        head = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "score",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint(model),
        }
        answer = await work_on(body, lambda _: _encoded(head, pairs, deltas, served.tokenizer.names))
        return Response(answer, media_type="application/json")

    return router


async def _scored(
    client: EngineClient,
    metrics: Metrics,
    pairs: Sequence[_Pair],
    *,
    caller: Caller,
    timeout_seconds: float | None,
    arrived_at: float,
    summary: dict[str, Any],
) -> list[Delta]:
    """The engine's one Delta of each pair. Raises ApiError, EngineUnavailable and DeadlineExceeded."""
    requests = [
        EngineRequest(
            client.new_request_id(),
            pair.context + pair.continuation,
            score_from=len(pair.context),
            priority=caller.priority(0),
            cache_salt=caller.cache_salt(""),
        )
        for pair in pairs
    ]
    prompt_tokens = sum(len(request.prompt) for request in requests)
    stream = client.submit(
        requests,
        SCORING,
        patient=True,
        client=caller.name,
        timeout_seconds=timeout_seconds,
        arrived_at=arrived_at,
    )
    metrics.prompt_tokens.inc(prompt_tokens)
    deltas: dict[int, Delta] = {}
    try:
        with metrics.follow(stream, lambda: len(requests) - len(deltas)):
            async for arrived in stream:
                for delta in arrived:
                    errors.check_delta(delta)
                    deltas[delta.request_id] = delta
                    metrics.finished.labels(str(delta.finish)).inc()
    finally:
        num_unfinished = len(requests) - len(deltas)
        summary.update(num_choices=len(requests), prompt_tokens=prompt_tokens, num_unfinished=num_unfinished)
    return [deltas[request.id] for request in requests]


def _encoded(head: dict[str, Any], pairs: Sequence[_Pair], deltas: Sequence[Delta], names: Sequence[str]) -> bytes:
    """The answer. An item at a time, so that in a thread it lets the event loop go on."""
    results = [_json(_result(pair, delta, names)) for pair, delta in zip(pairs, deltas, strict=True)]
    usage = usage_of(
        sum(len(pair.context) + len(pair.continuation) for pair in pairs),
        0,
        cached_tokens=sum(delta.cached_tokens for delta in deltas),
    )
    return b'%b,"results":[%b],"usage":%b}' % (_json(head)[:-1], b",".join(results), _json(usage))


def _result(pair: _Pair, delta: Delta, names: Sequence[str]) -> dict[str, Any]:
    logprobs, is_greedy = scores_of(delta, pair.continuation)
    return {
        "logprob": math.fsum(logprobs),
        "token_logprobs": logprobs,
        "tokens": [names[token_id] for token_id in pair.continuation],
        "token_ids": pair.continuation,
        "is_greedy": is_greedy,
        "context_tokens": len(pair.context),
        "continuation_tokens": len(pair.continuation),
    }


def _pairs(items: Sequence[ScoreItem], served: ServedModel, model: ModelInfo) -> list[_Pair]:
    """The ids of each item, checked. Raises ApiError (400), naming the item."""
    texts: list[str] = []  # of each item of text: the context without its last spaces, and context and continuation
    for number, item in enumerate(items):
        match item.context or type(item.continuation)(), item.continuation:
            case str(context), str(continuation):
                served.check_texts([context + continuation], model, param=f"items.{number}")
                texts += [context.rstrip(), context + continuation]
            case list(context_ids), list(continuation_ids):
                check_ids(f"items.{number}.context", context_ids, model.vocab_size)
                check_ids(f"items.{number}.continuation", continuation_ids, model.vocab_size)
            case _:
                raise invalid(f"items.{number}", "context and continuation must both be text or both token ids")
    encoded = iter(served.tokenizer.encode(texts) if texts else [])
    pairs = []
    for number, item in enumerate(items):
        if isinstance(item.continuation, str):
            # As lm-evaluation-harness splits them: the continuation is what both together have more than the context.
            context_ids = next(encoded)
            continuation_ids = next(encoded)[len(context_ids) :]
        else:
            context_ids, continuation_ids = [] if isinstance(item.context, str) else item.context, item.continuation
        if not continuation_ids:
            raise invalid(f"items.{number}.continuation", "has no token of its own after this context")
        pair = _Pair(tuple(context_ids) or (served.tokenizer.end_of_text_id,), tuple(continuation_ids))
        length = len(pair.context) + len(pair.continuation)
        most = model.context_length + 1  # the last one is only predicted
        if length > most:
            message = f"has {length} tokens, context and continuation together; the model scores {most}"
            raise invalid(f"items.{number}", message, code="context_length_exceeded")
        pairs.append(pair)
    return pairs
