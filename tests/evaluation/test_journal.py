"""What a run has found outlasts it, and is only gone on with where it belongs."""

import os
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


def test_two_runs_do_not_write_one_file(file: Path) -> None:
    """The second is told so and changes nothing; it goes on once the first has let go."""
    with closing(Journal(file, ABOUT)) as journal:
        content = file.read_bytes()
        with pytest.raises(EvaluationError, match=rf"^--out: {file}: another run writes it now; wait .* another --out"):
            Journal(file, ABOUT)
        assert content == file.read_bytes()
        journal.add(9, Outcome(-3.0, False))
    with closing(Journal(file, ABOUT)) as journal:
        assert OUTCOMES | {9: Outcome(-3.0, False)} == journal.outcomes


def test_a_run_that_has_ended_leaves_the_next_a_file_of_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that opened the file just before the other took it away makes it anew."""
    first = Journal(file, ABOUT)
    really = os.open
    opened: list[int] = []

    def open_then_end(*arguments: Any) -> int:
        opened.append(really(*arguments))
        if len(opened) == 1:
            first.remove()
        return opened[-1]

    monkeypatch.setattr(os, "open", open_then_end)
    with closing(Journal(file, ABOUT)) as second:
        second.add(1, Outcome(-1.0, True))
    monkeypatch.undo()
    with closing(Journal(file, ABOUT)) as third:
        assert {1: Outcome(-1.0, True)} == third.outcomes
    assert 2 == len(opened)


def test_a_file_that_is_refused_is_let_go(file: Path) -> None:
    with pytest.raises(EvaluationError):
        Journal(file, {"task": "other"})
    Journal(file, ABOUT).close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"^--out: .*No such file"):
        Journal(tmp_path / "nowhere" / "out.json.partial", ABOUT)
