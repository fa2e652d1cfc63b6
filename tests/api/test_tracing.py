"""Traces: what spans say, that they arrive at a collector, and that no collector holds anything up."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

import service.api.tracing
from service.api.tracing import Tracing, TracingError, traces_endpoint
from service.engine.backlog import QueueLimits
from service.engine.request import ModelInfo
from tests.api.collector import Collector, attributes
from tests.api.conftest import Service, Start
from tests.service.server import Server

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def trace(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Tracing]]:
    """Makes a Tracing to the collector, which sends every few milliseconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    made: list[Tracing] = []

    def make() -> Tracing:
        made.append(Tracing(collector.endpoint, model_name="demo", version="1.2.3"))
        return made[-1]

    yield make
    collector.gate.set()
    for tracing in made:
        tracing.close()


@pytest.fixture
async def api(start: Start, trace: Callable[[], Tracing]) -> Service:
    running: Service = await start(tracing=trace())
    return running


# What a span says


async def test_a_plain_answer(api: Service, collector: Collector) -> None:
    """One span, by OpenTelemetry's names, with what was asked, used and answered."""
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 11, "n": 2}
    body |= {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    response = await api.http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    answer = response.json()
    span = await collector.span()
    assert ("text_completion demo", Span.SPAN_KIND_SERVER) == (span.name, span.kind)
    got = attributes(span)
    assert 0 < got.pop("gen_ai.response.time_to_first_chunk") < 20
    assert {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "megatron-gpt2",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.seed": 11,
        "gen_ai.request.frequency_penalty": 0.5,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "http.request.header.x-request-id": ["mine"],
    } == got
    assert Status.STATUS_CODE_UNSET == span.status.code
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 20e9
    assert b"" == span.parent_span_id
    assert ("megatron-gpt2", "1.2.3") == (collector.resource["service.name"], collector.resource["service.version"])


async def test_names_are_those_of_the_convention(api: Service, collector: Collector) -> None:
    """Every gen_ai attribute is one that OpenTelemetry has."""
    await api.complete(prompt=[1], max_tokens=1, n=2, seed=1, top_k=2, presence_penalty=1, frequency_penalty=1)
    ours = {name for name in attributes(await collector.span()) if name.startswith("gen_ai.")}
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert 15 <= len(ours)
    assert ours <= known


async def test_a_stream(api: Service, collector: Collector) -> None:
    """The same, from its request to its last event; under the alias that was asked for."""
    api.engine.script = lambda request, params, choice: [5, 50256, 5]
    body = {"model": "org/alias", "prompt": [5], "max_tokens": 3, "stream": True}
    response = await api.http.post("/v1/completions", json=body)
    assert response.text.endswith("data: [DONE]\n\n")
    span = await collector.span()
    got = attributes(span)
    assert "text_completion org/alias" == span.name
    assert (True, ["stop"]) == (got["gen_ai.request.stream"], got["gen_ai.response.finish_reasons"])
    assert ("org/alias", "demo") == (got["gen_ai.request.model"], got["gen_ai.response.model"])
    assert (1, 2) == (got["gen_ai.usage.input_tokens"], got["gen_ai.usage.output_tokens"])


async def test_the_parent_is_the_callers(api: Service, collector: Collector) -> None:
    """`traceparent` names trace and parent; one that is none, or not sampled, does no harm."""
    for headers in (TRACEPARENT, {"traceparent": "00-zz"}, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}, {}):
        await api.http.post("/v1/completions", json={"prompt": [1], "max_tokens": 1}, headers=headers)
    spans = [await collector.span() for _ in range(3)]
    assert (TRACE_ID, PARENT_ID) == (spans[0].trace_id.hex(), spans[0].parent_span_id.hex())
    assert [b"", b""] == [span.parent_span_id for span in spans[1:]]
    assert [] == collector.left()


async def test_the_log_line_names_the_trace(
    api: Service, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "service.api.middleware"):
        await api.http.post("/v1/completions", json={"prompt": [1], "max_tokens": 1}, headers=TRACEPARENT)
    (record,) = caplog.records
    assert TRACE_ID == record.__dict__["figures"]["trace_id"]


async def test_no_text_leaves(api: Service, collector: Collector) -> None:
    """Of prompt, answer, stop strings, user and unknown models nothing is in any span."""
    api.engine.script = lambda request, params, choice: api.tokenizer.encode([" answered"])[0]
    body = {"prompt": "secret one", "stop": ["secret two"], "user": "secret three", "max_tokens": 9, "logprobs": 2}
    for more in ({}, {"stream": True}, {"model": "secret four"}, {"guided_regex": "secret five("}, {"n": "secret six"}):
        await api.http.post("/v1/completions", json=body | more)
    for _ in range(5):
        said = str(await collector.span())
        assert "secret" not in said
        assert "answered" not in said


async def test_megatrons_route(api: Service, collector: Collector) -> None:
    """It generates text too; what its fields say is not in the convention, but the usage is."""
    response = await api.http.put("/api", json={"prompts": ["The"], "tokens_to_generate": 3})
    assert 200 == response.status_code
    span = await collector.span()
    got = attributes(span)
    assert ("text_completion demo", "/api") == (span.name, got["http.route"])
    assert (1, 3) == (got["gen_ai.usage.input_tokens"], got["gen_ai.usage.output_tokens"])


async def test_other_routes_have_no_spans(api: Service, collector: Collector) -> None:
    """Probes, scrapes, lists and paths that are not there."""
    for path in ("/livez", "/readyz", "/metrics", "/v1/models", "/nothing"):
        await api.http.get(path)
    await api.complete(prompt=[1], max_tokens=1)
    assert "/v1/completions" == attributes(await collector.span())["http.route"]
    assert [] == collector.left()


# Errors


@pytest.mark.parametrize(
    ("body", "error", "status"),
    [
        ({"n": 0}, "invalid_request_error", 400),
        ({"prompt": [1] * 1024, "max_tokens": 1}, "context_length_exceeded", 400),
        ({"model": "nobody's"}, "model_not_found", 404),
    ],
)
async def test_a_refusal(api: Service, collector: Collector, body: dict[str, Any], error: str, status: int) -> None:
    """The answer's own code; a mistake of the client's is no failure of the server's."""
    assert status == (await api.http.post("/v1/completions", json=body)).status_code
    span = await collector.span()
    got = attributes(span)
    assert (error, status) == (got["error.type"], got["http.response.status_code"])
    assert ("text_completion demo", Status.STATUS_CODE_UNSET) == (span.name, span.status.code)


async def test_a_full_queue(start: Start, trace: Callable[[], Tracing], collector: Collector) -> None:
    api: Service = await start(tracing=trace(), queue=QueueLimits(max_requests=1))
    api.engine.gate.clear()
    api.engine.announce_started = False
    first = asyncio.create_task(api.complete(prompt=[1], max_tokens=1))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    assert 429 == (await api.http.post("/v1/completions", json={"prompt": [2]})).status_code
    assert "queue_full" == attributes(await collector.span())["error.type"]
    api.engine.gate.set()
    await first


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure(api: Service, collector: Collector, stream: bool) -> None:
    """A step that raised: the span is an error, also where the status line said 200 long before."""
    api.engine.gate.clear()
    api.engine.tokens_before_gate = 1
    body = {"prompt": [1], "max_tokens": 9, "stream": stream}
    asking = asyncio.create_task(api.http.post("/v1/completions", json=body))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    if stream:  # its status line has gone out
        await api.wait_metric("megatron_gpt2_generated_tokens_total", 1)
    api.engine.fail(api.engine.submitted[0], "out of memory")
    assert (200 if stream else 500) == (await asking).status_code
    span = await collector.span()
    assert ("internal_error", Status.STATUS_CODE_ERROR) == (attributes(span)["error.type"], span.status.code)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(api: Service, collector: Collector, stream: bool) -> None:
    """Is no fault of the server's."""
    api.engine.gate.clear()
    api.engine.tokens_before_gate = 1
    body = {"prompt": [1], "max_tokens": 9, "stream": stream}
    async with httpx.AsyncClient(base_url=api.url) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await api.engine.wait_for(lambda: bool(api.engine.submitted))
        if stream:  # its status line has gone out
            await api.wait_metric("megatron_gpt2_generated_tokens_total", 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    span = await collector.span()
    assert ("client_disconnected", Status.STATUS_CODE_UNSET) == (attributes(span)["error.type"], span.status.code)


async def test_an_exception_that_nobody_expects(
    api: Service, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class, and nothing of its message."""

    def broken() -> ModelInfo:
        raise KeyError("inner detail")

    monkeypatch.setattr(api.client, "check_ready", broken)
    assert 500 == (await api.http.post("/v1/completions", json={})).status_code
    span = await collector.span()
    assert ("KeyError", Status.STATUS_CODE_ERROR) == (attributes(span)["error.type"], span.status.code)
    assert "inner detail" not in str(span)


# What no collector may do


async def test_a_collector_that_hangs_holds_nobody_up(
    start: Start, trace: Callable[[], Tracing], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than the queue of spans has room for are all answered while the collector says nothing."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    collector.gate.clear()
    api: Service = await start(tracing=trace())
    for _ in range(30):
        await api.complete(prompt=[1], max_tokens=1)
    collector.gate.set()
    for _ in range(9):  # what was on its way, and a full queue
        await collector.span()
    api.http.headers["x-request-id"] = "after"
    await api.complete(prompt=[1], max_tokens=1)
    while attributes(await collector.span())["http.request.header.x-request-id"] != ["after"]:
        pass


async def test_the_end_does_not_wait_for_a_collector_that_hangs(
    trace: Callable[[], Tracing], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.api.tracing, "_CLOSE_SECONDS", 0.1)
    collector.gate.clear()
    tracing = trace()
    end(tracing)
    await asyncio.wait_for(asyncio.to_thread(tracing.close), 5)


def end(tracing: Tracing) -> None:
    """One span."""
    tracing.begin({}).end(method="POST", route="/api", status=200, request_id="r", figures={})


async def test_opentelemetrys_variables_hold(
    start: Start, trace: Callable[[], Tracing], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers, compression, the service's name, sampling."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-gpt2")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    end(trace())
    await collector.span()
    assert "Bearer abc" == {name.lower(): value for name, value in collector.headers[0].items()}["authorization"]
    assert ("my-gpt2", "test") == (
        collector.resource["service.name"],
        collector.resource["deployment.environment.name"],
    )
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    unsampled = trace()
    end(unsampled)
    unsampled.close()
    assert [] == collector.left()


# Who asks for traces

BASE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("expected", "setting", "environment"),
    [
        (None, None, {}),
        ("https://t.example/traces", "https://t.example/traces", {}),
        ("http://collector:4318/v1/traces", None, BASE),
        ("http://collector:4318/v1/traces", None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"}),
        ("http://t:1/x", None, BASE | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:1/x"}),
        ("http://s:1/x", "http://s:1/x", BASE),
        ("http://collector:4318/v1/traces", None, BASE | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}),
        (None, None, BASE | {"OTEL_TRACES_EXPORTER": "none"}),
        (None, "http://s:1/x", {"OTEL_SDK_DISABLED": "true"}),
        (None, None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}),
        (None, None, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}),
    ],
)
def test_who_asks(expected: str | None, setting: str | None, environment: dict[str, str]) -> None:
    """The setting, then the variable for traces, then that for all signals, which is the base of a path."""
    assert expected == traces_endpoint(setting, environment)


@pytest.mark.parametrize("endpoint", ["collector:4318", "http:///x", "grpc://collector:4317"])
def test_a_bad_setting_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(TracingError, match=r"^otlp_traces_endpoint: "):
        traces_endpoint(endpoint, {})


@pytest.mark.parametrize(
    ("named", "environment"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http:///x"}),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", BASE | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}),
    ],
)
def test_a_variable_of_no_use_is_told_of(
    named: str, environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """And keeps nothing from starting: a cluster may have put it into every pod."""
    assert traces_endpoint(None, environment) is None
    (line,) = caplog.messages
    assert line.startswith(f"no traces are sent: {named}: ")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The error says who asked, and what to install; so does the warning."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"^otlp_traces_endpoint: .*pip install 'megatron-gpt2\[otel\]'"):
        traces_endpoint("http://collector:4318/v1/traces", {})
    assert traces_endpoint(None, BASE) is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: needs OpenTelemetry" in caplog.text


# The whole service


async def test_a_service_sends_what_is_left_as_it_ends(collector: Collector) -> None:
    """Switched on by OpenTelemetry's variable; the batch would have been sent minutes later."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    server = Server("--kv-memory", "12MiB", environment=environment)
    try:
        server.wait_ready()
        assert server.engine.is_running()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            await http.post("/v1/completions", json={"prompt": "A", "max_tokens": 2}, headers=TRACEPARENT)
        server.process.terminate()
        assert 0 == server.wait(20)
    finally:
        server.kill()
    span = await collector.span()
    assert (TRACE_ID, "text_completion megatron-gpt2-demo") == (span.trace_id.hex(), span.name)
    lines = [json.loads(line) for line in server.log]
    (line,) = [line for line in lines if line["message"].startswith("request ")]
    assert TRACE_ID == line["figures"]["trace_id"]


def test_a_service_without_the_extra_does_not_start() -> None:
    """Exit code 2, and one line that names the setting."""
    source = """
import sys
sys.modules["opentelemetry.sdk.trace"] = None
from service.cli import main
sys.exit(main(["serve", "--port", "0", "--log-format", "json", "--otlp-traces-endpoint", "http://127.0.0.1:1/x"]))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert 2 == done.returncode
    assert json.loads(line)["message"].startswith("otlp_traces_endpoint: needs OpenTelemetry: pip install")
