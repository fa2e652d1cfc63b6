"""Raw checkpoints converted once: a folder for each content, found again without reading it. Used where a model's name
is resolved.

Below the cache's folder: converted/KEY is a folder of transformers, KEY the SHA-256 of the raw files and this code's
version; sources/PATH'S HASH.json remembers which KEY the files of a path had, by their sizes and times.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

from service.checkpoint import worker
from service.checkpoint.convert import Job, raw_files
from service.checkpoint.download import Progress
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import weights_entry

log = logging.getLogger(__name__)

_VERSION = 1  # of what a conversion makes; raised when that changes
_CHUNK = 2**22


def is_raw(path: Path) -> bool:
    """Whether a path must be converted before it is served: all but a folder of transformers in safetensors."""
    if path.is_file():
        return True
    if not (path / "config.json").is_file():
        return True
    entry = weights_entry([entry.name for entry in path.iterdir()])
    return entry is not None and ".bin" in entry  # an index of safetensors names no others


def converted(source: Path, *, cache_dir: Path, on_progress: Progress) -> Path:
    """The folder that `source` is converted to, which is done now if it has not been before.

    `on_progress` hears fractions of the work. Raises CheckpointError.
    """
    source = source.resolve()
    files = raw_files(source)
    stamps = _stamps(files)
    remembered = cache_dir / "sources" / f"{hashlib.sha256(str(source).encode()).hexdigest()[:32]}.json"
    try:
        for folder in (remembered.parent, cache_dir / "converted"):
            folder.mkdir(parents=True, exist_ok=True)
        known = _known_key(remembered, stamps)
        folder = cache_dir / "converted" / known
        if known and folder.is_dir():
            log.info("%s: converted before, in %s", source, folder)
            return folder
        key = _content_key(source, files, lambda share: on_progress(share / 4))
        folder = cache_dir / "converted" / key
        with FileLock(remembered.parent / f"{key}.lock"):  # of several that start at once, one converts
            if not folder.is_dir():
                _convert(source, folder, on_progress)
                if _stamps(files) != stamps:
                    shutil.rmtree(folder)
                    raise CheckpointError(f"{source}: changed while it was read")
            about = json.dumps({"source": str(source), "key": key, "files": stamps}, indent=1)
            partial = remembered.with_suffix(f".{os.getpid()}")
            partial.write_text(about)
            os.replace(partial, remembered)
    except OSError as error:
        raise CheckpointError(f"cache_dir: {error.filename or cache_dir}: {error.strerror}") from error
    return folder


def _convert(source: Path, folder: Path, on_progress: Progress) -> None:
    for partial in folder.parent.glob(f".{folder.name}-*"):  # of a service that was killed at this
        shutil.rmtree(partial, ignore_errors=True)
    worker.run(Job(str(source), str(folder)), lambda done, total: on_progress(0.25 + 0.75 * done / total))
    log.info("%s: converted into %s", source, folder)


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    """The size and the time of each. Raises CheckpointError."""
    try:
        return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error


def _known_key(remembered: Path, stamps: dict[str, list[int]]) -> str:
    try:
        about = json.loads(remembered.read_bytes())
        return str(about["key"]) if about["files"] == stamps else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _content_key(source: Path, files: list[Path], on_progress: Progress) -> str:
    total, done = sum(file.stat().st_size for file in files) or 1, 0
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for file in files:
        name = file.relative_to(source) if source.is_dir() else "checkpoint" if file == source else file.name
        digest.update(f"\0{name}\0{file.stat().st_size}\0".encode())
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    on_progress(done / total)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]
