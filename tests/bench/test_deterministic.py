"""The program that says what deterministic mode costs: its steps, and both ways of taking their time, on a CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import deterministic
from bench.deterministic import ON_CPU, ON_GPU, main, measure, parse_steps
from service.model.batch import Runner
from tests.model.conftest import Pair, make_pair

__all__ = ["make_pair"]
STEPS = "1@20,9@20,+24,3@20+24"
NAMES = ["decode, 1 row at 20", "decode, 9 rows at 20", "prompt of 24 tokens", "3 rows at 20, prompt of 24"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.deterministic", *arguments])
    main()


@pytest.mark.parametrize("one_ahead", [False, True])
def test_both_runners_take_every_step(
    make_pair: Callable[..., Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_ahead: bool,
) -> None:
    """In each dtype; the files say what is printed. As on a GPU, too: steps launched one ahead, by the clock."""
    make_pair(n_layer=1)

    def ahead(*arguments: object, **limits: object) -> Runner:
        runner = make_runner(*arguments, **limits)
        runner.depth = int(one_ahead)
        return runner

    make_runner: Callable[..., Runner] = deterministic.make_runner
    monkeypatch.setattr(deterministic, "make_runner", ahead)
    flags = ["--model", str(tmp_path), "--dtypes", "float32,int8", "--steps", STEPS, "--rounds", "1"]
    run(monkeypatch, *flags, "--out", str(tmp_path / "out"))
    found = json.loads((tmp_path / "out/deterministic.json").read_text())
    rows = found.pop("rows")
    assert [(dtype, name) for dtype in ("float32", "int8") for name in NAMES] == [
        (row["dtype"], row["step"]) for row in rows
    ]
    assert all(row["normal_ms"] > 0 and row["deterministic_ms"] > 0 for row in rows)
    assert one_ahead == all(row["normal_ms"] == row["normal_wall_ms"] for row in rows)
    lines = (tmp_path / "out/deterministic.txt").read_text().splitlines()
    assert f"threads 1, torch {found['torch']}, rounds 1" in lines[0]
    assert all(row["step"] in line for row, line in zip(rows, lines[2:], strict=True))


def test_steps_are_named() -> None:
    assert ["decode, 1 row at 96", "decode, 8 rows at 96", "decode, 16 rows at 96", "prompt of 256 tokens"] == list(
        map(str, parse_steps(ON_CPU[1]))
    )
    *_, longest, mixed = parse_steps(ON_GPU[1])
    assert 1024 == len(longest.batch().token_ids)
    batch = mixed.batch()
    assert (63, 64, 63 + 128) == (batch.num_decodes, len(batch.sampling), len(batch.token_ids))
    assert [192] * 63 + [128] == batch.context_lengths.tolist()


@pytest.mark.parametrize("steps", ["", "8", "8@", "@96", "0@96", "8@96+", "8@96,", "8@96;+16"])
def test_a_step_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--steps", steps)
    assert f"argument --steps: invalid parse_steps value: {steps!r}" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["1@129", "+129", "2@8,1@20+200"])
def test_a_step_past_the_models_context_is_named(make_pair: Callable[..., Pair], steps: str) -> None:
    _, ours = make_pair(n_layer=1)
    with pytest.raises(ValueError, match=rf"^--steps: {parse_steps(steps)[-1]}: the model has a context of 128$"):
        measure(ours, parse_steps(steps), 1)
