"""Who may ask: keys, what each may do, and which routes need none."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """What serve.py tells of keys; without keys and a file everybody may ask."""

    keys: tuple[str, ...] = ()
    key_file: Path | None = None
    open_routes: frozenset[str] = frozenset()
    share_prefixes: bool = False
