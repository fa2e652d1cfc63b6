"""A checkpoint of the 345M's shape with random weights: speed and parity are measured on it, without the real one."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from service.model.config import ModelConfig
from service.model.formats import Format
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


def given_or_demo(folder: Path | None) -> Path | None:
    """The folder; without one, the demo model on a CPU, and None on a GPU, for `given_or_random`."""
    return folder or (None if torch.cuda.is_available() else DEMO_MODEL)


@contextlib.contextmanager
def given_or_random(folder: Path | None) -> Iterator[Path]:
    """The folder; without one, a random model in bfloat16 on a GPU and float32 on a CPU, which goes in the end."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield write_random_model(Path(scratch), dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)


CONFIG_345M = ModelConfig(
    num_layers=24,
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


def gpt2_345m(
    make: Callable[[str, tuple[int, ...]], Tensor],
    *,
    num_layers: int,
    num_heads: int = 16,
    vocab_size: int = CONFIG_345M.vocab_size,
    weights: Format | None = None,
) -> GPT2:
    """The 345M's shape in `num_layers`, of tensors that `make` gives for a name and a shape."""
    config = replace(CONFIG_345M, num_layers=num_layers, num_heads=num_heads, vocab_size=vocab_size)
    config = replace(config, end_of_text_id=vocab_size - 1)
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, hidden),
        "position_embedding.weight": (config.context_length, hidden),
        "final_norm.weight": (hidden,),
        "final_norm.bias": (hidden,),
    }
    products = {"qkv": (3 * hidden, hidden), "attention_output": (hidden, hidden)}
    products |= {"up": (inner, hidden), "down": (hidden, inner)}
    for number in range(num_layers):
        for name in ("attention_norm", "mlp_norm"):
            shapes |= {f"layers.{number}.{name}.{part}": (hidden,) for part in ("weight", "bias")}
        for name, shape in products.items():
            shapes |= {f"layers.{number}.{name}.weight": shape, f"layers.{number}.{name}.bias": shape[:1]}
    return GPT2(config, {name: make(name, shape) for name, shape in shapes.items()}, weights)


def random_gpt2(*, weights: Format, device: str, num_layers: int = 24) -> GPT2:
    """The 345M's shape with random weights, straight on a device, in a format that is served there."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(name: str, shape: tuple[int, ...]) -> Tensor:
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        return (
            torch.empty(shape, device=device)
            .normal_(mean, 0.02, generator=generator)
            .to(weights.made_of or torch.float32)
        )

    return gpt2_345m(normal, num_layers=num_layers, weights=weights)
