"""Writes one GPT-2 in every layout of Megatron-LM, from the layouts' descriptions alone: no code of the service."""

import json
import sys
import types
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

NUM_LAYERS, HIDDEN, NUM_HEADS, CONTEXT, VOCAB = 4, 32, 4, 64, 50257
HEAD = HIDDEN // NUM_HEADS


def random_model(activation: str = "gelu_new") -> GPT2LMHeadModel:
    """A small GPT-2 with GPT-2's vocabulary; biases and norms are no zeros and ones."""
    torch.manual_seed(11)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=NUM_LAYERS,
        n_head=NUM_HEADS,
        activation_function=activation,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is written."""

    version: float | None = 3.0  # None leaves the key out, which means 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual: int = 1  # chunks a pipeline rank
    names: str = "encoder"  # transformer, encoder, norm, te (legacy); local, core-te (core)
    with_args: bool = True
    dtype: torch.dtype = torch.float32
    old_pickle: bool = False
    extra_args: dict[str, Any] = field(default_factory=dict)

    @property
    def core(self) -> bool:
        return self.names in ("local", "core-te")


# stem -> (input norm, qkv, dense, post norm, h to 4h, 4h to h)
STEMS = {
    "transformer": "input_layernorm attention.query_key_value attention.dense post_attention_layernorm "
    "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "encoder": "input_layernorm self_attention.query_key_value self_attention.dense post_attention_layernorm "
    "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "norm": "input_norm self_attention.query_key_value self_attention.dense post_attention_norm "
    "mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "te": "self_attention.layernorm_qkv.layer_norm_ self_attention.layernorm_qkv self_attention.proj "
    "layernorm_mlp.layer_norm_ layernorm_mlp.fc1_ layernorm_mlp.fc2_",
    "local": "input_layernorm self_attention.linear_qkv self_attention.linear_proj pre_mlp_layernorm "
    "mlp.linear_fc1 mlp.linear_fc2",
    "core-te": "self_attention.linear_qkv.layer_norm_ self_attention.linear_qkv self_attention.linear_proj "
    "mlp.linear_fc1.layer_norm_ mlp.linear_fc1 mlp.linear_fc2",
}


def key(stem: str, kind: str) -> str:
    return stem + kind if stem.endswith("_") else f"{stem}.{kind}"


def qkv_rows(version: float | None, rank: int, num_ranks: int) -> list[int]:
    """Rows of transformers' c_attn (q, k, v by head) in the order in which a rank stores its own."""
    heads = range(rank * NUM_HEADS // num_ranks, (rank + 1) * NUM_HEADS // num_ranks)
    at = lambda s, h, d: s * HIDDEN + h * HEAD + d  # noqa: E731
    if not version:
        return [at(s, h, d) for s, h, d in product(range(3), heads, range(HEAD))]
    if version == 1.0:
        return [at(s, h, d) for h, d, s in product(heads, range(HEAD), range(3))]
    return [at(s, h, d) for h, s, d in product(heads, range(3), range(HEAD))]


def layer_of(state: dict[str, Tensor], layer: int, layout: Layout, rank: int) -> dict[str, Tensor]:
    """One rank's part of a layer under the layout's names, without the layer's number."""
    num, theirs = layout.tensor_parallel, f"transformer.h.{layer}."
    norm1, qkv, dense, norm2, up, down = STEMS[layout.names].split()
    rows = qkv_rows(3.0 if layout.core else layout.version, rank, num)
    part = slice(rank * HIDDEN // num, (rank + 1) * HIDDEN // num)
    inner = slice(rank * 4 * HIDDEN // num, (rank + 1) * 4 * HIDDEN // num)
    return {
        key(norm1, "weight"): state[theirs + "ln_1.weight"],
        key(norm1, "bias"): state[theirs + "ln_1.bias"],
        key(qkv, "weight"): state[theirs + "attn.c_attn.weight"].T[rows],
        key(qkv, "bias"): state[theirs + "attn.c_attn.bias"][rows],
        key(dense, "weight"): state[theirs + "attn.c_proj.weight"].T[:, part],
        key(dense, "bias"): state[theirs + "attn.c_proj.bias"],
        key(norm2, "weight"): state[theirs + "ln_2.weight"],
        key(norm2, "bias"): state[theirs + "ln_2.bias"],
        key(up, "weight"): state[theirs + "mlp.c_fc.weight"].T[inner],
        key(up, "bias"): state[theirs + "mlp.c_fc.bias"][inner],
        key(down, "weight"): state[theirs + "mlp.c_proj.weight"].T[:, inner],
        key(down, "bias"): state[theirs + "mlp.c_proj.bias"],
    }


def padded_table(state: dict[str, Tensor], num_ranks: int) -> Tensor:
    table = state["transformer.wte.weight"]
    rows = -(-VOCAB // (128 * num_ranks)) * 128 * num_ranks
    return torch.cat((table, torch.full((rows - VOCAB, HIDDEN), 7.0, dtype=table.dtype)))


def chunk_model(state: dict[str, Tensor], layout: Layout, rank: int, layers: range, *, first: bool, last: bool) -> Any:
    """The `model` of one rank and chunk: layers are numbered from 0 in it."""
    table = padded_table(state, layout.tensor_parallel).chunk(layout.tensor_parallel)[rank]
    body: dict[str, Any] = OrderedDict()
    for number, layer in enumerate(layers):
        for name, tensor in layer_of(state, layer, layout, rank).items():
            body[f"layers.{number}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        if layout.names in ("te", "core-te"):
            body[f"layers.{number}.self_attention._extra_state"] = None
    if last:
        final = "final_norm" if layout.names in ("te", "norm") else "final_layernorm"
        body[f"{final}.weight"] = state["transformer.ln_f.weight"]
        body[f"{final}.bias"] = state["transformer.ln_f.bias"]
    if layout.core:
        model = OrderedDict((f"decoder.{name}", tensor) for name, tensor in body.items())
        if first:
            model["embedding.word_embeddings.weight"] = table.clone()
            model["embedding.position_embeddings.weight"] = state["transformer.wpe.weight"]
        if last and not first:
            model["output_layer.weight"] = table.clone()
        return model
    language: dict[str, Any] = {}
    if first:
        language["embedding"] = {
            "word_embeddings": OrderedDict(weight=table.clone()),
            "position_embeddings": OrderedDict(weight=state["transformer.wpe.weight"]),
            "tokentype_embeddings": {},
        }
    language["transformer" if layout.names == "transformer" else "encoder"] = body
    model = {"language_model": language}
    if last and not first:
        model["word_embeddings_for_head"] = OrderedDict(weight=table.clone())
    return model


def arguments(layout: Layout) -> Namespace:
    """As a training run leaves them, enums of Megatron-LM's own among them."""
    fields = {
        "num_layers": NUM_LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": NUM_HEADS,
        "ffn_hidden_size": 4 * HIDDEN,
        "max_position_embeddings": CONTEXT,
        "padded_vocab_size": -(-VOCAB // (128 * layout.tensor_parallel)) * 128 * layout.tensor_parallel,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "bias_gelu_fusion": True,
        "openai_gelu": False,
        "layernorm_epsilon": 1e-5,
        "params_dtype": layout.dtype,
        "apply_query_key_layer_scaling": True,
        "attention_backend": _foreign("megatron.core.transformer.enums", "AttnBackend"),
        "group_query_attention": False,
        "num_query_groups": 1,
    }
    if layout.version != 3.0 and not layout.core:
        fields["model_parallel_size"] = fields.pop("tensor_model_parallel_size")
        del fields["pipeline_model_parallel_size"]
    return Namespace(**fields | layout.extra_args)


def _foreign(module: str, name: str) -> Any:
    """A member of an enum that is nowhere installed, so it must not be needed."""
    kind = Enum(name, {"auto": 5}, module=module)
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    setattr(sys.modules[module], name, kind)
    return kind["auto"]


def rank_value(model: GPT2LMHeadModel, layout: Layout, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
    """What one rank saves."""
    state = {name: tensor.to(layout.dtype) for name, tensor in model.state_dict().items()}
    value: dict[str, Any] = {"iteration": 7}
    if layout.version is not None:
        value["checkpoint_version"] = layout.version
    if layout.with_args:
        value["args"] = arguments(layout)
    count = NUM_LAYERS // (layout.pipeline_parallel * layout.virtual)
    for chunk in range(layout.virtual):
        start = (chunk * layout.pipeline_parallel + pipeline_rank) * count
        name = "model" if layout.virtual == 1 else f"model{chunk}"
        value[name] = chunk_model(
            state,
            layout,
            tensor_rank,
            range(start, start + count),
            first=pipeline_rank == 0 and chunk == 0,
            last=pipeline_rank == layout.pipeline_parallel - 1 and chunk == layout.virtual - 1,
        )
    # What a training run has beside the weights, and nobody needs.
    value["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}}
    value["rng_state"] = [{"random_rng_state": (3, (1, 2), None), "np_rng_state": np.random.RandomState(1).get_state()}]
    return value


def write_rank(
    model: GPT2LMHeadModel, layout: Layout, file: Path, tensor_rank: int = 0, pipeline_rank: int = 0
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    value = rank_value(model, layout, tensor_rank, pipeline_rank)
    torch.save(value, file, _use_new_zipfile_serialization=not layout.old_pickle)
    return file


def write_tree(model: GPT2LMHeadModel, layout: Layout, folder: Path) -> Path:
    """mp_rank_TT, or mp_rank_TT_PPP where there is a pipeline."""
    for tensor_rank, pipeline_rank in product(range(layout.tensor_parallel), range(layout.pipeline_parallel)):
        name = f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if layout.pipeline_parallel > 1 else "")
        write_rank(model, layout, folder / name / "model_optim_rng.pt", tensor_rank, pipeline_rank)
    return folder


def write_release_zip(model: GPT2LMHeadModel, layout: Layout, file: Path) -> Path:
    """As NVIDIA's archive: a tree named release, compressed."""
    folder = file.parent / "for-zip"
    write_tree(model, layout, folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def write_torch_dist(model: GPT2LMHeadModel, folder: Path, *, stacked: bool, names: str = "core-te") -> Path:
    """By torch.distributed.checkpoint, with Megatron-core's names and the files beside it."""
    import torch.distributed.checkpoint as dcp

    layout = Layout(names=names)
    state = chunk_model(dict(model.state_dict()), layout, 0, range(NUM_LAYERS), first=True, last=True)
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    if stacked:
        for name in [name for name in state if name.startswith("decoder.layers.0.")]:
            rest = name.removeprefix("decoder.layers.0.")
            layers = [state.pop(f"decoder.layers.{layer}.{rest}") for layer in range(NUM_LAYERS)]
            state[f"decoder.layers.{rest}"] = torch.stack(layers)
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(HIDDEN)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"args": arguments(replace(layout)), "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(about))
    return folder
