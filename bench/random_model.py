"""A checkpoint of the 345M's shape with random weights: speed and parity are measured on it, without the real one."""

import shutil
from pathlib import Path

import torch
import transformers

from service.serve import DEMO_MODEL

SHAPE_345M = {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}


def write_random_model(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the checkpoint, with GPT-2's tokenizer, unless the folder has one; returns the folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE_345M))
        model.to(dtype).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(DEMO_MODEL / name, folder / name)
    return folder
