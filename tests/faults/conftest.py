"""A service that can be broken from within, and what is borrowed from tests/service. Run by `make faults`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from tests.faults.trigger import Triggers
from tests.faults.watch import Watch
from tests.service.conftest import connect, one_thread, scripted_model, start, tokenizer
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, until_drained

__all__ = ["connect", "one_thread", "scripted_model", "start", "tokenizer"]


class Watching(Protocol):
    """Makes a Watch of a server of the scripted model."""

    def __call__(self, server: Server, **expected: bool) -> Watch: ...


@pytest.fixture(scope="session")
def shared_triggers(tmp_path_factory: pytest.TempPathFactory) -> Triggers:
    return Triggers(tmp_path_factory.mktemp("triggers"))


@pytest.fixture(scope="session")
def shared_server(scripted_model: ScriptedModel, shared_triggers: Triggers) -> Iterator[Server]:
    """The server of all faults that leave one behind: four sequences at a time, small steps, little patience.

    Engines may die as often as tests kill them: no two restarts fall into one window.
    """
    yield from until_drained(
        Server(
            *(str(scripted_model.folder), "--max-num-seqs", "4", "--max-num-batched-tokens", "16"),
            *("--stall-seconds", "2", "--restart-window-seconds", "0.1"),
            environment=shared_triggers.environment(),
        )
    )


@pytest.fixture
def triggers(tmp_path: Path) -> Triggers:
    """For a server of one test's own."""
    return Triggers(tmp_path)


@pytest.fixture
def watching(scripted_model: ScriptedModel) -> Watching:
    return partial(Watch, model=scripted_model)
