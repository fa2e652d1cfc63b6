"""bench.events runs over the service's API process as it is now, and says what an event and a request cost it."""

import json
import os
import subprocess
import sys

import pytest


def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of the service."""
    monkeypatch.setenv("MGPT_API_KEY", "a-key-that-no-client-has")
    command = [sys.executable, "-m", "bench.events", "--streams", "2", "--requests", "4", "--interval-ms", "1"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"user", "system", "all"} == found["event_us"].keys() == found["plain_request_us"].keys()
    assert all(count > 10 for count in found["events_a_request"])
