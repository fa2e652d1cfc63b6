"""Which runner a model gets, and how much memory its KV cache. Called as the engine loads."""

import gc
import importlib.util
import logging
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from service.model.batch import Runner
from service.model.deterministic import DeterministicRunner
from service.model.gpt2 import GPT2
from service.model.parallel import ParallelGPT2
from service.model.runner import TorchRunner, translate, warm_up

log = logging.getLogger(__name__)

_CPU_KV_MEMORY = 2**30
# What captured graphs take beside the allocator's memory, and some.
_GRAPH_MEMORY = 2**29
_MOST_NUMBERS = 2**31  # in a layer's keys: the kernels count them in 32 bits


class KVMemoryError(ValueError):
    """The KV cache would not hold one full context, or the device has no room for the steps that were asked for."""


class KernelError(Exception):
    """The kernels do not compile for this GPU, or want more of it than it has."""


def make_runner(
    model: GPT2,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_memory: int | None,
    utilization: float,
    deterministic: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
    agree: Callable[[int], int] | None = None,
    kernels: Path | None = None,
) -> Runner:
    """The runner for the model's device, or the deterministic one, ready to step.

    `kv_memory` are the bytes of its cache; None takes what the GPU has left when `utilization` of it may be used in
    all. `on_progress` hears numbers from 0 to 1. `agree` is told what this GPU has left for the cache, and says how
    much of it is taken. `kernels` is a folder that keeps what is compiled for the GPU. Raises KVMemoryError,
    KernelError, OutOfMemory.
    """
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    plain = DeterministicRunner if deterministic else TorchRunner
    spare = int(deterministic)  # blocks for what fills slices up
    if model.device.type == "cpu":
        num_blocks = count_blocks(model, block_size, kv_memory or _CPU_KV_MEMORY, spare=spare)
        runner = plain(model, num_blocks=num_blocks, block_size=block_size)
        warm_up(runner, max_num_seqs=1, max_num_batched_tokens=16)  # only first calls are slow; memory is no concern
        return runner
    lack = what_kernels_lack(model.device)
    if lack is None and isinstance(model, ParallelGPT2):  # before it is measured what memory is left
        from service.model.graphs import most_rows

        if not model.connect(most_rows=max_num_batched_tokens, most_logits=most_rows(max_num_seqs)):
            lack = "access of each GPU to the others' memory"
    if deterministic or lack:
        log.warning(
            "the GPU is used through plain operators, many times slower: %s",
            "deterministic was asked for" if deterministic else f"the kernels lack {lack}",
        )
        if kv_memory is None:
            probe = plain(model, num_blocks=1, block_size=block_size)
            run = partial(warm_up, probe, **limits)
            kv_memory = _memory_left(model.device, run, utilization=utilization, agree=agree)
            probe.close()
        num_blocks = count_blocks(model, block_size, kv_memory, spare=spare)
        torch_runner = plain(model, num_blocks=num_blocks, block_size=block_size)
        warm_up(torch_runner, **limits)
        return torch_runner
    from triton.errors import TritonError  # Triton is only where CUDA is

    from service.model.graphs import GraphRunner, decode_sizes
    from service.model.kernels.cuda.hopper import kernels_for

    cuda = kernels_for(model, decode_sizes(**limits), block_size=block_size, folder=kernels)

    def run_largest() -> None:
        probe = GraphRunner(model, num_blocks=1, block_size=block_size, **limits, cuda=cuda)
        probe.run_largest()
        probe.close()

    try:
        if kv_memory is None:
            kv_memory = _memory_left(
                model.device, run_largest, utilization=utilization, agree=agree, beside=_GRAPH_MEMORY
            )
        num_blocks = count_blocks(model, block_size, kv_memory, spare=1)  # it takes what fills steps up
        graphs = GraphRunner(model, num_blocks=num_blocks, block_size=block_size, **limits, cuda=cuda)
        graphs.capture(on_progress)
    except TritonError as error:
        name = torch.cuda.get_device_name(model.device)
        raise KernelError(f"device: the kernels cannot be built for {name}: {str(error).strip()}") from error
    except RuntimeError as error:
        raise translate(error) from error
    return graphs


def what_kernels_lack(device: torch.device) -> str | None:
    """What the Triton kernels need and do not have here."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of the Ampere generation or later"
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    # With which Triton builds what launches a kernel. It also takes one that CC names, which is no setting of ours.
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler (gcc or clang)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's C headers (Python.h; python3-dev in Debian)"
    return None


def block_bytes(model: GPT2, block_size: int) -> int:
    """Bytes of one KV block over all layers."""
    config = model.config
    return 2 * config.num_layers * block_size * model.attention_width * model.cache_dtype.itemsize


def count_blocks(model: GPT2, block_size: int, kv_memory: int, *, spare: int = 0) -> int:
    """How many blocks fit in `kv_memory` bytes, beside `spare` that no sequence gets.

    No more than the kernels can reach. Raises KVMemoryError if that is less than one full context.
    """
    most = _MOST_NUMBERS // (block_size * model.attention_width)
    num_blocks = min(kv_memory // block_bytes(model, block_size), most)
    needed = -(-model.config.context_length // block_size) + spare
    if num_blocks < needed:
        raise KVMemoryError(
            f"kv_memory: {kv_memory} bytes hold {num_blocks} blocks; with a context of {model.config.context_length} "
            f"tokens {needed} are needed ({needed * block_bytes(model, block_size)} bytes)"
        )
    return num_blocks - spare


def _memory_left(
    device: torch.device,
    run_largest: Callable[[], None],
    *,
    utilization: float,
    agree: Callable[[int], int] | None,
    beside: int = 0,
) -> int:
    """Bytes left when `utilization` of the GPU may be used in all: others hold some, the run and `beside` need some."""
    torch.cuda.reset_peak_memory_stats(device)
    run_largest()
    peak = torch.cuda.max_memory_reserved(device)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # what NCCL and kernels took in the run, too
    left = max(0, int(total * utilization) - others - peak - beside)
    return left if agree is None else agree(left)
