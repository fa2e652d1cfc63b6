"""The Dockerfile under hadolint and checkov. It is built and run by tests/image."""

import json

import pytest

from tests.deploy.tools import ROOT, output, run

# Each with its reason.
WAIVED = {"CKV_DOCKER_7": "it does not see the version in the argument that FROM has"}
BAD = "FROM debian\nRUN cd /tmp && apt-get install gcc\n"


def test_hadolint_finds_nothing() -> None:
    assert "" == output("hadolint", "Dockerfile")


def test_hadolint_finds_what_is_there() -> None:
    """The tool itself works: a bad file has findings."""
    done = run("hadolint", "-", text=BAD)
    assert done.returncode
    assert {"DL3006", "DL3008"} <= set(done.stdout.split())


def test_checkov_finds_nothing() -> None:
    """But for what is waived; and it has looked."""
    found = json.loads(
        output(
            *("checkov", "--file", ROOT / "Dockerfile", "--framework", "dockerfile", "--skip-download"),
            *("--output", "json", "--skip-check", ",".join(WAIVED)),
        )
    )
    assert (0, 0) == (found["summary"]["failed"], found["summary"]["parsing_errors"])
    assert found["summary"]["passed"] > 50


@pytest.mark.parametrize("check", WAIVED)
def test_a_waiver_is_needed(check: str) -> None:
    """What is waived would fail: a waiver that has outlived its reason goes."""
    where = ("--file", ROOT / "Dockerfile", "--framework", "dockerfile", "--skip-download")
    assert check in run("checkov", *where, "--compact", "--check", check).stdout
    assert run("checkov", *where, "--check", check).returncode
