"""The head of one to 32 rows by a CUDA kernel: what it is compiled for, and how it is launched. Made by hopper.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.model.batch import SAMPLING_WORDS
from service.model.config import ModelConfig
from service.model.gpt2 import GPT2, LayerNorm
from service.model.kernels.cuda import chain
from service.model.kernels.cuda.chain import shared_memory
from service.model.kernels.cuda.compiler import Source, Target, compile_all
from service.model.kernels.record import MIN_LENGTH, TEMPERATURE

CHUNK = 128  # ids of what `scan_logits` would find; each block has whole ones
_TILE = 16  # rows of the head that are one copy
_THREADS = 256


@dataclass(frozen=True, slots=True)
class Ring:
    """Tiles of 32 KB that a block has under way."""

    stages: int = 4
    early: int = 2  # asked for before what they are multiplied by is there


_RING = Ring()


@dataclass(frozen=True, slots=True)
class HeadKernel:
    """Loaded, for so many rows of a model."""

    kernel: Any  # launch.Kernel
    num_blocks: int

    def __call__(
        self,
        x: Tensor,
        indices: Tensor,
        norm: LayerNorm,
        head: Tensor,
        logits: Tensor,
        records: Tensor,
        positions: Tensor,
        scanned: tuple[Tensor, ...],
        *,
        end_of_text_id: int,
        pdl: bool,
    ) -> None:
        """Logits fp32 [R, V'] of the `packed` head [V', H], and into `scanned` what `scan_logits` finds of each CHUNK.

        Of one row x [T, H] is the residual stream, which the kernel norms at `indices` [1]; of more [R, H] is normed.
        """
        self.kernel(
            (self.num_blocks, 1, 1),
            *(x, indices, norm.weight, norm.bias, head, logits, records, positions, *scanned),
            *(logits.stride(0), end_of_text_id, float(norm.epsilon)),
            pdl=pdl,
        )


def suits(model: GPT2) -> bool:
    """Whether the kernel can do that shape. Of a head in 8 bits it would read twice the bytes."""
    return chain.suits(model.config, model.dtype) and model.padded_head is not None and model.padded_head.narrow is None


def source(
    config: ModelConfig, dtype: torch.dtype, *, num_rows: int, most_blocks: int, ring: Ring = _RING
) -> tuple[Source, int]:
    """And how many blocks it is launched with."""
    chunks = -(-config.vocab_size // CHUNK)
    each = -(-chunks // most_blocks)  # of a block
    shape = {"TOKENS": num_rows, "K": config.hidden_size, "SIZE": config.vocab_size, "ROWS": ring.stages * _TILE}
    shape |= {"EARLY": ring.early, "CHUNK": CHUNK, "TILES": each * CHUNK // _TILE}
    shape |= {"WORDS": SAMPLING_WORDS, "TEMPERATURE": TEMPERATURE.value, "MIN_LENGTH": MIN_LENGTH.value}
    shape |= {"HALF": 1} if dtype == torch.float16 else {}
    return Source("head.cu", tuple(shape.items())), -(-chunks // each)


def load_heads(
    model: GPT2, sizes: Iterable[int], *, multiprocessors: int, folder: Path | None, ring: Ring = _RING
) -> dict[int, HeadKernel]:
    """By how many rows, on the current device. Raises CompilerError, ImportError, OSError, RuntimeError."""
    from service.model.kernels.cuda.launch import Kernel, driver_version  # cuda-bindings is only where CUDA is

    named = {
        num: source(model.config, model.dtype, num_rows=num, most_blocks=multiprocessors, ring=ring) for num in sizes
    }
    cubins = compile_all([each for each, _ in named.values()], Target("sm_90a", driver_version()), folder=folder)
    return {
        num: HeadKernel(Kernel(cubin, "head", threads=_THREADS, shared=shared_memory(each)), num_blocks)
        for (num, (each, num_blocks)), cubin in zip(named.items(), cubins, strict=True)
    }
