"""Prometheus metrics of one API process, in a registry of their own. The routes and the engine's stats feed them."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.engine_metrics import EngineCollector, EngineMetrics, kv_usage
from service.api.errors import ApiError
from service.api.series import PREFIX, SECONDS, Count, Distribution
from service.engine.client import EngineClient, Overloaded, Stream
from service.engine.request import EngineStats

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
        self._engines = [EngineMetrics(client, engine) for engine in client.engines]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, descriptors, when it began
        self.registry.register(_ClientCollector(client, version, by_client))
        self.registry.register(EngineCollector(self._engines))
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

    def take_stats(self, engine: int, stats: EngineStats) -> None:
        """What the engine of that number said."""
        self.dropped_tokens.inc(self._engines[engine].take_stats(stats))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _count(self, name: str, help: str) -> Count:
        return Count(f"{PREFIX}_{name}", help, self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str) -> Distribution:
        return Distribution(f"{PREFIX}_{name}", help, self.registry, bounds=SECONDS)


class _ClientCollector(Collector):
    """What the client knows of the service at the moment of a scrape."""

    def __init__(self, client: EngineClient, version: str, by_client: bool) -> None:
        self._client = client
        self._version = version
        self._by_client = by_client

    def collect(self) -> Iterator[Metric]:
        client = self._client
        gauges = {
            "requests_open": ("Requests of clients that were taken and are not answered whole.", client.num_open),
            "queued_tokens": ("Tokens of requests that no engine has begun.", client.backlog.num_tokens),
            "ready": ("1 when requests are taken.", client.ready),
            "draining": ("1 when the service is shutting down.", client.draining),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=float(value))
        if self._by_client:
            waiting = GaugeMetricFamily(
                f"{PREFIX}_client_requests_waiting", "Sequences that wait, by the name of their key.", labels=["client"]
            )
            for name, num_requests in client.backlog.num_requests_by_client():
                waiting.add_metric([name], num_requests)
            yield waiting
        yield CounterMetricFamily(
            f"{PREFIX}_drain_cut_requests", "Requests that a shutdown ended with an error.", value=client.num_cut
        )
        yield InfoMetricFamily(f"{PREFIX}_build", "The service.", value={"version": self._version})


class _VllmCollector(Collector):
    """What the Kubernetes inference gateway and vLLM's router decide by, under the names that they look for.

    Of several engines it is the total: they read one series of a name.
    """

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        gauges = {
            "num_requests_running": ("Sequences that are worked on.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", kv_usage(stats)),
        }
        for name, (help, value) in gauges.items():
            family = GaugeMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
