"""Bytes that are nearly right: some are changed, left out, doubled or put in. What must hold is the targets' own."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import right, seeds, wrong
from tests.fuzz.targets import TARGETS

SEEDS = seeds()
RIGHT = [(target, data) for target, found in right().items() for data in found]
WRONG = [(target, data) for target, found in wrong().items() for data in found]
_PEAK = Path("/proc/self/clear_refs")  # Linux: a 5 sets the peak back to what is held now
_MAX_GROWTH_BYTES = 256 * 2**20  # of the process, by a file of kilobytes

# What numbers, lengths and texts are broken with.
PIECES = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xff" * 8,
        b"\x7f" * 8,
        b"\0" * 8,
        b"-",
        b"-1",
        b"0",
        b"1e999",
        b"9" * 30,
        b"NaN",
        b"null",
    ),
    *(b"true", b"{}", b"[]", b'""', b"[" * 50, b'{"a":' * 50, b'"\\ud800"', b"\xed\xa0\x80", b"../", b"/", b"\n", b","),
    *(b"%", b"\x93", b"\xdd\xff\xff\xff\xff", b"\x80\x02", b".", b"R", b"PK\x03\x04", b"(", b"*{1000000}", b"|", b"\\"),
)


@st.composite
def broken(draw: st.DrawFn, target: str) -> bytes:
    """A seed, changed in one to six places; most of the time near its head, where sizes stand."""
    data = draw(st.sampled_from(SEEDS[target]))
    for _ in range(draw(st.integers(1, 6))):
        end = draw(st.sampled_from([16, 100, len(data)]))
        start = draw(st.integers(0, min(end, len(data))))
        length = draw(st.sampled_from([0, 0, 1, 1, 2, 8, 1000]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=4) | st.just(data[start : start + length] * 2))
        data = data[:start] + piece + data[start + length :]
    return data


def peak_bytes() -> int:
    """The most that the process has held since the peak was set back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def check(target: str, data: bytes) -> bool:
    if not _PEAK.exists():
        return TARGETS[target](data)
    _PEAK.write_text("5")
    before = peak_bytes()
    taken = TARGETS[target](data)
    assert peak_bytes() - before < _MAX_GROWTH_BYTES
    return taken


@pytest.mark.skipif(not _PEAK.exists(), reason=f"no {_PEAK}: what a target holds cannot be seen, and is not bounded")
def test_what_a_target_holds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process has held more before."""
    bytearray(4 * _MAX_GROWTH_BYTES).count(0)
    monkeypatch.setitem(TARGETS, "greedy", lambda data: bool(bytearray(2 * _MAX_GROWTH_BYTES).count(0)))
    with pytest.raises(AssertionError):
        check("greedy", b"")


@pytest.mark.parametrize(("target", "data"), RIGHT, ids=[target for target, _ in RIGHT])
def test_right_bytes_are_taken(target: str, data: bytes) -> None:
    assert check(target, data)


@pytest.mark.parametrize(("target", "data"), WRONG, ids=[target for target, _ in WRONG])
def test_wrong_bytes_are_refused(target: str, data: bytes) -> None:
    assert not check(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_that_are_cut_off_are_taken_or_refused(target: str) -> None:
    """Anywhere."""
    for data in SEEDS[target]:
        for end in range(0, len(data), max(1, len(data) // 50)):
            check(target, data[:end])


@pytest.mark.parametrize("target", TARGETS)
def test_broken_bytes_are_taken_or_refused(target: str) -> None:
    """By the errors that are meant for them, in little memory."""

    @settings(max_examples=300, deadline=None)
    @given(broken(target))
    def run(data: bytes) -> None:
        check(target, data)

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_refused(target: str) -> None:
    """Without a grain of sense in them."""

    @settings(max_examples=50, deadline=None)
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        check(target, data)

    run()
