"""`megatron-gpt2 selftest`: the same requests alone and in company, compared to the bit, without a server."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Never

from tqdm import tqdm

from service.engine.loading import Loaded, Reporter, Unusable, load
from service.model.batch import DeviceLost
from service.selftest.asks import Ask, random_asks
from service.selftest.differences import Finding, compare
from service.selftest.scenarios import Limits, alone, run, scenarios, usual
from service.serve import DEMO_NAME, engine_config, log_quietly, wants_json
from service.settings import Settings, SettingsError

NUM_REQUESTS = 256
_MOST_REQUESTS = 4096
_TOKENS_A_REQUEST = 64  # of its prompt, and some: of so many a step begins all at once
_COLUMNS = "{:<26}{:>10}{:>11}{:>14}{:>14}{:>13}{:>10}"


def selftest(settings: Settings, *, requests: int = NUM_REQUESTS, seed: int = 0, as_json: bool = False) -> int:
    """Print a table of the scenarios; the exit code: 0 where all is the same and was put to the test, else 1.

    Deterministic mode is on unless a setting says otherwise. Raises SettingsError for what cannot be used.
    """
    log_quietly(settings)
    if not 2 <= requests <= _MOST_REQUESTS:
        raise SettingsError(f"--requests: must be from 2 to {_MOST_REQUESTS} (got {requests})")
    if seed < 0:
        raise SettingsError(f"--seed: must not be negative (got {seed})")
    config = engine_config(settings, json_lines=wants_json(settings))
    if "deterministic" not in settings.model_fields_set:
        config = replace(config, deterministic=True)
    max_num_seqs = config.max_num_seqs or requests
    budget = max(config.max_num_batched_tokens or _TOKENS_A_REQUEST * requests, max_num_seqs)
    config = replace(config, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    try:
        with Reporter(lambda phase, progress: None) as reporter:
            loaded = load(config, reporter)
    except Unusable as error:
        raise SettingsError(str(error)) from error
    model = loaded.model
    asks = random_asks(
        requests,
        seed=seed,
        context_length=model.context_length,
        block_size=model.block_size,
        vocab_size=model.vocab_size,
        max_num_seqs=max_num_seqs,
    )
    most = Limits(model.num_blocks, max_num_seqs, budget)
    about: dict[str, Any] = {
        "model": settings.model or DEMO_NAME,
        "dtype": model.dtype,
        "device": model.device,
        "deterministic": model.deterministic,
        "requests": requests,
        "seed": seed,
    }
    if not as_json:
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        print(_COLUMNS.format("scenario", "answers", "differing", "most at once", "tokens found", "preemptions", "s"))
    try:
        findings = _findings(loaded, asks, most, seed=seed, show=not as_json)
    except DeviceLost as error:
        print(f"megatron-gpt2: the device is lost: {error}", file=sys.stderr)
        return 1
    finally:
        loaded.runner.close()
    same = all(finding.first is None for finding in findings)
    if as_json:
        print(json.dumps(about | {"same": same, "scenarios": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print("verdict: " + ("the same to the bit" if same else "not the same, or not put to the test"))
    return 0 if same else 1


def _findings(loaded: Loaded, asks: Sequence[Ask], most: Limits, *, seed: int, show: bool) -> list[Finding]:
    """Alone first, which must end without an error."""
    model = loaded.model
    total = sum(ask.request.n for ask in asks)
    with _progress("alone", total) as bar:
        outcome = alone(loaded, asks, replace(usual(most), max_num_seqs=1), bar.update)
    expected = dict(outcome.answers)
    findings = [compare(expected, outcome)]
    if show:
        _print(findings[-1])
    company = scenarios(
        asks,
        most,
        context_length=model.context_length,
        block_size=model.block_size,
        seed=seed,
        drafting=not loaded.runner.depth,
    )
    for scenario in company:
        total = sum(ask.request.n for wave in scenario.waves for ask in wave)
        with _progress(scenario.name, total) as bar:
            outcome = run(loaded, scenario, num_requests=len(asks), on_end=bar.update)
        findings.append(compare(expected, outcome))
        if show:
            _print(findings[-1])
    return findings


def _progress(name: str, total: int) -> "tqdm[Never]":
    return tqdm(total=total, desc=name, unit=" answers", leave=False, disable=not sys.stderr.isatty())


def _print(finding: Finding) -> None:
    counts = (finding.compared, finding.differing, finding.most_at_once, finding.hits, finding.preemptions)
    print(_COLUMNS.format(finding.scenario, *counts, f"{finding.seconds:.1f}"), flush=True)
    if finding.first is not None:
        print(f"  {finding.first}", flush=True)
