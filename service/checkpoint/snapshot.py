"""A hub id's files, through huggingface_hub: fetched, or out of its cache. Called by download.py.

Its import takes a quarter of a second and brings an HTTP client, so only what has to do with the hub imports this.
"""

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import WEIGHTS, weight_files, weights_entry

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  # for the list of files; then the cache serves
_REMEDY = "fetch it where the hub can be reached, or give a local folder"
_BYTES_BAR = "huggingface_hub.snapshot_download"  # the name of the client's bar that counts what is on the disk
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
]


def snapshot(
    model: str, *, revision: str | None, offline: bool, cache_dir: Path | None, on_progress: Callable[[float], None]
) -> Path:
    """The folder. The arguments are those of `resolve`. Raises CheckpointError."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    if offline or is_offline_mode():
        return _cached(model, revision=revision, cache_dir=cache_dir, reason="offline is on")
    try:
        # Not list_repo_files: with the hub away, that one goes on trying for 20 seconds.
        repository = HfApi().model_info(model, revision=revision, timeout=_ANSWER_SECONDS, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in repository.siblings or ()}
        wanted = _wanted(model, list(sizes))
        bars = _told_to(on_progress, sum(sizes.get(name, 0) for name in wanted))
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=wanted, tqdm_class=bars)
        )
    except CheckpointError:
        raise
    except HFValidationError as error:
        raise CheckpointError(f"{model}: no such folder, and not of a hub id's form (owner/name)") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{model}: gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such folder, and no such model on the hub (private: set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no revision {revision!r} of it") from error
    except Exception as error:  # the hub's HTTP library changes with its releases, and so do the errors
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = f"fetching it from the hub failed ({cause})"
        logger.warning("%s: %s; looking in the cache", model, reason)
        return _cached(model, revision=revision, cache_dir=cache_dir, reason=reason)


def _told_to(on_progress: Callable[[float], None], num_bytes: int) -> type[tqdm]:
    """The client's own bars, which also tell `on_progress` how much of `num_bytes` is there."""
    lock = threading.Lock()  # the client fetches several files at a time
    num_there = 0.0

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._tells = options.get("name") == _BYTES_BAR and num_bytes > 0
            super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal num_there
            if self._tells:
                with lock:
                    num_there += n or 0
                    on_progress(min(1.0, num_there / num_bytes))
            return super().update(n)

    return Bar


def _wanted(model: str, names: Sequence[str]) -> list[str]:
    """The files to fetch: the small ones and one set of weights, never a second set in another format."""
    weights = weights_entry(names)
    if weights is None or "config.json" not in names:
        missing = "config.json" if weights else f"weights ({', '.join(WEIGHTS)})"
        raise CheckpointError(f"{model}: the repository on the hub has no {missing}")
    stem, dot, suffix = weights.removesuffix(".index.json").rpartition(".")
    is_index = weights.endswith(".index.json")
    shards = [name for name in names if is_index and "/" not in name and fnmatch(name, f"{stem}-*{dot}{suffix}")]
    return [*_SMALL_FILES, weights, *shards]


def _cached(model: str, *, revision: str | None, cache_dir: Path | None, reason: str) -> Path:
    """The snapshot in huggingface_hub's cache; `reason` tells in an error why the hub was not used."""
    what = model if revision is None else f"{model} (revision {revision})"
    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=_SMALL_FILES
            )
        )
        weight_files(folder)  # raises where a download was broken off
    except CheckpointError as error:
        raise CheckpointError(f"{what}: not whole in the cache ({error}), and {reason}; {_REMEDY}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: not in the cache, and {reason}; {_REMEDY}") from error
    return folder
