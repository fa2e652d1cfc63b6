"""What the names in a pickle of torch.save's stand for: tensors still in their file, and Records. Used by pickles.py.

Whatever is not listed here has no meaning, and is refused.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

# Storage classes of torch and torch.cuda -> dtype, bytes an element.
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "UntypedStorage": ("uint8", 1),
}
_DTYPES = frozenset(dtype for dtype, _ in _STORAGES.values()) | {"half", "float", "double", "long", "int", "short"}
# Modules whose objects a training run leaves beside its weights: each is replaced by a Record, which does nothing.
_INERT = ("megatron", "fp16", "deepspeed", "apex", "transformer_engine", "numpy", "argparse", "modelopt")
_INERT_NAMES = frozenset(
    {
        ("types", "SimpleNamespace"),
        ("_io", "BytesIO"),
        ("_codecs", "encode"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("datetime", "timedelta"),
        ("signal", "Signals"),
        ("enum", "Enum"),
        ("torch", "device"),
        ("torch", "Tensor"),
        ("torch", "Generator"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.nn.modules.container", "ParameterDict"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
_INERT_PACKAGES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")


class Record:
    """What stands for an object of a class that is not loaded: what it was made of, and its attributes."""

    args: tuple[object, ...]
    items: list[object]
    state: Any

    def __new__(cls, *args: object, **kwargs: object) -> Self:  # a pickle may leave __init__ out
        record = super().__new__(cls)
        record.args, record.items, record.state = args, [], kwargs or None
        return record

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, item: object) -> None:
        self.items.append(item)

    add = append

    def extend(self, items: list[object]) -> None:
        self.items.extend(items)

    @property
    def attributes(self) -> dict[str, Any]:
        """By name; empty where the object had none of the usual kind."""
        state = self.state[1] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return dict(state) if isinstance(state, dict) else {}


def _refuse_state(_self: object, _state: object) -> None:
    """A pickle may make these, and not change them afterwards."""
    raise ValueError("a tensor with a state")


@dataclass(frozen=True, slots=True)
class Storage:
    """`num_bytes` bytes of numbers, from `start` on in the mapped file."""

    buffer: memoryview
    start: int
    num_bytes: int
    __setstate__ = _refuse_state


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that still lies in its file."""

    storage: Storage
    dtype: str
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    __setstate__ = _refuse_state

    def read(self) -> torch.Tensor:
        """A view of the file: read-only memory, which is not to be written to."""
        import torch

        if 0 in self.shape:
            return torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        storage = self.storage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory that is read-only
            data: Any = storage.buffer[storage.start : storage.start + storage.num_bytes]
            dtype = getattr(torch, self.dtype)
            if storage.start % dtype.itemsize:  # as in the old format, where pickles of any length come before
                data = bytearray(data)
            flat = torch.frombuffer(data, dtype=dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class StorageClass:
    dtype: str
    element_bytes: int
    __setstate__ = _refuse_state


def meaning(module: str, name: str) -> Any:
    """What a name in a pickle stands for here; None refuses it."""
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return StorageClass(*_STORAGES[name])
    if module == "torch" and (name in _DTYPES or name.startswith("float8_")):
        return name  # of a dtype
    if (known := _REBUILDING.get((module, name))) is not None:
        return known
    package = module.partition(".")[0]
    if package in _INERT or module in _INERT_PACKAGES or (module, name) in _INERT_NAMES:
        return Record
    return None


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: object) -> StoredTensor:
    data, kind = storage
    shape, stride = tuple(shape), tuple(stride)
    if not (isinstance(data, Storage) and isinstance(kind, StorageClass)):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor with a shape that is none")
    if math.prod(shape) * kind.element_bytes > data.num_bytes:
        raise ValueError("a tensor that is larger than its storage")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * kind.element_bytes > data.num_bytes:
        raise ValueError("a tensor that goes past its storage")
    return StoredTensor(data, kind.dtype, offset, shape, stride)


def _same(value: object, *_: object) -> object:
    return value


def _subclassed(rebuild: Any, _kind: object, arguments: Any, _state: object) -> Any:
    if rebuild not in (_tensor, _same):
        raise ValueError("a tensor of an unknown kind")
    return rebuild(*arguments)


def _member(owner: object, _name: object) -> Record:
    """getattr, by which Python 3.11.0 to 3.11.3 wrote the members of enums: of a class that is not loaded, a Record."""
    if owner is not Record:
        raise ValueError("getattr of something that is no enum")
    return Record()


_REBUILDING: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): Record,
    ("collections", "deque"): Record,
    **{
        (module, name): set if name == "set" else Record
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "dict", "tuple", "slice", "range", "bytearray", "complex")
    },
    ("builtins", "getattr"): _member,
    ("__builtin__", "getattr"): _member,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch._utils", "_rebuild_parameter_with_state"): _same,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclassed,
}
