"""Which of the CUDA kernels a model gets, and what is said of the others: on no GPU."""

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.random_model import gpt2_345m
from service.model.formats import Plain
from service.model.gpt2 import GPT2
from service.model.kernels.cuda import hopper
from service.model.kernels.cuda.compiler import CompilerError
from service.model.kernels.cuda.hopper import CudaKernels, kernels_for
from service.model.kernels.plans import CHAINS, CUDA_DECODES

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn
INFO, WARNING = logging.INFO, logging.WARNING


def model_of(dtype: torch.dtype = BF16, cache_dtype: torch.dtype | None = None) -> GPT2:
    """Of the 345M's shape, without its numbers."""
    weights = Plain(dtype, cache_dtype=cache_dtype)
    return gpt2_345m(lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), num_layers=1, weights=weights)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU with `processors` of `capability`, on which loading gives what it was asked for, or raises `error`."""
    gpu = SimpleNamespace(capability=(9, 0), processors=132, error=None)

    def load(asked: Iterable[Any]) -> Any:
        if gpu.error is not None:
            raise gpu.error
        return list(asked)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu.capability)
    properties = SimpleNamespace(multi_processor_count=gpu.processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(hopper, "load_chains", lambda config, dtype, chains, **_: load(chains))
    monkeypatch.setattr(hopper, "load_decode", lambda model, shapes, **_: load(shapes))
    gpu.properties = properties
    return gpu


def test_a_model_of_the_345ms_shape_gets_all(loads: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(INFO):
        found = kernels_for(model_of(), block_size=16, folder=None)
    assert [1, *CHAINS] == found.chains
    assert [shape for _, shape in CUDA_DECODES] == found.decode
    assert not caplog.records


def test_keys_in_8_bits_and_few_multiprocessors_leave_attention(
    loads: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(INFO):
        found = kernels_for(model_of(cache_dtype=FP8), block_size=16, folder=None)
        loads.properties.multi_processor_count = 78
        other = kernels_for(model_of(), block_size=16, folder=None)
    assert found.chains == other.chains == []
    assert found.decode
    assert other.decode
    assert [INFO, INFO] == [record.levelno for record in caplog.records]
    assert "which read no keys in 8 bits" in caplog.records[0].getMessage()
    assert "for 128 multiprocessors, and here are 78" in caplog.records[1].getMessage()


@pytest.mark.parametrize(
    ("capability", "error", "level", "said"),
    [
        ((8, 0), None, INFO, "no CUDA kernels: they are for Hopper GPUs (9.0), and this is of 8.0"),
        ((9, 0), CompilerError("x.cu"), WARNING, "no CUDA kernels, Triton's instead: x.cu"),
        ((9, 0), ImportError("cuda"), WARNING, "no CUDA kernels, Triton's instead: cuda"),
        ((9, 0), OSError("unreadable"), WARNING, "no CUDA kernels, Triton's instead: unreadable"),
        ((9, 0), RuntimeError("driver"), WARNING, "no CUDA kernels, Triton's instead: driver"),
    ],
)
def test_where_none_can_be_had_the_log_says_why(
    capability: tuple[int, int],
    error: Exception | None,
    level: int,
    said: str,
    loads: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loads.capability, loads.error = capability, error
    with caplog.at_level(INFO):
        assert kernels_for(model_of(), block_size=16, folder=None) == CudaKernels()
    assert [(level, said)] == [(record.levelno, record.getMessage()) for record in caplog.records]


def test_what_none_are_for_needs_no_word_and_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(INFO):
        assert kernels_for(model_of(torch.float32), block_size=16, folder=None) == CudaKernels()
    assert not caplog.records
