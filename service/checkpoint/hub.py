"""Hugging Face checkpoints: a folder's config, and its tensors under canonical names.

read_config is called where settings meet the model and needs no torch; read_state by the engine process.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from service.checkpoint import pickles
from service.checkpoint.errors import CheckpointError
from service.model.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# In transformers' order of preference: a folder is read from the first of these that it has.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PADDED_ROWS = 1024  # Megatron pads to a multiple of 128 x TP, TP <= 8: always fewer rows than this are padding
_VOCABULARY = ("wte.weight", "lm_head.weight")  # the tables with a row for each id, and perhaps padding
_LARGEST = 1 << 20  # of any size in a config; keeps a broken one from filling the memory with names

_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
    "tanh": "tanh",
}
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # safetensors' names
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}
_DTYPES |= {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float32"}
_DTYPES |= {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32", "float64": "float32"}


def weights_entry(names: Collection[str]) -> str | None:
    """The one of a folder's files that its weights are read from, or through; None if it has none."""
    return next((name for name in WEIGHTS if name in names), None)


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights, each with the tensors an index promises in it (None: no index). All exist."""
    entry = weights_entry([path.name for path in folder.iterdir()])
    if entry is None:
        raise CheckpointError(f"{folder}: no weights ({', '.join(WEIGHTS)})")
    index = folder / entry
    if index.suffix != ".json":
        return {index: None}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected a table from tensor names to files")
    suffix = "safetensors" if ".safetensors" in entry else "bin"
    shards: dict[Path, set[str] | None] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if not re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", shard):
            raise CheckpointError(f"{index}: weight_map: {shard!r} is not the name of a .{suffix} file beside it")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: {shard} is missing from the folder")
        shards[folder / shard] = {name for name, its_shard in weight_map.items() if its_shard == shard}
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


# --- config.json ----------------------------------------------------------------------------------------------------


def read_config(folder: Path, *, vocab_size: int | None = None) -> ModelConfig:
    """The config of a GPT-2 folder, with transformers' defaults for absent fields; needs no torch.

    `vocab_size` is the tokenizer's: the config's may exceed it by padding (fewer than 1,024 rows), which is cut off.
    Raises CheckpointError naming the field for anything that this service would have to ignore or guess.
    """
    path = folder / "config.json"
    config = _read_json(path)

    def refuse(name: str, expected: str) -> CheckpointError:
        found = json.dumps(config[name]) if name in config else "nothing"
        return CheckpointError(f"{path}: {name}: expected {expected}, found {found}")

    def size(name: str, default: int, other_name: str = "") -> int:
        name = other_name if name not in config and other_name in config else name
        value = config.get(name, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise refuse(name, f"a whole number from 1 to {_LARGEST:,}")
        return value

    def switch(name: str, default: bool) -> bool:
        value = config.get(name, default)
        if not isinstance(value, bool):
            raise refuse(name, "true or false")
        return value

    if config.get("model_type") != "gpt2":
        raise refuse("model_type", '"gpt2"')
    if switch("add_cross_attention", False):
        raise refuse("add_cross_attention", "false (there is no encoder to attend to)")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise refuse("activation_function", f"one of {', '.join(_ACTIVATIONS)}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise refuse("layer_norm_epsilon", "a number between 0 and 1")
    hidden_size, num_heads = size("n_embd", 768, "hidden_size"), size("n_head", 12, "num_attention_heads")
    if hidden_size % num_heads:
        raise CheckpointError(f"{path}: n_embd {hidden_size} is not divisible by n_head {num_heads}")
    rows = size("vocab_size", 50257)
    real = rows if vocab_size is None else vocab_size
    if not 0 <= rows - real < _PADDED_ROWS:
        raise CheckpointError(
            f"{path}: vocab_size {rows} does not go with the tokenizer's {real} ids"
            f" (expected as many, or up to {_PADDED_ROWS - 1} padding rows more)"
        )
    end_of_text = config.get("eos_token_id")
    if isinstance(end_of_text, list):
        end_of_text = end_of_text[0] if end_of_text else None
    end_of_text = 50256 if end_of_text is None else end_of_text
    if type(end_of_text) is not int or not 0 <= end_of_text < real:
        raise CheckpointError(f"{path}: eos_token_id: expected an id below {real}, found {json.dumps(end_of_text)}")
    return ModelConfig(
        num_layers=size("n_layer", 12, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size if config.get("n_inner") is None else size("n_inner", 0),
        context_length=size("n_positions", 1024, "max_position_embeddings"),
        vocab_size=real,
        layer_norm_epsilon=float(epsilon),
        activation=_ACTIVATIONS[activation],
        scale_attention=switch("scale_attn_weights", True),
        scale_attention_by_layer=switch("scale_attn_by_inverse_layer_idx", False),
        upcast_attention=switch("reorder_and_upcast_attn", False),
        tie_word_embeddings=switch("tie_word_embeddings", True),
        end_of_text_id=end_of_text,
        dtype=_dtype(folder, config),
    )


def _dtype(folder: Path, config: dict[str, Any]) -> str:
    """That of most stored numbers; where the files do not tell, the config's word, and float32 without one."""
    where, word = folder / "config.json", config.get("dtype") or config.get("torch_dtype") or "float32"
    file = next(iter(weight_files(folder))) if weights_entry([path.name for path in folder.iterdir()]) else None
    if file is not None and file.suffix == ".safetensors":
        counts: Counter[str] = Counter()
        with _opened(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - keys() is all it has of a dict
                counts[tensors.get_slice(name).get_dtype()] += math.prod(tensors.get_slice(name).get_shape())
        where, word = file, max(counts, key=counts.__getitem__, default=word)
    elif file is not None:
        # A pickle names the storage class of its first tensor near its start, in both of torch's file formats;
        # looking for the name runs nothing.
        with file.open("rb") as stream:
            found = re.search(rb"torch\n(Half|BFloat16|Float|Double)Storage\n", stream.read(1 << 16))
        where, word = (file, found[1].decode()) if found else (where, word)
    dtype = _DTYPES.get(str(word).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{where}: dtype: expected float16, bfloat16 or float32, found {word}")
    return dtype


# --- tensors --------------------------------------------------------------------------------------------------------


def read_state(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[int, int], None] | None = None,
    part: Callable[[str, Tensor], Tensor] | None = None,
    head_apart: bool = False,
) -> dict[str, Tensor]:
    """All weights in `dtype`, or their own, on `device`; read-only where they are not copies.

    On a CPU, asked for in fp32 or in their own, tensors lie in memory as they do in the file: Conv1D's matrices are
    transposed views, which are not contiguous, and what need not be cast stays in the file, mapped. fp32 products take
    a matrix either way round at the same speed. Anywhere else, and in 16 bits, all are contiguous copies. Each tensor
    has a mapping of its own, whose pages go with it: no more than one is in memory twice. Of each only `part(our name,
    tensor)` is read, and copied.

    Matrices are (out, in): token_embedding.weight (vocab_size, hidden), position_embedding.weight (context, hidden),
    layers.{i}.{attention_norm, qkv, attention_output, mlp_norm, up, down}.{weight, bias} with qkv's rows q then k then
    v, final_norm.{weight, bias}, and head.weight (vocab_size, hidden) if it is not tied. With `head_apart` also where
    it is tied and mapped, in a mapping of its own: once a product is made of it, of the embeddings only rows that are
    looked up are in memory. `on_tensor(done, total)` is called after each. Raises CheckpointError naming the file and
    the tensor that is unknown, missing, of a wrong shape or not finite.
    """
    import torch

    expected = layout(config)
    total = len({name for name, _, _ in expected.values()})
    state: dict[str, Tensor] = {}
    mapped_head: tuple[Path, str] | None = None
    for file, their_name, tensor in _stored(folder):
        where, name = f"{file}: {their_name}", their_name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            continue  # causal masks, which old releases stored among the weights
        if name not in expected:
            raise CheckpointError(f"{where}: not a tensor of this model")
        our_name, shape, transposed = expected[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(f"{where}: not a dense floating-point tensor")
        if name in _VOCABULARY and tensor.ndim > 0 and tensor.shape[0] - shape[0] < _PADDED_ROWS:
            tensor = tensor[: shape[0]]
        tensor = tensor.T if transposed and tensor.ndim == 2 else tensor
        if tensor.shape != shape:
            raise CheckpointError(f"{where}: expected shape {shape} (out, in), found {tuple(tensor.shape)}")
        if part is not None:
            tensor = part(our_name, tensor)
        wanted = dtype or tensor.dtype
        if part is None and dtype in (None, torch.float32) and torch.device(device).type == "cpu":
            value = tensor.to(wanted)
        else:  # transposed as stored: half the bytes
            value = torch.empty(tensor.shape, dtype=wanted, device=device).copy_(tensor.contiguous())
        # The bounds of what is not contiguous would be those of a copy.
        if not all(bound.isfinite() for bound in (value if value.is_contiguous() else value.T).aminmax()):
            raise CheckpointError(f"{where}: {_why_not_finite(tensor, value.dtype)}")
        if our_name in state and not torch.equal(state[our_name], value):
            tied = " (tie_word_embeddings: lm_head.weight must equal wte.weight)" if name in _VOCABULARY else ""
            raise CheckpointError(f"{where}: stored twice with different values{tied}")
        state[our_name] = value
        if our_name == "token_embedding.weight":
            is_mapped = value is tensor and file.suffix == ".safetensors"
            mapped_head = (file, their_name) if is_mapped and head_apart else None
        if on_tensor is not None:
            on_tensor(len(state), total)
    for their_name, (our_name, _, _) in expected.items():
        if our_name not in state:
            raise CheckpointError(f"{folder}: {their_name}: missing from the weights")
    if mapped_head is not None and config.tie_word_embeddings:
        file, their_name = mapped_head
        state["head.weight"] = state["token_embedding.weight"]
        again = next(tensor for name, tensor in _mapped(file, None) if name == their_name)
        state["token_embedding.weight"] = again[: config.vocab_size]
    return state


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Their name, without `transformer.`, in their order -> our name, our shape, whether theirs is transposed.

    Conv1D's matrices are (in, out). A tied head is the token embedding's second name, and comes last.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    expected: dict[str, tuple[str, tuple[int, ...], bool]] = {
        "wte.weight": ("token_embedding.weight", (config.vocab_size, hidden), False),
        "wpe.weight": ("position_embedding.weight", (config.context_length, hidden), False),
    }
    for i in range(config.num_layers):
        for theirs, ours, shape in (
            ("ln_1", "attention_norm", (hidden,)),
            ("attn.c_attn", "qkv", (3 * hidden, hidden)),
            ("attn.c_proj", "attention_output", (hidden, hidden)),
            ("ln_2", "mlp_norm", (hidden,)),
            ("mlp.c_fc", "up", (inner, hidden)),
            ("mlp.c_proj", "down", (hidden, inner)),
        ):
            expected[f"h.{i}.{theirs}.weight"] = (f"layers.{i}.{ours}.weight", shape, len(shape) == 2)
            expected[f"h.{i}.{theirs}.bias"] = (f"layers.{i}.{ours}.bias", shape[:1], False)
    expected["ln_f.weight"] = ("final_norm.weight", (hidden,), False)
    expected["ln_f.bias"] = ("final_norm.bias", (hidden,), False)
    # Stored or not, a tied head is the token embedding.
    head = "token_embedding.weight" if config.tie_word_embeddings else "head.weight"
    expected["lm_head.weight"] = (head, (config.vocab_size, hidden), False)
    return expected


def _stored(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """Every (file, name, value) of the folder's weights, mapped where the format can be."""
    for file, promised in weight_files(folder).items():
        if file.suffix == ".safetensors":
            for name, tensor in _mapped(file, promised):
                yield file, name, tensor
        else:
            values = _unpickled(file)
            _keep_promise(file, list(values), promised)
            for name, value in values.items():
                yield file, name, value.read() if isinstance(value, pickles.StoredTensor) else value


def _mapped(file: Path, promised: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file, each in a mapping of its own: the library's is of all of them at once."""
    import torch

    # What the library opens has a header without gaps, overlaps or anything out of bounds.
    with _opened(file, framework="pt") as tensors, file.open("rb") as stream:
        names = list(tensors.keys())
        _keep_promise(file, names, promised)
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
        for name in names:
            start, end = (8 + header_bytes + offset for offset in header[name]["data_offsets"])
            dtype = getattr(torch, _FLOATS.get(header[name]["dtype"], ""), None)
            if dtype is None or start == end or start % dtype.itemsize:
                yield name, tensors.get_tensor(name)
                continue
            first = start - start % mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(stream.fileno(), end - first, access=mmap.ACCESS_READ, offset=first)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of memory that is read-only
                flat = torch.frombuffer(mapping, dtype=dtype, offset=start - first)
            yield name, flat.view(header[name]["shape"])
            del mapping, flat  # here, or they stay until the next


def _keep_promise(file: Path, names: Collection[str], promised: set[str] | None) -> None:
    for name in sorted(set(names) ^ promised) if promised is not None else ():
        raise CheckpointError(f"{file}: {name}: in the {'shard' if name in names else 'index'} only")


@contextmanager
def _opened(file: Path, *, framework: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework=framework) as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors: {error}") from error


def _unpickled(file: Path) -> dict[str, Any]:
    """The tensors of a .bin, still in the file."""
    values = pickles.load(file)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{file}: expected a table of named tensors")
    return values


def _why_not_finite(tensor: Tensor, dtype: torch.dtype) -> str:
    largest = tensor.abs().max().item()
    if math.isfinite(largest):
        return f"{largest:.4g} does not fit in {str(dtype).removeprefix('torch.')}; use bfloat16 or float32"
    return "holds NaN or infinity"
