"""From a model's name to a runner on a device: resolve, read, place, warm up. Called by the engine process and the CLI.

Imports torch: the API process never imports this.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Never, Self

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from service.checkpoint.cache import converted, is_raw
from service.checkpoint.download import resolve
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config, read_state
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.child import EXIT_UNUSABLE, die_with_parent, give_back_memory, start_child
from service.engine.compiler import Compile
from service.engine.config import EngineConfig
from service.engine.cores import available_cores
from service.engine.grammar import Grammars
from service.engine.ranks import LeadingRunner, Ranks, follow, meet
from service.engine.request import ModelInfo
from service.engine.scheduler import Scheduler
from service.engine.speculation import Speculation
from service.model.batch import OutOfMemory, Runner
from service.model.config import ModelConfig
from service.model.formats import format_for
from service.model.gpt2 import GPT2
from service.model.memory import KernelError, KVMemoryError, make_runner
from service.model.parallel import ParallelError, ParallelGPT2, check_split, part_of

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # phase, progress from 0 to 1

# On a CPU a step of as much takes a second or two of the 345M's time, and every stream waits for it.
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_NUM_BATCHED_TOKENS = {"cpu": 256, "cuda": 2048}


# The compute capability from which on the kernels have products and keys in 8 bits.
_LEAST = {"int8": (8, 0), "fp8": (8, 9)}


class Reporter:
    """Tells progress to `tell`, a hundredth at a time; shows bars on a terminal, and logs the phases elsewhere."""

    def __init__(self, tell: Report) -> None:
        self._tell = tell
        self._phase = ""
        self._told = 0.0
        self._bar: tqdm[Never] | None = None

    def __call__(self, phase: str, progress: float) -> None:
        if phase != self._phase:
            self.close()
            self._phase, self._told = phase, 0.0
            if not sys.stderr.isatty():
                log.info("phase: %s", phase)
            elif phase != "download":  # the hub's client draws its own
                self._bar = tqdm(total=100, desc=phase, leave=False, bar_format="{desc}: {percentage:3.0f}%|{bar}|")
        elif progress - self._told < 0.01:
            return
        if self._bar is not None:
            self._bar.update(round(progress * 100) - self._bar.n)
        self._told = progress
        self._tell(phase, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class DeviceError(ValueError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine ready to step."""

    model: ModelInfo
    runner: Runner
    scheduler: Scheduler
    compile_grammar: Compile  # makes the library's tokenizer of the model's folder when first called


def load(config: EngineConfig, report: Reporter) -> Loaded:
    """Everything before the first request. Raises one of Unusable."""
    with _room_needed():
        return _load(config, report)


@contextmanager
def _room_needed() -> Iterator[None]:
    """A device without room cannot be used with these settings. Raises KVMemoryError."""
    try:
        yield
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        raise KVMemoryError(
            f"the device has no room for the model and its largest steps ({reason}); lower max_num_seqs, "
            "max_num_batched_tokens or kv_memory, or free memory"
        ) from error


def _load(config: EngineConfig, report: Reporter) -> Loaded:
    started = time.monotonic()
    if config.deterministic and config.tensor_parallel_size > 1:
        raise ParallelError(
            f"deterministic, tensor_parallel_size: sums over {config.tensor_parallel_size} ranks round by how many "
            "tokens a step has; choose one of the two"
        )
    device = _prepare(config, rank=0)
    report("download", 0.0)
    folder = served_folder(config, report)
    model_config = read_config(folder, vocab_size=len(read_tokenizer(folder).token_bytes))
    check_split(model_config, config.tensor_parallel_size)
    ranks: Ranks | None = None
    with ExitStack() as on_failure:
        if config.tensor_parallel_size > 1:
            ranks = Ranks(config.tensor_parallel_size, partial(follow_as_rank, config, folder, model_config))
            on_failure.callback(ranks.close)
        model, runner = _compute(
            config, folder, model_config, device, report, rank=0, store=None if ranks is None else ranks.store
        )
        on_failure.pop_all()
    report("warmup", 1.0)
    report.close()
    log.info(
        "model loaded in %.1f s: %s on %s in %s%s, %d KV blocks of %d tokens",
        time.monotonic() - started,
        config.model,
        device if ranks is None else f"{ranks.num_ranks} ranks from {device} on",
        model.format.name,
        ", deterministic" if config.deterministic else "",
        runner.num_blocks,
        config.block_size,
    )
    limits = _limits(config, device)
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=limits["max_num_seqs"],
        max_num_batched_tokens=limits["max_num_batched_tokens"],
        context_length=model_config.context_length,
        vocab_size=model_config.vocab_size,
        end_of_text_id=model_config.end_of_text_id,
        speculation=Speculation(most=0 if config.speculation == "off" else config.speculation_tokens),
    )
    info = ModelInfo(
        folder=str(folder),
        context_length=model_config.context_length,
        vocab_size=model_config.vocab_size,
        end_of_text_id=model_config.end_of_text_id,
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=limits["max_num_seqs"],
        dtype=model.format.name,
        device=str(device),
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_heads=model_config.num_heads,
        deterministic=config.deterministic,
    )
    grammars = Grammars(lambda: read_tokenizer(folder), end_of_text_id=model_config.end_of_text_id)
    return Loaded(info, runner if ranks is None else LeadingRunner(runner, ranks), scheduler, grammars.compile)


def follow_as_rank(
    config: EngineConfig, folder: Path, model_config: ModelConfig, rank: int, port: int, connection: Connection
) -> None:
    """The process of a rank other than 0: load its part, and compute what rank 0 does until `connection` closes."""
    start_child(level=config.log_level, json_lines=config.json_lines)
    die_with_parent()
    try:
        device = _prepare(config, rank=rank)
        with _room_needed():
            _, runner = _compute(config, folder, model_config, device, lambda *_: None, rank=rank, store=port)
    except Unusable as error:
        log.error("%s", error)
        sys.exit(EXIT_UNUSABLE)
    follow(runner, connection)


def _prepare(config: EngineConfig, *, rank: int) -> torch.device:
    """The device of a rank, and torch as its process needs it."""
    device = _device(config, rank=rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events are those of the current device
        _keep_kernels(_kernels_folder(config))
    torch.set_float32_matmul_precision("highest")  # fp32 means no TF32, whatever the environment says
    # torch knows nothing of a container's share of its cores.
    torch.set_num_threads(config.cpu_threads or min(torch.get_num_threads(), available_cores()))
    return device


def _limits(config: EngineConfig, device: torch.device) -> dict[str, int]:
    max_num_seqs = config.max_num_seqs or _MAX_NUM_SEQS[device.type]
    max_num_batched_tokens = config.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS[device.type]
    return {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max(max_num_batched_tokens, max_num_seqs)}


def _compute(
    config: EngineConfig,
    folder: Path,
    model_config: ModelConfig,
    device: torch.device,
    report: Report,
    *,
    rank: int,
    store: TCPStore | int | None,
) -> tuple[GPT2, Runner]:
    """What computes a rank's part of the model, or all of it where there is one rank; `store` is for `meet`."""
    num_ranks = config.tensor_parallel_size
    name = config.dtype
    if name == "auto":
        name = model_config.dtype if device.type == "cuda" else "float32"
    weights = format_for(name, device, stored=model_config.dtype, kv_cache=config.kv_cache_dtype)
    report("load", 0.0)
    reading: dict[str, Any] = {
        "dtype": weights.made_of,
        "device": device,
        "on_tensor": lambda done, total: report("load", done / total),
    }
    agree: Callable[[int], int] | None = None
    if num_ranks == 1:
        model = GPT2(model_config, read_state(folder, model_config, **reading, head_apart=True), weights)
    else:
        part = partial(part_of, config=model_config, rank=rank, num_ranks=num_ranks)
        state = read_state(folder, model_config, **reading, part=part)
        assert store is not None
        group = meet(store, rank=rank, num_ranks=num_ranks, device=device)
        model = ParallelGPT2(model_config, state, group, weights)
        agree = partial(group.least, device=device)
    give_back_memory()  # what the weights were made of
    report("warmup", 0.0)
    runner = make_runner(
        model,
        block_size=config.block_size,
        **_limits(config, device),
        kv_memory=config.kv_memory,
        utilization=config.gpu_memory_utilization,
        deterministic=config.deterministic,
        on_progress=lambda share: report("warmup", share),
        agree=agree,
        kernels=_kernels_folder(config),
    )
    return model, runner


def _kernels_folder(config: EngineConfig) -> Path:
    return Path(config.cache_dir) / "kernels"


def _keep_kernels(folder: Path) -> None:
    """Let Triton keep compiled kernels there: a start without them takes about 30 s more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled kernels are not kept: %s", error)
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))  # Triton reads it when it is first imported


def served_folder(config: EngineConfig, report: Report) -> Path:
    """The folder of safetensors to read: the model's own, or what that is converted to. Raises CheckpointError."""
    folder = resolve(
        config.model,
        revision=config.revision,
        offline=config.offline,
        on_progress=lambda share: report("download", share),
    )
    if not is_raw(folder):
        return folder
    return converted(folder, cache_dir=Path(config.cache_dir), on_progress=lambda share: report("convert", share))


def _device(config: EngineConfig, *, rank: int) -> torch.device:
    """A rank's own; engines and their ranks are on GPUs one after the other, from the one that was asked for."""
    name, num_ranks = config.device, config.tensor_parallel_size
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        for setting in ("dtype", "kv_cache_dtype"):
            if getattr(config, setting) == "fp8":
                raise DeviceError(
                    f"{setting}: fp8 is for a GPU, and the device is a CPU; choose another, or device cuda"
                )
        return device
    if config.speculation != "off":
        raise DeviceError(
            f"speculation: {config.speculation} is for a CPU, and the device is a GPU; choose off, or device cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceError(f"device: {name} was asked for, and this torch ({torch.__version__}) sees no GPU")
    first, num_gpus = device.index or 0, torch.cuda.device_count()
    wanted = config.data_parallel_size * num_ranks
    if first + wanted > num_gpus and wanted == 1:
        raise DeviceError(f"device: {name} was asked for, and there are {num_gpus} GPUs")
    if first + wanted > num_gpus:
        raise DeviceError(
            f"data_parallel_size, tensor_parallel_size: {config.data_parallel_size} engines of {num_ranks} GPUs each "
            f"take {wanted} GPUs from {name} on, and there are {num_gpus}"
        )
    own = range(first + config.engine_number * num_ranks, first + (config.engine_number + 1) * num_ranks)
    kinds = [torch.cuda.get_device_name(number) for number in own]
    if len(set(kinds)) > 1:  # each would shape its steps for itself, and wait for the others in another place
        raise DeviceError(f"tensor_parallel_size: its GPUs must be of one kind, and are {', '.join(kinds)}")
    device = torch.device("cuda", own[rank])
    capability = torch.cuda.get_device_capability(device)
    for setting in ("dtype", "kv_cache_dtype"):
        value = getattr(config, setting)
        if value in _LEAST and capability < _LEAST[value]:
            least, found = (".".join(map(str, version)) for version in (_LEAST[value], capability))
            raise DeviceError(
                f"{setting}: {value} needs a GPU of compute capability {least} or later, and "
                f"{torch.cuda.get_device_name(device)} has {found}; choose another"
            )
    return device


Unusable = (CheckpointError, DeviceError, KernelError, KVMemoryError, ParallelError)  # what another try would not mend
