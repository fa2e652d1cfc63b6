"""Scores items by the service's own engine, in this process. Called by command.py."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from service.api.text import load_tokenizer
from service.engine.config import EngineConfig
from service.engine.core import Core
from service.engine.loading import Reporter, Unusable, load
from service.engine.request import SCORING, Finish, Request, scores_of
from service.evaluation.errors import EvaluationError
from service.evaluation.items import Item, Outcome
from service.evaluation.scorer import what_is_incomparable
from service.model.batch import DeviceLost

_MAX_NUM_SEQS = 32  # windows that are scored have so many tokens that few make a step, and each size costs a start time


class EngineScorer:
    """A Scorer that loads the model here."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises EvaluationError."""
        config = replace(config, max_num_seqs=config.max_num_seqs or _MAX_NUM_SEQS)
        try:
            with Reporter(lambda phase, progress: None) as reporter:
                self._loaded = load(config, reporter)
        except Unusable as error:
            raise EvaluationError(str(error)) from error
        info = self._loaded.model
        folder = Path(info.folder)
        self.tokenizer = load_tokenizer(folder, end_of_text_id=info.end_of_text_id)
        self.context_length = info.context_length
        self.model = {
            "name": config.model,
            "sha256": _digest(folder),
            "dtype": info.dtype,
            "device": info.device,
        }
        sizes = (info.num_layers, info.hidden_size, info.num_heads, info.context_length, info.vocab_size)
        self.incomparable = what_is_incomparable(sizes)

    def score(self, items: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Outcome]]:
        scheduler = self._loaded.scheduler
        core = Core(scheduler, self._loaded.runner)
        waiting = iter(items)
        targets: dict[int, tuple[int, ...]] = {}  # of the items that are open
        most_open = 2 * self._loaded.model.max_num_seqs
        while True:
            for number, item in islice(waiting, most_open - len(targets)):
                targets[number] = item.ids[item.score_from :]
                scheduler.add(Request(number, item.ids, score_from=item.score_from), SCORING, patient=True)
            if core.idle:
                return
            try:
                deltas = core.step()
            except DeviceLost as error:
                raise EvaluationError(f"the device is lost, and the same command goes on from here: {error}") from error
            for delta in deltas:
                if delta.finish is Finish.ERROR:
                    raise EvaluationError(f"the engine failed: {delta.error}")
                logprobs, is_greedy = scores_of(delta, targets.pop(delta.request_id))
                yield delta.request_id, Outcome(math.fsum(logprobs), is_greedy)

    def close(self) -> None:
        """Give the device's memory back."""
        self._loaded.runner.close()


def _digest(folder: Path) -> str:
    """SHA-256 over the model's config, tokenizer and weights."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", "vocab.json", "merges.txt")
    for file in (*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))):
        if not file.exists():
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
