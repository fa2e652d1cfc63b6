"""What a run has found outlasts it, and is only gone on with where it belongs."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.evaluation.errors import EvaluationError
from service.evaluation.items import Outcome
from service.evaluation.journal import Journal

ABOUT: dict[str, Any] = {"task": "text", "data": {"sha256": "ab"}}
OUTCOMES = {3: Outcome(-1.25, True), 0: Outcome(-0.1 - 0.2, False), 7: Outcome(-1e-300, True)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A journal of OUTCOMES."""
    journal = Journal(tmp_path / "out.json.partial", ABOUT)
    for number, outcome in OUTCOMES.items():
        journal.add(number, outcome)
    journal.close()
    return journal.file


def test_outcomes_are_found_again(file: Path) -> None:
    """Bit by bit."""
    with closing(Journal(file, ABOUT)) as journal:
        assert journal.outcomes == OUTCOMES


def test_whatever_was_being_written_is_dropped(file: Path) -> None:
    """A file cut anywhere gives the outcomes of its whole lines, and takes more."""
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with closing(Journal(file, ABOUT)) as journal:
            assert journal.outcomes.items() <= OUTCOMES.items()
            assert max(0, content[:length].count(b"\n") - 1) == len(journal.outcomes)
            journal.add(9, Outcome(-3.0, False))
        with closing(Journal(file, ABOUT)) as journal:
            assert Outcome(-3.0, False) == journal.outcomes[9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"task": "other"}\n', "of something else"),
        (b"hello\nworld\n", "of something else"),
        (b"hello", "of something else"),
    ],
    ids=["other", "text", "a line without an end"],
)
def test_what_is_of_something_else_is_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    """An error names the file and the flag, and the file stays as it is."""
    file = tmp_path / "out.json.partial"
    file.write_bytes(content)
    with pytest.raises(EvaluationError, match=rf"^--out: {file}: .*{message}"):
        Journal(file, ABOUT)
    assert content == file.read_bytes()


def test_broken_lines_are_an_error(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"[1, 2]\n")
    with pytest.raises(EvaluationError, match="is no journal of an evaluation"):
        Journal(file, ABOUT)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"^--out: .*No such file"):
        Journal(tmp_path / "nowhere" / "out.json.partial", ABOUT)
