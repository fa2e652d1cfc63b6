"""API keys: what one is, the file that has them, and those in force while that file changes.

The file is a YAML list with an entry a key: its name, the SHA-256 of the key in hex, and its limits, if it has any.
`service/key.py` writes it. No message, log line or repr has a key or its hash.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)

MAX_KEYS = 1000  # every one is compared with what each request brings, and has its own series in the metrics
UNKNOWN = "unknown"  # what whoever has no key is called in metrics and log
_LOOK_SECONDS = 1.0  # between looks at the file
_SENDABLE = re.compile(r"[\x21-\x7e]+")  # as a header's value, and without a space


class AccessError(ValueError):
    """A setting or a file of keys, origins or certificates that cannot be used; the message names it, in one line."""


class Key(BaseModel):
    """Who has a key, and what may be asked with it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    priority_floor: Annotated[int, Field(ge=-100, le=100)] | None = None  # 0, where there is none


def hash_key(key: bytes) -> str:
    """Plain SHA-256: keys are random, so there is nothing that a slow hash would keep from being guessed."""
    return hashlib.sha256(key).hexdigest()


def named_keys(keys: Sequence[str]) -> tuple[Key, ...]:
    """The keys of the setting api_key, called key-1, key-2 and so on. Raises AccessError."""
    named: list[Key] = []
    for number, key in enumerate(keys, 1):
        if not _SENDABLE.fullmatch(key):
            raise AccessError(f"api_key: key {number} has characters that no client can send: use visible ASCII")
        named.append(Key(name=f"key-{number}", sha256=hash_key(key.encode())))
    _check_different(named, (), "api_key")
    return tuple(named)


def read_keys(file: Path, *, beside: Sequence[Key] = ()) -> tuple[Key, ...]:
    """The keys of `file`, none of which is one of `beside`. Raises AccessError, which names the file and the entry."""
    try:
        return parse_keys(file.read_bytes(), file, beside=beside)
    except OSError as error:
        raise AccessError(f"{file}: {error.strerror}") from error


def parse_keys(data: bytes, file: Path, *, beside: Sequence[Key] = ()) -> tuple[Key, ...]:
    """The same of the content of `file`."""
    try:
        entries = yaml.load(data, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # its message would quote the file
        raise AccessError(f"{file}: {f'line {mark.line + 1}: ' if mark else ''}not readable as YAML") from None
    if not isinstance(entries, list):
        raise AccessError(f"{file}: expected a list, an entry `- name: ...` a key, or [] for none")
    if len(entries) > MAX_KEYS:
        raise AccessError(f"{file}: {len(entries)} keys are more than {MAX_KEYS}")
    keys = tuple(key_of(entry, f"{file}: entry {number}") for number, entry in enumerate(entries, 1))
    _check_different(keys, beside, str(file))
    return keys


def key_of(entry: Any, where: str) -> Key:
    """One entry. Raises AccessError, which begins with `where` and names the field."""
    try:
        key = Key.model_validate(entry)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        message = problem["msg"] if problem["loc"] else "expected a table with name and sha256"
        place = "".join(f"{part}: " for part in problem["loc"])
        raise AccessError(f"{where}: {place}{message}") from None
    if key.name == UNKNOWN:
        raise AccessError(f"{where}: name: {UNKNOWN} is what whoever has no key is called")
    return key


def _check_different(keys: Sequence[Key], beside: Sequence[Key], where: str) -> None:
    """Raises AccessError if two keys have one name, or are one key."""
    names = {key.name: f"{key.name} of api_key" for key in beside}
    hashes = {key.sha256: f"{key.name} of api_key" for key in beside}
    for number, key in enumerate(keys, 1):
        if key.name in names:
            raise AccessError(f"{where}: entry {number}: the name {key.name} is taken by {names[key.name]}")
        if key.sha256 in hashes:
            raise AccessError(f"{where}: entry {number}: the same key as {hashes[key.sha256]}")
        names[key.name] = hashes[key.sha256] = f"entry {number}"


class Keys:
    """The keys in force: those given, and those of the file as it is now.

    `current` looks at the file once a second at most. A file that has become bad, or is away, leaves the keys as they
    were, and is told once.
    """

    def __init__(self, given: Sequence[Key], file: Path | None, *, clock: Callable[[], float]) -> None:
        """Raises AccessError."""
        self._given, self._file, self._clock = tuple(given), file, clock
        self._looked_at = clock()
        self._seen = _version(file)
        self._keys = self._given
        if file is not None:
            self._keys += read_keys(file, beside=given)

    def current(self) -> tuple[Key, ...]:
        """The same object until they change."""
        if self._file is not None and (now := self._clock()) - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            seen = _version(self._file)
            if seen != self._seen:
                self._seen = seen
                self._read(self._file)
        return self._keys

    def _read(self, file: Path) -> None:
        try:
            self._keys = self._given + read_keys(file, beside=self._given)
        except AccessError as error:
            log.error("%s; the keys that were read before stay in force", error)
            return
        log.info("%s has changed: %d keys are in force", file, len(self._keys))


def _version(file: Path | None) -> tuple[int, ...] | None:
    """What changes with the content, also where Kubernetes swaps a link in the path; None where there is no file."""
    try:
        found = os.stat(file) if file is not None else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
