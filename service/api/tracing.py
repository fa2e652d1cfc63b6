"""Traces: a span a request that generates text, by OpenTelemetry's names for it, sent by OTLP/HTTP in a thread.

The SDK is the optional extra `otel`, and is imported where a Tracing is made. A span is made at the end of its request,
from what was noted on the way, so that events of a stream cost nothing. No text is in it: no prompt, no answer, no stop
string.
"""

import asyncio
import importlib
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect

from service.api.errors import ApiError, to_api_error
from service.api.schemas import CompletionRequest
from service.engine.client import DeadlineExceeded, EngineUnavailable, Overloaded

log = logging.getLogger(__name__)

_OPERATION = "text_completion"
_ROUTES = frozenset({"/v1/completions", "/api"})
_EXTRA = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_LEFT = "client_disconnected"
_CLOSE_SECONDS = 2  # for what is not sent yet; a collector that is away must not hold up the end
_ENDPOINT, _TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class TracingError(Exception):
    """Traces are asked for and cannot be sent; the message names the setting or variable."""


def traces_endpoint(setting: str | None, environment: Mapping[str, str]) -> str | None:
    """The URL that traces go to, by `setting` or by OpenTelemetry's variables; None where none are asked for.

    What cannot be done, also for want of the extra, raises TracingError where the setting asks for it. Where a variable
    does, which some clusters put into every pod, a warning says so, and there are no traces.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        return _endpoint(setting, environment)
    except TracingError as error:
        if setting is not None:
            raise
        log.warning("no traces are sent: %s", error)
        return None


def _endpoint(setting: str | None, environment: Mapping[str, str]) -> str | None:
    name, endpoint = "otlp_traces_endpoint", setting
    if endpoint is None and environment.get("OTEL_TRACES_EXPORTER") != "none":
        name, endpoint = _TRACES_ENDPOINT, environment.get(_TRACES_ENDPOINT)
        if not endpoint and (base := environment.get(_ENDPOINT)):
            name, endpoint = _ENDPOINT, f"{base.rstrip('/')}/v1/traces"
        variable = next((each for each in _PROTOCOLS if environment.get(each)), None)
        if endpoint and variable is not None and environment[variable] != "http/protobuf":
            raise TracingError(f"{variable}: traces are sent by http/protobuf alone (got {environment[variable]!r})")
    if not endpoint:
        return None
    if not re.match(r"https?://[^/]", endpoint):
        raise TracingError(f"{name}: must be a URL such as http://collector:4318/v1/traces (got {endpoint!r})")
    try:
        for module in _EXTRA:
            importlib.import_module(module)
    except ImportError as error:
        raise TracingError(f"{name}: needs OpenTelemetry: pip install 'megatron-gpt2[otel]' ({error})") from error
    return endpoint


class Tracing:
    """Makes spans, and sends them in batches from a thread of its own; where its queue is full, the oldest are lost.

    OpenTelemetry's own variables decide the rest: sampling, headers, certificates, the size of a batch.
    """

    def __init__(self, endpoint: str, *, model_name: str, version: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = Resource.create({"service.name": "megatron-gpt2", "service.version": version})
        self._provider = TracerProvider(
            resource=about.merge(OTELResourceDetector().detect()),  # OTEL_SERVICE_NAME and the like come first
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("megatron-gpt2", version)
        self._extract = TraceContextTextMapPropagator().extract
        self._server = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._model_name = model_name

    def begin(self, headers: Mapping[bytes, bytes]) -> "Trace":
        """Of a request that begins now, with these headers."""
        return Trace(self, headers)

    def close(self) -> None:
        """Send what is left, if that takes no longer than it may."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def write(self, attributes: Mapping[str, Any], headers: Mapping[bytes, bytes], *, started_ns: int) -> str:
        """A span from then until now, within the trace that the headers name; the trace's id."""
        attributes = {"gen_ai.request.model": self._model_name, **attributes}
        parent = {name: headers.get(name.encode(), b"").decode("latin-1") for name in ("traceparent", "tracestate")}
        span = self._tracer.start_span(
            f"{_OPERATION} {attributes['gen_ai.request.model']}",
            context=self._extract(parent),
            kind=self._server,
            attributes=attributes,
            start_time=started_ns,
        )
        # A mistake of the client's, or its leaving, is no fault of the server's.
        error, status = attributes.get("error.type"), attributes["http.response.status_code"]
        if error not in (None, _LEFT) and not 400 <= status < 500:
            span.set_status(self._failed)
        span.end()
        return format(span.get_span_context().trace_id, "032x")


class Trace:
    """What one request's span will say. A route that knows more than the middleware tells it."""

    def __init__(self, tracing: Tracing, headers: Mapping[bytes, bytes]) -> None:
        self._tracing = tracing
        self._headers = headers
        self._created = time.time_ns()
        self._attributes: dict[str, Any] = {}

    def ask(self, ask: CompletionRequest, *, max_tokens: int) -> None:
        """What is asked for. Its model is one that is served."""
        wanted = {
            "model": ask.model,
            "max_tokens": max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": ask.top_k if ask.top_k > 0 else None,
            "seed": ask.seed,
            "frequency_penalty": ask.frequency_penalty or None,
            "presence_penalty": ask.presence_penalty or None,
            "choice.count": ask.n if ask.n > 1 else None,
            "stream": ask.stream,
        }
        self._note("gen_ai.request", wanted)

    def answer(
        self,
        *,
        id: str,
        model: str,
        finish_reasons: Sequence[str],
        num_cached_tokens: int,
        first_token_seconds: float | None,
    ) -> None:
        """What came of it; `first_token_seconds` from the submission on."""
        self._note(
            "gen_ai.response",
            {
                "id": id,
                "model": model,
                "finish_reasons": finish_reasons,
                "time_to_first_chunk": first_token_seconds,
            },
        )
        self._note("gen_ai.usage", {"cache_read.input_tokens": num_cached_tokens})

    def fail(self, error: BaseException) -> None:
        """It ended so; the last call says how."""
        self._attributes["error.type"] = _error_type(error)

    def end(self, *, method: str, route: str, status: int, request_id: str, figures: Mapping[str, Any]) -> str | None:
        """Write the span, with the `figures` of the log line; its trace's id. None where the route has no spans."""
        if route not in _ROUTES:
            return None
        self._note(
            "gen_ai",
            {
                "operation.name": _OPERATION,
                "provider.name": "megatron-gpt2",
                "usage.input_tokens": figures.get("prompt_tokens"),
                "usage.output_tokens": figures.get("completion_tokens"),
            },
        )
        self._note("http", {"request.method": method, "route": route, "response.status_code": status})
        self._attributes["http.request.header.x-request-id"] = (request_id,)
        if status >= 400:
            self._attributes.setdefault("error.type", str(status))
        return self._tracing.write(self._attributes, self._headers, started_ns=self._created)

    def _note(self, prefix: str, values: Mapping[str, Any]) -> None:
        self._attributes |= {f"{prefix}.{name}": value for name, value in values.items() if value is not None}


def _error_type(error: BaseException) -> str:
    """The code of the answer that tells of it, or what it is called."""
    match error:
        case ApiError() | EngineUnavailable() | Overloaded() | DeadlineExceeded():
            about = to_api_error(error).body["error"]
            return str(about["code"] or about["type"])
        case ClientDisconnect() | asyncio.CancelledError() | GeneratorExit():
            return _LEFT
    return type(error).__qualname__
