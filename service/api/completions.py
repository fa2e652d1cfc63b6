"""POST /v1/completions: admit a request, follow its sequences, and answer whole or as server-sent events."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api import schemas
from service.api.connection import DONE, EventStream, while_connected
from service.api.errors import ApiError, internal_error, unavailable
from service.api.metrics import Metrics
from service.api.schemas import CompletionRequest, parse_body
from service.api.served import ServedModel
from service.api.text import StopStrings, TextStream
from service.engine.client import EngineClient, EngineDraining, Stream
from service.engine.request import Delta, Finish, ModelInfo, SamplingParams
from service.engine.request import Request as EngineRequest

_DEFAULT_MAX_TOKENS = 16
_LONG_BODY_BYTES = 8192  # from here on a body is read in a thread, so that the event loop goes on


_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice, its end, or both."""

    choice: "Choice"
    text: str
    finish_reason: str | None
    stop_reason: str | None


@dataclass(slots=True)
class Choice:
    """One sequence's place in the answer, and its text so far."""

    index: int
    num_prompt_tokens: int
    text: TextStream
    finished: bool = False
    delivered_at: float = 0.0  # its last tokens, in monotonic seconds; 0 is none so far


def completions_router(
    *, client: EngineClient, served: ServedModel, metrics: Metrics, keep_alive_seconds: float
) -> APIRouter:
    router = APIRouter()
    request_schema = {"$ref": "#/components/schemas/CompletionRequest"}

    @router.post(
        "/v1/completions",
        summary="Complete text",
        response_class=JSONResponse,
        responses={200: {"model": schemas.Completion, "content": {"text/event-stream": {}}}},
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": request_schema}}, "required": True}},
    )
    async def complete(request: Request) -> Response:
        model = client.check_ready()
        body = await request.body()
        if len(body) < _LONG_BODY_BYTES:
            ask, prompts = _read(body, served, model)
        else:
            ask, prompts = await asyncio.to_thread(_read, body, served, model)
        params = sampling_params(ask, prompts, model, stop_token_ids=served.stop_token_ids(ask.stop))
        completion = Completion(
            client, served, metrics, model, ask=ask, prompts=prompts, params=params, summary=request.state.summary
        )
        if ask.stream:
            return EventStream(completion.events(), keep_alive_seconds=keep_alive_seconds)
        return await while_connected(request.receive, completion.answer())

    return router


def _read(body: bytes, served: ServedModel, model: ModelInfo) -> tuple[CompletionRequest, list[tuple[int, ...]]]:
    ask = parse_body(body, CompletionRequest)
    served.check_name(ask.model)
    return ask, served.prompt_ids(ask.prompt, model)


def sampling_params(
    ask: CompletionRequest,
    prompts: list[tuple[int, ...]],
    model: ModelInfo,
    *,
    stop_token_ids: tuple[int, ...],
    default_max_tokens: int = _DEFAULT_MAX_TOKENS,
) -> SamplingParams:
    """The engine's numbers for a request, checked against the model's context. Raises ApiError (400)."""
    longest = max(map(len, prompts))
    fitting = model.context_length - longest
    max_tokens = ask.max_tokens or max(1, min(default_max_tokens, fitting))
    if max_tokens > fitting:
        raise ApiError(
            400,
            f"This model's context is {model.context_length} tokens, prompt and completion together; "
            f"the prompt has {longest} and max_tokens is {max_tokens}, which is {longest + max_tokens} in all.",
            param="max_tokens" if fitting > 0 else "prompt",
            code="context_length_exceeded",
        )
    if ask.min_tokens > max_tokens:
        message = f"min_tokens: {ask.min_tokens} is more than max_tokens, which is {max_tokens}"
        raise ApiError(400, message, param="min_tokens")
    # top_p 0 keeps the best token, and so does a top_k of 1; a top_k of the whole vocabulary keeps all.
    top_k = 1 if ask.top_p == 0 else ask.top_k
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if ask.greedy else ask.temperature,
        top_k=top_k if 0 < top_k < model.vocab_size else 0,
        top_p=ask.top_p or 1.0,
        min_p=ask.min_p,
        seed=secrets.randbits(63) if ask.seed is None else ask.seed,
        min_tokens=ask.min_tokens,
        ignore_eos=ask.ignore_eos,
        stop_token_ids=stop_token_ids,
    )


class Completion:
    """The life of one admitted request: submitted by the first step of `answer` or `events`, aborted by their end."""

    def __init__(
        self,
        client: EngineClient,
        served: ServedModel,
        metrics: Metrics,
        model: ModelInfo,
        *,
        ask: CompletionRequest,
        prompts: list[tuple[int, ...]],
        params: SamplingParams,
        summary: dict[str, Any],
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._summary = summary
        summary.update(stream=ask.stream, num_choices=len(prompts) * ask.n)
        self._ask = ask
        self._end_of_text = served.tokenizer.end_of_text
        stops = StopStrings([stop for stop in ask.stop if stop != self._end_of_text])
        self._requests = [EngineRequest(client.new_request_id(), prompt, params, ask.n) for prompt in prompts]
        self._choices = {
            (request.id, sample): Choice(
                place * ask.n + sample,
                len(request.prompt),
                TextStream(served.tokenizer, stops, min_tokens=params.min_tokens),
            )
            for place, request in enumerate(self._requests)
            for sample in range(ask.n)
        }
        self._cached_tokens = dict.fromkeys((request.id for request in self._requests), 0)
        self._submitted_at = self._first_token_at = 0.0
        self._started_at: dict[int, float] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint(model),
        }

    # The two answers

    async def answer(self) -> Response:
        """The whole answer. Raises ApiError and EngineUnavailable."""
        texts: list[list[str]] = [[] for _ in self._choices]
        ends: dict[int, Piece] = {}
        async with aclosing(self._pieces()) as batches:
            async for batch in batches:
                for piece in batch:
                    texts[piece.choice.index].append(piece.text)
                    if piece.finish_reason is not None:
                        ends[piece.choice.index] = piece
        choices = [
            {
                "index": index,
                "text": "".join(text),
                "logprobs": None,
                "finish_reason": ends[index].finish_reason,
                "stop_reason": ends[index].stop_reason,
            }
            for index, text in enumerate(texts)
        ]
        timing = ", ".join(f"{name};dur={milliseconds}" for name, milliseconds in self._timings().items())
        return JSONResponse(
            self._head | {"choices": choices, "usage": self._usage()}, headers={"Server-Timing": timing}
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, from the first chunk to [DONE]. Raises as `answer` does."""
        options = self._ask.stream_options
        head = f"data: {_json(self._head)[:-1]},"
        tail = ',"usage":null}\n\n' if options.include_usage else "}\n\n"
        async with aclosing(self._pieces()) as batches:
            async for batch in batches:
                chunks = []
                for piece in batch:
                    if options.continuous_usage_stats:
                        tail = f',"usage":{_json(self._choice_usage(piece.choice))}}}\n\n'
                    # All but ASCII is escaped: some clients break lines at U+2028 and its like.
                    chunks.append(
                        f'{head}"choices":[{{"index":{piece.choice.index},"text":{_json(piece.text)},"logprobs":null,'
                        f'"finish_reason":{_or_null(piece.finish_reason)},'
                        f'"stop_reason":{_or_null(piece.stop_reason)}}}]{tail}'
                    )
                yield "".join(chunks).encode()
        if options.include_usage:
            timings = {f"{name}_ms": milliseconds for name, milliseconds in self._timings().items()}
            usage = self._usage() | {"timings": timings}
            yield f'{head}"choices":[],"usage":{_json(usage)}}}\n\n'.encode()
        yield DONE

    # What both follow

    async def _pieces(self) -> AsyncGenerator[list[Piece], None]:
        """The pieces of all choices as they come, several at a time; a choice's last has its finish reason."""
        stream = self._client.submit(self._requests)
        self._submitted_at, self._started_at = stream.submitted_at, stream.started_at
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in self._requests))
        unfinished = "error"
        try:
            async with stream:
                async for deltas in stream:
                    pieces = [self._take(delta, stream) for delta in deltas]
                    if pieces := [piece for piece in pieces if piece.text or piece.finish_reason]:
                        yield pieces
            self._metrics.end_to_end.observe(time.monotonic() - self._submitted_at)
        except (asyncio.CancelledError, GeneratorExit):
            unfinished = "abort"
            self._metrics.aborted.inc()
            raise
        finally:
            self._record(unfinished)

    def _take(self, delta: Delta, stream: Stream) -> Piece:
        """Turn new tokens into text; end the sequence in the engine when they complete a stop string."""
        choice = self._choices[delta.request_id, delta.choice]
        if delta.finish is Finish.ERROR:
            raise internal_error(delta.error or "the engine failed on this request")
        if delta.finish is Finish.ABORT:  # not by us: we leave the stream when we abort
            raise unavailable(EngineDraining("the service is shutting down"))
        before = choice.text.num_tokens
        text = choice.text.push(delta.token_ids)
        if delta.finish is not None:
            text += choice.text.finish()
        self._observe(delta, choice, choice.text.num_tokens - before)
        finish_reason = stop_reason = None
        if choice.text.stop is not None:
            finish_reason, stop_reason = "stop", choice.text.stop
            stream.abort(delta.request_id, delta.choice)
        elif delta.finish is not None:
            finish_reason = delta.finish.value
            if delta.finish is Finish.STOP and self._end_of_text in self._ask.stop:
                stop_reason = self._end_of_text
        if finish_reason is not None:
            choice.finished = True
            self._metrics.finished.labels(finish_reason).inc()
        return Piece(choice, text, finish_reason, stop_reason)

    def _observe(self, delta: Delta, choice: Choice, num_tokens: int) -> None:
        if delta.choice == 0:  # the choices after it find its prompt in shared blocks
            self._cached_tokens[delta.request_id] += delta.cached_tokens
        self._metrics.generated_tokens.inc(num_tokens)
        if num_tokens < len(delta.token_ids):
            self._metrics.dropped_tokens.inc(len(delta.token_ids) - num_tokens)
        if num_tokens:
            now = time.monotonic()
            self._first_token_at = self._first_token_at or now
            if choice.delivered_at:
                self._metrics.between_tokens.observe((now - choice.delivered_at) / num_tokens)
            else:
                self._metrics.first_token.observe(now - self._submitted_at)
            choice.delivered_at = now

    def _record(self, unfinished: str) -> None:
        """Count what did not finish, and leave the figures of the log line."""
        num_unfinished = sum(not choice.finished for choice in self._choices.values())
        if num_unfinished:
            self._metrics.finished.labels(unfinished).inc(num_unfinished)
        for started_at in self._started_at.values():
            self._metrics.queue.observe(started_at - self._submitted_at)
        usage = self._usage()
        self._summary.update(
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            num_unfinished=num_unfinished,
        )

    def _timings(self) -> dict[str, float]:
        """Milliseconds in the queue, from there to the first token, and to the end."""
        started_at = min(self._started_at.values(), default=self._submitted_at)
        first_token_at = self._first_token_at or time.monotonic()
        moments = {"queue": started_at - self._submitted_at, "prefill": first_token_at - started_at}
        moments["decode"] = time.monotonic() - first_token_at
        return {name: round(1000 * seconds, 3) for name, seconds in moments.items()}

    def _usage(self) -> dict[str, Any]:
        return _usage(
            sum(len(request.prompt) for request in self._requests),
            sum(choice.text.num_tokens for choice in self._choices.values()),
            sum(self._cached_tokens.values()),
        )

    def _choice_usage(self, choice: Choice) -> dict[str, Any]:
        """Of one prompt and one choice so far."""
        request = self._requests[choice.index // self._ask.n]
        return _usage(choice.num_prompt_tokens, choice.text.num_tokens, self._cached_tokens[request.id])


def _or_null(text: str | None) -> str:
    return "null" if text is None else _json(text)


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
