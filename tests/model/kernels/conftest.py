"""Where the kernels' tests run: on a GPU where one is, else in Triton's interpreter."""

import os
import shutil
from collections.abc import Callable
from functools import cache

import pytest
import torch

from service.model.kernels.cuda.compiler import Source
from tests.model.kernels.emulating import Run, built, precompile

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def pdl() -> bool:
    """Whether kernels are launched by programmatic dependent launch, which Hopper GPUs and later know."""
    return ON_GPU and torch.cuda.get_device_capability() >= (9, 0)


@pytest.fixture(scope="session")
def chain(pdl: bool) -> dict[str, bool]:
    """What a launch is told of it."""
    return {"PDL": pdl, "launch_pdl": pdl}


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Source], Run]:
    """A source of kernels/cuda as a function of its arguments, on this processor."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    header = tmp_path_factory.mktemp("header")
    precompile(header)
    return cache(lambda source: built(source, tmp_path_factory.mktemp("kernel"), header))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)
