"""What of a model is computed in CUDA on its GPU, and what is said of the rest. Called by model/memory.py."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from service.model.formats import Narrowed
from service.model.gpt2 import GPT2
from service.model.kernels.cuda import chain, decode, head
from service.model.kernels.cuda.chain import BLOCKS, ChainKernels, load_chains
from service.model.kernels.cuda.compiler import CompilerError
from service.model.kernels.cuda.decode import DecodeKernels, load_decode
from service.model.kernels.cuda.head import HeadKernel, load_heads
from service.model.kernels.plan import Chain, Wide
from service.model.kernels.plans import CHAINS, CUDA_DECODES, WIDES
from service.model.parallel import ParallelGPT2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaKernels:
    """Loaded for a model and a block size; Triton's do what there is none for."""

    chains: Mapping[int, ChainKernels] = field(default_factory=dict)  # by how many tokens they are for
    decode: DecodeKernels | None = None
    heads: Mapping[int, HeadKernel] = field(default_factory=dict)  # by how many rows


def kernels_for(model: GPT2, sizes: Collection[int], *, block_size: int, folder: Path | None) -> CudaKernels:
    """Those of plans.py that can be had for `model` on its GPU. A line in the log says what cannot, and why.

    `sizes`: how many single tokens steps may have. `folder` keeps the code.
    """
    if not decode.suits(model):
        return CudaKernels()  # a chain, too, is of heads that it is for
    chains: dict[int, Chain | Wide] = {}
    if chain.suits(model.config, model.dtype):
        chains |= {num: CHAINS[num] for num in CHAINS if num in sizes}
        chains |= {num: WIDES[num] for num in WIDES if num in sizes}
    heads = [num for num in CHAINS if num in sizes] if head.suits(model) else []
    capability = torch.cuda.get_device_capability(model.device)
    if capability != (9, 0):
        log.info("no CUDA kernels: they are for Hopper GPUs (9.0), and this is of %d.%d", *capability)
        return CudaKernels()
    if isinstance(model, ParallelGPT2):
        log.info("no CUDA kernels: no model that is split over ranks has run with them")
        return CudaKernels()
    found = torch.cuda.get_device_properties(model.device).multi_processor_count
    if chains and model.cache_dtype != model.dtype:
        most = max(chains)
        log.info("no CUDA kernels of layers, which read no keys in 8 bits: up to %d streams take longer", most)
        chains = {}
    elif chains and found < BLOCKS:
        log.info("no CUDA kernels of layers, which are for %d multiprocessors, and here are %d", BLOCKS, found)
        chains = {}
    if chains and isinstance(model.format, Narrowed):
        log.info("layers of up to %d streams read weights in 16 bits, by CUDA kernels, not in 8", max(chains))
    try:
        return CudaKernels(
            load_chains(model.config, model.dtype, chains, block_size=block_size, folder=folder),
            load_decode(model, (shape for _, shape in CUDA_DECODES), block_size=block_size, folder=folder),
            load_heads(model, heads, multiprocessors=found, folder=folder),
        )
    except (CompilerError, ImportError, OSError, RuntimeError) as error:  # the last are the driver's
        log.warning("no CUDA kernels, Triton's instead: %s", error)
        return CudaKernels()
