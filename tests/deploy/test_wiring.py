"""The objects of a build find each other, and what they ask the service for is there: selectors, metrics, routes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.api.conftest import Service, Start, start, tokenizer  # noqa: F401 - fixtures
from tests.deploy.kinds import BUILDS, K8S, Object, build, of_kind, only
from tests.deploy.pods import pod_of
from tests.deploy.tools import output, run

SCALED = [name for name in BUILDS if "autoscale" in name]
WITH_GATEWAY = [name for name in BUILDS if "gateway" in name]
OBSERVED = [name for name in BUILDS if "observability" in name]


@pytest.fixture
async def ready(start: Start) -> Service:  # noqa: F811
    service: Service = await start(by_client=True)
    return service


# --- How objects find each other ------------------------------------------------------------------------------------


def selectors(objects: list[Object]) -> Iterator[dict[str, str]]:
    """Every selector of our pods."""
    yield only(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    yield only(objects, "Service")["spec"]["selector"]
    yield only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    yield only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    for spread in pod_of(objects)["topologySpreadConstraints"]:
        yield spread["labelSelector"]["matchLabels"]
    for pool in of_kind(objects, "InferencePool"):
        yield pool["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_match(name: str) -> None:
    """Each selects by the same label, which the pods have; the monitor selects the Service."""
    objects = build(name)
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    found = list(selectors(objects))
    assert len(found) >= 6
    for selector in found:
        assert found[0] == selector
        assert selector.items() <= labels.items()
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert wanted
        assert wanted.items() <= only(objects, "Service")["metadata"]["labels"].items()


@pytest.mark.parametrize("name", BUILDS)
def test_one_namespace(name: str) -> None:
    """All is in the base's, which is made too; a component that says another would move everything there."""
    objects = build(name)
    expected = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["namespace"]
    namespace = only(objects, "Namespace")
    assert expected == namespace["metadata"]["name"]
    assert {expected} == {thing["metadata"]["namespace"] for thing in objects if thing is not namespace}


@pytest.mark.parametrize("name", SCALED)
def test_scaling(name: str) -> None:
    """The autoscaler has the Deployment, which says no number itself; both kinds scale alike, by one metric."""
    objects = build(name)
    deployment = only(objects, "Deployment")
    assert "replicas" not in deployment["spec"]
    hpas, scaled = of_kind(objects, "HorizontalPodAutoscaler"), of_kind(objects, "ScaledObject")
    ((scaler,),) = [each for each in (hpas, scaled) if each]
    spec = scaler["spec"]
    assert deployment["metadata"]["name"] == spec["scaleTargetRef"]["name"]
    if hpas:
        (metric,) = [each["pods"] for each in spec["metrics"]]
        wanted = (metric["metric"]["name"], metric["target"]["averageValue"])
        bounds, behavior = (spec["minReplicas"], spec["maxReplicas"]), spec["behavior"]
    else:
        (trigger,) = spec["triggers"]
        assert "AverageValue" == trigger["metricType"]
        query = trigger["metadata"]["query"]
        output("python", "-c", "import sys, promql_parser; promql_parser.parse(sys.argv[1])", query)
        found = re.fullmatch(r'sum\((\w+)\{namespace="([\w-]+)"\}\)', query)
        assert found is not None
        assert deployment["metadata"]["namespace"] == found[2]
        wanted = (found[1], trigger["metadata"]["threshold"])
        bounds = (spec["minReplicaCount"], spec["maxReplicaCount"])
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert bounds[0] <= spec["fallback"]["replicas"] <= bounds[1]
    assert ("megatron_gpt2_requests_waiting", "5") == wanted
    assert (2, 6) == bounds
    slowly = behavior["scaleDown"]["policies"][0]["periodSeconds"]
    assert slowly > pod_of(objects)["terminationGracePeriodSeconds"]
    assert {2: 60, 1: slowly} == {
        policy["value"]: policy["periodSeconds"] for way in behavior.values() for policy in way["policies"]
    }


def test_promql_that_is_broken_is_seen() -> None:
    code = "import sys, promql_parser; promql_parser.parse(sys.argv[1])"
    assert run("python", "-c", code, "sum(megatron_gpt2_requests_waiting{)").returncode != 0


# --- Metrics and routes ---------------------------------------------------------------------------------------------


async def test_metrics_are_ours(ready: Service) -> None:
    """Every metric that a manifest names, in a rule, a dashboard, a query or a mapping, is one of the service's."""
    families = re.findall(r"^# TYPE (\w+) (\w+)$", (await ready.http.get("/metrics")).text, re.MULTILINE)
    known = {name for name, kind in families if kind != "histogram"}
    known |= {f"{name}_{part}" for name, kind in families if kind == "histogram" for part in ("bucket", "sum", "count")}
    assert {"megatron_gpt2_model_info", "megatron_gpt2_queue_seconds_bucket"} < known
    named = {word for name in BUILDS for word in re.findall(r"\bmegatron_gpt2_\w+", json.dumps(build(name)))}
    assert "megatron_gpt2_requests_waiting" in named
    assert set() == named - known


@pytest.mark.parametrize("name", WITH_GATEWAY)
async def test_endpoint_picker_reads_our_gauges(name: str, ready: Service) -> None:
    """Its engine is the one that the pods are labelled with, and its three metrics are gauges."""
    objects = build(name)
    (config,) = [thing for thing in of_kind(objects, "ConfigMap") if thing["metadata"]["name"] == "endpoint-picker"]
    (text,) = config["data"].values()
    about = yaml.safe_load(text)
    plugins = {plugin.get("name", plugin["type"]): plugin for plugin in about["plugins"]}
    profiles = [entry["pluginRef"] for profile in about["schedulingProfiles"] for entry in profile["plugins"]]
    sources = [
        each["pluginRef"] for source in about["dataLayer"]["sources"] for each in (source, *source["extractors"])
    ]
    assert sorted(plugins) == sorted([*profiles, *sources])
    (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels["llm-d.ai/engine-type"] == engine.pop("name")
    families = dict(re.findall(r"^# TYPE (\w+) (\w+)$", (await ready.http.get("/metrics")).text, re.MULTILINE))
    assert {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"} == set(engine)
    assert ["gauge"] * 3 == [families[metric] for metric in engine.values()]
    assert engine["kvUsageSpec"].endswith("_ratio")


@pytest.mark.parametrize("name", WITH_GATEWAY)
async def test_gateway_has_the_routes_of_clients(name: str, ready: Service) -> None:
    """Completions go to the picker, which reads every body as theirs, and all else that clients use to the Service.

    Nothing leads to what is for those who run it; each match has a route; and no stream is cut.
    """
    objects = build(name)
    picked, other = only(objects, "HTTPRoute")["spec"]["rules"]
    (backend,) = picked["backendRefs"]
    pool = only(objects, "InferencePool")
    assert (pool["kind"], pool["metadata"]["name"]) == (backend["kind"], backend["name"])
    assert pool["apiVersion"].startswith(f"{backend['group']}/")
    assert [{"path": {"type": "Exact", "value": "/v1/completions"}}] == picked["matches"]
    service = only(objects, "Service")
    (port,) = service["spec"]["ports"]
    assert [{"name": service["metadata"]["name"], "port": port["port"]}] == other["backendRefs"]
    assert {"request": "0s"} == picked["timeouts"] == other["timeouts"]
    matches = [match["path"] for rule in (picked, other) for match in rule["matches"]]

    def leads_to(match: dict[str, str], path: str) -> bool:
        below = match["type"] == "PathPrefix" and path.startswith(f"{match['value']}/")
        return below or path == match["value"]

    paths = {route.path for route in ready.routes()}
    assert all(any(leads_to(match, path) for path in paths) for match in matches)
    reached = {path for path in paths if any(leads_to(match, path) for match in matches)}
    to_run_it = {"/livez", "/readyz", "/health", "/ping", "/metrics", "/version", "/openapi.json"}
    assert to_run_it < paths
    pages = re.compile(r"/$|/(docs|playground)(/|$)")  # for people, and they need the routes above
    assert {path for path in paths - to_run_it if not pages.match(path)} == reached


@pytest.mark.parametrize("name", OBSERVED)
async def test_monitor_scrapes_a_route(name: str, ready: Service) -> None:
    """Of the name that it says, in Prometheus' text format."""
    (endpoint,) = only(build(name), "ServiceMonitor")["spec"]["endpoints"]
    answer = await ready.http.get(endpoint["path"])
    assert (200, "text/plain") == (answer.status_code, answer.headers["Content-Type"].split(";")[0])


@pytest.mark.parametrize("name", OBSERVED)
def test_monitor_leaves_pods_that_have_not_begun(name: str, tmp_path: Path) -> None:
    """By Prometheus' own relabelling: an address that nobody listens on yet is no target that is down."""
    (endpoint,) = only(build(name), "ServiceMonitor")["spec"]["endpoints"]
    relabel = [{snake(field): value for field, value in rule.items()} for rule in endpoint["relabelings"]]
    label = "__meta_kubernetes_pod_phase"
    pods = [{"targets": [f"{phase}:8000"], "labels": {label: phase}} for phase in ("Pending", "Running")]
    config = tmp_path / "prometheus.yml"
    scrape = {"job_name": "pods", "static_configs": pods, "relabel_configs": relabel}
    config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    found = json.loads(output("promtool", "check", "service-discovery", "--timeout=1s", config, "pods"))
    kept = {target["discoveredLabels"][label]: target["labels"].get("instance") for target in found}
    assert {"Pending": None, "Running": "Running:8000"} == kept


def snake(field: str) -> str:
    """A field of the operator's, as Prometheus calls it."""
    return re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", field)
