"""Reads the dashboard's file."""

import json
from typing import Any

from tests.deploy.tools import ROOT

DASHBOARD = ROOT / "k8s" / "components" / "observability" / "dashboard.json"
# What Grafana puts in their place.
_VALUES = {"$job": "megatron-gpt2", "$instance": ".+", "$__rate_interval": "10s"}


def panels() -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["templating"]["list"]
    return found


def expressions() -> list[str]:
    """Every query, as it is sent to Prometheus."""
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    for name, value in _VALUES.items():
        queries = [query.replace(name, value) for query in queries]
    return queries
