"""How much memory the KV cache gets."""

import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model import graphs, memory
from service.model.batch import OutOfMemory
from service.model.deterministic import DeterministicRunner
from service.model.formats import Plain, format_for
from service.model.memory import (
    KernelError,
    KVMemoryError,
    block_bytes,
    count_blocks,
    make_runner,
    what_kernels_lack,
)
from service.model.parallel import ParallelGPT2
from service.model.runner import TorchRunner
from tests.model.batches import BLOCK_SIZE
from tests.model.conftest import Pair


def test_kv_memory_below_one_context_is_refused(make_pair: Callable[..., Pair]) -> None:
    """The message names the setting and the bytes that would do; just enough is accepted."""
    _, ours = make_pair()
    enough = 16 * block_bytes(ours, BLOCK_SIZE)
    assert 16 == count_blocks(ours, BLOCK_SIZE, enough)
    with pytest.raises(KVMemoryError, match=rf"kv_memory: .*\({enough} bytes\)"):
        count_blocks(ours, BLOCK_SIZE, enough - 1)


def test_a_cache_is_no_larger_than_the_kernels_can_reach(make_pair: Callable[..., Pair]) -> None:
    """Slots times hidden size, with those of the spare block, are at most 2^31 on the largest GPU."""
    _, ours = make_pair()
    num_blocks = count_blocks(ours, BLOCK_SIZE, 2**40, spare=1)
    assert 2**31 // (BLOCK_SIZE * 64) == num_blocks + 1


@pytest.mark.parametrize(
    ("name", "kv_cache", "expected"), [("bfloat16", "auto", 2), ("bfloat16", "fp8", 1), ("int8", "fp8", 1)]
)
def test_keys_and_values_in_fp8_take_half_the_bytes(name: str, kv_cache: str, expected: int) -> None:
    """So that twice as many tokens fit."""
    weights = format_for(name, torch.device("cuda"), kv_cache=kv_cache)
    model = gpt2_345m(lambda _, shape: torch.empty(shape, device="meta"), num_layers=24, weights=weights)
    assert 2 * 24 * 16 * 1024 * expected == block_bytes(model, 16)


def test_what_no_sequence_gets_is_within_the_bytes(make_pair: Callable[..., Pair]) -> None:
    """Spare blocks are taken off, also from what one full context needs."""
    _, ours = make_pair()
    bytes_each = block_bytes(ours, BLOCK_SIZE)
    assert 29 == count_blocks(ours, BLOCK_SIZE, 30 * bytes_each, spare=1)
    with pytest.raises(KVMemoryError, match=rf"kv_memory: .*\({17 * bytes_each} bytes\)"):
        count_blocks(ours, BLOCK_SIZE, 16 * bytes_each, spare=1)


def test_a_cpu_gets_the_runner_of_plain_operators(make_pair: Callable[..., Pair]) -> None:
    """With as many blocks as the bytes hold, and no more."""
    _, ours = make_pair()
    runner = make_runner(
        ours,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_memory=20 * block_bytes(ours, BLOCK_SIZE) + 1,
        utilization=0.9,
    )
    assert isinstance(runner, TorchRunner)
    assert 20 == runner.num_blocks


def test_deterministic_mode_has_a_runner_of_its_own(make_pair: Callable[..., Pair]) -> None:
    """Which takes one of the blocks for itself, so that the bytes are not exceeded."""
    _, ours = make_pair()
    limits = {"block_size": BLOCK_SIZE, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    kv_memory = 20 * block_bytes(ours, BLOCK_SIZE)
    runner = make_runner(ours, **limits, kv_memory=kv_memory, utilization=0.9, deterministic=True)
    assert isinstance(runner, DeterministicRunner)
    assert 19 == runner.num_blocks


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("nothing", None),
        ("Ampere", "a GPU of the Ampere generation or later"),
        ("triton", "the package triton"),
        ("a compiler", "a C compiler (gcc or clang)"),
        ("headers", "Python's C headers (Python.h; python3-dev in Debian)"),
    ],
)
def test_what_the_kernels_lack_is_named(
    without: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU of that kind, Triton, and what Triton compiles its launchers with."""
    capability = (7, 5) if without == "Ampere" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if without == "triton" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if without == "a compiler" else f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    if without != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert expected == what_kernels_lack(torch.device("cuda"))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            OutOfResources(300_000, 232_448, "shared memory"),
            (KernelError, "device: .* cannot be built for H100: .*300"),
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), (OutOfMemory, "CUDA out of memory")),
        (RuntimeError("Triton Error [CUDA]: out of memory"), (OutOfMemory, "out of memory")),
    ],
)
def test_a_gpu_too_small_is_told_from_one_that_failed(
    raised: Exception, expected: tuple[type[Exception], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Triton or the driver calls it while the graphs are captured: another try would not mend it."""
    plain = Plain(torch.float32)
    model: Any = SimpleNamespace(device=torch.device("cuda"), format=plain, dtype=plain.dtype, config=CONFIG_345M)

    class Failing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def capture(self, _: object) -> None:
            raise raised

    monkeypatch.setattr(graphs, "GraphRunner", Failing)
    monkeypatch.setattr(memory, "what_kernels_lack", lambda _: None)
    monkeypatch.setattr(memory, "count_blocks", lambda *_, **__: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    error, message = expected
    with pytest.raises(error, match=message):
        make_runner(model, block_size=16, max_num_seqs=1, max_num_batched_tokens=16, kv_memory=2**30, utilization=0.9)


def test_ranks_that_do_not_reach_each_other_take_plain_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a line in the log; whether they do, `connect` says, for as many tokens and rows as a step may have."""
    asked: dict[str, int] = {}

    class Apart(ParallelGPT2):
        device = torch.device("cuda")

        def __init__(self) -> None:
            pass

        def connect(self, **sizes: int) -> bool:
            asked.update(sizes)
            return False

    monkeypatch.setattr(memory, "what_kernels_lack", lambda _: None)
    monkeypatch.setattr(memory, "count_blocks", lambda *_, **__: 7)
    monkeypatch.setattr(memory, "TorchRunner", lambda _, **sizes: sizes)
    monkeypatch.setattr(memory, "warm_up", lambda *_, **__: None)
    limits = {"max_num_seqs": 300, "max_num_batched_tokens": 2048}
    runner: Any = make_runner(Apart(), block_size=16, **limits, kv_memory=2**30, utilization=0.9)
    assert {"num_blocks": 7, "block_size": 16} == runner
    assert {"most_rows": 2048, "most_logits": 300} == asked
    assert "the kernels lack access of each GPU to the others' memory" in caplog.text
