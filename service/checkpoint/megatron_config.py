"""The model of a Megatron-LM checkpoint, by its args and shapes; what is no GPT-2 is refused. Used by convert.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from service.checkpoint.errors import CheckpointError
from service.checkpoint.megatron import Megatron
from service.model.config import ModelConfig

_GPT2_IDS = 50257
_LARGEST_PADDING = 1024  # rows: a multiple of 128 x tensor-parallel ranks, of which the largest runs had 8
_LAYER_TENSORS = [
    f"{stem}.{kind}"
    for stem in ("attention_norm", "qkv", "attention_output", "mlp_norm", "up", "down")
    for kind in ("weight", "bias")
]
_TABLE = "a GPT-2 has a table of positions"
# Fields of args that say that the model is no GPT-2: the name, when they do, and why not.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "position_embedding_type",
        lambda value: value not in (None, "learned_absolute"),
        _TABLE,
    ),
    ("use_rotary_position_embeddings", bool, _TABLE),
    ("add_position_embedding", lambda value: value is False, _TABLE),
    ("normalization", lambda value: value not in (None, "LayerNorm"), "a GPT-2 has LayerNorm"),
    ("apply_layernorm_1p", bool, "a GPT-2's norms are not around 1"),
    ("apply_residual_connection_post_layernorm", bool, "a GPT-2 adds what came before the norm"),
    ("swiglu", bool, "a GPT-2 has GELU"),
    ("squared_relu", bool, "a GPT-2 has GELU"),
    ("quick_geglu", bool, "a GPT-2 has GELU"),
    ("add_bias_linear", lambda value: value is False, "a GPT-2's layers have biases"),
    ("untie_embeddings_and_output_weights", bool, "a GPT-2's head is its token embedding"),
    ("multi_latent_attention", bool, "a GPT-2's heads each have keys and values of their own"),
    ("qk_layernorm", bool, "a GPT-2 has no norms of queries and keys"),
    ("num_experts", lambda value: value is not None, "a GPT-2 has no experts"),
    ("window_size", lambda value: value is not None, "a GPT-2 attends to all that came before"),
    ("softmax_type", lambda value: value not in (None, "vanilla"), "a GPT-2 has the plain softmax"),
    ("mtp_num_layers", bool, "a GPT-2 predicts one token"),
    ("hybrid_override_pattern", lambda value: value is not None, "a GPT-2's layers are all alike"),
)


def model_config(
    checkpoint: Megatron, *, num_tokenizer_ids: int | None, end_of_text_id: int | None, num_heads: int | None
) -> ModelConfig:
    """The sizes and switches; `num_heads` is needed where neither args nor the 345M's own shape tell it.

    The vocabulary is the tokenizer's, or args' orig_vocab_size, or GPT-2's 50,257 ids. Raises CheckpointError, with
    the field or the tensor that cannot be a GPT-2's.
    """
    where, args, pieces = checkpoint.where, checkpoint.args, checkpoint.pieces
    for field, is_refused, reason in _REFUSED:
        if is_refused(args.get(field)):
            raise CheckpointError(f"{where}: args: {field}: is {_shown(args[field])}: {reason}")
    num_layers = 1 + max(
        (int(match[1]) for name in pieces if (match := re.match(r"layers\.(\d+)\.", name))), default=-1
    )
    _check_complete(where, pieces, num_layers)
    shapes = {
        name: checkpoint.joined(name, num_heads=1).shape
        for name in ("token_embedding.weight", "position_embedding.weight", "layers.0.up.weight")
    }
    for name, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{where}: {name}: expected a matrix, found {shape}")
    rows, hidden_size = shapes["token_embedding.weight"]
    intermediate_size = shapes["layers.0.up.weight"][0]
    context_length = shapes["position_embedding.weight"][0]
    if intermediate_size == 2 * _number(args, "ffn_hidden_size", 0):
        raise CheckpointError(f"{where}: layers.0.up.weight: twice args' ffn_hidden_size: gated; a GPT-2 has GELU")
    for field, found in (
        ("num_layers", num_layers),
        ("hidden_size", hidden_size),
        ("ffn_hidden_size", intermediate_size),
        ("max_position_embeddings", context_length),
        ("padded_vocab_size", rows),
    ):
        if _number(args, field, found) != found:
            raise CheckpointError(f"{where}: args: {field}: is {_shown(args[field])}, and the tensors have {found}")
    heads = _num_heads(where, args, given=num_heads, hidden_size=hidden_size, num_layers=num_layers)
    if heads % (num_ranks := len(pieces["layers.0.qkv.weight"])):
        raise CheckpointError(f"{where}: {heads} attention heads do not split over {num_ranks} tensor-parallel ranks")
    vocab_size = _vocab_size(where, args, rows=rows, num_tokenizer_ids=num_tokenizer_ids)
    epsilon = args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5))
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise CheckpointError(f"{where}: args: layernorm_epsilon: expected a small number, found {_shown(epsilon)}")
    dtype = checkpoint.joined("layers.0.qkv.weight", num_heads=heads).dtype
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=heads,
        intermediate_size=intermediate_size,
        context_length=context_length,
        vocab_size=vocab_size,
        layer_norm_epsilon=epsilon,
        activation=_activation(checkpoint.family, args),
        scale_attention=True,
        scale_attention_by_layer=False,  # query-key layer scaling cancels out
        upcast_attention=False,
        tie_word_embeddings=True,
        end_of_text_id=vocab_size - 1 if end_of_text_id is None else end_of_text_id,
        dtype="float32" if dtype == "float64" else dtype,
    )


def _check_complete(where: str, pieces: Mapping[str, Any], num_layers: int) -> None:
    if "position_embedding.weight" not in pieces:
        raise CheckpointError(f"{where}: has no table of positions (rotary or none); a GPT-2 has one")
    if num_layers == 0:
        raise CheckpointError(f"{where}: has no layers")
    expected = ["token_embedding.weight", "final_norm.weight", "final_norm.bias"]
    expected += [f"layers.{layer}.{tensor}" for layer in range(num_layers) for tensor in _LAYER_TENSORS]
    for name in expected:
        if name in pieces:
            continue
        if name.endswith(".bias") and name.removesuffix("bias") + "weight" in pieces:
            norm = " (RMSNorm)" if "norm" in name else ""
            raise CheckpointError(f"{where}: {name}: missing{norm}; a GPT-2's norms and layers have biases")
        raise CheckpointError(f"{where}: {name}: missing")


def _num_heads(where: str, args: Mapping[str, Any], *, given: int | None, hidden_size: int, num_layers: int) -> int:
    if given is not None and given < 1:
        raise CheckpointError(f"--num-heads: must be at least 1, and is {given}")
    found = _number(args, "num_attention_heads", 0) or given
    if not found and (hidden_size, num_layers) == (1024, 24):
        found = 16  # NVIDIA's 345M, whose release has no args
    if not found:
        raise CheckpointError(
            f"{where}: has no args that tell the number of attention heads: give --num-heads to `convert`"
        )
    if given is not None and given != found:
        raise CheckpointError(f"{where}: args: num_attention_heads: is {found}, not the {given} that were asked for")
    if hidden_size % found or _number(args, "kv_channels", hidden_size // found) * found != hidden_size:
        raise CheckpointError(f"{where}: {found} attention heads do not share a width of {hidden_size} as a GPT-2's do")
    groups = _number(args, "num_query_groups", found)
    if args.get("group_query_attention") and groups != found:
        raise CheckpointError(f"{where}: args: num_query_groups: is {groups}, fewer than the {found} heads")
    return found


def _vocab_size(where: str, args: Mapping[str, Any], *, rows: int, num_tokenizer_ids: int | None) -> int:
    named = _number(args, "orig_vocab_size", 0) or None
    if named and num_tokenizer_ids and named != num_tokenizer_ids:
        message = f"is {named}, and the tokenizer has {num_tokenizer_ids} ids"
        raise CheckpointError(f"{where}: args: orig_vocab_size: {message}")
    size = num_tokenizer_ids or named or _GPT2_IDS
    multiple = _number(args, "make_vocab_size_divisible_by", 1) * _number(args, "tensor_model_parallel_size", 1)
    if not 0 <= rows - size < max(_LARGEST_PADDING, multiple):
        raise CheckpointError(
            f"{where}: token_embedding.weight: has {rows} rows for {size} ids, and some padding was expected at most:"
            " give its --tokenizer to `megatron-gpt2 convert`"
        )
    return size


def _activation(family: str, args: Mapping[str, Any]) -> str:
    """Fused and `openai` GELU are the tanh form, which is also that of files without args, as is Transformer Engine's.

    The core has no use for openai_gelu.
    """
    fused, openai = args.get("bias_gelu_fusion"), args.get("openai_gelu")
    if family == "transformer-engine" or args.get("use_te_activation_func"):
        return "gelu_tanh"
    if family == "core":
        return "gelu" if fused is False else "gelu_tanh"
    return "gelu" if (fused, openai) != (None, None) and not fused and not openai else "gelu_tanh"


def _number(args: Mapping[str, Any], field: str, default: int) -> int:
    value = args.get(field)
    return value if type(value) is int and value > 0 else default


def _shown(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else "something else"
