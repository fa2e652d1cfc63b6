"""Small random GPT-2s, as transformers makes them and as we read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from service.checkpoint.hub import read_config, read_state
from service.model.gpt2 import GPT2

Pair = tuple[transformers.GPT2LMHeadModel, GPT2]


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    """A transformers model of random weights (seed 0) and ours of the same, in fp32 on the CPU."""

    def make(**config: object) -> Pair:
        torch.manual_seed(0)
        sizes = {
            "n_layer": 3,
            "n_embd": 64,
            "n_head": 4,
            "n_positions": 128,
            "vocab_size": 515,
        } | config
        sizes |= {"bos_token_id": 1, "eos_token_id": 1}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        for name, parameter in theirs.named_parameters():
            if "bias" in name or "ln_" in name:  # transformers starts these at 0 and 1, which hides mistakes
                torch.nn.init.normal_(parameter, std=0.3)
        theirs.save_pretrained(tmp_path)
        ours = read_config(tmp_path)
        return theirs, GPT2(ours, read_state(tmp_path, ours, dtype=torch.float32))

    return make
