"""What lies where in a Megatron-LM checkpoint, and how its pieces join into a GPT-2's tensors. Used by convert.py.

The layouts: one file; a tree of mp_rank_TT[_PPP] folders; a folder of such trees by iteration; torch_dist. The names
are those of Megatron-LM 1.0 to core 0.16, with Megatron's own layers or with Transformer Engine's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from service.checkpoint import distributed, pickles
from service.checkpoint.errors import CheckpointError
from service.model.split import SPLIT_AT

if TYPE_CHECKING:
    import torch

LATEST = "latest_checkpointed_iteration.txt"
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
_OPTIMIZER_FILES = ("optim.pt", "distrib_optim.pt")
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
_ITERATION = re.compile(r"iter_\d{7,}|release")
_LAYER = re.compile(r"^layers\.(\d+)\.")
_VERSIONS = (0, 1.0, 2.0, 3.0)

# Within a layer: their name -> ours.
_OURS = {
    **dict.fromkeys(("input_layernorm", "input_norm"), "attention_norm"),
    **dict.fromkeys(("self_attention.linear_qkv.norm", "self_attention.layernorm_qkv.norm"), "attention_norm"),
    **dict.fromkeys(("attention.query_key_value", "self_attention.query_key_value"), "qkv"),
    **dict.fromkeys(("self_attention.linear_qkv", "self_attention.layernorm_qkv"), "qkv"),
    **dict.fromkeys(("attention.dense", "self_attention.dense"), "attention_output"),
    **dict.fromkeys(("self_attention.linear_proj", "self_attention.proj"), "attention_output"),
    **dict.fromkeys(("post_attention_layernorm", "post_attention_norm", "pre_mlp_layernorm"), "mlp_norm"),
    **dict.fromkeys(("mlp.linear_fc1.norm", "layernorm_mlp.norm"), "mlp_norm"),
    **dict.fromkeys(("mlp.dense_h_to_4h", "mlp.linear_fc1", "layernorm_mlp.fc1"), "up"),
    **dict.fromkeys(("mlp.dense_4h_to_h", "mlp.linear_fc2", "layernorm_mlp.fc2"), "down"),
}
_OURS_OUTSIDE = {
    "embedding.word_embeddings.weight": "token_embedding.weight",
    "embedding.position_embeddings.weight": "position_embedding.weight",
    **{f"final_{norm}.{kind}": f"final_norm.{kind}" for norm in ("layernorm", "norm") for kind in ("weight", "bias")},
    # The tied table again, where the last pipeline stage has no embedding of its own.
    **dict.fromkeys(("word_embeddings_for_head.weight", "output_layer.weight"), "head.weight"),
}
# Not weights: state of fp8, rotary tables, and what old files left beside them.
_SKIPPED = re.compile(r"(^|\.)(_extra_state(/|$)|rotary_pos_emb\.inv_freq$|attention\.(bias|masked_bias)$)")


class Weight(Protocol):
    """A tensor that is read only when it is wanted."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> torch.Tensor:
        """Perhaps a view of a mapped file: not to be written to. Raises CheckpointError."""


@dataclass(frozen=True, slots=True)
class Megatron:
    """An opened checkpoint."""

    where: str
    args: Mapping[str, Any]  # of the training run; empty where they were not saved
    version: float  # of the order of the rows of the query, key and value matrices
    family: str  # of its layers: core, transformer-engine (of the models before the core), or legacy
    # The pieces of each canonical name, one a tensor-parallel rank; layers are numbered through all pipeline stages.
    pieces: Mapping[str, Sequence[Weight]]

    def joined(self, name: str, *, num_heads: int) -> Weight:
        """The whole tensor of a canonical name; query, key and value in the order of hub.read_state's qkv."""
        pieces = self.pieces[name]
        stem = _LAYER.sub("", name)
        where = f"{self.where}: {name}"
        if stem.startswith("qkv."):
            return _JoinedQkv(pieces, where, self.version, num_heads)
        return _Joined(pieces, where, SPLIT_AT.get(stem))


# --- Finding the files -----------------------------------------------------------------------------------------------


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like one of Megatron-LM's, by the names in it."""
    names = {entry.name for entry in path.iterdir()}
    return bool(
        {LATEST, ".metadata", *RANK_FILES} & names
        or any(_RANK.match(name) or _ITERATION.fullmatch(name) for name in names)
    )


def iteration_folder(path: Path) -> Path:
    """The folder of the iteration that `path` names as its latest, or has alone; `path` itself if it is one."""
    if (path / LATEST).is_file():
        with (path / LATEST).open("rb") as file:
            word = file.read(64).decode("utf-8", "replace").strip()
        if word != "release" and not re.fullmatch(r"\d{1,12}", word):
            raise CheckpointError(f"{path / LATEST}: expected a number or `release`, found {word!r}")
        folder = path / ("release" if word == "release" else f"iter_{int(word):07d}")
        if not folder.is_dir():
            raise CheckpointError(f"{path / LATEST}: names {folder.name}, which is not there")
        return folder
    found = sorted(entry for entry in path.iterdir() if entry.is_dir() and _ITERATION.fullmatch(entry.name))
    if len(found) > 1:
        raise CheckpointError(f"{path}: has {found[0].name}, ..., {found[-1].name} and no {LATEST}: name one of them")
    return found[0] if found else path


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each (pipeline, tensor) rank. Raises CheckpointError where one is missing."""
    files: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("mp_rank_"):
            continue
        if not _has_rank_file(entry) and any((entry / name).is_file() for name in _OPTIMIZER_FILES):
            continue  # a distributed optimizer's, in folders of its own
        match = _RANK.fullmatch(entry.name)
        if match is None:
            raise CheckpointError(f"{entry}: expected mp_rank_TT or mp_rank_TT_PPP: experts are not for a GPT-2")
        rank = int(match[2] or 0), int(match[1])
        if rank in files:
            raise CheckpointError(f"{entry}: is the same rank as {files[rank].parent.name}")
        files[rank] = _rank_file(entry)
    if not files:
        raise CheckpointError(f"{folder}: has no mp_rank_00 with a model in it")
    num_pipeline, num_tensor = (1 + max(ranks) for ranks in zip(*files, strict=True))
    for rank in ((p, t) for p in range(num_pipeline) for t in range(num_tensor)):
        if rank not in files:
            raise CheckpointError(f"{folder}: tensor rank {rank[1]} of pipeline rank {rank[0]} is missing")
    return files


def _has_rank_file(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RANK_FILES)


def _rank_file(folder: Path) -> Path:
    for name in RANK_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: has neither {' nor '.join(RANK_FILES)}")


def checkpoint_files(path: Path) -> list[Path]:
    """The files that a checkpoint's tensors are read from. Raises CheckpointError."""
    if path.is_file():
        return [path]
    folder = iteration_folder(path)
    if (folder / ".metadata").is_file():
        return distributed.files(folder)
    if _has_rank_file(folder):
        return [_rank_file(folder)]
    if not any(entry.name.startswith("mp_rank_") for entry in folder.iterdir()):
        raise CheckpointError(f"{folder}: no checkpoint: has no mp_rank_00, {RANK_FILES[0]} or .metadata")
    return list(rank_files(folder).values())


# --- Opening them ----------------------------------------------------------------------------------------------------


def open_megatron(path: Path) -> Megatron:
    """Any of the layouts. Reads names and shapes, no weights. Raises CheckpointError."""
    files = checkpoint_files(path)
    folder = path if path.is_file() else iteration_folder(path)
    if files[0].parent == folder and (folder / ".metadata").is_file():
        args, tensors = distributed.open_folder(folder)
        return Megatron(str(path), _arguments(args), 3.0, "core", _pieces(str(folder), [[tensors]]))
    ranks = rank_files(folder) if files[0].parent.parent == folder else {(0, 0): files[0]}
    opened = {rank: _opened(file) for rank, file in ranks.items()}
    first = opened[0, 0]
    for rank, file in ranks.items():
        if opened[rank].get("checkpoint_version", 0) != first.get("checkpoint_version", 0):
            raise CheckpointError(f"{file}: checkpoint_version: not that of the other ranks")
    args, version = _arguments(first.get("args")), first.get("checkpoint_version", 0)
    if version not in _VERSIONS:
        raise CheckpointError(f"{files[0]}: checkpoint_version: expected one of {_VERSIONS}, found {str(version)[:40]}")
    num_tensor = 1 + max(tensor for _, tensor in ranks)
    num_pipeline = 1 + max(pipeline for pipeline, _ in ranks)
    for field, number in (
        ("tensor_model_parallel_size", num_tensor),
        ("model_parallel_size", num_tensor),
        ("pipeline_model_parallel_size", num_pipeline),
    ):
        if args.get(field) not in (None, number):
            raise CheckpointError(f"{path}: args: {field}: is {args[field]}, and there are {number} ranks")
    # Virtual pipeline: the first chunks of all ranks come before the second ones.
    chunks = [key for key in first if re.fullmatch(r"model\d*", str(key))]
    if not chunks:
        found = ", ".join(sorted(map(str, first)))[:200]
        raise CheckpointError(f"{files[0]}: has no model; found {found or 'nothing'}")
    stages = []
    for chunk in sorted(chunks, key=lambda key: int(key.removeprefix("model") or 0)):
        for pipeline in range(num_pipeline):
            stage = []
            for tensor in range(num_tensor):
                if chunk not in opened[pipeline, tensor]:
                    raise CheckpointError(f"{ranks[pipeline, tensor]}: has no {chunk}")
                stage.append(dict(_flat(opened[pipeline, tensor][chunk])))
            stages.append(stage)
    names = " ".join(stages[0][0])
    family = "core" if "linear_qkv" in names else "transformer-engine" if "layernorm_qkv" in names else "legacy"
    pieces = _pieces(str(path), stages)
    return Megatron(str(path), args, 3.0 if family == "core" else float(version), family, pieces)


def _opened(file: Path) -> dict[str, Any]:
    value = pickles.load(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a table with the model in it")
    return value


def _arguments(args: object) -> dict[str, Any]:
    if isinstance(args, pickles.Record):
        return args.attributes
    return dict(args) if isinstance(args, dict) else {}


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, Weight]]:
    """The tensors of nested tables, under names joined by dots."""
    if isinstance(value, pickles.StoredTensor):
        yield prefix, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))


def _pieces(where: str, stages: Sequence[Sequence[Mapping[str, Weight]]]) -> dict[str, list[Weight]]:
    """By canonical name, one a tensor rank, from each stage's tensors by rank."""
    pieces: dict[str, list[Weight]] = {}
    first_layer = 0
    for stage in stages:
        num_layers = 0
        named = [_canonical(where, rank) for rank in stage]
        for name in named[0]:
            if match := _LAYER.match(name):
                num_layers = max(num_layers, int(match[1]) + 1)
        for rank in named:
            if lacking := sorted(rank.keys() ^ named[0].keys()):
                raise CheckpointError(f"{where}: {lacking[0]}: not in all tensor-parallel ranks")
        for name in named[0]:
            match = _LAYER.match(name)
            ours = f"layers.{int(match[1]) + first_layer}.{name[match.end() :]}" if match else name
            found = [rank[name] for rank in named]
            if ours not in pieces:
                pieces[ours] = found
            elif ours in ("token_embedding.weight", "head.weight"):  # a copy, on the first and the last stage
                pieces.setdefault("head.weight", found)
            else:
                raise CheckpointError(f"{where}: {ours}: in more than one pipeline stage")
        first_layer += num_layers
    return pieces


def _canonical(where: str, tensors: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same tensors under our names, layers as they are numbered in the stage."""
    named: dict[str, Weight] = {}
    for theirs, tensor in tensors.items():
        if _SKIPPED.search(theirs):
            continue
        name = re.sub(r"^(module\.)*(model\.)?(language_model\.)?((encoder|transformer|decoder)\.)?", "", theirs)
        name = re.sub(r"\.layer_norm_(weight|bias)$", r".norm.\1", name)  # Transformer Engine's
        name = re.sub(r"\.(fc[12])_(weight|bias)$", r".\1.\2", name)
        ours = _OURS_OUTSIDE.get(name)
        if match := re.fullmatch(r"layers\.(\d{1,5})\.(.+)\.(weight|bias)", name):
            stem = _OURS.get(match[2])
            ours = stem and f"layers.{int(match[1])}.{stem}.{match[3]}"
        if ours is None:
            raise CheckpointError(f"{where}: {theirs}: {_why_unknown(name)}")
        if ours in named:
            raise CheckpointError(f"{where}: {theirs}: there twice")
        named[ours] = tensor
    return named


def _why_unknown(name: str) -> str:
    for part, reason in (
        ("expert", "experts; a GPT-2 has none"),
        ("router", "experts; a GPT-2 has none"),
        ("linear_q", "attention other than a GPT-2's"),
        ("q_layernorm", "norms of queries and keys; a GPT-2 has none"),
        ("k_layernorm", "norms of queries and keys; a GPT-2 has none"),
        ("tokentype", "token types; a GPT-2 has none"),
        ("inter_attention", "an encoder to attend to; a GPT-2 has none"),
        ("cross_attention", "an encoder to attend to; a GPT-2 has none"),
        ("adapter", "an adapter; merge it first"),
        ("lora", "an adapter; merge it first"),
    ):
        if part in name:
            return reason
    return "not a tensor of a GPT-2"


# --- Joining the pieces ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Joined:
    """The pieces of a tensor as one: joined at a dimension, or where that is None, each the whole."""

    pieces: Sequence[Weight]
    where: str
    dimension: int | None

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        if self.dimension is not None:
            shape[self.dimension] = sum(piece.shape[self.dimension] for piece in self.pieces)
        return tuple(shape)

    def read(self) -> torch.Tensor:
        import torch

        tensors = _read(self.pieces, self.where)
        if self.dimension is not None:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.dimension)
        for rank, tensor in enumerate(tensors):
            if not torch.equal(tensor, tensors[0]):
                raise CheckpointError(f"{self.where}: differs between tensor-parallel ranks 0 and {rank}")
        return tensors[0]


@dataclass(frozen=True, slots=True)
class _JoinedQkv:
    """Queries, keys and values, [3H, ...]: all queries by head, then keys, then values.

    Each rank has those of its own heads, in an order of rows that depends on the checkpoint's version. So each is put
    in order before they are joined.
    """

    pieces: Sequence[Weight]
    where: str
    version: float
    num_heads: int

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    def read(self) -> torch.Tensor:
        import torch

        ordered = []
        for tensor in _read(self.pieces, self.where):
            num_heads, rest = self.num_heads // len(self.pieces), tensor.shape[1:]
            if self.version == 0:
                tensor = tensor.view(3, num_heads, -1, *rest)
            elif self.version == 1.0:
                tensor = tensor.view(num_heads, -1, 3, *rest).movedim(2, 0)
            else:
                tensor = tensor.view(num_heads, 3, -1, *rest).movedim(1, 0)
            ordered.append(tensor)
        return torch.cat(ordered, 1).flatten(0, 2)


def _read(pieces: Sequence[Weight], where: str) -> list[torch.Tensor]:
    tensors = [piece.read() for piece in pieces]
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise CheckpointError(f"{where}: of other dtypes in other ranks")
    return [tensor.contiguous() for tensor in tensors]
