"""What the application is built from, and how many replicas there should be. Needs no cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from service.ray_serve import ByQueue, build
from service.settings import Settings, SettingsError


def built(**arguments: Any) -> tuple[Settings, dict[str, Any], AutoscalingConfig]:
    """The settings, the resources and the scaling of one replica."""
    deployment = build(arguments)._bound_deployment
    (settings,) = deployment.init_args
    return settings, deployment.ray_actor_options, deployment._deployment_config.autoscaling_config


def test_a_replica_takes_a_gpu_a_rank() -> None:
    """One, unless it is told otherwise, in words as `serve run` has them or in numbers as a file has."""
    settings, resources, scaling = built(model="someone/model", max_replicas="4", kv_memory="1GiB")
    assert ("someone/model", 2**30, "cuda") == (settings.model, settings.kv_memory, settings.device)
    assert (1.0, 1.0) == (resources["num_cpus"], resources["num_gpus"])
    assert (1, 4) == (scaling.min_replicas, scaling.max_replicas)
    _, resources, _ = built(gpus=0.5, cpus=2)
    assert (2.0, 0.5) == (resources["num_cpus"], resources["num_gpus"])
    _, resources, _ = built(tensor_parallel_size="2")
    assert 2.0 == resources["num_gpus"]


def test_a_replica_on_a_cpu_takes_its_threads() -> None:
    """One, unless it is told otherwise, as others are on the same node."""
    settings, resources, _ = built(device="cpu")
    assert (1, 1.0, 0.0) == (settings.cpu_threads, resources["num_cpus"], resources["num_gpus"])
    settings, resources, _ = built(device="cpu", cpu_threads="3")
    assert (3, 3.0) == (settings.cpu_threads, resources["num_cpus"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"port": 80}, "port"),
        ({"api_key": "a" * 20}, "api_key: .* use api_key_file"),
        ({"modle": "x"}, "modle"),
        ({"device": "cuda:1"}, "device"),
        ({"max_replicas": "many"}, "max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas"),
        ({"target_queued": 0}, "target_queued"),
        ({"kv_memory": "much"}, "kv-memory"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        build(arguments)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("MGPT_DATA_PARALLEL_SIZE", "2", "^data_parallel_size: has no effect"),
        ("MGPT_API_KEY", "a" * 20, "^api_key: .* use api_key_file"),
    ],
)
def test_variables_are_no_way_around(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str) -> None:
    """What is refused as an argument is refused from the environment too."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=named):
        build({})


def test_no_more_than_the_setting_waits_at_a_proxy() -> None:
    """Where there is no replica that takes it, Serve keeps what comes, by default all."""
    assert 7 == build({"max_queued_requests": "7"})._bound_deployment._deployment_config.max_queued_requests
    assert 2048 == build({})._bound_deployment._deployment_config.max_queued_requests


@pytest.mark.parametrize(
    ("now", "queued", "at_proxies", "busy", "expected"),
    [
        (1, [0], 0, [1.0], 1),  # busy, but nobody waits
        (1, [6], 0, [1.0], 2),
        (1, [0], 11, [], 3),  # at the proxies, as there is no replica that takes it
        (2, [30, 11], 0, [1.0, 1.0], 9),
        (4, [6, 0, 0, 0], 0, [1.0, 1.0, 1.0, 1.0], 4),  # somebody waits: not the time to go
        (4, [0, 0, 0, 0], 0, [0.2, 0.2, 0.2, 0.1], 1),
        (4, [0, 0, 0, 0], 0, [0.9, 0.9, 0.9, 0.9], 4),
        (2, [], 0, [], 0),  # below the least, which Serve keeps
    ],
)
def test_as_many_as_the_queue_asks_for(
    now: int, queued: list[float], at_proxies: float, busy: list[float], expected: int
) -> None:
    """Five that wait are one replica's; without a queue, what runs fits the rest at four fifths of their rows."""
    metrics = {name: dict(enumerate(values)) for name, values in (("queued", queued), ("busy", busy)) if values}
    context: Any = SimpleNamespace(
        aggregated_metrics=metrics, total_queued_requests=at_proxies, target_num_replicas=now
    )
    assert (expected, {}) == ByQueue(target_queued=5)(context)
