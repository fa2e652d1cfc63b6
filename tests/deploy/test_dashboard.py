"""The dashboard: what Grafana is given, and that every query is one. That each has data is in test_prometheus.py."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.deploy.dashboard import DASHBOARD, expressions, panels, variables
from tests.deploy.tools import ROOT, run

PROVISIONING = ROOT / "docker" / "grafana" / "provisioning"
_PARSE = """
import json, sys, promql_parser
for expression in json.load(sys.stdin):
    try:
        promql_parser.parse(expression)
    except ValueError as error:
        print(expression, error)
"""


def parse_errors(queries: list[str]) -> str:
    done = run(ROOT / ".venv-deploy" / "bin" / "python", "-c", _PARSE, text=json.dumps(queries))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_query_parses() -> None:
    """With Grafana's variables filled in, by Prometheus' own grammar; and the parser does refuse what is none."""
    queries = expressions()
    assert 40 <= len(queries)
    assert "" == parse_errors(queries)
    assert "sum(rate(x[10s])" in parse_errors(["sum(rate(x[10s])"])


def test_every_panel_takes_the_variables() -> None:
    """The data source from its variable, and what is shown from job and instance."""
    assert ["datasource", "job", "instance"] == [variable["name"] for variable in variables()]
    assert "prometheus" == variables()[0]["query"]
    for panel in panels():
        assert "${datasource}" == panel["datasource"]["uid"], panel["title"]
        for target in panel["targets"]:
            assert "${datasource}" == target["datasource"]["uid"], panel["title"]
            assert 'job="$job"' in target["expr"], target["expr"]
            # The alert of a job without targets has no instance.
            assert (panel["title"] == "Alerts firing") != ('instance=~"$instance"' in target["expr"]), target["expr"]


def test_rows_are_the_questions() -> None:
    """Four questions, with panels under each, which do not overlap."""
    board = json.loads(DASHBOARD.read_text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert ["Is it healthy?", "How loaded is it?", "Who waits, and why?", "How fast is it?"] == rows
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in board["panels"]]
    assert sorted(set(ids)) == ids


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    """What it is provisioned with."""
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert ("prometheus", "http://prometheus:9090", True) == (source["type"], source["url"], source["isDefault"])
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "files.yaml").read_text())["providers"]
    assert ("file", "/etc/grafana/dashboards") == (provider["type"], provider["options"]["path"])


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panels_are_whole(panel: dict[str, Any]) -> None:
    """A title, a unit, targets with letters of their own."""
    letters = [target["refId"] for target in panel["targets"]]
    assert letters
    assert sorted(set(letters)) == letters
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert not re.search(r"\$(?!job|instance|__rate_interval)", "".join(t["expr"] for t in panel["targets"]))
