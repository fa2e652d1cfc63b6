"""The metrics of a scrape: what the engine said, what the routes counted, and totals that never go down."""

from prometheus_client.parser import text_string_to_metric_families

from service.engine.request import EngineStats
from tests.api.conftest import Service


async def scrape(api: Service) -> dict[str, float]:
    """Sample name with its labels -> value."""
    response = await api.http.get("/metrics")
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
        step_seconds=(0.001, 0.5),
        batch_sizes=(1, 64),
    )
    api.engine.publish_stats(stats)
    await api.wait_metric("megatron_gpt2_steps_total", 10)
    got = await scrape(api)
    expected = {
        "requests_running": 3,
        "requests_waiting": 2,
        "kv_cache_usage_ratio": 0.25,
        "steps_total": 10,
        "preemptions_total": 4,
        "dropped_tokens_total": 5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
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
        "requests_aborted_total": 0,
        "time_to_first_token_seconds_count": 4,
        "request_seconds_count": 1,
        "queue_seconds_count": 2,
    }
    assert expected == {name: got[f"megatron_gpt2_{name}"] for name in expected}
    assert got["megatron_gpt2_time_between_tokens_seconds_count"] >= 1


async def test_labels_are_bounded(api: Service) -> None:
    """Paths and methods that a client makes up do not become labels."""
    for i, method in enumerate(("PROPFIND", "MKCOL", "LOCK", "TRACE", "REPORT")):
        await api.http.request(method, f"/nothing/{i}")
        await api.http.get(f"/v1/models/unknown-{i}")
    responses = {name: value for name, value in (await scrape(api)).items() if "http_responses_total" in name}
    assert 5 == responses["megatron_gpt2_http_responses_total method=other route=other status=404"]
    model_route = "/v1/models/{model_id:path}"
    assert 5 == responses[f"megatron_gpt2_http_responses_total method=GET route={model_route} status=404"]
    assert 3 >= len(responses)
