"""torch.save's files, read without running anything they name: both of its formats. Used by megatron.py and hub.py.

Tensors stay in the mapped file until they are asked for. Formats: torch.serialization of torch 0.4 to 2.x.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.checkpoint.errors import CheckpointError
from service.checkpoint.pickled import Record, Storage, StorageClass, StoredTensor, meaning

__all__ = ["Record", "StoredTensor", "load", "load_buffer", "load_plain", "mapped"]

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LARGEST_PICKLE = 64 * 2**20  # bytes of one pickle: it holds no numbers, so a 345M's has well under one MiB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, then the lengths of its name and extra field


def load(file: Path) -> Any:
    """What torch.save wrote to `file`: plain values, StoredTensors, and Records for the objects it may name.

    Raises CheckpointError for any other format, for a class or function that is not on the list, for a part that is
    cut off, compressed or out of bounds.
    """
    return load_buffer(mapped(file), str(file))


def load_plain(file: Path) -> Any:
    """The same of a file that is one pickle without tensors."""
    return _told(lambda: _plain(_Reader(mapped(file)), str(file)), str(file), "a pickle")


def mapped(file: Path) -> memoryview:
    """The bytes of a file, read as they are used. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def load_buffer(buffer: memoryview, where: str) -> Any:
    """`load` of a part of a mapped file; `where` is named in errors."""
    load_format = _load_zip if bytes(buffer[:4]) == b"PK\3\4" else _load_legacy
    return _told(lambda: load_format(buffer, where), where, "a file of torch.save")


def _told(work: Callable[[], Any], where: str, what: str) -> Any:
    """What `work` returns. Whatever broken or hostile bytes lead the unpickler to becomes a CheckpointError."""
    try:
        return work()
    except CheckpointError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
        raise CheckpointError(f"{where}: not readable as {what}: {reason}") from error


# --- The two formats -------------------------------------------------------------------------------------------------


def _load_zip(buffer: memoryview, where: str) -> Any:
    """Since torch 1.6: a zip without compression, with a pickle and a member for each storage."""
    with zipfile.ZipFile(_Reader(buffer)) as archive:
        members = {}
        for member in archive.infolist():
            if member.filename in members:
                raise CheckpointError(f"{where}: {member.filename}: twice in the archive")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise CheckpointError(f"{where}: {member.filename}: compressed or encrypted; torch.save does neither")
            members[member.filename] = member
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{where}: an archive without torch.save's data.pkl")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> tuple[int, int]:
        member = members.get(root + name)
        if member is None:
            raise CheckpointError(f"{where}: {root}{name} is missing")
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(buffer, member.header_offset)
        start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != b"PK\3\4" or start + member.file_size > len(buffer):
            raise CheckpointError(f"{where}: {root}{name}: cut off")
        return start, member.file_size

    if root + "byteorder" in members:
        start, size = content("byteorder")
        if bytes(buffer[start : start + size]) != b"little":
            raise CheckpointError(f"{where}: of a big-endian machine")

    def storage(key: str, num_bytes: int) -> Storage:
        start, size = content(f"data/{key}")
        if size < num_bytes:
            raise CheckpointError(f"{where}: {root}data/{key}: has {size} bytes of {num_bytes}")
        return Storage(buffer, start, num_bytes)

    start, size = content("data.pkl")
    if size > _LARGEST_PICKLE:
        raise CheckpointError(f"{where}: a pickle of {size} bytes")
    data = bytes(buffer[start : start + size])
    _checked(io.BytesIO(data), where)
    return _Unpickler(io.BytesIO(data), storage, where).load()


def _load_legacy(buffer: memoryview, where: str) -> Any:
    """Before torch 1.6: pickles one after the other, then the bytes of each storage behind their count."""
    stream = _Reader(buffer)
    head = [_plain(stream, where) for _ in range(3)]
    if head[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise CheckpointError(f"{where}: not a file of torch.save")
    if isinstance(head[2], dict) and head[2].get("little_endian") is False:
        raise CheckpointError(f"{where}: of a big-endian machine")
    start = stream.tell()
    sizes = _checked(stream, where)  # the storages' places are known only behind the pickle
    keys = _plain(stream, where)
    if not isinstance(keys, list) or {str(key) for key in keys} != sizes.keys():
        raise CheckpointError(f"{where}: its list of storages is not that of its tensors")
    places: dict[str, int] = {}
    place = stream.tell()
    for key in map(str, keys):
        if place + 8 + sizes[key] > len(buffer):
            raise CheckpointError(f"{where}: cut off in the storage {key}")
        places[key] = place + 8
        place += 8 + sizes[key]
    stream.seek(start)
    return _Unpickler(stream, lambda key, num_bytes: Storage(buffer, places[key], num_bytes), where).load()


class _Reader(io.RawIOBase):
    """A mapped file, as a stream that copies nothing it is not asked for."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, len(self._buffer))[whence]
        if self._place < 0:
            raise OSError("before the start of the file")
        return self._place

    def readinto(self, target: Any) -> int:
        piece = self._buffer[self._place : self._place + len(target)]
        target[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def peek(self, num_bytes: int) -> bytes:
        """What pickle would read next: without it, it reads a byte at a time."""
        return bytes(self._buffer[self._place : self._place + num_bytes])

    def readline(self, size: int | None = -1, /) -> bytes:
        for step in (256, 65_536):  # the longest line a pickle may have here
            line, newline, _ = bytes(self._buffer[self._place : self._place + step]).partition(b"\n")
            if newline:
                break
        self._place += len(line) + len(newline)
        return line + newline


# --- The pickle ------------------------------------------------------------------------------------------------------


def _checked(stream: Any, where: str) -> dict[str, int]:
    """Read a pickle with all of its names replaced, so that nothing is called; its storages' sizes, in bytes, by key.

    Raises CheckpointError for names that mean nothing here.
    """
    start = stream.tell()
    for opcode, argument, place in pickletools.genops(stream):
        # The memo is an array, so a number out of nowhere takes that much memory.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= place - start + 256:
            raise CheckpointError(f"{where}: a pickle that no pickler writes")
    stream.seek(start)
    names = _Names(stream)
    names.load()
    if refused := sorted(f"{module}.{name}" for module, name in names.found if meaning(module, name) is None):
        listed = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
        raise CheckpointError(f"{where}: names {listed}, for which a checkpoint has no use; nothing of it was run")
    return names.storages


def _plain(stream: Any, where: str) -> Any:
    """One pickle without tensors."""
    start = stream.tell()
    if _checked(stream, where):
        raise CheckpointError(f"{where}: tensors where torch.save writes none")
    stream.seek(start)
    return _Unpickler(stream, lambda _key, _num_bytes: Storage(memoryview(b""), 0, 0), where).load()


class _Names(pickle.Unpickler):
    """Finds the names and the storages in a pickle."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, encoding="latin1")
        self.found: set[tuple[str, str]] = set()
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        self.found.add((module, name))
        found = meaning(module, name)
        return found if isinstance(found, StorageClass) else Record

    def persistent_load(self, pid: Any) -> Record:
        key, num_bytes = _storage_of(pid)[1:]
        self.storages[key] = max(num_bytes, self.storages.get(key, 0))
        return Record()


def _storage_of(pid: Any) -> tuple[StorageClass, str, int]:
    """The kind of a storage, its key and its size in bytes, from the reference that torch.save writes."""
    match pid:
        case ("storage", StorageClass() as kind, str() | int() as key, _, int() as count, *rest) if count >= 0:
            if rest in ([], [None]):
                return kind, str(key), count * kind.element_bytes
            raise ValueError("a storage within another, which only torch 0.3 wrote")
    raise ValueError("a reference that is no tensor's")


class _Unpickler(pickle.Unpickler):
    """Reads with the names of `meaning` alone. `latin1`: Python 2 wrote texts as bytes."""

    def __init__(self, stream: Any, storage: Callable[[str, int], Storage], where: str) -> None:
        super().__init__(stream, encoding="latin1")
        self._storage = storage
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        found = meaning(module, name)
        if found is None:
            raise CheckpointError(f"{self._where}: names {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> tuple[Storage, StorageClass]:
        kind, key, num_bytes = _storage_of(pid)
        return self._storage(key, num_bytes), kind
