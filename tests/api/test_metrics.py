"""The metrics of a scrape: what the engine said, what the routes counted, and totals that never go down."""

import asyncio
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.api.access import Access, AccessConfig
from service.api.keys import named_keys
from service.engine.request import EngineStats
from tests.api.conftest import Service, Start

REASONS = ("stop", "length", "abort", "refused", "error")
METHODS = ("PROPFIND", "MKCOL", "LOCK", "TRACE", "REPORT")
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def scrape(api: Service, **headers: str) -> dict[str, float]:
    """Sample name with its labels -> value."""
    response = await api.http.get("/metrics", headers=headers)
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        name + "".join(f" {key}={value}" for key, value in labels.items()): value
        for family in text_string_to_metric_families(response.text)
        for name, labels, value, *_ in family.samples
    }


async def test_engine_stats(api: Service) -> None:
    """Gauges are the last stats, counters the sum over engines, histograms have an entry a step."""
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_blocks=100,
        num_blocks_used=25,
        num_steps=10,
        num_preemptions=4,
        num_dropped_tokens=5,
        num_prefix_queries=100,
        num_prefix_hits=60,
        num_draft_tokens=30,
        num_accepted_tokens=20,
        step_seconds=(0.001, 0.5),
        batch_sizes=(1, 64),
    )
    api.engine.publish_stats(stats)
    await api.wait_metric("megatron_gpt2_steps_total", 10)
    got = await scrape(api)
    expected = {
        "requests_running": 3,
        "max_num_seqs": 64,
        "phase phase=ready": 1,
        "requests_waiting": 2,
        "kv_cache_usage_ratio": 0.25,
        "steps_total": 10,
        "preemptions_total": 4,
        "dropped_tokens_total": 5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
        "draft_tokens_total": 30,
        "accepted_draft_tokens_total": 20,
        "step_seconds_count": 2,
        "step_seconds_sum": 0.501,
        "step_seconds_bucket le=0.001": 1,
        "batch_size_count": 2,
        "batch_size_sum": 65,
        "engine_restarts_total": 0,
        "last_step_age_seconds": 0,
        "ready": 1,
        "draining": 0,
        "build_info version=1.2.3": 1,
    }
    assert expected == {name: got[f"megatron_gpt2_{name}"] for name in expected}
    assert any(name.startswith("megatron_gpt2_model_info") and "dtype=float32" in name for name in got)

    await api.engine.die()
    (await api.restart()).ready()
    await api.wait_phase("ready")
    assert 0 == (await scrape(api))["megatron_gpt2_requests_running"]
    # More than the lost engine ever had: only what the new one did may be added.
    api.engine.publish_stats(EngineStats(num_steps=12, num_preemptions=1))
    await api.wait_metric("megatron_gpt2_steps_total", 22)
    got = await scrape(api)
    assert (22, 5) == (got["megatron_gpt2_steps_total"], got["megatron_gpt2_preemptions_total"])
    assert (100, 1) == (got["megatron_gpt2_prefix_cache_queries_total"], got["megatron_gpt2_engine_restarts_total"])


async def test_a_request_is_counted(api: Service) -> None:
    """Tokens, finish reasons by choice, and one observation of each duration."""
    await api.complete(prompt=[[1, 2], [3]], n=2, max_tokens=5)
    got = await scrape(api)
    expected = {
        "prompt_tokens_total": 3,
        "generated_tokens_total": 20,
        "requests_finished_total finish_reason=length": 4,
        "requests_finished_total finish_reason=stop": 0,
        "requests_finished_total finish_reason=abort": 0,
        "requests_finished_total finish_reason=error": 0,
        "requests_finished_total finish_reason=refused": 0,
        "requests_aborted_total": 0,
        "time_to_first_token_seconds_count": 4,
        "request_seconds_count": 1,
        "queue_seconds_count": 2,
    }
    assert expected == {name: got[f"megatron_gpt2_{name}"] for name in expected}
    assert got["megatron_gpt2_time_between_tokens_seconds_count"] >= 1


async def test_what_leaves_the_queue_again_is_no_error(start: Start) -> None:
    """A request that waited too long was refused; one of a failed step is an error."""
    api: Service = await start()
    api.engine.gate.clear()
    api.engine.announce_started = False
    response = await api.http.post("/v1/completions", json={"prompt": [1], "n": 2, "queue_timeout_seconds": 0.01})
    assert 429 == response.status_code
    failing = asyncio.create_task(api.http.post("/v1/completions", json={"prompt": [1]}))
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 2)
    api.engine.fail(api.engine.submitted[1], "out of memory")
    assert 500 == (await failing).status_code
    got = await scrape(api)
    ended = {reason: got[f"megatron_gpt2_requests_finished_total finish_reason={reason}"] for reason in REASONS}
    assert {"stop": 0, "length": 0, "abort": 0, "refused": 2, "error": 1} == ended


async def test_labels_are_bounded(api: Service) -> None:
    """Paths, methods, models and hosts that clients make up add no series, a thousand of each."""

    async def junk(number: int) -> None:
        for path in (f"/nothing/{number}", f"/v1/models/unknown-{number}", f"/v1/completions?x={number}"):
            await api.http.get(path, headers={"Host": f"host-{number}", "X-Request-Id": f"{number}"})
        await api.http.request(METHODS[number % len(METHODS)], "/nothing")
        await api.http.post("/v1/completions", json={"model": f"unknown-{number}", "user": f"{number}"})

    await junk(0)
    await scrape(api)  # which is a series of its own
    before = set(await scrape(api))
    for number in range(1, 1000):
        await junk(number)
    got = await scrape(api)
    assert before == set(got)
    responses = "megatron_gpt2_http_responses_total"
    assert 1000 == got[f"{responses} method=GET route=other status=404"]
    assert 1000 == got[f"{responses} method=other route=other status=404"]
    assert 1000 == got[f"{responses} method=GET route=/v1/models/{{model_id:path}} status=404"]
    assert 1000 == got[f"{responses} method=POST route=/v1/completions status=404"]


async def test_clients_are_labels_by_the_names_of_keys_alone(start: Start) -> None:
    """What waits by client, where clients have keys; whoever has none is never a label of its own."""
    keys = named_keys(["k" * 20, "l" * 20])
    api: Service = await start(access=Access(AccessConfig(keys=keys)), by_client=True)
    asking = [
        asyncio.create_task(api.http.post("/v1/completions", json={"prompt": [1, 1]}, headers=bearer("l" * 20)))
        for _ in range(3)
    ]
    api.engine.gate.clear()
    api.engine.announce_started = False
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 3)
    for number in range(50):
        assert 401 == (await api.http.post("/v1/completions", headers=bearer(f"guess {number}"))).status_code
    got = await scrape(api, **bearer("k" * 20))
    assert 3 == got["megatron_gpt2_client_requests_waiting client=key-2"]
    assert 50 == got["megatron_gpt2_client_requests_total client=unknown status=401"]
    assert {"key-1", "key-2", "unknown"} >= {name.split("client=")[1].split()[0] for name in got if "client=" in name}
    api.engine.gate.set()
    assert [200, 200, 200] == [response.status_code for response in await asyncio.gather(*asking)]
    got = await scrape(api, **bearer("k" * 20))
    assert not any("client_requests_waiting" in name for name in got)


async def test_addresses_are_no_labels(api: Service) -> None:
    """Without keys a client is its address, of which there are any number."""
    await api.complete(prompt=[1], max_tokens=1)
    assert not any("client=" in name for name in await scrape(api))


async def test_vllms_names(start: Start) -> None:
    """The three that routers read, with vLLM's label, when they are asked for; the same numbers as ours."""
    api: Service = await start()
    assert not any(name.startswith("vllm:") for name in await scrape(api))
    api = await start(vllm_model_name="demo")
    stats = EngineStats(num_running=3, num_waiting=2, num_blocks=100, num_blocks_used=25, num_steps=1)
    api.engine.publish_stats(stats)
    await api.wait_metric("megatron_gpt2_steps_total", 1)
    assert {
        "vllm:num_requests_running model_name=demo": 3,
        "vllm:num_requests_waiting model_name=demo": 2,
        "vllm:kv_cache_usage_perc model_name=demo": 0.25,
    } == {name: value for name, value in (await scrape(api)).items() if name.startswith("vllm:")}


async def test_every_metric_is_documented(start: Start) -> None:
    """docs/operations.md names each of ours, and none that is not there."""
    api: Service = await start(by_client=True)
    await api.complete(prompt=[1], max_tokens=1)
    text = (await api.http.get("/metrics")).text
    ours = {name.removeprefix("megatron_gpt2_") for name in re.findall(r"^# TYPE (megatron_gpt2_\w+)", text, re.M)}
    documented = OPERATIONS.read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    table = [line.split(" | ")[0] for line in documented.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", "".join(table)))
    assert {name for name in ours if not name.endswith("_created")} == named
