"""A real Prometheus scrapes the real service under load, and promtool reads what is shipped for it."""

import asyncio
import json
import math
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from service.settings import Settings
from tests.deploy.dashboard import expressions
from tests.deploy.prometheus import ALERTS, FOLDER, JOB, Prometheus, scaled, shipped_rules
from tests.deploy.tools import ROOT, output, run
from tests.service.server import Server, until_drained

COMPONENT = ROOT / "k8s" / "components" / "observability"
KEYS = ["a" * 20, "b" * 20]


class Load:
    """Requests of two keys without end, from a thread: plain and streamed, a few that are refused, one that leaves."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopping = threading.Event()
        self.num_answered = 0
        self.statuses: set[int] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as http:
            await asyncio.gather(*[self._ask(http, number) for number in range(12)])

    async def _ask(self, http: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": "The people of the United States " * 5, "max_tokens": 12 + number, "stream": number % 2 == 0}
        headers = {"Authorization": f"Bearer {KEYS[number % 2]}"}
        while not self._stopping.is_set():
            response = await http.post("/v1/completions", json=body, headers=headers)
            self.statuses.add(response.status_code)
            self.num_answered += 1
            if response.status_code == 429:
                await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The demo model with keys, an open /metrics, two places, a queue of six, and what vLLM's routers read."""
    yield from until_drained(
        Server(
            *("--kv-memory", "24MiB", "--max-num-seqs", "2", "--max-queued-requests", "6"),
            *("--open-routes", "/metrics", "--vllm-metrics"),
            environment={"MGPT_API_KEY": ",".join(KEYS)},
        )
    )


@pytest.fixture(scope="module")
def load(server: Server) -> Iterator[Load]:
    load = Load(server.url)
    yield load
    load.stop()


@pytest.fixture(scope="module")
def prometheus(server: Server, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), [server.url])
    yield prometheus
    prometheus.close()


# Under load


def test_scrapes(prometheus: Prometheus, load: Load) -> None:
    """The target is up under the job that rules and dashboard know, and requests are counted as they are answered."""
    prometheus.wait(lambda: prometheus.query(f'up{{job="{JOB}"}} == 1'), seconds=30, what="the target to be up")
    count = 'sum(megatron_gpt2_http_responses_total{route="/v1/completions"})'
    prometheus.wait(lambda: prometheus.query(f"{count} > 20"), seconds=60, what="answers")
    assert {200, 429} == load.statuses


def test_every_query_of_the_dashboard_has_data(prometheus: Prometheus) -> None:
    """A number, from this Prometheus, while the load goes on."""
    waiting = dict.fromkeys(expressions())

    def answered() -> bool:
        for query in list(waiting):
            if any(math.isfinite(one["value"]) for one in prometheus.query(query)):
                del waiting[query]
        return not waiting

    try:
        prometheus.wait(answered, seconds=60, what="data")
    except AssertionError:
        pytest.fail("no data: " + "\n".join(waiting))


def test_every_metric_of_the_rules_is_there(prometheus: Prometheus) -> None:
    """No rule asks for a name that nobody exposes, and Prometheus evaluates all of them."""
    names = metric_names([rule["expr"] for rule in shipped_rules()])
    assert 10 <= len(names)
    for name in sorted(names):
        assert prometheus.query(name), name
    assert {rule["alert"]: "ok" for rule in shipped_rules()} == prometheus.rule_health()


def metric_names(queries: list[str]) -> set[str]:
    """Of ours, and of what Prometheus and its client add."""
    return set(re.findall(r"\b(?:megatron_gpt2_\w+|process_\w+|up)\b", " ".join(queries)))


def test_vllms_names_have_the_same_numbers(prometheus: Prometheus) -> None:
    """Routers that look for vLLM's find them, with its label."""
    pairs = {
        "vllm:num_requests_running": "megatron_gpt2_requests_running",
        "vllm:num_requests_waiting": "megatron_gpt2_requests_waiting",
        "vllm:kv_cache_usage_perc": "megatron_gpt2_kv_cache_usage_ratio",
    }
    for theirs, ours in pairs.items():
        (one,) = prometheus.query(theirs)
        assert "megatron-gpt2-demo" == one["metric"]["model_name"]
        same = f"{theirs} == ignoring (model_name) {ours}"
        prometheus.wait(lambda same=same: prometheus.query(same), seconds=20, what=same)  # type: ignore[misc]


def test_promtool_checks_the_metrics(server: Server, prometheus: Prometheus) -> None:
    """Its lint has nothing to say but of vLLM's names, which are not by Prometheus' rules."""
    text = httpx.get(f"{server.url}/metrics").text
    complaints = run("promtool", "check", "metrics", text=text).stderr.splitlines()
    assert 3 == len(complaints)
    assert all(line.startswith("vllm:") for line in complaints), complaints
    bad = run("promtool", "check", "metrics", text="# TYPE megatron_gpt2_bad counter\nmegatron_gpt2_bad 1\n")
    assert "megatron_gpt2_bad" in bad.stderr


def test_a_busy_service_alarms_nobody(prometheus: Prometheus) -> None:
    """Under a load that it refuses some of, for longer than most rules wait.

    The queue may be high; and how fast it is depends on what else this machine does.
    """
    prometheus.wait(lambda: prometheus.query("count_over_time(up[1m]) > 30"), seconds=60, what="thirty scrapes")
    slow = {"MegatronGpt2QueueHigh", "MegatronGpt2FirstTokenSlow", "MegatronGpt2TokensSlow"}
    assert set() == prometheus.alerts("firing") - slow


def test_the_log_has_a_line_a_request(server: Server, prometheus: Prometheus, load: Load) -> None:
    """JSON, with figures and without text; none of scrapes and probes."""
    lines = [json.loads(line) for line in list(server.log)]
    requests = [line["figures"] for line in lines if line["message"].startswith("request ")]
    assert {"/v1/completions"} == {figures["route"] for figures in requests}
    assert 20 < len(requests) <= load.num_answered + 12
    answered = [figures for figures in requests if figures["status"] == 200]
    for figures in answered:
        assert figures["client"] in ("key-1", "key-2")
        assert {"length"} == set(figures["finish_reasons"]) or {"stop"} == set(figures["finish_reasons"])
        assert 0 <= figures["queue_milliseconds"] <= figures["first_token_milliseconds"] <= figures["milliseconds"]
        assert figures["prompt_tokens"] > 20
        assert figures["completion_tokens"] > 0
    assert not any("United" in line or key in line for line in server.log for key in KEYS)


# What is shipped


def test_promtool_checks_config_and_rules() -> None:
    output("promtool", "check", "config", FOLDER / "prometheus.yml")
    output("promtool", "check", "rules", "--lint=all", "--lint-fatal", ALERTS)


def test_prometheus_finds_the_services_of_compose() -> None:
    """By the name that all replicas have there, on the port of the settings, under the job that the rules know."""
    (scrape,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (names,) = scrape["dns_sd_configs"]
    assert (JOB, Settings.model_fields["port"].default) == (scrape["job_name"], names["port"])
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for service in ("cpu", "gpu"):
        assert names["names"] == compose["services"][service]["networks"]["default"]["aliases"]


def test_kubernetes_has_the_same_rules() -> None:
    """The PrometheusRule's groups are those of alerts.yml, and the ServiceMonitor gives them the same job."""
    rule = yaml.safe_load((COMPONENT / "prometheusrule.yaml").read_text())
    assert yaml.safe_load(ALERTS.read_text())["groups"] == rule["spec"]["groups"]
    monitor = yaml.safe_load((COMPONENT / "servicemonitor.yaml").read_text())["spec"]
    assert JOB == monitor["selector"]["matchLabels"][monitor["jobLabel"]]
    (endpoint,) = monitor["endpoints"]
    assert "/metrics" == endpoint["path"]


def test_rules_pass_their_tests() -> None:
    assert "SUCCESS" in output("promtool", "test", "rules", FOLDER / "alerts_test.yml")


@pytest.mark.parametrize("number", range(len(shipped_rules())), ids=[rule["alert"] for rule in shipped_rules()])
def test_a_rule_that_never_fires_fails_its_test(number: int, tmp_path: Path) -> None:
    """So each rule has a test that can fail."""
    rules = yaml.safe_load(ALERTS.read_text())
    rules["groups"][0]["rules"][number]["expr"] = "vector(0) > 1"
    (tmp_path / ALERTS.name).write_text(yaml.safe_dump(rules))
    shutil.copy(FOLDER / "alerts_test.yml", tmp_path)
    assert 0 != run("promtool", "test", "rules", tmp_path / "alerts_test.yml").returncode


def test_scaled_rules_differ_in_their_times_alone() -> None:
    """What fires in test_alerts.py is what is shipped."""
    short, long = yaml.safe_load(scaled(ALERTS.read_text())), yaml.safe_load(ALERTS.read_text())
    for ours, shipped in zip(short["groups"][0]["rules"], long["groups"][0]["rules"], strict=True):
        assert {name: value for name, value in shipped.items() if name not in ("for", "expr")} == {
            name: value for name, value in ours.items() if name not in ("for", "expr")
        }
        assert re.sub(r"\[\w+\]", "[]", shipped["expr"]) == re.sub(r"\[\w+\]", "[]", ours["expr"])
    assert "[10000ms]" in str(short)
    assert "30000ms" == short["groups"][0]["rules"][1]["for"]
