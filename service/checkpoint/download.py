"""Finds a model's folder: a local one, or a hub id's snapshot (snapshot.py). Called by `serve` and `cli`."""

import os
from collections.abc import Callable
from pathlib import Path

from service.checkpoint.errors import CheckpointError
from service.checkpoint.megatron import is_megatron

Progress = Callable[[float], None]  # a fraction of the work


def resolve(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    on_progress: Progress = lambda _: None,
) -> Path:
    """A local folder or file with a checkpoint, or the snapshot of a hub id, fetched unless cached.

    A name that exists here, or starts with '.', '/' or '~', is local. `revision` is a hub id's branch, tag or commit.
    With `offline`, or HF_HUB_OFFLINE set, only the cache is read; it also serves while the hub cannot be reached.
    `on_progress` hears the share of bytes that were fetched, from one thread at a time. A download whose connection
    breaks goes on from there (the client's pieces have 10 MiB); one that is broken off keeps its whole files. Raises
    CheckpointError.
    """
    path = Path(os.path.expanduser(model))
    if model.startswith((".", "/", "~")) or path.exists():
        if not path.exists():
            raise CheckpointError(f"{model}: no such file or folder")
        if not path.is_dir() and not path.is_file():
            raise CheckpointError(f"{model}: neither a file nor a folder")
        if path.is_dir() and not (path / "config.json").is_file() and not is_megatron(path):
            raise CheckpointError(f"{model}: the folder has neither a config.json nor a checkpoint of Megatron-LM")
        if revision is not None:
            raise CheckpointError(f"{model}: what is local has no revisions (asked for {revision!r})")
        return path
    from service.checkpoint.snapshot import snapshot  # the hub's client takes long to import, and memory

    return snapshot(model, revision=revision, offline=offline, cache_dir=cache_dir, on_progress=on_progress)
