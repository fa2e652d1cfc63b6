"""A GPT-2 small enough to be run a window at a time, by us and by transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from service.serve import DEMO_MODEL


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights, whose tokens are far from equally likely, and GPT-2's tokenizer and positions."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(7)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=1024, initializer_range=0.3))
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder
