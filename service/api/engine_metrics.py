"""The metrics of each engine. Of several they have the label `engine`, which is its number; of one they do not."""

from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.series import PREFIX, SECONDS, Count, Distribution
from service.engine.client import EngineClient, EngineHandle
from service.engine.request import EngineStats

_STEP_SECONDS = (0.00025, 0.0005, *SECONDS)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class EngineMetrics:
    """What one engine said. Its totals never go down, though each process of it counts from zero."""

    def __init__(self, client: EngineClient, engine: EngineHandle) -> None:
        self._client = client
        self._engine = engine
        self._last_stats = EngineStats()
        self._last_restarts = 0
        self._steps = Count(f"{PREFIX}_steps", "Steps of the engine.")
        self._preemptions = Count(f"{PREFIX}_preemptions", "Sequences that gave up their blocks and began again.")
        self._prefix_queries = Count(f"{PREFIX}_prefix_cache_queries", "Prompt tokens looked up in shared blocks.")
        self._prefix_hits = Count(f"{PREFIX}_prefix_cache_hits", "Prompt tokens found in shared blocks.")
        self._draft_tokens = Count(f"{PREFIX}_draft_tokens", "Tokens computed on speculation.")
        self._accepted_draft_tokens = Count(
            f"{PREFIX}_accepted_draft_tokens", "Of the tokens computed on speculation, those that were right."
        )
        self._step_seconds = Distribution(f"{PREFIX}_step_seconds", "Time of a step.", bounds=_STEP_SECONDS)
        self._batch_size = Distribution(f"{PREFIX}_batch_size", "Sequences in a step.", bounds=_SEQUENCES)

    def take_stats(self, stats: EngineStats) -> int:
        """Add what the engine did since the last stats. Returns how many tokens it computed past a stop."""
        if self._engine.num_restarts != self._last_restarts:
            self._last_restarts = self._engine.num_restarts
            self._last_stats = EngineStats()
        last = self._last_stats
        self._last_stats = stats
        self._steps.inc(stats.num_steps - last.num_steps)
        self._preemptions.inc(stats.num_preemptions - last.num_preemptions)
        self._prefix_queries.inc(stats.num_prefix_queries - last.num_prefix_queries)
        self._prefix_hits.inc(stats.num_prefix_hits - last.num_prefix_hits)
        self._draft_tokens.inc(stats.num_draft_tokens - last.num_draft_tokens)
        self._accepted_draft_tokens.inc(stats.num_accepted_tokens - last.num_accepted_tokens)
        for seconds in stats.step_seconds:
            self._step_seconds.observe(seconds)
        for size in stats.batch_sizes:
            self._batch_size.observe(size)
        return stats.num_dropped_tokens - last.num_dropped_tokens

    def families(self) -> Iterator[Metric]:
        """The same ones, in the same order, for every engine."""
        engine, stats, model = self._engine, self._engine.stats, self._engine.model
        gauges = {
            "requests_running": ("Sequences that the engine works on.", stats.num_running),
            "requests_waiting": ("Sequences in the engine's queue.", stats.num_waiting),
            "kv_cache_usage_ratio": ("Share of the KV blocks in use.", kv_usage(stats)),
            "last_step_age_seconds": ("Silence of the engine while work is open.", engine.last_message_age_seconds),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=float(value))
        phase = GaugeMetricFamily(f"{PREFIX}_phase", "1 for what it is at, as /readyz says.", labels=["phase"])
        phase.add_metric([self._client.phase_of(engine)], 1)
        yield phase
        yield CounterMetricFamily(
            f"{PREFIX}_engine_restarts", "Engine processes started after the first.", value=engine.num_restarts
        )
        max_num_seqs = GaugeMetricFamily(f"{PREFIX}_max_num_seqs", "Sequences that the engine works on at most.")
        about = InfoMetricFamily(f"{PREFIX}_model", "What the engine loaded.")
        if model is not None:
            if not engine.given_up or len(self._client.engines) == 1:  # what the others take at most is in their sum
                max_num_seqs.add_metric([], model.max_num_seqs)
            words = {
                "dtype": model.dtype,
                "device": model.device,
                "context_length": str(model.context_length),
                "vocab_size": str(model.vocab_size),
                "num_blocks": str(model.num_blocks),
                "block_size": str(model.block_size),
                "max_num_seqs": str(model.max_num_seqs),
            }
            about.add_metric([], words)
        yield max_num_seqs
        yield about
        for series in (
            *(self._steps, self._preemptions, self._prefix_queries, self._prefix_hits),
            *(self._draft_tokens, self._accepted_draft_tokens),
            *(self._step_seconds, self._batch_size),
        ):
            yield from series.collect()


class EngineCollector(Collector):
    """All engines' families, each of which appears once."""

    def __init__(self, engines: Sequence[EngineMetrics]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        for same in zip(*(engine.families() for engine in self._engines), strict=True):
            family: Metric = same[0]
            if len(same) > 1:
                family.samples = [
                    sample._replace(labels={**sample.labels, "engine": str(number)})
                    for number, one in enumerate(same)
                    for sample in one.samples
                ]
            if family.samples:
                yield family


def kv_usage(stats: EngineStats) -> float:
    """Share of the blocks, 0 to 1."""
    return stats.num_blocks_used / (stats.num_blocks or 1)
