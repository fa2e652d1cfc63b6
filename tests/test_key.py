"""`megatron-gpt2 key`: by the installed command, and what it does to files that people have written."""

import hashlib
import os
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from service.api.keys import read_keys
from service.cli import main
from tests.test_cli import refusal, run

ENTRY = {"name": "alice", "sha256": "a" * 64}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_key_and_its_entry() -> None:
    """Without a file both are printed: the key first, at least 128 random bits of it, then what a file is to have."""
    limits = ["--requests-per-minute", "60", "--max-concurrent", "4", "--priority-floor", "-2"]
    done = run("key", "new", "alice", *limits)
    assert (0, "") == (done.returncode, done.stderr)
    key, entry = done.stdout.split("\n", 1)
    assert key.startswith("mgpt-")
    assert len(key) >= 5 + 22
    expected = {"requests_per_minute": 60, "max_concurrent": 4, "priority_floor": -2}
    assert [{"name": "alice", "sha256": sha256(key), **expected}] == yaml.safe_load(entry)
    assert key not in entry
    assert key != run("key", "new", "alice").stdout.split("\n", 1)[0]


def test_a_file_from_the_first_key_to_the_last(tmp_path: Path) -> None:
    """It is for its owner alone, has no key, and `list` and `remove` know each by its name."""
    file = tmp_path / "keys.yaml"
    keys = {}
    for name, *limits in (["alice", "--max-concurrent", "3"], ["bob"], ["carl"]):
        done = run("key", "new", name, "--file", str(file), *limits)
        assert (0, 1) == (done.returncode, done.stdout.count("\n"))
        keys[name] = done.stdout.strip()
        assert keys[name] not in done.stderr
    assert {name: sha256(key) for name, key in keys.items()} == {key.name: key.sha256 for key in read_keys(file)}
    assert 0o600 == stat.S_IMODE(file.stat().st_mode)
    assert not [key for key in keys.values() if key in file.read_text()]
    assert "alice max_concurrent=3\nbob\ncarl\n" == run("key", "list", "--file", str(file)).stdout
    for name, rest in (("bob", ["alice", "carl"]), ("alice", ["carl"]), ("carl", [])):
        assert 0 == run("key", "remove", name, "--file", str(file)).returncode
        assert rest == [key.name for key in read_keys(file)]
    assert [file] == list(tmp_path.iterdir()), "nothing is left beside it"


def quietly(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert 0 == main(["key", *arguments])
    return capsys.readouterr().out


def test_what_people_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments, other entries byte by byte, the mode, and a link that leads to the file."""
    file, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    head = f"# ours\n- name: alice  # since May\n  sha256: '{'a' * 64}'\n"
    file.write_text(head.removesuffix("\n"))
    file.chmod(0o640)
    link.symlink_to("real.yaml")
    quietly(capsys, "new", "bob", "--file", str(link))
    assert file.read_text().startswith(head)
    quietly(capsys, "remove", "bob", "--file", str(link))
    assert head == file.read_text()
    assert link.is_symlink()
    assert 0o640 == stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump([ENTRY], default_flow_style=True),
        f"  - name: alice\n    sha256: {'a' * 64}\n",
        f"---\n-\n  name: alice\n  sha256: {'a' * 64}\n...\n",
        f"- &x\n  name: alice\n  sha256: &y {'a' * 64}\n",
    ],
)
def test_other_ways_of_writing_yaml(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys are what they were, and the new one; a removal is one too."""
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    quietly(capsys, "new", "bob", "--file", str(file), "--max-concurrent", "2")
    assert [("alice", None), ("bob", 2)] == [(key.name, key.max_concurrent) for key in read_keys(file)]
    quietly(capsys, "remove", "alice", "--file", str(file))
    assert ["bob"] == [key.name for key in read_keys(file)]


def test_many_at_once(tmp_path: Path) -> None:
    """None is lost."""
    file = tmp_path / "keys.yaml"
    add: Callable[[int], subprocess.CompletedProcess[str]] = lambda i: run("key", "new", f"k{i}", "--file", str(file))  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert {0} == {done.returncode for done in pool.map(add, range(8))}
    assert {f"k{i}" for i in range(8)} == {key.name for key in read_keys(file)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "alice", "--file", "FILE"], "FILE: entry 2: the name alice is taken by entry 1"),
        (["new", "a b", "--file", "FILE"], "the new key: name: String should match pattern"),
        (["new", "unknown"], "the new key: name: unknown is what whoever has no key is called"),
        (["new", "bob", "--max-concurrent", "0"], "the new key: max_concurrent: Input should be greater than or equal"),
        (["new", "bob", "--priority-floor", "9" * 20], "the new key: priority_floor: Input should be less than"),
        (["new", "bob", "--file", "FOLDER/none/keys.yaml"], "FOLDER/none/keys.yaml: No such file or directory"),
        (["new", "bob", "--file", "FOLDER"], "FOLDER: Is a directory"),
        (["new", "bob", "--file", "BAD"], "BAD: entry 1: sha256: Field required"),
        (["list", "--file", "BAD"], "BAD: entry 1: sha256: Field required"),
        (["list", "--file", "FOLDER/none"], "FOLDER/none: No such file or directory"),
        (["remove", "bob", "--file", "FILE"], "FILE: there is no key bob"),
    ],
)
def test_mistakes_end_with_2_and_change_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is wrong; no key is printed that no file has."""
    file, bad = tmp_path / "keys.yaml", tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump([ENTRY]))
    bad.write_text("- name: alice\n")
    names = {"FILE": str(file), "BAD": str(bad), "FOLDER": str(tmp_path)}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
        message = message.replace(name, path)
    assert refusal(capsys, "key", *arguments).startswith(f"megatron-gpt2: {message}")
    assert [ENTRY] == yaml.safe_load(file.read_text())
    assert {file, bad} == set(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file stays as it was, and no key is printed."""
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump([ENTRY]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = f"megatron-gpt2: {file}: No space left on device"
    assert expected == refusal(capsys, "key", "new", "bob", "--file", str(file))
    assert [ENTRY] == yaml.safe_load(file.read_text())
    assert [file] == list(tmp_path.iterdir())
