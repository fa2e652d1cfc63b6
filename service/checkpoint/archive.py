"""A release archive (.zip) unpacked into a folder, member by member, each looked at first. Used by convert.py."""

import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from service.checkpoint.errors import CheckpointError

_MAX_MEMBERS = 4096
_MAX_BYTES = 64 * 2**30  # unpacked, in all
_MAX_RATIO = 20  # of a member: weights hardly shrink
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, IndexError, RuntimeError, ValueError)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others have readers, and errors, of their own
_SUFFIXES = (".pt", ".txt", ".json", ".metadata", ".distcp", ".md")


def is_release(file: Path) -> bool:
    """Whether a file is a zip that is not torch.save's own."""
    try:
        if not zipfile.is_zipfile(file):  # it raises, too
            return False
        with zipfile.ZipFile(file) as archive:
            return not any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except _BROKEN as error:
        raise CheckpointError(f"{file}: a broken archive: {error}") from error


def unpack(file: Path, folder: Path) -> None:
    """Everything of a checkpoint in `file`, into the empty `folder`. Raises CheckpointError before writing anything
    for a name that leads out of the folder, a link, an archive within, or sizes or packing that no checkpoint has.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check(file, members)
            for member in members:
                if member.filename.endswith(_SUFFIXES):
                    _unpack(file, archive, member, folder / member.filename)
    except CheckpointError:
        raise
    except _BROKEN as error:
        raise CheckpointError(f"{file}: a broken archive: {error}") from error


def _check(file: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > _MAX_MEMBERS:
        raise CheckpointError(f"{file}: {len(members)} members are more than a checkpoint has")
    if (total := sum(member.file_size for member in members)) > _MAX_BYTES:
        raise CheckpointError(f"{file}: would unpack to {total} bytes")
    seen = set()
    for member in members:
        name, path = member.filename, PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            raise CheckpointError(f"{file}: {name!r:.200}: a name that leads out of the folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise CheckpointError(f"{file}: {name!r:.200}: a link")
        if str(path) in seen:
            raise CheckpointError(f"{file}: {name!r:.200}: there twice")
        seen.add(str(path))
        if member.header_offset < 0:  # where the directory's size is a lie
            raise CheckpointError(f"{file}: {name!r:.200}: stands outside of the archive")
        if member.flag_bits & 1:
            raise CheckpointError(f"{file}: {name!r:.200}: encrypted")
        if member.compress_type not in _METHODS:
            raise CheckpointError(f"{file}: {name!r:.200}: packed by a method that no checkpoint uses")
        if member.file_size > 2**20 and member.file_size > _MAX_RATIO * member.compress_size:
            raise CheckpointError(f"{file}: {name!r:.200}: unpacks to {member.file_size} bytes, too many for its size")
        if path.suffix in (".zip", ".tar", ".gz", ".7z", ".rar"):
            raise CheckpointError(f"{file}: {name!r:.200}: an archive within the archive")


def _unpack(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, 2**20)  # never more than file_size, which the library holds it to
    if target.suffix == ".pt" and is_release(target):
        raise CheckpointError(f"{file}: {member.filename}: an archive within the archive")
