"""torch.distributed.checkpoint's folders, as Megatron-core writes them (torch_dist). Used by megatron.py.

Read by the same restricted reader as all pickles: the library's own reader runs whatever .metadata names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.checkpoint import pickles
from service.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_NOT_MODEL = re.compile(r"^(optimizer|chained_|rng_state|opt_param_scheduler|rerun_state_machine|iteration|args)")
_MAX_LAYERS = 10_000
_STACKED = re.compile(r"^((?:.*\.)?layers)\.(?!\d)(.+)$")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A block of a tensor: where it starts in it, its sizes, and the file, the start and the bytes that it is in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int

    def read(self) -> torch.Tensor:
        where = f"{self.file}: bytes {self.start} to {self.start + self.num_bytes}"
        buffer = pickles.mapped(self.file)
        if self.start + self.num_bytes > len(buffer):
            raise CheckpointError(f"{where}: cut off")
        value = pickles.load_buffer(buffer[self.start : self.start + self.num_bytes], where)
        if not isinstance(value, pickles.StoredTensor) or value.shape != self.sizes:
            raise CheckpointError(f"{where}: not the tensor of shape {self.sizes} that .metadata promises")
        return value.read()


@dataclass(frozen=True, slots=True)
class _Sharded:
    """A tensor in blocks; `layer` is one index of its leading axis, where layers are stacked."""

    where: str
    dtype: str
    whole: tuple[int, ...]
    chunks: tuple[_Chunk, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole if self.layer is None else self.whole[1:]

    def read(self) -> torch.Tensor:
        import torch

        result = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        filled = torch.zeros(self.shape, dtype=torch.bool)
        for chunk in self.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if self.layer is not None:
                if not offsets[0] <= self.layer < offsets[0] + sizes[0]:
                    continue
                tensor = chunk.read()[self.layer - offsets[0]]
                offsets, sizes = offsets[1:], sizes[1:]
            else:
                tensor = chunk.read()
            if str(tensor.dtype) != f"torch.{self.dtype}":
                raise CheckpointError(f"{self.where}: a block is of {tensor.dtype}, not {self.dtype}")
            place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            if result[place].shape != tensor.shape or filled[place].any():
                raise CheckpointError(f"{self.where}: a block that is outside of it, or there twice")
            result[place], filled[place] = tensor, True
        if not filled.all():
            raise CheckpointError(f"{self.where}: its blocks do not make up the whole tensor")
        return result


def files(folder: Path) -> list[Path]:
    """All files of the folder that count. Raises CheckpointError."""
    found = [folder / ".metadata", *sorted(path for path in folder.glob("*.distcp") if path.is_file())]
    return [*found, *(folder / name for name in ("metadata.json", "common.pt") if (folder / name).is_file())]


def open_folder(folder: Path) -> tuple[object, dict[str, _Sharded]]:
    """The training run's args, if they are there, and the model's tensors by their names. Raises CheckpointError."""
    file = folder / ".metadata"
    metadata = pickles.load_plain(file)
    state = metadata.attributes if isinstance(metadata, pickles.Record) else {}
    described, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{file}: not the metadata of torch.distributed.checkpoint")
    try:
        places = {_place(index): _stored(folder, info) for index, info in stored.items()}
        tensors = {
            name: tensor
            for name, description in described.items()
            if not _NOT_MODEL.match(name) and (tensor := _tensor(file, name, description, places)) is not None
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not as torch.distributed.checkpoint writes it: {error!r:.200}") from error
    common = pickles.load(folder / "common.pt") if (folder / "common.pt").is_file() else {}
    args = common.get("args") if isinstance(common, dict) else None
    return args, dict(_by_layer(tensors))


def _place(index: pickles.Record) -> tuple[str, tuple[int, ...] | None]:
    """A MetadataIndex: the tensor's name and where the block starts."""
    state = index.attributes
    offset = state.get("offset")
    return state["fqn"], None if offset is None else _numbers(offset)


def _stored(folder: Path, info: pickles.Record) -> tuple[Path, int, int]:
    state = info.attributes
    name, start, num_bytes = state["relative_path"], state["offset"], state["length"]
    if not re.fullmatch(r"[\w-][\w.-]*\.distcp", name):
        raise CheckpointError(f"{folder / '.metadata'}: {name[:100]!r} is not the name of a file beside it")
    if state.get("transform_descriptors"):
        raise CheckpointError(f"{folder / name}: compressed; write it without")
    return folder / name, *_numbers((start, num_bytes))


def _tensor(
    file: Path, name: str, description: pickles.Record, places: Mapping[Any, tuple[Path, int, int]]
) -> _Sharded | None:
    """None for what is no tensor, such as the state of fp8."""
    state = description.attributes
    if "chunks" not in state:
        return None
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = (_numbers(chunk.attributes[key]) for key in ("offsets", "sizes"))
        chunks.append(_Chunk(offsets, sizes, *places[name, offsets]))
    properties = state["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    whole = _numbers(state["size"])
    if math.prod(whole) > 2**34 or (_STACKED.match(name) and not 0 < (*whole, 0)[0] < _MAX_LAYERS):
        raise CheckpointError(f"{file}: {name}: a shape of {whole}")
    return _Sharded(f"{file.parent}: {name}", dtype, whole, tuple(chunks))


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = tuple(value)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"expected sizes, found {numbers}")
    return numbers


def _by_layer(tensors: Mapping[str, _Sharded]) -> Iterator[tuple[str, _Sharded]]:
    """The same with a name for each layer: layers that are all alike may be stacked in one tensor."""
    for name, tensor in tensors.items():
        match = _STACKED.match(name)
        if match is None or not tensor.whole:
            yield name, tensor
            continue
        for layer in range(tensor.whole[0]):
            yield f"{match[1]}.{layer}.{match[2]}", replace(tensor, layer=layer)
