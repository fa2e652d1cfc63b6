"""service.checkpoint.hub: every layout of the weights, against transformers' own GPT-2."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch.nn.functional import (
    gelu,
    layer_norm,
    linear,
    relu,
    scaled_dot_product_attention,
    silu,
)

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config, read_state
from service.model.config import ModelConfig

Tensors = dict[str, torch.Tensor]
WriteFolder = Callable[..., Path]
MakeModel = Callable[..., Any]  # a GPT2LMHeadModel
LAYOUTS = ["safetensors", "sharded safetensors", "bin", "old bin", "sharded bin"]
IDS = torch.tensor([5, 299, 0, 17, 17, 123, 298, 1, 44])


def read(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensors:
    return read_state(folder, read_config(folder), dtype=dtype, **kwargs)


def logits(state: Tensors, config: ModelConfig) -> torch.Tensor:
    """GPT-2 on IDS, (tokens, vocab_size), in nothing but linear layers over the canonical tensors."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(
            x,
            (config.hidden_size,),
            state[f"{name}.weight"],
            state[f"{name}.bias"],
            config.layer_norm_epsilon,
        )

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
        "gelu": gelu,
        "relu": relu,
        "silu": silu,
        "tanh": torch.tanh,
    }
    activation = activations[config.activation]
    x = state["token_embedding.weight"][IDS] + state["position_embedding.weight"][: len(IDS)]
    for i in range(config.num_layers):
        qkv = project(norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.qkv")
        q, k, v = qkv.view(len(IDS), 3, config.num_heads, config.head_size).permute(1, 2, 0, 3)
        scale = 1 / math.sqrt(config.head_size) if config.scale_attention else 1.0
        scale = scale / (i + 1) if config.scale_attention_by_layer else scale
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).flatten(1)
        x = x + project(attended, f"layers.{i}.attention_output")
        x = x + project(
            activation(project(norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.up")),
            f"layers.{i}.down",
        )
    head = state["token_embedding.weight" if config.tie_word_embeddings else "head.weight"]
    return linear(norm(x, "final_norm"), head)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_models_own_tensors(
    layout: str, make_model: MakeModel, tensors: Tensors, write_folder: WriteFolder
) -> None:
    """Names, shapes, orientation and values, against the modules of transformers' model."""
    model = make_model().transformer
    expected = {
        "token_embedding.weight": model.wte.weight,
        "position_embedding.weight": model.wpe.weight,
        "final_norm.weight": model.ln_f.weight,
        "final_norm.bias": model.ln_f.bias,
    }
    for i, block in enumerate(model.h):
        expected |= {f"layers.{i}.attention_norm.{name}": p for name, p in block.ln_1.named_parameters()}
        expected |= {f"layers.{i}.mlp_norm.{name}": p for name, p in block.ln_2.named_parameters()}
        projections = {
            "qkv": block.attn.c_attn,
            "attention_output": block.attn.c_proj,
            "up": block.mlp.c_fc,
            "down": block.mlp.c_proj,
        }
        for name, projection in projections.items():
            expected[f"layers.{i}.{name}.weight"] = projection.weight.T
            expected[f"layers.{i}.{name}.bias"] = projection.bias
    state = read(write_folder(tensors, layout=layout))
    assert expected.keys() == state.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, state[name]), name
        as_stored = state[name].T if name.startswith("layers.") and tensor.ndim == 2 else state[name]
        assert as_stored.is_contiguous(), name
        assert torch.float32 == state[name].dtype, name
    assert all(tensor.is_contiguous() for tensor in read(write_folder(tensors, layout=layout), torch.bfloat16).values())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 24, "layer_norm_epsilon": 1e-2},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "relu"},
        {"activation_function": "swish"},
        {"activation_function": "tanh"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_config_and_tensors_together_give_transformers_logits(
    fields: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """What save_pretrained writes comes back as the same function, whichever of the config's switches is set."""
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
        found = logits(read_state(tmp_path, config, dtype=torch.float32), config)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_prefix_and_tied_head_are_optional(tensors: Tensors, write_folder: WriteFolder, make_model: MakeModel) -> None:
    """GPT2Model's names, the duplicate of a tied head, and the file where only the duplicate is left are one model."""
    expected = read(write_folder(tensors))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    duplicate = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    for variant in (bare, duplicate):
        torch.testing.assert_close(read(write_folder(variant)), expected, atol=0, rtol=0)
    folder = write_folder(tensors)
    save_model(make_model(), str(folder / "model.safetensors"))  # safetensors' own function keeps lm_head.weight only
    torch.testing.assert_close(read(folder), expected, atol=0, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_head_that_differs_is_refused(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """It would silently be another model."""
    head = tensors["transformer.wte.weight"].clone()
    head[7, 3] += 0.5
    folder = write_folder({**tensors, "lm_head.weight": head}, layout=layout)
    with pytest.raises(
        CheckpointError,
        match=r"tie_word_embeddings: lm_head\.weight must equal wte\.weight",
    ):
        read(folder)


def test_untied_head_is_kept_and_required(tensors: Tensors, write_folder: WriteFolder) -> None:
    """With tie_word_embeddings false the head is a tensor of its own."""
    head = torch.randn(300, 16)
    folder = write_folder({**tensors, "lm_head.weight": head}, tie_word_embeddings=False)
    assert torch.equal(head, read(folder)["head.weight"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        read(write_folder(tensors, tie_word_embeddings=False))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_published_files_leftovers_are_dropped(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """The published 345M: fp16 weights, causal masks as bytes, float scalars, the duplicated head, no dtype word."""
    expected = {name: tensor.half() for name, tensor in tensors.items()}
    published: Tensors = {}
    for name, tensor in expected.items():
        published[name] = tensor
        if name.endswith("attn.c_attn.weight"):
            published[name.replace("c_attn.weight", "bias")] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
            published[name.replace("c_attn.weight", "masked_bias")] = torch.tensor(-1e4)
    published["lm_head.weight"] = expected["transformer.wte.weight"].clone()
    folder = write_folder(published, layout=layout)
    assert "float16" == read_config(folder).dtype
    torch.testing.assert_close(
        read(folder, torch.float16),
        read(write_folder(expected), torch.float16),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [1, 47, 1023])
def test_padded_rows_are_cut_off(padding: int, tied: bool, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Rows beyond the tokenizer's ids are gone from both tables, not-a-numbers in them included; copies have none."""
    rows = 300 + padding
    padded = dict(tensors)
    padded["transformer.wte.weight"] = torch.cat(
        [tensors["transformer.wte.weight"], torch.full((padding, 16), torch.nan)]
    )
    padded["lm_head.weight"] = padded["transformer.wte.weight"].clone()
    folder = write_folder(padded, vocab_size=rows, tie_word_embeddings=tied)
    config = read_config(folder, vocab_size=300)
    assert 300 == config.vocab_size
    state = read_state(folder, config, dtype=torch.float32)
    copied = read_state(folder, config, dtype=torch.bfloat16)
    for name in ["token_embedding.weight"] + ["head.weight"] * (not tied):
        assert torch.equal(tensors["transformer.wte.weight"], state[name])
        assert 300 * 16 * 2 == copied[name].untyped_storage().nbytes()


def test_1024_rows_too_many_are_not_padding(tensors: Tensors, write_folder: WriteFolder) -> None:
    """Such a table belongs to another vocabulary."""
    padded = {**tensors, "transformer.wte.weight": torch.zeros(300 + 1024, 16)}
    with pytest.raises(
        CheckpointError,
        match=r"transformer\.wte\.weight: expected shape \(300, 16\).*\(1324, 16\)",
    ):
        read(write_folder(padded))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_converts_to_any(
    stored: torch.dtype,
    dtype: torch.dtype,
    layout: str,
    tensors: Tensors,
    write_folder: WriteFolder,
) -> None:
    """Values are rounded as torch rounds them; the config tells what was stored (64 bits count as 32)."""
    folder = write_folder(
        {name: tensor.to(stored) for name, tensor in tensors.items()},
        layout=layout,
        dtype="float16",
    )
    name = str(stored).removeprefix("torch.").replace("64", "32")
    assert name == read_config(folder).dtype
    state = read(folder, dtype)
    assert torch.equal(
        tensors["transformer.wpe.weight"].to(stored).to(dtype),
        state["position_embedding.weight"],
    )
    assert {dtype} == {tensor.dtype for tensor in state.values()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_state_outlives_its_file(dtype: torch.dtype, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Also where tensors stay in the file: one that is put in its place, or removed, changes nothing."""
    folder = write_folder(tensors)
    state = read(folder, dtype)
    write_folder({name: tensor + 1 for name, tensor in tensors.items()}).rename(folder.parent / "new")
    os.replace(folder.parent / "new" / "model.safetensors", folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert torch.equal(tensors["transformer.wpe.weight"].to(dtype), state["position_embedding.weight"])


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2]
)
def test_copies_have_nothing_of_the_file(
    stored: torch.dtype, dtype: torch.dtype, tensors: Tensors, write_folder: WriteFolder
) -> None:
    """Where a tensor is cast, or its matrices turned, writing over the mapped file changes nothing."""
    folder = write_folder({name: tensor.to(stored) for name, tensor in tensors.items()})
    state = read(folder, dtype)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\xff" * size)
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("shift", range(1, 9))
def test_tensors_may_lie_anywhere_in_a_file(
    shift: int, dtype: str, tensors: Tensors, write_folder: WriteFolder
) -> None:
    """A header of any length, also an odd one, by which no number lies where a processor likes it."""
    stored = {"F32": torch.float32, "F16": torch.float16}[dtype]
    folder = write_folder({name: tensor.to(stored) for name, tensor in tensors.items()})
    expected = {name: tensor.clone() for name, tensor in read(folder).items()}
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * shift
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    found = read(folder)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_state_equals_cpu_state(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """On a GPU: the same numbers, already there."""
    folder = write_folder(tensors, layout=layout)
    state = read(folder, torch.float16, device="cuda")
    assert {"cuda"} == {tensor.device.type for tensor in state.values()}
    expected = read(folder, torch.float16)
    assert all(torch.equal(expected[name], tensor.cpu()) for name, tensor in state.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_counts_every_tensor(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """From 1 to the number of tensors, in steps of one."""
    calls: list[tuple[int, int]] = []
    state = read(
        write_folder(tensors, layout=layout),
        on_tensor=lambda done, total: calls.append((done, total)),
    )
    assert [(done, len(state)) for done in range(1, len(state) + 1)] == calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.1.mlp.c_fc.bias",
        "transformer.wte.weight",
        "transformer.ln_f.bias",
    ],
)
def test_missing_tensor_is_named(name: str, layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Nothing is made up in its place."""
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"{name.removeprefix('transformer.')}: missing"):
        read(write_folder(tensors, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.2.ln_1.bias",
        "transformer.h.0.attn.q_norm.weight",
        "score.weight",
        "h.0.crossattention.bias",
    ],
)
def test_unknown_tensor_is_named(name: str, layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Also a layer more than the config says."""
    with pytest.raises(CheckpointError, match=rf"{name}: not a tensor of this model"):
        read(write_folder({**tensors, name: torch.zeros(16)}, layout=layout))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", (299, 16)),
        ("transformer.wte.weight", (300, 17)),
        ("transformer.wte.weight", ()),
        ("transformer.wpe.weight", (33, 16)),
        ("transformer.h.0.attn.c_attn.weight", (48, 16)),
        ("transformer.h.0.mlp.c_fc.weight", (16, 63)),
        ("transformer.h.0.ln_1.bias", (1, 16)),
        ("transformer.ln_f.weight", (15,)),
    ],
)
def test_wrong_shape_is_named(name: str, shape: tuple[int, ...], tensors: Tensors, write_folder: WriteFolder) -> None:
    """A linear layer's orientation where Conv1D's belongs counts as wrong, too few rows as well."""
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: expected shape"):
        read(write_folder({**tensors, name: torch.zeros(shape)}))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_tensors_that_are_not_floats_are_refused(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Quantized weights need their scales; read as numbers they would be noise."""
    name = "transformer.h.0.mlp.c_fc.weight"
    folder = write_folder({**tensors, name: tensors[name].to(torch.int8)}, layout=layout)
    with pytest.raises(CheckpointError, match=rf"{name}: not a dense floating-point tensor"):
        read(folder)


@pytest.mark.parametrize("value", [3.0, [1, 2], torch.eye(16).to_sparse()], ids=["float", "list", "sparse"])
def test_things_that_are_not_tensors_are_refused(value: Any, tensors: Tensors, write_folder: WriteFolder) -> None:
    """A .bin can hold more than tensors."""
    name = "transformer.h.0.attn.c_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: not a dense floating-point tensor"):
        read(write_folder({**tensors, name: value}, layout="bin"))


def test_values_beyond_float16_are_refused(tensors: Tensors, write_folder: WriteFolder) -> None:
    """They would become infinity; the tensor is named with the number, and other dtypes take it."""
    tensors["transformer.h.1.mlp.c_proj.weight"][3, 4] = -70000.0
    folder = write_folder(tensors)
    with pytest.raises(
        CheckpointError,
        match=r"h\.1\.mlp\.c_proj\.weight: 7e\+04 does not fit in float16",
    ):
        read(folder, torch.float16)
    assert -70000.0 == read(folder)["layers.1.down.weight"][4, 3]
    read(folder, torch.bfloat16)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, tensors: Tensors, write_folder: WriteFolder
) -> None:
    """A broken checkpoint is found at the start, not in the text."""
    tensors["transformer.h.0.ln_2.bias"][5] = value
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.ln_2\.bias: holds NaN or infinity"):
        read(write_folder(tensors), dtype)


def test_two_spellings_of_a_tensor_must_agree(tensors: Tensors, write_folder: WriteFolder) -> None:
    """With and without prefix in one file is ambiguous unless it is the same tensor."""
    with pytest.raises(CheckpointError, match=r"stored twice with different values$"):
        read(write_folder({**tensors, "h.0.ln_1.bias": torch.zeros(16)}))
