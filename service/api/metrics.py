"""Prometheus metrics of one API process, in a registry of their own. The routes and the engine's stats feed them."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.errors import ApiError
from service.api.series import Count, Distribution
from service.engine.client import EngineClient, Overloaded, Stream
from service.engine.request import EngineStats

_PREFIX = "megatron_gpt2"
# Seconds; a step of a 345M model takes 0.4 to 2 ms on a GPU and a full answer a minute on a CPU.
_SECONDS = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.3,
    0.5,
    1,
    2,
    5,
    10,
    30,
    60,
)
_STEP_SECONDS = (0.00025, 0.0005, *_SECONDS)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Metrics:
    """All metrics. Labels are bounded: routes by their template, methods and statuses of HTTP, five finish reasons, and
    names of keys. No name that a client makes up is one.
    """

    def __init__(
        self, client: EngineClient, *, version: str, by_client: bool = False, vllm_model_name: str | None = None
    ) -> None:
        """`by_client` says that clients have keys, whose names can be labels: of addresses there is no end.

        With `vllm_model_name`, what routers and gateways read of vLLM is there too, by its names and with this label.
        """
        self._client = client
        self._last_stats = EngineStats()
        self._last_restarts = 0
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, descriptors, when it began
        self.registry.register(_ClientCollector(client, version, by_client))
        if vllm_model_name is not None:
            self.registry.register(_VllmCollector(client, vllm_model_name))
        self.finished = self._counter("requests_finished", "Choices that ended, by reason.", "finish_reason")
        self.aborted = self._count("requests_aborted", "Requests whose client left before the end.")
        self.prompt_tokens = self._count("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generated_tokens = self._count("generated_tokens", "Generated tokens that belong to an answer.")
        self.dropped_tokens = self._count("dropped_tokens", "Tokens computed past a stop and never sent.")
        self.first_token = self._histogram("time_to_first_token_seconds", "From submission to a choice's first token.")
        self.between_tokens = self._histogram(
            "time_between_tokens_seconds", "Between a choice's deliveries, divided by the tokens delivered."
        )
        self.end_to_end = self._histogram("request_seconds", "From submission to the end of a finished request.")
        self.queue = self._histogram("queue_seconds", "From submission until the engine starts on a prompt.")
        self._responses = self._counter("http_responses", "HTTP answers.", "method", "route", "status")
        self._client_requests = self._counter(
            "client_requests", "HTTP requests by the name of their key, where keys are asked for.", "client", "status"
        )
        self._steps = self._count("steps", "Steps of the engine.")
        self._preemptions = self._count("preemptions", "Sequences that gave up their blocks and began again.")
        self._prefix_queries = self._count("prefix_cache_queries", "Prompt tokens looked up in shared blocks.")
        self._prefix_hits = self._count("prefix_cache_hits", "Prompt tokens found in shared blocks.")
        self._step_seconds = self._histogram("step_seconds", "Time of a step.", buckets=_STEP_SECONDS)
        self._batch_size = self._histogram("batch_size", "Sequences in a step.", buckets=_SEQUENCES)
        self._responses_of = cache(self._responses.labels)  # it checks and spells labels anew each time
        for reason in ("stop", "length", "abort", "refused", "error"):
            self.finished.labels(reason)

    def http_response(self, *, method: str, route: str, status: int) -> None:
        """`route` is a template such as /v1/models/{id}, never a raw path."""
        self._responses_of(method if method in _METHODS else "other", route, status).inc()

    def client_request(self, *, client: str, status: int) -> None:
        """`client` is the name of a key in force, or UNKNOWN."""
        self._client_requests.labels(client, status).inc()

    def refused(self, status: int) -> None:
        """An answer to what never became a request of a route: no HTTP, over a limit, or one connection too many."""
        self.http_response(method="other", route="other", status=status)

    @contextmanager
    def follow(self, stream: Stream, count_unfinished: Callable[[], int]) -> Iterator[None]:
        """Within `stream`, from its submission to its end: how long it took, and the choices that did not finish."""
        unfinished = "error"
        try:
            with closing(stream):
                yield
            self.end_to_end.observe(time.monotonic() - stream.submitted_at)
        except (asyncio.CancelledError, GeneratorExit):  # the client has left
            unfinished = "abort"
            self.aborted.inc()
            raise
        except Overloaded:  # out of the queue again: a 429, and no fault
            unfinished = "refused"
            raise
        except ApiError as error:
            unfinished = "refused" if error.status < 500 else "error"
            raise
        finally:
            if num_unfinished := count_unfinished():
                self.finished.labels(unfinished).inc(num_unfinished)
            for started_at in stream.started_at.values():
                self.queue.observe(started_at - stream.submitted_at)

    def take_tokens(self, num_tokens: int, *, num_dropped: int, stream: Stream, delivered_at: float) -> float:
        """Count a delivery of one choice; `delivered_at` is that of the one before, or 0. Returns it for the next."""
        self.generated_tokens.inc(num_tokens)
        if num_dropped:
            self.dropped_tokens.inc(num_dropped)
        if not num_tokens:
            return delivered_at
        now = time.monotonic()
        if delivered_at:
            self.between_tokens.observe((now - delivered_at) / num_tokens)
        else:
            self.first_token.observe(now - stream.submitted_at)
        return now

    def take_stats(self, stats: EngineStats) -> None:
        """Add what the engine did since the last stats. A new engine counts from zero; our totals never go down."""
        if self._client.num_restarts != self._last_restarts:
            self._last_restarts = self._client.num_restarts
            self._last_stats = EngineStats()
        last = self._last_stats
        self._last_stats = stats
        self._steps.inc(stats.num_steps - last.num_steps)
        self._preemptions.inc(stats.num_preemptions - last.num_preemptions)
        self.dropped_tokens.inc(stats.num_dropped_tokens - last.num_dropped_tokens)
        self._prefix_queries.inc(stats.num_prefix_queries - last.num_prefix_queries)
        self._prefix_hits.inc(stats.num_prefix_hits - last.num_prefix_hits)
        for seconds in stats.step_seconds:
            self._step_seconds.observe(seconds)
        for size in stats.batch_sizes:
            self._batch_size.observe(size)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _count(self, name: str, help: str) -> Count:
        return Count(f"{_PREFIX}_{name}", help, self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *, buckets: tuple[float, ...] = _SECONDS) -> Distribution:
        return Distribution(f"{_PREFIX}_{name}", help, self.registry, bounds=buckets)


class _ClientCollector(Collector):
    """What the client knows at the moment of a scrape."""

    def __init__(self, client: EngineClient, version: str, by_client: bool) -> None:
        self._client = client
        self._version = version
        self._by_client = by_client

    def collect(self) -> Iterator[Metric]:
        client, stats = self._client, self._client.stats
        gauges = {
            "requests_running": ("Sequences that the engine works on.", stats.num_running),
            "requests_waiting": ("Sequences in the engine's queue.", stats.num_waiting),
            "requests_open": ("Requests of clients that were taken and are not answered whole.", client.num_open),
            "queued_tokens": ("Tokens of requests that the engine has not begun.", client.backlog.num_tokens),
            "kv_cache_usage_ratio": ("Share of the KV blocks in use.", _kv_usage(stats)),
            "last_step_age_seconds": ("Silence of the engine while work is open.", client.last_message_age_seconds),
            "ready": ("1 when requests are taken.", client.ready),
            "draining": ("1 when the service is shutting down.", client.draining),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", help, value=float(value))
        phase = GaugeMetricFamily(
            f"{_PREFIX}_phase", "1 for what the service is at, as /readyz says.", labels=["phase"]
        )
        phase.add_metric([client.phase], 1)
        yield phase
        if self._by_client:
            waiting = GaugeMetricFamily(
                f"{_PREFIX}_client_requests_waiting",
                "Sequences that wait, by the name of their key.",
                labels=["client"],
            )
            for name, num_requests in client.backlog.num_requests_by_client():
                waiting.add_metric([name], num_requests)
            yield waiting
        yield CounterMetricFamily(
            f"{_PREFIX}_engine_restarts", "Engine processes started after the first.", value=client.num_restarts
        )
        yield CounterMetricFamily(
            f"{_PREFIX}_drain_cut_requests", "Requests that a shutdown ended with an error.", value=client.num_cut
        )
        yield InfoMetricFamily(f"{_PREFIX}_build", "The service.", value={"version": self._version})
        if (model := client.model) is not None:
            yield GaugeMetricFamily(
                f"{_PREFIX}_max_num_seqs", "Sequences that the engine works on at most.", value=model.max_num_seqs
            )
            about = {
                "dtype": model.dtype,
                "device": model.device,
                "context_length": str(model.context_length),
                "vocab_size": str(model.vocab_size),
                "num_blocks": str(model.num_blocks),
                "block_size": str(model.block_size),
                "max_num_seqs": str(model.max_num_seqs),
            }
            yield InfoMetricFamily(f"{_PREFIX}_model", "What the engine loaded.", value=about)


class _VllmCollector(Collector):
    """What the Kubernetes inference gateway and vLLM's router decide by, under the names that they look for."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        gauges = {
            "num_requests_running": ("Sequences that the engine works on.", stats.num_running),
            "num_requests_waiting": ("Sequences in the engine's queue.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", _kv_usage(stats)),
        }
        for name, (help, value) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family


def _kv_usage(stats: EngineStats) -> float:
    return stats.num_blocks_used / (stats.num_blocks or 1)
