"""A checkpoint of the 345M's shape with random weights: speed and parity are measured on it, without the real one."""

import shutil
from pathlib import Path

import torch
import transformers

from service.model.config import ModelConfig
from service.model.gpt2 import GPT2
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


def random_gpt2(*, dtype: torch.dtype, device: str, num_layers: int = 24) -> GPT2:
    """The 345M's shape with random weights, straight on a device."""
    generator = torch.Generator(device).manual_seed(0)
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=1024,
        num_heads=16,
        intermediate_size=4096,
        context_length=1024,
        vocab_size=50257,
        layer_norm_epsilon=1e-5,
        activation="gelu_tanh",
        scale_attention=True,
        scale_attention_by_layer=False,
        upcast_attention=False,
        tie_word_embeddings=True,
        end_of_text_id=50256,
        dtype="float32",
    )

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(shape, device=device).normal_(mean, 0.02, generator=generator).to(dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"qkv": (3 * hidden, hidden), "attention_output": (hidden, hidden), "up": (inner, hidden)}
    shapes["down"] = (hidden, inner)
    state = {
        "token_embedding.weight": normal(config.vocab_size, hidden),
        "position_embedding.weight": normal(config.context_length, hidden),
        "final_norm.weight": normal(hidden, mean=1.0),
        "final_norm.bias": normal(hidden),
    }
    for number in range(num_layers):
        for name in ("attention_norm", "mlp_norm"):
            state[f"layers.{number}.{name}.weight"] = normal(hidden, mean=1.0)
            state[f"layers.{number}.{name}.bias"] = normal(hidden)
        for name, shape in shapes.items():
            state[f"layers.{number}.{name}.weight"] = normal(*shape)
            state[f"layers.{number}.{name}.bias"] = normal(shape[0])
    return GPT2(config, state)
