"""Rows for the sampler, as tensors and as plain numbers."""

import numpy as np
import torch
from torch import Tensor

from service.model.batch import Int32
from service.model.sampler import SamplingTensors


def tensors(num_rows: int, **given: object) -> SamplingTensors:
    """Defaults of a plain draw, with `given` columns; a scalar fills its column."""
    defaults: dict[str, object] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "choice": 0,
        "position": list(range(num_rows)),
        "may_end": True,
    }
    kinds = {
        "temperature": torch.float32,
        "top_p": torch.float32,
        "min_p": torch.float32,
        "may_end": torch.bool,
    }

    def column(name: str, value: object) -> Tensor:
        return torch.tensor(value, dtype=kinds.get(name, torch.int64)).expand(num_rows).clone()

    return SamplingTensors(**{name: column(name, value) for name, value in (defaults | given).items()})


def pack_mask(allowed: np.ndarray) -> Int32:
    """[R, ceil(V / 32)] words of [R, V] booleans, as Batch.masks has them."""
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), bool)
    padded[:, : allowed.shape[1]] = allowed
    return np.packbits(padded, axis=-1, bitorder="little").view(np.int32)
