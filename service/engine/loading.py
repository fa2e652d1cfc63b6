"""From a model's name to a runner on a device: resolve, read, place, warm up. Called by the engine process and the CLI.

Imports torch: the API process never imports this.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Never, Self

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from tqdm import tqdm

from service.checkpoint.cache import converted, is_raw
from service.checkpoint.download import resolve
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config, read_state
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.compiler import Compile
from service.engine.config import EngineConfig
from service.engine.grammar import Grammars
from service.engine.request import ModelInfo
from service.engine.scheduler import Scheduler
from service.model.batch import OutOfMemory, Runner
from service.model.gpt2 import GPT2
from service.model.memory import KernelError, KVMemoryError, make_runner

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # phase, progress from 0 to 1

# On a CPU a step of as much takes a second or two of the 345M's time, and every stream waits for it.
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_NUM_BATCHED_TOKENS = {"cpu": 256, "cuda": 2048}


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
    try:
        return _load(config, report)
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        raise KVMemoryError(
            f"the device has no room for the model and its largest steps ({reason}); lower max_num_seqs, "
            "max_num_batched_tokens or kv_memory, or free memory"
        ) from error


def _load(config: EngineConfig, report: Reporter) -> Loaded:
    started = time.monotonic()
    device = _device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events are those of the current device
        _keep_kernels(Path(config.cache_dir) / "kernels")
    torch.set_float32_matmul_precision("highest")  # fp32 means no TF32, whatever the environment says
    if not sys.stderr.isatty():
        disable_progress_bars()  # of the hub's client
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    report("download", 0.0)
    folder = served_folder(config, report)
    model = _read(folder, config, device, report)
    report("warmup", 0.0)
    max_num_seqs = config.max_num_seqs or _MAX_NUM_SEQS[device.type]
    max_num_batched_tokens = config.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS[device.type]
    max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
    runner = make_runner(
        model,
        block_size=config.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_memory=config.kv_memory,
        utilization=config.gpu_memory_utilization,
        on_progress=lambda share: report("warmup", share),
    )
    report("warmup", 1.0)
    report.close()
    log.info(
        "model loaded in %.1f s: %s on %s in %s, %d KV blocks of %d tokens",
        time.monotonic() - started,
        config.model,
        device,
        str(model.dtype).removeprefix("torch."),
        runner.num_blocks,
        config.block_size,
    )
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        context_length=model.config.context_length,
        vocab_size=model.config.vocab_size,
        end_of_text_id=model.config.end_of_text_id,
    )
    info = ModelInfo(
        folder=str(folder),
        context_length=model.config.context_length,
        vocab_size=model.config.vocab_size,
        end_of_text_id=model.config.end_of_text_id,
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=max_num_seqs,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
    )
    grammars = Grammars(lambda: read_tokenizer(folder), end_of_text_id=model.config.end_of_text_id)
    return Loaded(info, runner, scheduler, grammars.compile)


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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device: {name} was asked for, and this torch ({torch.__version__}) sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device: {name} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _read(folder: Path, config: EngineConfig, device: torch.device, report: Report) -> GPT2:
    report("load", 0.0)
    model_config = read_config(folder, vocab_size=len(read_tokenizer(folder).token_bytes))
    name = config.dtype
    if name == "auto":
        name = model_config.dtype if device.type == "cuda" else "float32"
    state = read_state(
        folder,
        model_config,
        dtype=getattr(torch, name),
        device=device,
        on_tensor=lambda done, total: report("load", done / total),
    )
    return GPT2(model_config, state)


Unusable = (CheckpointError, DeviceError, KernelError, KVMemoryError)  # what another try would not mend
