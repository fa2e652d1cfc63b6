"""POST /v1/completions: admit a request, follow its sequences, and answer whole or as server-sent events."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api import answers, errors
from service.api.access import Caller
from service.api.admission import Admitted, admit
from service.api.body import DirectRoute, documented_body, parse_body, read_body, work_on
from service.api.choice import Choice, Piece
from service.api.chunks import Chunks
from service.api.connection import DONE, EventStream, while_connected
from service.api.metrics import Metrics
from service.api.schemas import CompletionRequest
from service.api.served import ServedModel
from service.api.tracing import Trace
from service.engine.client import EngineClient, Stream
from service.engine.request import Delta, Logprobs, ModelInfo
from service.engine.request import Request as EngineRequest

REQUEST_SCHEMAS = (CompletionRequest,)
_json = msgspec.json.Encoder().encode


def add_completions(
    router: APIRouter,
    *,
    client: EngineClient,
    served: ServedModel,
    metrics: Metrics,
    keep_alive_seconds: float,
    max_choices: int,
) -> None:
    """Add the route to the app's own router: one that is included is looked through twice for every request."""

    async def complete(request: Request) -> Response:
        arrived_at = time.monotonic()
        model = client.check_ready()
        client.check_room(request.state.caller.name)  # before the work of reading it
        body = await read_body(request)
        ask = await work_on(body, lambda body: parse_body(body, CompletionRequest))
        admitted = await work_on(
            body, lambda _: admit(ask, served, model, max_choices=max_choices), slow=ask.slow_to_admit
        )
        completion = Completion(
            client,
            served,
            metrics,
            model,
            caller=request.state.caller,
            admitted=admitted,
            arrived_at=arrived_at,
            summary=request.state.summary,
            trace=request.state.trace,
        )
        if ask.stream:
            return EventStream(
                completion.events(), keep_alive_seconds=keep_alive_seconds, close=completion.stream.close
            )
        try:
            return await while_connected(request.scope, completion.answer())
        finally:
            completion.stream.close()

    router.add_api_route(
        "/v1/completions",
        complete,
        methods=["POST"],
        route_class_override=DirectRoute,
        tags=["Completions"],
        summary="Complete text",
        description="The answer is JSON, or with `stream` server-sent events: each `data:` line a chunk of the same "
        "shape, the last one `[DONE]`.",
        response_class=JSONResponse,
        responses={
            200: {"model": answers.Completion, "content": {"text/event-stream": {}}},
            **errors.documented(400, 404, 413, 429, 500, 503, 504),
        },
        openapi_extra=documented_body(CompletionRequest, prompt="The capital of France is", max_tokens=32),
    )


class Completion:
    """The life of one admitted request: submitted as it is made, aborted by the end of `answer` or `events`.

    Whoever might not begin either closes the `stream`. Raises EngineUnavailable.
    """

    def __init__(
        self,
        client: EngineClient,
        served: ServedModel,
        metrics: Metrics,
        model: ModelInfo,
        *,
        caller: Caller,
        admitted: Admitted,
        arrived_at: float,
        summary: dict[str, Any],
        trace: Trace | None,
    ) -> None:
        self._metrics = metrics
        self._summary = summary
        self._trace = trace
        self._admitted = admitted
        self._ask = ask = admitted.ask
        self._params = admitted.params
        num_samples = ask.num_samples
        summary.update(stream=ask.stream, num_choices=len(admitted.prompts) * ask.n)
        if trace is not None:
            trace.ask(ask, max_tokens=admitted.params.max_tokens)
        scored = ask.echo and ask.logprobs is not None
        self._requests = [
            EngineRequest(
                client.new_request_id(),
                prompt,
                num_samples,
                score_from=1 if scored and len(prompt) > 1 else None,
                priority=caller.priority(ask.priority),
                cache_salt=caller.cache_salt(ask.cache_salt),
            )
            for prompt in admitted.prompts
        ]
        self._choices = {
            (request.id, sample): Choice(
                place * num_samples + sample,
                request,
                ask=ask,
                params=self._params,
                tokenizer=served.tokenizer,
                stops=admitted.stops,
                echo=admitted.echoes[place],
            )
            for place, request in enumerate(self._requests)
            for sample in range(num_samples)
        }
        # By request: the prompt's scores, and what its other choices had to say before choice 0 brought them.
        self._scores: dict[int, Logprobs | None] = {}
        self._waiting: dict[int, list[Delta]] = {
            request.id: [] for request in self._requests if request.score_from is not None
        }
        self._cached_tokens = dict.fromkeys((request.id for request in self._requests), 0)
        self._first_token_at = 0.0
        self._finish_reasons: dict[int, str] = {}  # by choice
        self._head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint(model),
        }
        # Here and not when the answer is begun: of a crowd that comes at once, the engine has the first before the
        # last is read, and does not end them all at once either.
        self.stream = client.submit(
            self._requests,
            self._params,
            completing_ids=admitted.completing_ids,
            # Whoever waits for the whole needs no piece of it, but where pieces decide where it ends.
            patient=not ask.stream and ask.repetition_stop is None,
            client=caller.name,
            timeout_seconds=ask.timeout_seconds,
            queue_timeout_seconds=ask.queue_timeout_seconds,
            arrived_at=arrived_at,
        )
        self._num_prompt_tokens = sum(map(len, admitted.prompts))
        metrics.prompt_tokens.inc(self._num_prompt_tokens)

    # The two answers

    async def answer(self) -> Response:
        """The whole answer. Raises ApiError, DeadlineExceeded and QueueTimeout."""
        wholes = {choice.index: _Whole() for choice in self._choices.values()}
        with self._followed() as stream:
            async for deltas in stream:
                for piece in await self._pieces(deltas):
                    wholes[piece.choice.index].add(piece)
        chosen = [wholes[index] for index in self._best()]
        if self._ask.logprobs is None:
            choices = _encoded(chosen)
        else:  # up to some tens of milliseconds a choice
            choices = await asyncio.to_thread(_encoded, chosen)
        timing = ", ".join(f"{name};dur={milliseconds}" for name, milliseconds in self._timings().items())
        body = b'%b,"choices":[%b],"usage":%b}' % (_json(self._head)[:-1], choices, _json(self._usage()))
        return Response(body, headers={"Server-Timing": timing}, media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, from the first chunk to [DONE]. Raises as `answer` does."""
        options = self._ask.stream_options
        chunks = Chunks(self._head, with_usage=options.include_usage)
        choice_usage = self._choice_usage if options.continuous_usage_stats else lambda _: None
        with self._followed() as stream:
            async for deltas in stream:
                batch = await self._pieces(deltas)
                if not batch:
                    continue
                events = [chunks.of(piece, usage=choice_usage(piece.choice)) for piece in batch]
                if batch[-1].finish_reason is not None and not self._count_unfinished():
                    if options.include_usage:
                        timings = {f"{name}_ms": milliseconds for name, milliseconds in self._timings().items()}
                        events.append(chunks.of_usage(self._usage() | {"timings": timings}))
                    yield "".join(events).encode() + DONE
                else:
                    yield "".join(events).encode()

    # What both follow

    @contextmanager
    def _followed(self) -> Iterator[Stream]:
        """The stream, which is closed in the end, and its figures."""
        try:
            with self._metrics.follow(self.stream, self._count_unfinished):
                yield self.stream
        except BaseException as error:
            if self._trace is not None:
                self._trace.fail(error)
            raise
        finally:
            self._record()

    async def _pieces(self, deltas: list[Delta]) -> list[Piece]:
        """What is new in the answer; a choice's last piece has its finish reason. Raises ApiError."""
        if self._waiting:
            deltas = list(chain.from_iterable(map(self._ready, deltas)))
        pieces = []
        for delta in deltas:
            piece = self._take(delta)
            if piece.says_something:
                pieces.append(piece)
            if piece.logprobs is not None:  # a prompt's entries take their time: let others go on
                await asyncio.sleep(0)
        return pieces

    def _ready(self, delta: Delta) -> list[Delta]:
        """What can be taken now: the choices of a scored prompt all begin with the scores that choice 0 brings."""
        waiting = self._waiting.get(delta.request_id)
        if waiting is None:
            return [delta]
        if delta.choice:
            waiting.append(delta)
            return []
        self._scores[delta.request_id] = delta.prompt_logprobs
        return [delta, *self._waiting.pop(delta.request_id)]

    def _take(self, delta: Delta) -> Piece:
        """Turn new tokens into text; end the sequence in the engine when its text ends before it."""
        choice = self._choices[delta.request_id, delta.choice]
        if delta.finish is not None:
            errors.check_delta(delta)
        before = choice.num_tokens
        piece = choice.take(delta, prompt_logprobs=self._scores.get(delta.request_id))
        self._observe(delta, choice, choice.num_tokens - before)
        if piece.finish_reason is not None:
            if delta.finish is None:
                self.stream.abort(delta.request_id, delta.choice)
            self._finish_reasons[choice.index] = piece.finish_reason
            self._metrics.finished.labels(piece.finish_reason).inc()
        return piece

    def _observe(self, delta: Delta, choice: Choice, num_tokens: int) -> None:
        if delta.choice == 0:  # the choices after it find its prompt in shared blocks
            self._cached_tokens[delta.request_id] += delta.cached_tokens
        choice.delivered_at = self._metrics.take_tokens(
            num_tokens,
            num_dropped=len(delta.token_ids) - num_tokens,
            stream=self.stream,
            delivered_at=choice.delivered_at,
        )
        self._first_token_at = self._first_token_at or choice.delivered_at

    def _best(self) -> list[int]:
        """Indices of the choices that are answered: all, or of each prompt the n likeliest, likeliest first."""
        choices, num_samples = list(self._choices.values()), self._ask.num_samples
        if num_samples == self._ask.n:
            return list(range(len(choices)))
        best = []
        for start in range(0, len(choices), num_samples):
            ranked = sorted(choices[start : start + num_samples], key=lambda choice: -choice.mean_logprob)
            best += [choice.index for choice in ranked[: self._ask.n]]
        return best

    def _count_unfinished(self) -> int:
        return sum(not choice.finished for choice in self._choices.values())

    def _count_tokens(self) -> int:
        return sum([choice.num_tokens for choice in self._choices.values()])

    def _record(self) -> None:
        """Leave the figures of the log line and of the span."""
        stream, first_token_seconds = self.stream, None
        self._summary.update(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._count_tokens(),
            finish_reasons=dict(Counter(self._finish_reasons.values())),
            num_unfinished=self._count_unfinished(),
        )
        if stream.started_at:
            queue_seconds = min(stream.started_at.values()) - stream.submitted_at
            self._summary["queue_milliseconds"] = round(1000 * queue_seconds, 1)
        if self._first_token_at:
            first_token_seconds = self._first_token_at - stream.submitted_at
            self._summary["first_token_milliseconds"] = round(1000 * first_token_seconds, 1)
        if self._trace is not None:
            self._trace.answer(
                id=self._head["id"],
                model=self._head["model"],
                finish_reasons=[self._finish_reasons[index] for index in sorted(self._finish_reasons)],
                num_cached_tokens=sum(self._cached_tokens.values()),
                first_token_seconds=first_token_seconds,
            )

    def _timings(self) -> dict[str, float]:
        """Milliseconds in the queue, from there to the first token, and to the end."""
        submitted_at = self.stream.submitted_at
        started_at = min(self.stream.started_at.values(), default=submitted_at)
        first_token_at = self._first_token_at or time.monotonic()
        moments = {"queue": started_at - submitted_at, "prefill": first_token_at - started_at}
        moments["decode"] = time.monotonic() - first_token_at
        return {name: round(1000 * seconds, 3) for name, seconds in moments.items()}

    def _usage(self) -> dict[str, Any]:
        return usage_of(
            self._num_prompt_tokens,
            self._count_tokens(),
            cached_tokens=sum(self._cached_tokens.values()),
            truncated_tokens=sum(self._admitted.num_truncated),
        )

    def _choice_usage(self, choice: Choice) -> dict[str, Any]:
        """Of one prompt and one choice so far."""
        return usage_of(
            len(choice.request.prompt),
            choice.num_tokens,
            cached_tokens=self._cached_tokens[choice.request.id],
            truncated_tokens=self._admitted.num_truncated[choice.index // self._ask.num_samples],
        )


class _Whole:
    """A choice of a whole answer, from its pieces."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: dict[str, list[Any]] | None = None
        self._token_ids: dict[str, Any] = {}
        self._end: dict[str, Any] = {}

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        if piece.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = {name: [] for name in piece.logprobs}
            for name, values in piece.logprobs.items():
                self._logprobs[name] += values
        if piece.token_ids is not None:
            self._token_ids.setdefault("token_ids", []).extend(piece.token_ids)
        if piece.prompt_token_ids is not None:
            self._token_ids["prompt_token_ids"] = piece.prompt_token_ids
        if piece.finish_reason is not None:
            self._end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}

    def encoded(self, index: int) -> bytes:
        whole = {"index": index, "text": "".join(self._texts), "logprobs": self._logprobs}
        return _json(whole | self._end | self._token_ids)


def _encoded(wholes: Sequence[_Whole]) -> bytes:
    return b",".join([whole.encoded(index) for index, whole in enumerate(wholes)])


def usage_of(
    prompt_tokens: int, completion_tokens: int, *, cached_tokens: int, truncated_tokens: int = 0
) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, "truncated_tokens": truncated_tokens},
    }
