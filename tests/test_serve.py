"""What engines are told of the settings. The supervisor in its work is in tests/service and tests/faults."""

import os

import pytest

from service.serve import engine_config
from service.settings import Settings


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("num_engines", "size", "expected"), [(1, 1, None), (2, 1, 4), (2, 2, 2), (1, 3, 2), (3, 1, 2), (16, 1, 1)]
)
def test_engines_share_the_cores(num_engines: int, size: int, expected: int | None) -> None:
    """A thread at least; a single one leaves it to torch, and whoever says a number gets it."""
    settings = Settings.model_construct(tensor_parallel_size=size)
    configs = [engine_config(settings, json_lines=True, number=k, of=num_engines) for k in range(num_engines)]
    assert [expected] * num_engines == [config.cpu_threads for config in configs]
    assert list(range(num_engines)) == [config.engine_number for config in configs]
    told = engine_config(settings.model_copy(update={"cpu_threads": 7}), json_lines=True, of=num_engines)
    assert 7 == told.cpu_threads


@pytest.mark.parametrize(
    ("asked", "first_was_on", "expected"),
    [
        *(("auto", None, "auto"), ("auto", "cpu", "cpu"), ("auto", "cuda:3", "cuda")),
        *(("cuda:1", "cuda:2", "cuda:1"), ("cpu", "cpu", "cpu")),
    ],
)
def test_an_engine_is_restarted_on_the_same_kind_of_device(asked: str, first_was_on: str | None, expected: str) -> None:
    """Which of them is by its number; a GPU that is away for a moment is no reason to go on without it."""
    settings = Settings.model_construct(device=asked)
    assert expected == engine_config(settings, json_lines=True, device=first_was_on).device
