"""`megatron-gpt2 key`: make an API key, list those of a file, remove one. A key is printed once and kept nowhere."""

import fcntl
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from service.api.keys import AccessError, Key, hash_key, key_of, parse_keys, read_keys

LIMITS = ("requests_per_minute", "max_concurrent", "priority_floor")
_PREFIX = "mgpt-"  # tells people, and whoever looks for secrets in files, what it is
_NUM_BYTES = 32
_HEAD = "# API keys of megatron-gpt2; the service reads them again when this file changes.\n"


def new(name: str, *, file: Path | None, limits: Mapping[str, int]) -> None:
    """Print a new key, and its entry if there is no file to add it to. Raises AccessError."""
    key = _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
    added = key_of({"name": name, "sha256": hash_key(key.encode()), **limits}, "the new key")
    entry = _dumped([added])
    if file is None:
        print(f"{key}\n{entry}", end="")
        return
    with _locked(file):
        text = file.read_text() if file.exists() else _HEAD
        keys = read_keys(file) if file.exists() else ()
        parse_keys(_dumped([*keys, added]).encode(), file)  # also whether the name is new
        _write(file, text.removesuffix("\n") + "\n" + entry, [*keys, added])
    print(key)
    print(f"{name} is added to {file}; its key is shown this once", file=sys.stderr)


def show(file: Path) -> None:
    """Print the name and the limits of each key. Raises AccessError."""
    for key in read_keys(file):
        limits = [f"{limit}={value}" for limit in LIMITS if (value := getattr(key, limit)) is not None]
        print(" ".join([key.name, *limits]))


def remove(name: str, *, file: Path) -> None:
    """Take a key out of the file. Raises AccessError."""
    with _locked(file):
        keys = read_keys(file)
        rest = [key for key in keys if key.name != name]
        if len(rest) == len(keys):
            raise AccessError(f"{file}: there is no key {name}")
        place = [key.name for key in keys].index(name)
        text = file.read_text()
        lines = text.splitlines(keepends=True)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        assert node is not None, "it is a list"
        starts = [item.start_mark.line for item in node.value]
        del lines[starts[place] : [*starts, len(lines)][place + 1]]
        _write(file, "".join(lines), rest)
    print(f"{name} is removed from {file}", file=sys.stderr)


def _dumped(keys: Sequence[Key]) -> str:
    return yaml.safe_dump([key.model_dump(exclude_none=True) for key in keys], sort_keys=False)


def _write(file: Path, text: str, keys: Sequence[Key]) -> None:
    """Put `text` into the file if it says `keys`, as it does where the file is one of ours; else the keys alone."""
    try:
        as_meant = list(parse_keys(text.encode(), file)) == list(keys)
    except AccessError:
        as_meant = False
    content = text if as_meant else _HEAD + _dumped(keys)
    target = file.resolve()  # where a link leads, so that it stays one
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # for its owner alone
    try:
        with open(descriptor, "w") as new_file:
            new_file.write(content)
            new_file.flush()
            os.fsync(descriptor)
            if target.exists():  # whoever could read it still can
                before = target.stat()
                os.fchmod(descriptor, before.st_mode & 0o777)
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One change at a time of the files of a folder. Raises AccessError for what the system refuses."""
    try:
        folder = os.open(file.resolve().parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise AccessError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise AccessError(f"{file}: not valid UTF-8") from None
