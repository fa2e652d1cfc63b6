"""docs/evaluation.md says what is so: its commands that can run here print what it shows, its report has its fields.

`python -m tests.test_evaluation_docs` writes what the commands print anew.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.evaluation.items import Windows
from tests.commands import DOCUMENTED_URL
from tests.test_readme import COMMAND, ROOT, served_demo

PAGE = ROOT / "docs/evaluation.md"
# A block that begins with commands and goes on with what the last of them prints.
BLOCKS = re.compile(
    r"^```console\n((?:\$ (?:printf|megatron-gpt2 eval) .*\n)+)((?:(?!```|\$ ).*\n)+)```$", re.MULTILINE
)
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
NUM_TEST_TOKENS = 270_329


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_demo() as url:
        yield url


def blocks() -> list[tuple[str, str]]:
    return BLOCKS.findall(PAGE.read_text())


def printed(commands: str, folder: Path, url: str) -> str:
    """What the commands print, the errors among it, in a folder with the repository's tests; but for where they ran."""
    if not (folder / "tests").exists():
        (folder / "tests").symlink_to(ROOT / "tests")
    script = re.sub(r"^\$ ", "", commands, flags=re.MULTILINE).replace(DOCUMENTED_URL, url)
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MGPT_LOG_FORMAT": "text", "MGPT_KV_MEMORY": "64MiB"}
    ended = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=folder, env=environment)
    errors = [line for line in ended.stderr.splitlines(keepends=True) if not line.startswith("eval: ")]
    shown = ended.stdout + "".join(errors)
    shown = re.sub(r"^(model +)/\S+(/service/demo/model)", r"\1…\2", shown, flags=re.MULTILINE)
    return re.sub(r"fp_\w+", "fp_…", shown).replace(url, DOCUMENTED_URL)


def parts(shown: str) -> tuple[list[str], list[float]]:
    """The text without its numbers, and the numbers; without the line of the time."""
    timeless = re.sub(r"^time .*\n", "", shown, flags=re.MULTILINE)
    return NUMBER.split(timeless), [float(number.replace(",", "").rstrip(".")) for number in NUMBER.findall(timeless)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks run: the later ones use files of the earlier ones."""
    return tmp_path_factory.mktemp("evaluation")


def test_the_commands_print_what_is_shown(folder: Path, url: str) -> None:
    """Line by line, numbers to a thousandth, without the times."""
    assert 4 == len(blocks())
    for commands, documented in blocks():
        text, numbers = parts(documented)
        found_text, found_numbers = parts(printed(commands, folder, url))
        assert text == found_text
        assert numbers == pytest.approx(found_numbers, rel=1e-3)
    check_report(folder)


def check_report(folder: Path) -> None:
    """The table of the report has each field of the reports that these commands wrote, and no other."""
    reports = [json.loads(file.read_text()) for file in folder.glob("eval-*.json")]
    assert {"lambada", "text"} == {report["task"] for report in reports}
    table = PAGE.read_text().partition("| field | what |\n| --- | --- |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").partition(" | ")[::2] for line in table.splitlines()]
    named = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    about = {name: what for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    for report in reports:
        assert named == list(report)
        for part in ("protocol", "data", "model", "figures"):
            for name in report[part]:
                assert f"`{name.removesuffix('_interval')}`" in about[part], name


def test_every_flag_that_is_named_is_there() -> None:
    """Of `eval`, but for those of Megatron-LM, the harness and the benchmark, and those of other commands."""
    helped = "".join(
        subprocess.run([COMMAND, "eval", task, "--help"], capture_output=True, text=True, check=True).stdout
        for task in ("wikitext103", "lambada", "text")
    )
    others = {"--overlapping-eval", "--strict-lambada", "--share", "--include_path"}
    named = set(re.findall(r"`(--[\w-]+)", PAGE.read_text())) - others
    assert {"--stride", "--no-strict", "--skip-bad-lines", "--out", "--url", "--header", "--tokenizer"} <= named
    assert [] == [flag for flag in named if flag not in helped]


def test_the_work_of_each_stride() -> None:
    """Windows, tokens through the model to a thousand, and the least context, of a text of the test set's length."""
    rows = re.findall(r"^\| ([\d,]+)(?:, .*?)? \| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert ["32", "128", "512", "1,024"] == [row[0] for row in rows]
    for row in rows:
        stride, num_windows, num_tokens, least = (int(value.replace(",", "")) for value in row)
        windows = Windows(range(NUM_TEST_TOKENS), width=1024, stride=stride)
        assert len(windows) == num_windows
        assert abs(sum(len(window.ids) - 1 for window in windows) - num_tokens) <= 500
        assert windows[1].score_from == least


def write() -> None:
    with served_demo() as url, tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(
            BLOCKS.sub(
                lambda found: f"```console\n{found[1]}{printed(found[1], Path(folder), url)}```", PAGE.read_text()
            )
        )


if __name__ == "__main__":
    sys.exit(write())
