"""Where the kernels' tests run: on a GPU where one is, else in Triton's interpreter."""

import os

import pytest
import torch

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
