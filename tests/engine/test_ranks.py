"""How an engine's ranks end; with models they are in tests/service/test_tensor_parallel.py."""

import multiprocessing
import subprocess
import sys
import threading
from multiprocessing.connection import Connection

import pytest
import torch

from service.engine import ranks
from service.engine.ranks import Ranks


def idle(rank: int, port: int, connection: Connection) -> None:
    """A rank that is told nothing."""
    connection.poll(None)


@pytest.mark.parametrize("waits", [False, True])
def test_nobody_waits_for_a_device_that_waits_for_others(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is ended when the device is not done in time; when it is, only the other ranks are."""
    ended = threading.Event()
    monkeypatch.setattr(ranks, "_PATIENCE", 0.1 if waits else 30.0)
    monkeypatch.setattr(ranks, "_end_at_once", ended.set)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ended.wait(60) if waits else None)
    both = Ranks(2, idle)
    (other,) = multiprocessing.active_children()
    both.close()
    assert waits == ended.is_set()
    assert not other.is_alive()


def test_a_process_that_ends_takes_its_ranks_along() -> None:
    """One that has not closed them; quietly."""
    program = """
from service.engine.ranks import Ranks
from tests.engine.test_ranks import idle
if __name__ == "__main__":
    ranks = Ranks(2, idle)
    print(ranks._processes[0].pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (0, "") == (done.returncode, done.stderr)
    assert int(done.stdout)
