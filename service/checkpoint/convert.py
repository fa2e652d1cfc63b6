"""One conversion: any checkpoint that is read here, into a folder of transformers or Megatron-LM's. Run by worker.py.

Raw files are opened here and nowhere else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.checkpoint import archive, export
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import layout, read_config, read_state, weight_files
from service.checkpoint.megatron import Megatron, Weight, checkpoint_files, open_megatron
from service.checkpoint.megatron_config import model_config
from service.checkpoint.tokenizer import read_tokenizer
from service.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

GPT2_TOKENIZER = Path(__file__).parents[1] / "demo" / "model"  # OpenAI's, byte for byte
Form = Literal["huggingface", "megatron", "megatron-core"]
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, and how."""

    source: str
    target: str  # a folder that is not there yet
    form: Form = "huggingface"
    dtype: str | None = None  # None keeps each tensor's own
    tensor_parallel: int = 1
    tokenizer: str | None = None  # a folder; None is the checkpoint's own, or GPT-2's
    num_heads: int | None = None


@dataclass(frozen=True, slots=True)
class _Opened:
    config: ModelConfig
    weights: Mapping[str, Weight]
    tokenizer: Path


def convert(job: Job, on_tensor: export.OnTensor, *, work: Path | None = None) -> None:
    """Write the target whole, or not at all; `work` is an empty folder beside it. Raises CheckpointError."""
    target = Path(job.target)
    if target.exists():
        raise CheckpointError(f"{target}: exists already; name a new folder")
    if job.form == "huggingface" and job.tensor_parallel > 1:
        raise CheckpointError("--tensor-parallel: is for trees of Megatron-LM's (--to megatron)")
    if work is None:
        with temporary_beside(target) as work:
            convert(job, on_tensor, work=work)
        return
    try:
        _convert(job, on_tensor, work)
    except (OSError, MemoryError):
        raise
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(work / "unpacked"), job.source)) from error
    except Exception as error:  # what no check has foreseen of a broken or hostile checkpoint
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{job.source}: not a checkpoint that can be read: {reason}") from error


def _convert(job: Job, on_tensor: export.OnTensor, work: Path) -> None:
    source, written = Path(job.source), work / "written"
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    written.mkdir()
    if source.is_file() and archive.is_release(source):
        (work / "unpacked").mkdir()
        archive.unpack(source, work / "unpacked")
        source = _checkpoint_in(source, work / "unpacked")
    opened = _open(job, source)
    if job.form == "huggingface":
        export.write_hugging_face(written, opened.config, opened.weights, dtype=job.dtype, on_tensor=on_tensor)
    else:
        export.write_megatron(
            written,
            opened.config,
            opened.weights,
            tensor_parallel=job.tensor_parallel,
            core=job.form == "megatron-core",
            dtype=job.dtype,
            on_tensor=on_tensor,
        )
    export.copy_tokenizer(opened.tokenizer, written, context_length=opened.config.context_length)
    os.replace(written, job.target)


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A folder beside the target, so that what is made in it can be moved there at once; removed in the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield folder
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def raw_files(source: Path) -> list[Path]:
    """All files that a conversion reads, a tokenizer beside them too. Raises CheckpointError."""
    folder = source if source.is_dir() else source.parent
    if (source / "config.json").is_file():
        files = [*weight_files(source), source / "config.json"]
    else:
        files = checkpoint_files(source)
    return files + [folder / name for names in _TOKENIZERS for name in names if (folder / name).is_file()]


def _checkpoint_in(file: Path, unpacked: Path) -> Path:
    """The folder of an unpacked archive that has the checkpoint: the highest one that is not alone in its parent."""
    folder = unpacked
    while True:
        entries = list(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name == "release":
            break
        if entries[0].name.startswith(("mp_rank_", "iter_")):
            break
        folder = entries[0]
    entries = list(folder.iterdir())
    if not entries:
        raise CheckpointError(f"{file}: an archive without a checkpoint")
    return entries[0] if len(entries) == 1 and entries[0].is_file() else folder


def _open(job: Job, source: Path) -> _Opened:
    if source.is_dir() and (source / "config.json").is_file():
        return _open_hugging_face(source, tokenizer=job.tokenizer)
    checkpoint = open_megatron(source)
    given = Path(job.tokenizer) if job.tokenizer else _tokenizer_beside(source)
    if job.tokenizer and not _has_tokenizer(Path(job.tokenizer)):
        raise CheckpointError(f"{job.tokenizer}: --tokenizer: has neither tokenizer.json nor vocab.json and merges.txt")
    ids, end_of_text = _tokenizer_ids(given) if given else (None, None)
    config = model_config(checkpoint, num_tokenizer_ids=ids, end_of_text_id=end_of_text, num_heads=job.num_heads)
    tokenizer = given or GPT2_TOKENIZER
    if given is None and config.vocab_size != _tokenizer_ids(GPT2_TOKENIZER)[0]:
        raise CheckpointError(f"{source}: a vocabulary of {config.vocab_size} ids is not GPT-2's: give its --tokenizer")
    return _Opened(config, _joined(checkpoint, config), tokenizer)


def _joined(checkpoint: Megatron, config: ModelConfig) -> dict[str, Weight]:
    """All tensors by canonical name, with the shapes that the config asks for."""
    weights = {name: checkpoint.joined(name, num_heads=config.num_heads) for name in checkpoint.pieces}
    expected = {name: shape for name, shape, _ in layout(config).values()}
    for name, weight in weights.items():
        if name not in (*expected, "head.weight"):
            raise CheckpointError(f"{checkpoint.where}: {name}: not a tensor of this model")
        if weight.dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise CheckpointError(f"{checkpoint.where}: {name}: of {weight.dtype}, which is no floating-point dtype")
        shape = expected.get(name, weight.shape)
        if name == "token_embedding.weight":
            shape = (weight.shape[0], shape[1])
        if weight.shape != shape:
            hint = "; a GPT-2's heads each have keys and values of their own" if ".qkv." in name else ""
            raise CheckpointError(f"{checkpoint.where}: {name}: expected shape {shape}, found {weight.shape}{hint}")
    if "head.weight" in weights:
        import torch

        size = config.vocab_size
        if not torch.equal(weights.pop("head.weight").read()[:size], weights["token_embedding.weight"].read()[:size]):
            raise CheckpointError(f"{checkpoint.where}: output_layer.weight: untied; a GPT-2's head is its embedding")
    return weights


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A weight that is in memory already."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        return self.tensor


def _open_hugging_face(folder: Path, *, tokenizer: str | None) -> _Opened:
    given = Path(tokenizer) if tokenizer else folder
    if not _has_tokenizer(given):
        raise CheckpointError(f"{given}: has neither tokenizer.json nor vocab.json and merges.txt: give a --tokenizer")
    config = read_config(folder, vocab_size=_tokenizer_ids(given)[0])
    state = read_state(folder, config, dtype=None)
    return _Opened(config, {name: _Loaded(tensor) for name, tensor in state.items()}, given)


def _tokenizer_beside(source: Path) -> Path | None:
    """The folder with a tokenizer's files: the checkpoint's own, or that of its file."""
    folder = source if source.is_dir() else source.parent
    return folder if _has_tokenizer(folder) else None


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


def _tokenizer_ids(folder: Path) -> tuple[int, int]:
    """How many ids a tokenizer has, and which is the end of text."""
    with tempfile.TemporaryDirectory() as copied:  # under the usual names
        export.copy_tokenizer(folder, Path(copied), context_length=0)
        files = read_tokenizer(Path(copied))
    ids = len(files.token_bytes)
    end_of_text = files.backend.token_to_id("<|endoftext|>")
    return ids, ids - 1 if end_of_text is None else end_of_text
