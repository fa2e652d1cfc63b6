"""`megatron-gpt2 convert`: a checkpoint into another form, with a progress bar."""

import sys
from collections.abc import Mapping
from typing import Any, Never

from tqdm import tqdm

from service.checkpoint import worker
from service.checkpoint.convert import Job
from service.checkpoint.download import resolve
from service.checkpoint.errors import CheckpointError
from service.logs import configure_logging
from service.serve import wants_json
from service.settings import Settings, SettingsError


def convert(settings: Settings, *, target: str, options: Mapping[str, Any]) -> int:
    """Write the folder `target`; the exit code. Raises SettingsError for what cannot be used."""
    configure_logging(level=settings.log_level, json_lines=wants_json(settings))
    assert settings.model is not None
    bar: tqdm[Never] = tqdm(unit=" tensors", desc="convert", disable=not sys.stderr.isatty())

    def on_tensor(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        source = resolve(settings.model, revision=settings.revision, offline=settings.offline)
        with bar:
            worker.run(Job(str(source), target, **options), on_tensor)
    except CheckpointError as error:
        raise SettingsError(str(error)) from error
    print(f"{target}: written")
    return 0
