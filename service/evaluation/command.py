"""`megatron-gpt2 eval`: the paper's evaluations, by the service's engine in this process or by a running service."""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from service.evaluation import tasks
from service.evaluation.data import Data
from service.evaluation.errors import EvaluationError
from service.evaluation.journal import Journal
from service.evaluation.progress import Progress
from service.evaluation.report import lines, verdict
from service.evaluation.scorer import Scorer
from service.evaluation.server import ServerScorer
from service.evaluation.tasks import Task
from service.pair import parse_header
from service.serve import DEMO_MODEL, engine_config, log_quietly, wants_json
from service.settings import Settings, SettingsError, load
from service.version import VERSION

_OF_ANY_RUN = {"log_level", "log_format", "config"}  # settings, here or by a server


def evaluate(settings: Settings, *, task: str, options: Mapping[str, Any]) -> int:
    """Score a file, print what was found and write the report; the exit code. Raises SettingsError.

    `options` are those of cli.py's `eval`. What was found before an interruption is kept beside the report.
    """
    log_quietly(settings)
    out = Path(options.get("out", f"eval-{task}.json"))
    try:
        if not out.name or out.is_dir():
            raise EvaluationError(f"--out: {out}: must be a file")
        data = Data.read(options["data"], "FILE" if task == "text" else "--data")
        with closing(_scorer(settings, options)) as scorer:
            asked = _task(task, data, options, scorer)
            report = _run(asked, scorer, out)
        for line in lines(report):
            print(line)
    except EvaluationError as error:
        raise SettingsError(str(error)) from error
    return 0


def _scorer(settings: Settings, options: Mapping[str, Any]) -> Scorer:
    if "url" not in options:
        for name in ("header", "tokenizer"):
            if name in options:
                raise EvaluationError(f"--{name}: goes with --url only")
        from service.evaluation.engine import EngineScorer  # imports torch, which asking a server needs not

        return EngineScorer(engine_config(settings, json_lines=wants_json(settings)))
    _check_flags(settings)
    try:
        headers = dict(parse_header(text) for text in options.get("header", ()))
    except ValueError as error:
        raise EvaluationError(f"--header: {error}") from error
    return ServerScorer(options["url"], headers=headers, tokenizer=options.get("tokenizer", DEMO_MODEL))


def _check_flags(settings: Settings) -> None:
    """With --url no model is loaded: raise EvaluationError for a flag that says how. Variables and a file say it to
    other commands too, so they are passed over."""
    others = load({} if settings.config is None else {"config": settings.config})
    for name in sorted(settings.model_fields_set - _OF_ANY_RUN):
        if name not in others.model_fields_set or getattr(settings, name) != getattr(others, name):
            raise EvaluationError(f"--{name.replace('_', '-')}: does not go with --url, where the server has the model")


def _task(name: str, data: Data, options: Mapping[str, Any], scorer: Scorer) -> Task:
    make = partial(getattr(tasks, name), data, scorer.tokenizer, context_length=scorer.context_length)
    given = {key: options[key] for key in ("stride", "strict", "skip_bad_lines") if key in options}
    made: Task = make(**given)
    return made


def _run(task: Task, scorer: Scorer, out: Path) -> dict[str, Any]:
    about = {
        "version": VERSION,
        "task": task.name,
        "protocol": task.protocol,
        "data": task.data,
        "model": scorer.model,
    }
    began_at = time.monotonic()
    journal = Journal(out.with_name(out.name + ".partial"), about)
    known = len(journal.outcomes)
    if known:
        print(f"eval: {known} of {len(task.items)} were scored before", file=sys.stderr)
    left = ((number, item) for number, item in enumerate(task.items) if number not in journal.outcomes)
    num_tokens = 0
    with closing(journal), Progress(len(task.items), done=known) as progress:
        try:
            for number, outcome in scorer.score(left):
                journal.add(number, outcome)
                num_tokens += len(task.items[number].ids) - 1
                progress.advance()
        except OSError as error:
            raise EvaluationError(f"--out: {journal.file}: {error.strerror}") from error
        except KeyboardInterrupt:
            print("\neval: interrupted; the same command goes on from here", file=sys.stderr)
            raise
        figures = task.figures([journal.outcomes[number] for number in range(len(task.items))])
        seconds = time.monotonic() - began_at
        report = about | {
            "figures": figures,
            "skipped": task.skipped,
            "verdict": verdict(task, figures, scorer.incomparable),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1) if num_tokens else None,  # that went through the model
            "items_scored_before": known,
        }
        _write(out, report)
        journal.remove()
    return report


def _write(out: Path, report: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = out.with_name(out.name + ".tmp")
    try:
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(unfinished, out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise EvaluationError(f"--out: {out}: {error.strerror}") from error
