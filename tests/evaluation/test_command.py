"""`megatron-gpt2 eval`: an interrupted run goes on, a report is whole, mistakes are told in a line."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.evaluation.report import verdict
from service.evaluation.tasks import Task

HELD_OUT = Path(__file__).parents[1] / "data" / "held_out.txt"
# `eval text` of HELD_OUT with the demo model on a CPU in fp32.
DEMO_PERPLEXITY = 82.907


def test_the_demo_model_has_not_become_worse_nor_better(tmp_path: Path) -> None:
    """Its perplexity on works kept from training stays within half a percent: a change is one of what is computed."""
    out = tmp_path / "report.json"
    assert 0 == main(["eval", "text", str(HELD_OUT), "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert DEMO_PERPLEXITY == pytest.approx(report["figures"]["perplexity"], rel=0.005)
    assert math.exp(report["figures"]["loss"]) == pytest.approx(report["figures"]["perplexity"])
    assert (10953, 2379) == (report["data"]["bytes"], report["data"]["tokens"])
    assert {"name", "sha256", "dtype", "device"} == report["model"].keys()
    assert 64 == len(report["model"]["sha256"])


def test_an_interrupted_run_goes_on(small_model: Path, tmp_path: Path) -> None:
    """Ctrl-C in its midst; the same command scores what is left, and finds what an undisturbed run finds."""
    file = tmp_path / "wiki.test.tokens"
    file.write_text(HELD_OUT.read_text()[:6500])
    arguments = [*("--data", str(file), "--stride", "4", "--model", str(small_model), "--device", "cpu")]
    arguments = ["eval", "wikitext103", *arguments, "--max-num-seqs", "1", "--out"]
    command = [sys.executable, "-m", "service.cli", *arguments, str(tmp_path / "out.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MGPT_")}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert any("10 %" in line for line in running.stderr)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert 130 == running.returncode
    assert "the same command goes on from here" in errors
    assert "" == output
    assert not (tmp_path / "out.json").exists()
    num_scored = (tmp_path / "out.json.partial").read_bytes().count(b"\n") - 1
    assert num_scored > 0
    assert 0 == main([*arguments, str(tmp_path / "out.json")])
    assert 0 == main([*arguments, str(tmp_path / "whole.json")])
    assert [] == list(tmp_path.glob("*.partial"))
    found, whole = (json.loads((tmp_path / name).read_text()) for name in ("out.json", "whole.json"))
    assert (num_scored, 0) == (found["items_scored_before"], whole["items_scored_before"])
    assert whole["figures"]["loss"] == pytest.approx(found["figures"]["loss"], abs=1e-5)


def test_a_journal_of_another_run_is_not_gone_on_with(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data under the same name: 2, the file is named, and it stays."""
    file, out = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text("some words")
    partial = tmp_path / "out.json.partial"
    partial.write_text('{"data": {"sha256": "of another"}}\n[0, -1.0, false]\n')
    assert 2 == main(["eval", "text", str(file), "--model", str(small_model), "--out", str(out)])
    assert f"megatron-gpt2: --out: {partial}: is of an evaluation of something else" in capsys.readouterr().err
    assert "of another" in partial.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wikitext103"], "--data"),
        (["lambada", "--data", "nowhere"], "--data: nowhere: No such file"),
        (["text", "nowhere"], "FILE: nowhere: No such file"),
        (["text", str(HELD_OUT), "--stride", "0"], "--stride: must be from 1 to 1024"),
        (["text", str(HELD_OUT), "--stride", "x"], "--stride"),
        (["text", str(HELD_OUT), "--header", "a:b"], "--header: goes with --url only"),
        (["text", str(HELD_OUT), "--tokenizer", "."], "--tokenizer: goes with --url only"),
        (["text", str(HELD_OUT), "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["text", str(HELD_OUT), "--out", "."], "--out: .: must be a file"),
        (["text", str(HELD_OUT), "--out", ""], "--out: .: must be a file"),
        (["text", str(HELD_OUT), "--out", "nowhere/out.json"], "--out: nowhere/out.json.partial: No such file"),
        (["text", str(HELD_OUT), "--url", "localhost:1"], "--url"),
        (["text", str(HELD_OUT), "--url", "http://127.0.0.1:1"], "--url: http://127.0.0.1:1/tokenizer_info"),
        (["text", str(HELD_OUT), "--url", "http://127.0.0.1:1", "--header", "x"], "--header: must be NAME:VALUE"),
        (["text", str(HELD_OUT), "--url", "http://127.0.0.1:1", "--header", ": x"], "--header: must be NAME:VALUE"),
        (["text", str(HELD_OUT), "--url", "http://127.0.0.1:1", "--header", "a: …"], "--header: must be ASCII"),
        (["glue", "--data", "x"], "glue"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With 2, what is wrong in a line, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["eval", *arguments])
    except SystemExit as exit:  # argparse's own
        code = exit.code  # type: ignore[assignment]
    assert 2 == code
    assert message in capsys.readouterr().err
    assert [] == os.listdir(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", str(HELD_OUT.parent)],
        ["--revision", "main"],
        ["--offline"],
        ["--cache-dir", "cache"],
        ["--device", "cpu"],
        ["--dtype", "auto"],  # also what is so without it
        ["--tensor-parallel-size", "2"],
        ["--kv-memory", "64MiB"],
        ["--gpu-memory-utilization", "0.5"],
        ["--cpu-threads", "1"],
        ["--max-num-seqs", "8"],
        ["--max-num-batched-tokens", "512"],
    ],
    ids=lambda flags: str(flags[0]),
)
def test_what_a_model_is_loaded_by_does_not_go_with_a_server(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag is named, and no server is asked; variables and a file, which other commands have too, pass."""
    asked = ["eval", "text", str(HELD_OUT), "--url", "http://127.0.0.1:1", "--out", str(tmp_path / "out.json")]
    config = tmp_path / "config.yaml"
    config.write_text("max_num_seqs: 4\n")
    monkeypatch.setenv("MGPT_KV_MEMORY", "32MiB")
    for given in (flags, [*flags, "--config", str(config), "--log-level", "warning"]):
        assert 2 == main([*asked, *given])
        assert f"megatron-gpt2: {flags[0]}: does not go with --url" in capsys.readouterr().err
    assert 2 == main([*asked, "--config", str(config), "--log-level", "warning"])
    assert "--url: http://127.0.0.1:1/tokenizer_info: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figure", "incomparable", "model_incomparable", "expected"),
    [
        (19.31, None, None, "reproduced: 19.31, and 19.31 in the paper (+0.00%)"),
        (19.49, None, None, "reproduced: 19.49, and 19.31 in the paper (+0.93%)"),
        (25.0, None, None, "NOT reproduced: 25.00, and 19.31 in the paper (+29.47%)"),
        (19.31, "the stride is 512", None, "not to be compared with the paper's 19.31: the stride is 512"),
        (19.31, None, "another shape", "not to be compared with the paper's 19.31: another shape"),
    ],
)
def test_the_verdict_is_one_line(
    figure: float, incomparable: str | None, model_incomparable: str | None, expected: str
) -> None:
    """Against the paper's figure, where protocol, data and model are the paper's; else why not."""
    paper = ("adjusted_perplexity", 19.31)
    task = Task("wikitext103", {}, {}, [], lambda _: {}, incomparable, paper)
    assert expected == verdict(task, {"adjusted_perplexity": figure}, model_incomparable)
