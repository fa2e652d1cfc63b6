"""service.checkpoint.hub: config.json, field by field, and the dtype of the stored tensors."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config
from service.model.config import ModelConfig

Tensors = dict[str, torch.Tensor]
WriteFolder = Callable[..., Path]
LAYOUTS = ["safetensors", "sharded safetensors", "bin", "old bin", "sharded bin"]


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., ModelConfig]:
    """read_config of a folder that has nothing but this config.json."""

    def config_of(fields: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
        return read_config(tmp_path, vocab_size=vocab_size)

    return config_of


def test_absent_fields_have_transformers_defaults(
    config_of: Callable[..., ModelConfig],
) -> None:
    """An almost empty config.json is GPT-2 small."""
    expected = ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        intermediate_size=3072,
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
    assert expected == config_of({})
    assert 64 == expected.head_size
    assert expected == config_of({"n_ctx": 77, "n_inner": None, "eos_token_id": None, "resid_pdrop": 0.5})


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"n_layer": 3}, {"num_layers": 3}),
        (
            {"n_embd": 60, "n_head": 4},
            {
                "hidden_size": 60,
                "num_heads": 4,
                "intermediate_size": 240,
                "head_size": 15,
            },
        ),
        (
            {"hidden_size": 60, "num_attention_heads": 4, "num_hidden_layers": 5},
            {"num_heads": 4, "num_layers": 5},
        ),
        ({"n_inner": 5}, {"intermediate_size": 5}),
        ({"n_positions": 64}, {"context_length": 64}),
        ({"layer_norm_epsilon": 1e-6}, {"layer_norm_epsilon": 1e-6}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"activation_function": "silu"}, {"activation": "silu"}),
        ({"scale_attn_weights": False}, {"scale_attention": False}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attention_by_layer": True}),
        ({"reorder_and_upcast_attn": True}, {"upcast_attention": True}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"eos_token_id": 7}, {"end_of_text_id": 7}),
        ({"eos_token_id": [8, 7]}, {"end_of_text_id": 8}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "float32"}, {"dtype": "float16"}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
    ],
    ids=str,
)
def test_fields_are_honoured(
    fields: dict[str, Any], found: dict[str, Any], config_of: Callable[..., ModelConfig]
) -> None:
    """Each field reaches its place in ModelConfig."""
    config = config_of(fields)
    assert found == {name: getattr(config, name) for name in found}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, 'model_type: expected "gpt2", found "llama"'),
        ({"model_type": None}, 'model_type: expected "gpt2", found null'),
        ({"add_cross_attention": True}, "add_cross_attention: expected false"),
        (
            {"activation_function": "mish"},
            'activation_function: expected one of .*found "mish"',
        ),
        ({"activation_function": ["gelu"]}, "activation_function: expected one of"),
        ({"n_embd": 770}, "n_embd 770 is not divisible by n_head 12"),
        ({"n_embd": "768"}, 'n_embd: expected a whole number.*found "768"'),
        ({"n_head": 0}, "n_head: expected a whole number.*found 0"),
        ({"n_layer": -1}, "n_layer: expected a whole number"),
        ({"n_layer": 2.0}, "n_layer: expected a whole number"),
        ({"n_layer": True}, "n_layer: expected a whole number"),
        (
            {"n_layer": 10**9},
            "n_layer: expected a whole number from 1 to 1,048,576, found 1000000000",
        ),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: expected a whole number"),
        ({"n_positions": None}, "n_positions: expected a whole number.*found null"),
        ({"n_inner": -4}, "n_inner: expected a whole number"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number"),
        (
            {"layer_norm_epsilon": 0},
            "layer_norm_epsilon: expected a number between 0 and 1, found 0",
        ),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon: expected a number"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: expected a number"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon: expected a number"),
        (
            {"scale_attn_weights": 1},
            "scale_attn_weights: expected true or false, found 1",
        ),
        (
            {"scale_attn_by_inverse_layer_idx": "false"},
            "scale_attn_by_inverse_layer_idx: expected true or false",
        ),
        (
            {"reorder_and_upcast_attn": None},
            "reorder_and_upcast_attn: expected true or false",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        (
            {"eos_token_id": 50257},
            "eos_token_id: expected an id below 50257, found 50257",
        ),
        ({"eos_token_id": "x"}, "eos_token_id: expected an id below 50257"),
        ({"eos_token_id": -1}, "eos_token_id: expected an id"),
        ({"vocab_size": 300}, "eos_token_id: expected an id below 300, found 50256"),
        (
            {"torch_dtype": "int8"},
            "dtype: expected float16, bfloat16 or float32, found int8",
        ),
    ],
    ids=str,
)
def test_fields_are_refused_by_name(
    fields: dict[str, Any], message: str, config_of: Callable[..., ModelConfig]
) -> None:
    """Nothing that changes the model is ignored; the error has the file, the field and what was found."""
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        config_of(fields)


@pytest.mark.parametrize("rows", [50257, 50304, 50432, 50688, 51200, 50257 + 1023])
def test_vocabulary_may_be_padded(rows: int, config_of: Callable[..., ModelConfig]) -> None:
    """Megatron's sizes for 1 to 8 ranks; the tokenizer's size is the real one."""
    assert 50257 == config_of({"vocab_size": rows}, vocab_size=50257).vocab_size
    assert rows == config_of({"vocab_size": rows}).vocab_size


@pytest.mark.parametrize("rows", [50256, 300, 50257 + 1024, 100000])
def test_other_vocabulary_is_refused_with_both_numbers(rows: int, config_of: Callable[..., ModelConfig]) -> None:
    """Too small cannot hold the tokenizer's ids; much larger is another tokenizer's."""
    with pytest.raises(
        CheckpointError,
        match=rf"vocab_size {rows} does not go with the tokenizer's 50257 ids",
    ):
        config_of({"vocab_size": rows}, vocab_size=50257)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\xff", b"[" * 100_000])
def test_broken_config_is_named(content: bytes, tmp_path: Path) -> None:
    """Absent, cut short, not an object, not text: the file's name is in the error."""
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_config(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_is_what_is_stored_not_what_the_config_says(
    layout: str, tensors: Tensors, write_folder: WriteFolder
) -> None:
    """All layouts tell it, pickles too; norms kept in 32 bits do not outvote the matrices."""
    norms = {name: tensor for name, tensor in tensors.items() if ".ln_" in name}
    stored = {**{name: tensor.bfloat16() for name, tensor in tensors.items()}, **norms}
    assert "bfloat16" == read_config(write_folder(stored, layout=layout, torch_dtype="float32")).dtype


def test_dtype_of_quantized_weights_is_refused(tensors: Tensors, write_folder: WriteFolder) -> None:
    """No dtype is invented for 8-bit tensors."""
    folder = write_folder(tensors)
    save_file(
        {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: dtype: expected float16.*found I8"):
        read_config(folder)


def test_config_needs_no_torch(write_folder: WriteFolder, tensors: Tensors) -> None:
    """Importing this package and reading a config loads no torch, from safetensors and from a pickle."""
    folders = [write_folder(tensors, layout=layout) for layout in ("safetensors", "bin")]
    script = (
        "import sys, pathlib; import service.checkpoint.download; from service.checkpoint.hub import read_config\n"
        "for folder in sys.argv[1:]: print(read_config(pathlib.Path(folder)).dtype)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ["float32", "float32", "[]"] == done.stdout.splitlines()
