"""A GPT-2's tensors written as a folder of transformers, or as Megatron-LM's. Used by convert.py.

Weights are read one at a time, so no more than one is in memory, besides what a Megatron file is made of.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import layout
from service.checkpoint.megatron import LATEST, RANK_FILES, Weight
from service.model.config import ModelConfig
from service.model.split import MULTIPLE, SPLIT_AT, end_of, vocabulary_rows, what_does_not_split

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu", "tanh": "tanh"}
_LEGACY = {
    "attention_norm": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "attention_output": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_CORE = {
    "attention_norm": "input_layernorm",
    "qkv": "self_attention.linear_qkv",
    "attention_output": "self_attention.linear_proj",
    "mlp_norm": "pre_mlp_layernorm",
    "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}
OnTensor = Callable[[int, int], None]  # how many are done, of how many


# --- transformers ----------------------------------------------------------------------------------------------------


def write_hugging_face(
    folder: Path, config: ModelConfig, weights: Mapping[str, Weight], *, dtype: str | None, on_tensor: OnTensor
) -> None:
    """config.json and model.safetensors, without a tokenizer. `dtype` None keeps each tensor's own."""
    import torch

    plan: dict[str, tuple[str, tuple[int, ...], bool, str]] = {}  # by our name
    for theirs, (name, shape, transposed) in layout(config).items():
        if name not in plan:  # a tied head is
            stored_as = theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"
            plan[name] = stored_as, shape[::-1] if transposed else shape, transposed, dtype or weights[name].dtype
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for theirs, shape, _, its_dtype in plan.values():
        start, end = end, end + math.prod(shape) * getattr(torch, its_dtype).itemsize
        header[theirs] = {"dtype": _SAFETENSORS[its_dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for done, (name, (_, shape, transposed, its_dtype)) in enumerate(plan.items(), 1):
            tensor = _in(weights[name].read(), its_dtype)
            if name == "token_embedding.weight":
                tensor = tensor[: config.vocab_size]
            tensor = (tensor.T if transposed else tensor).contiguous()
            assert tuple(tensor.shape) == shape
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            on_tensor(done, len(plan))
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(_config_json(config, dtype), indent=2) + "\n")


def _config_json(config: ModelConfig, dtype: str | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "bos_token_id": config.end_of_text_id,
        "eos_token_id": config.end_of_text_id,
        "scale_attn_weights": config.scale_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        "reorder_and_upcast_attn": config.upcast_attention,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype or config.dtype,
    }


def copy_tokenizer(source: Path, folder: Path, *, context_length: int) -> None:
    """tokenizer.json, or vocab.json and merges.txt (also as NVIDIA names them), and a tokenizer_config.json."""
    for prefix in ("", "gpt2-"):
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            if (source / f"{prefix}{name}").is_file() and not (folder / name).exists():
                shutil.copyfile(source / f"{prefix}{name}", folder / name)
    about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context_length, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


# --- Megatron-LM -----------------------------------------------------------------------------------------------------


def write_megatron(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Weight],
    *,
    tensor_parallel: int,
    core: bool,
    dtype: str | None,
    on_tensor: OnTensor,
) -> None:
    """release/mp_rank_TT/model_optim_rng.pt for each rank, with args, and the file that names `release`.

    The names are Megatron-core's (of its own layers) with `core`, otherwise those of the models before it. Raises
    CheckpointError for what Megatron-LM has no field for, and for a split that does not come out even.
    """
    import torch

    _check_splits(config, tensor_parallel)
    args = _arguments(config, tensor_parallel=tensor_parallel, dtype=dtype or config.dtype)
    names = list(dict.fromkeys(name for name, _, _ in layout(config).values()))
    for rank in range(tensor_parallel):
        model: dict[str, Any] = {}
        for place, name in enumerate(names, 1):
            piece = _piece(name, weights[name], config, args["padded_vocab_size"], rank=rank, num_ranks=tensor_parallel)
            _put(model, name, _in(piece, dtype or weights[name].dtype).clone(), core=core)
            on_tensor(rank * len(names) + place, tensor_parallel * len(names))
        file = folder / "release" / f"mp_rank_{rank:02d}" / RANK_FILES[0]
        file.parent.mkdir(parents=True)
        saved = {"args": Namespace(**args, rank=rank), "checkpoint_version": 3.0, "iteration": 0, "model": model}
        torch.save(saved, file)
    (folder / LATEST).write_text("release")


def _check_splits(config: ModelConfig, tensor_parallel: int) -> None:
    if config.activation not in ("gelu", "gelu_tanh") or not config.scale_attention or config.scale_attention_by_layer:
        raise CheckpointError("activation_function, scale_attn_*: Megatron-LM's GPT has none of this kind")
    if not config.tie_word_embeddings:
        raise CheckpointError("tie_word_embeddings: an untied head is not written")
    if (what := what_does_not_split(config, tensor_parallel)) is not None:
        raise CheckpointError(f"--tensor-parallel: {what}")


def _arguments(config: ModelConfig, *, tensor_parallel: int, dtype: str) -> dict[str, Any]:
    """What Megatron-LM and the tools around it read from args."""
    import torch

    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "kv_channels": config.head_size,
        "max_position_embeddings": config.context_length,
        "seq_length": config.context_length,
        "orig_vocab_size": config.vocab_size,
        "padded_vocab_size": tensor_parallel * vocabulary_rows(config, tensor_parallel),
        "make_vocab_size_divisible_by": MULTIPLE,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "layernorm_epsilon": config.layer_norm_epsilon,
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "openai_gelu": False,
        "apply_query_key_layer_scaling": False,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "swiglu": False,
        "untie_embeddings_and_output_weights": False,
        "group_query_attention": False,
        "tokenizer_type": "GPT2BPETokenizer",
        "params_dtype": getattr(torch, dtype),
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _piece(name: str, weight: Weight, config: ModelConfig, padded_rows: int, *, rank: int, num_ranks: int) -> Tensor:
    """One rank's part of a tensor, in the order of Megatron's version 3."""
    import torch

    tensor, end = weight.read(), end_of(name)
    if end == "token_embedding.weight":
        tensor = tensor[: config.vocab_size]
        padding = tensor.new_zeros(padded_rows - len(tensor), tensor.shape[1])
        tensor = torch.cat((tensor, padding))
    elif end.startswith("qkv."):
        tensor = tensor.view(3, config.num_heads, config.head_size, *tensor.shape[1:]).movedim(1, 0)
        return tensor.chunk(num_ranks)[rank].flatten(0, 2)
    return tensor.chunk(num_ranks, SPLIT_AT[end])[rank] if end in SPLIT_AT else tensor


def _put(model: dict[str, Any], name: str, tensor: Tensor, *, core: bool) -> None:
    """Put a tensor where Megatron-LM looks for it."""
    embedding = {"token_embedding.weight": "word_embeddings", "position_embedding.weight": "position_embeddings"}
    stems = _CORE if core else _LEGACY
    match name.split("."):
        case ["layers", layer, stem, kind]:
            theirs = f"layers.{layer}.{stems[stem]}.{kind}"
        case ["final_norm", kind]:
            theirs = f"final_layernorm.{kind}"
        case _ if core:
            model[f"embedding.{embedding[name]}.weight"] = tensor
            return
        case _:
            tables = model.setdefault("language_model", {}).setdefault("embedding", {})
            tables.setdefault(embedding[name], {})["weight"] = tensor
            return
    if core:
        model[f"decoder.{theirs}"] = tensor
    else:
        model.setdefault("language_model", {}).setdefault("encoder", {})[theirs] = tensor


# --- Tensors ---------------------------------------------------------------------------------------------------------


def _in(tensor: Tensor, dtype: str) -> Tensor:
    import torch

    return tensor.to(getattr(torch, dtype))
