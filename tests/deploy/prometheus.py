"""A real Prometheus on a free port, by the shipped configuration and rules, over services that tests start."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from tests.deploy.tools import ROOT

FOLDER = ROOT / "docker" / "prometheus"
ALERTS = FOLDER / "alerts.yml"
JOB = "megatron-gpt2"
MINUTE_SECONDS = 2.0  # what a minute of the shipped rules takes in a test
_POLL_SECONDS = 0.1
_Result = TypeVar("_Result")


def shipped_rules() -> list[dict[str, Any]]:
    """The rules of alerts.yml, which has one group."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def scaled(text: str) -> str:
    """A file of rules with all its windows and `for` made as much shorter as a minute is here; nothing else."""

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[2]) * {"s": 1, "m": 60}[match[3]] * MINUTE_SECONDS / 60
        return f"{match[1]}{round(1000 * seconds)}ms{match[4]}"

    text = re.sub(r"(\[)(\d+)([sm])(\])", shorter, text)
    return re.sub(r"(\bfor: )(\d+)([sm])(\n)", shorter, text)


def write_config(folder: Path, targets: Sequence[str]) -> Path:
    """The shipped prometheus.yml with the scaled rules; it finds `targets` instead of names, every second."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": list(targets)}]
    assert [ALERTS.name] == config["rule_files"]
    (folder / ALERTS.name).write_text(scaled(ALERTS.read_text()))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


class Prometheus:
    """One process, which knows services by their host and port."""

    def __init__(self, folder: Path, urls: Sequence[str]) -> None:
        config = write_config(folder, [str(httpx.URL(url).netloc, "ascii") for url in urls])
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        try:
            address = self._wait_ready()
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._reader.start()
        self._http = httpx.Client(base_url=f"http://{address}", timeout=10)

    def _wait_ready(self) -> str:
        """Where it listens, once it takes queries."""
        address, ready = "", False
        assert self.process.stderr is not None
        while not (address and ready):
            line = self.process.stderr.readline()
            assert line, f"prometheus ended: {self.log}"
            self.log.append(line)
            ready = ready or "Server is ready to receive web requests" in line
            if '"Listening on"' in line:
                address = line.split("address=")[1].strip()
        return address

    def close(self) -> None:
        self._http.close()
        self.process.terminate()
        self.process.wait(20)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, each with its `metric` and its `value` as a number."""
        response = self._http.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, f"{expression}: {response.text}"
        series = response.json()["data"]["result"]
        return [{"metric": one["metric"], "value": float(one["value"][1])} for one in series]

    def alerts(self, state: str) -> set[str]:
        """Names of the alerts in this state: pending or firing."""
        alerts = self._http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == state}

    def targets(self) -> list[Mapping[str, Any]]:
        """Its active targets."""
        active: list[Mapping[str, Any]] = self._http.get("/api/v1/targets").json()["data"]["activeTargets"]
        return active

    def rule_health(self) -> dict[str, str]:
        """Of each rule by its name: ok, or what is wrong with it."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: rule.get("lastError", rule["health"]) for group in groups for rule in group["rules"]}

    def wait_firing(self, *names: str, seconds: float) -> None:
        """Return when each of these has fired since."""
        missing = set(names)

        def all_fired() -> bool:
            missing.difference_update(self.alerts("firing"))
            return not missing

        self.wait(all_fired, seconds=seconds, what=f"{names} to fire")

    def wait(self, condition: Callable[[], _Result], *, seconds: float, what: str) -> _Result:
        """The first true result; an AssertionError with `what` and what Prometheus knows when there is none in time."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < deadline, f"waited for {what}; {self._about()}"
            time.sleep(_POLL_SECONDS)
        return result

    def _about(self) -> str:
        about = {
            "firing": sorted(self.alerts("firing")),
            "pending": sorted(self.alerts("pending")),
            "targets": [(target["scrapeUrl"], target["health"], target["lastError"]) for target in self.targets()],
            "metrics": self.query('{__name__=~"megatron_gpt2_.*", __name__!~".*_(bucket|created)"}'),
        }
        return json.dumps(about)
