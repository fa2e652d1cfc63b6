"""Keys: what a file of them may say, what a refusal tells, and a file that changes while it is used."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from service.api.keys import MAX_KEYS, AccessError, Key, Keys, named_keys, parse_keys, read_keys
from tests.api.clock import Clock

SECRET = "mgpt-the-secret-of-nobody"
FILE = Path("keys.yaml")


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, key: str | None = None, **limits: int) -> dict[str, str | int]:
    return {"name": name, "sha256": sha256(key or name), **limits}


def written(*entries: dict[str, str | int]) -> bytes:
    return yaml.safe_dump(list(entries)).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(AccessError) as error:
        parse_keys(data, FILE)
    assert "\n" not in str(error.value), "one line"
    assert SECRET not in str(error.value)
    return str(error.value)


def test_a_file_of_keys() -> None:
    """Name and hash, and the limits that are given; the others are none. A repr has no hash."""
    keys = parse_keys(written(entry("a"), entry("b", requests_per_minute=3, max_concurrent=2, priority_floor=-1)), FILE)
    assert (Key(name="a", sha256=sha256("a")), "b", 3, 2, -1) == (
        keys[0],
        keys[1].name,
        keys[1].requests_per_minute,
        keys[1].max_concurrent,
        keys[1].priority_floor,
    )
    assert sha256("b") not in repr(keys)
    assert () == parse_keys(b"[]", FILE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "keys.yaml: expected a list"),
        (b"# nothing\n", "keys.yaml: expected a list"),
        (SECRET.encode(), "keys.yaml: expected a list"),
        (b"a: {name: a}", "keys.yaml: expected a list"),
        (f"- [{SECRET}\n- {{".encode(), "keys.yaml: line 2: not readable as YAML"),
        (f"- &{SECRET} !!python/name:os.system {SECRET}".encode(), "keys.yaml: line 1: not readable as YAML"),
        (b"\xff\xfe\x00", "keys.yaml: not readable as YAML"),
        (b"- 2024-99-99\n", "keys.yaml: not readable as YAML"),
        (b"[" * 5000, "keys.yaml: "),
        (f"- {SECRET}".encode(), "keys.yaml: entry 1: expected a table with name and sha256"),
        (written({"name": "a"}), "keys.yaml: entry 1: sha256: Field required"),
        (written(entry("a"), {"sha256": sha256("b")}), "keys.yaml: entry 2: name: Field required"),
        (written({"name": "a", "sha256": SECRET}), "keys.yaml: entry 1: sha256: String should match"),
        (written({"name": "a", "sha256": sha256("a").upper()}), "keys.yaml: entry 1: sha256: String should match"),
        (written(entry("a b")), "keys.yaml: entry 1: name: String should match"),
        (written(entry("a\n")), "keys.yaml: entry 1: name: String should match"),
        (written(entry("")), "keys.yaml: entry 1: name: String should match"),
        (written(entry("x" * 65)), "keys.yaml: entry 1: name: String should match"),
        (written(entry("unknown")), "keys.yaml: entry 1: name: unknown is what whoever has no key is called"),
        (b"- {name: 7, sha256: x}", "keys.yaml: entry 1: name: Input should be a valid string"),
        (written(entry("a", max_concurrent=0)), "keys.yaml: entry 1: max_concurrent: Input should be greater"),
        (written(entry("a", requests_per_minute=True)), "keys.yaml: entry 1: requests_per_minute: Input should be"),
        (written(entry("a", priority_floor=101)), "keys.yaml: entry 1: priority_floor: Input should be less"),
        (written({**entry("a"), "key": SECRET}), "keys.yaml: entry 1: key: Extra inputs are not permitted"),
        (written(entry("a"), entry("b"), entry("a", "c")), "keys.yaml: entry 3: the name a is taken by entry 1"),
        (written(entry("a"), entry("b", "a")), "keys.yaml: entry 2: the same key as entry 1"),
        (written(*(entry(f"k{i}") for i in range(MAX_KEYS + 1))), "keys.yaml: 1001 keys are more than 1000"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(data: bytes, message: str) -> None:
    """It names the file and the entry, and quotes nothing that may be a key."""
    assert refusal(data).startswith(message)


@given(st.binary(max_size=200))
def test_any_bytes_are_keys_or_are_refused(data: bytes) -> None:
    try:
        keys = parse_keys(data, FILE)
    except AccessError:
        assert refusal(data).startswith("keys.yaml: ")
    else:
        assert len(keys) == len({key.name for key in keys})


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=f"^{tmp_path / name}: (No such file|Is a directory)"):
        read_keys(tmp_path / name)


def test_keys_of_the_setting() -> None:
    """They are called by their number. What no header can carry is refused, and a key that is there twice."""
    assert [("key-1", sha256("k")), ("key-2", sha256("l"))] == [
        (key.name, key.sha256) for key in named_keys(["k", "l"])
    ]
    for keys, message in (
        (["caf\xe9" + SECRET], "api_key: key 1 has characters"),
        (["k", f"a {SECRET}"], "api_key: key 2 has characters"),
        (["k", SECRET, SECRET], "api_key: entry 3: the same key as entry 2"),
    ):
        with pytest.raises(AccessError, match=message) as error:
            named_keys(keys)
        assert SECRET not in str(error.value)


# A file that changes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_bytes(written(entry("a")))
    return path


def names(keys: Keys, clock: Clock) -> list[str]:
    clock.now += 1
    return [key.name for key in keys.current()]


def replace(file: Path, content: bytes) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(content)
    os.replace(other, file)


@pytest.mark.parametrize("write", [Path.write_bytes, replace], ids=["in place", "replaced"])
def test_a_change_is_in_force_within_a_second(file: Path, write: Callable[[Path, bytes], object]) -> None:
    """Not before one has passed since the last look. The keys of the setting stay; nothing is made anew without one."""
    clock = Clock()
    keys = Keys(named_keys(["k"]), file, clock=clock)
    before = keys.current()
    write(file, written(entry("b")))
    clock.now += 0.99
    assert keys.current() is before
    clock.now += 0.01
    assert ["key-1", "b"] == [key.name for key in keys.current()]
    clock.now += 10
    assert keys.current() is keys.current()


def test_a_link_that_is_swapped(tmp_path: Path) -> None:
    """As Kubernetes changes a Secret: the file is a link into a folder whose own link is replaced."""
    for version in ("a", "b"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "keys.yaml").write_bytes(written(entry(version)))
        os.utime(tmp_path / f"..{version}" / "keys.yaml", ns=(0, 0))
    (tmp_path / "..data").symlink_to("..a")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    clock = Clock()
    keys = Keys((), tmp_path / "keys.yaml", clock=clock)
    assert ["a"] == names(keys, clock)
    (tmp_path / "..tmp").symlink_to("..b")
    os.replace(tmp_path / "..tmp", tmp_path / "..data")
    assert ["b"] == names(keys, clock)


def test_a_file_that_has_become_bad_or_is_away(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The keys before it stay, each change is one error, and what comes after it is read."""
    clock = Clock()
    keys = Keys(named_keys(["k"]), file, clock=clock)
    for number, content in enumerate((f"- {SECRET}".encode(), b"", None, written(entry("b", "k"))), 1):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        for _ in range(3):
            assert ["key-1", "a"] == names(keys, clock)
        assert number == sum(record.levelno == logging.ERROR for record in caplog.records)
    assert "entry 1: the same key as key-1 of api_key" in caplog.text
    assert SECRET not in caplog.text
    file.write_bytes(written())
    assert ["key-1"] == names(keys, clock)
