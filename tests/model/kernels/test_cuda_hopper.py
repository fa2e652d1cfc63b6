"""Which of the CUDA kernels a model gets, and what is said of the others: on no GPU."""

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.random_model import gpt2_345m
from service.model.formats import Narrow, Narrowed, Plain
from service.model.gpt2 import GPT2
from service.model.graphs import decode_sizes
from service.model.kernels.cuda import compiler
from service.model.kernels.cuda.compiler import CompilerError
from service.model.kernels.cuda.hopper import CudaKernels, kernels_for
from service.model.kernels.plans import CHAINS, CUDA_DECODES, WIDES
from service.model.parallel import ParallelGPT2

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn
INFO, WARNING = logging.INFO, logging.WARNING


def model_of(dtype: torch.dtype = BF16, cache_dtype: torch.dtype | None = None) -> GPT2:
    """Of the 345M's shape, without its numbers."""
    weights = Plain(dtype, cache_dtype=cache_dtype)
    return gpt2_345m(lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), num_layers=1, weights=weights)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU with `multi_processor_count` of `capability`, for which all compiles, or `error` is raised."""
    gpu = SimpleNamespace(capability=(9, 0), multi_processor_count=132, error=None)

    def compiled(*_: object) -> bytes:
        if gpu.error is not None:
            raise gpu.error
        return b"code"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(compiler, "_library", SimpleNamespace)
    monkeypatch.setattr(compiler, "_compiled", compiled)
    driver = SimpleNamespace(
        Kernel=lambda code, name, **_: name, driver_version=lambda: 13000, tiled_map=lambda *_, **__: None
    )
    monkeypatch.setitem(sys.modules, "service.model.kernels.cuda.launch", driver)
    return gpu


def decodes_of(found: CudaKernels) -> list[tuple[int, int]]:
    assert found.decode is not None
    return list(found.decode.kernels)


SIZES = decode_sizes(256, 2048)
ALL = [*CHAINS, *WIDES]
SHAPES = list(dict.fromkeys((shape.warps, shape.passes) for _, shape in CUDA_DECODES))


def test_a_model_of_the_345ms_shape_gets_all(gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(INFO):
        found = kernels_for(model_of(), SIZES, block_size=16, folder=None)
    assert list(found.chains) == ALL
    assert list(found.heads) == list(CHAINS)
    assert {("head", 131)} == {(head.kernel, head.num_blocks) for head in found.heads.values()}
    assert all("attention" == found.chains[num].attention for num in CHAINS)
    assert SHAPES == decodes_of(found)
    assert not caplog.records


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "chains"),
    [
        (1, 2048, [1]),
        (3, 2048, [1, 2, 4]),
        (12, 16, [1, 2, 4, 8, 16]),
        (20, 20, [1, 2, 4, 8, 16]),
        (100, 2048, ALL),
        (300, 2048, ALL),
    ],
)
def test_only_sizes_that_steps_have_are_loaded(
    gpu: SimpleNamespace, max_num_seqs: int, max_num_batched_tokens: int, chains: list[int]
) -> None:
    """The most sequences are rounded up to the next one, where a step may have so many tokens."""
    sizes = decode_sizes(max_num_seqs, max_num_batched_tokens)
    found = kernels_for(model_of(), sizes, block_size=16, folder=None)
    assert chains == list(found.chains)
    assert list(found.heads) == [num for num in chains if num in CHAINS]
    assert max_num_seqs <= sizes[-1] <= max_num_batched_tokens
    assert set(ALL) <= set(decode_sizes(256, 2048))


def test_weights_in_8_bits_are_told_of_when_kernels_read_others(
    gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    model.format = Narrowed("int8", torch.int8, BF16)
    with caplog.at_level(INFO):
        assert kernels_for(model, SIZES, block_size=16, folder=None).chains
    assert "layers of up to 128 streams read weights in 16 bits" in caplog.text


@pytest.mark.parametrize(
    ("cache_dtype", "multi_processor_count", "num_blocks", "said"),
    [
        (FP8, 132, 131, "no CUDA kernels of layers, which read no keys in 8 bits: up to 128 streams take longer"),
        (None, 114, 99, "no CUDA kernels of layers, which are for 128 multiprocessors, and here are 114"),
    ],
)
def test_keys_in_8_bits_and_few_multiprocessors_leave_attention_and_the_head(
    cache_dtype: torch.dtype | None,
    multi_processor_count: int,
    num_blocks: int,
    said: str,
    gpu: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu.multi_processor_count = multi_processor_count
    with caplog.at_level(INFO):
        found = kernels_for(model_of(cache_dtype=cache_dtype), SIZES, block_size=16, folder=None)
    assert not found.chains
    assert SHAPES == decodes_of(found)
    assert list(CHAINS) == list(found.heads)
    assert {num_blocks} == {head.num_blocks for head in found.heads.values()}
    assert [(INFO, said)] == [(record.levelno, record.getMessage()) for record in caplog.records]


def test_a_head_in_8_bits_stays_tritons(gpu: SimpleNamespace) -> None:
    """Which reads half the bytes."""
    model = model_of()
    assert model.padded_head is not None
    model.padded_head = replace(model.padded_head, narrow=Narrow(torch.empty(1, dtype=FP8), torch.empty(1)))
    found = kernels_for(model, SIZES, block_size=16, folder=None)
    assert found.chains
    assert not found.heads


def test_another_shape_with_heads_of_64_gets_attention(gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """Which is all that there is for it, so that nothing is said."""
    model = model_of()
    model.config = replace(model.config, hidden_size=768, num_heads=12)
    with caplog.at_level(INFO):
        found = kernels_for(model, SIZES, block_size=16, folder=None)
    assert not found.chains
    assert not found.heads
    assert SHAPES == decodes_of(found)
    assert not caplog.records


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
    gpu: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu.capability, gpu.error = capability, error
    with caplog.at_level(INFO):
        assert kernels_for(model_of(), SIZES, block_size=16, folder=None) == CudaKernels()
    assert [(level, said)] == [(record.levelno, record.getMessage()) for record in caplog.records]


def test_a_rank_of_several_gets_none(gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    rank = ParallelGPT2.__new__(ParallelGPT2)
    vars(rank).update(vars(model_of()), attention_width=512)
    with caplog.at_level(INFO):
        assert kernels_for(rank, SIZES, block_size=16, folder=None) == CudaKernels()
    assert "split over ranks" in caplog.text


def test_what_none_are_for_needs_no_word_and_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(INFO):
        assert kernels_for(model_of(torch.float32), SIZES, block_size=16, folder=None) == CudaKernels()
    assert not caplog.records
