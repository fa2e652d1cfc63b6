"""Finds a model's folder: a local one, or a hub id's snapshot through huggingface_hub. Called by `serve` and `cli`."""

import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import WEIGHTS, weight_files, weights_entry
from service.checkpoint.megatron import is_megatron

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  # for the list of files; then the cache serves
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
]


def resolve(model: str, *, revision: str | None = None, offline: bool = False, cache_dir: Path | None = None) -> Path:
    """A local folder or file with a checkpoint, or the snapshot of a hub id, fetched unless cached.

    A name that exists here, or starts with '.', '/' or '~', is local. `revision` is a hub id's branch, tag or commit.
    With `offline`, or HF_HUB_OFFLINE set, only the cache is read; it also serves while the hub cannot be reached.
    Raises CheckpointError.
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
    if offline or is_offline_mode():
        return _cached(model, revision=revision, cache_dir=cache_dir, reason="offline is on")
    try:
        # Not list_repo_files: with the hub away, that one goes on trying for 20 seconds.
        repository = HfApi().model_info(model, revision=revision, timeout=_ANSWER_SECONDS)
        wanted = _wanted(model, [file.rfilename for file in repository.siblings or ()])
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=wanted))
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
        raise CheckpointError(f"{what}: not whole in the cache ({error}), and {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: not in the cache, and {reason}") from error
    return folder
