"""The metrics of several engines: a label tells them apart, and what is read as one number is their total."""

import socket
from collections import Counter
from contextlib import closing

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from service.api.metrics import Metrics
from service.engine.channel import frame
from service.engine.client import EngineClient
from service.engine.request import EngineStats, Publish, Ready
from tests.api.fake_engine import MODEL
from tests.engine.attached import until

STATS = (
    EngineStats(num_running=3, num_waiting=2, num_blocks=100, num_blocks_used=50, num_steps=10, num_dropped_tokens=1),
    EngineStats(
        num_running=4, num_blocks=300, num_blocks_used=50, num_steps=7, step_seconds=(0.25,), num_dropped_tokens=2
    ),
)


def scrape(metrics: Metrics) -> dict[str, float]:
    """Name and labels -> value, of a text in which each family has one head and each sample is there once."""
    text = metrics.render().decode()
    heads = Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert {1} == set(heads.values())
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {
        " ".join([sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))]): sample.value
        for sample in samples
    }
    assert len(found) == len(samples)
    return found


async def test_two_engines() -> None:
    """Each has its own series of what is an engine's, with its number; the rest is the service's, without."""
    client = EngineClient(api_number=0, num_engines=2, stall_seconds=60, on_stall=lambda _: None)
    metrics = Metrics(client, version="1", vllm_model_name="demo")
    client.on_stats = metrics.take_stats
    encoder = msgspec.msgpack.Encoder()

    def attach(number: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        client.attach(ours, number)
        theirs.sendall(frame(Ready(MODEL), encoder) + frame(Publish(stats=STATS[number]), encoder))
        return theirs

    with closing(attach(0)) as first, closing(attach(1)):
        await until(lambda: client.stats.num_steps == 17)
        got = scrape(metrics)
        expected = {
            "requests_running engine=0": 3,
            "requests_running engine=1": 4,
            "requests_waiting engine=0": 2,
            "requests_waiting engine=1": 0,
            "kv_cache_usage_ratio engine=0": 0.5,
            "steps_total engine=0": 10,
            "steps_total engine=1": 7,
            "step_seconds_count engine=0": 0,
            "step_seconds_count engine=1": 1,
            "step_seconds_bucket engine=1 le=0.2": 0,
            "step_seconds_bucket engine=1 le=0.3": 1,
            "max_num_seqs engine=1": 64,
            "phase engine=0 phase=ready": 1,
            "dropped_tokens_total": 3,
            "ready": 1,
        }
        assert expected == {name: got[f"megatron_gpt2_{name}"] for name in expected}
        assert {
            "vllm:num_requests_running model_name=demo": 7,
            "vllm:num_requests_waiting model_name=demo": 2,
            "vllm:kv_cache_usage_perc model_name=demo": 0.25,
        } == {name: value for name, value in got.items() if name.startswith("vllm:")}
        first.close()
        await until(lambda: not client.engines[0].ready)
        client.give_up(0)
        got = scrape(metrics)
        expected = {
            "requests_running engine=0": 0,
            "phase engine=0 phase=failed": 1,
            "phase engine=1 phase=ready": 1,
            "steps_total engine=0": 10,
            "ready": 1,
        }
        assert expected == {name: got[f"megatron_gpt2_{name}"] for name in expected}
        assert "megatron_gpt2_max_num_seqs engine=0" not in got, "what was given up takes none"
        assert 64 == got["megatron_gpt2_max_num_seqs engine=1"]
        client.give_up(1)
        assert 0 == scrape(metrics)["megatron_gpt2_ready"]
        await client.close()


async def test_a_restart_counts_from_zero_for_its_engine_alone() -> None:
    """The totals of both go on."""
    client = EngineClient(api_number=0, num_engines=2, stall_seconds=60, on_stall=lambda _: None)
    metrics = Metrics(client, version="1")
    for number in range(2):
        metrics.take_stats(number, EngineStats(num_steps=10))
    client.engines[1].num_restarts = 1
    metrics.take_stats(0, EngineStats(num_steps=12))
    metrics.take_stats(1, EngineStats(num_steps=12))
    got = scrape(metrics)
    assert [12, 22] == [got[f"megatron_gpt2_steps_total engine={number}"] for number in range(2)]
    assert [0, 1] == [got[f"megatron_gpt2_engine_restarts_total engine={number}"] for number in range(2)]
