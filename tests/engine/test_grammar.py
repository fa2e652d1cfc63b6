"""Masks of real grammars over the demo model's tokens: exactly what can go on to a match, whatever was taken before."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import regex_to_lark

import service.demo
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.grammar import Constraint, GrammarError, Grammars

FOLDER = Path(service.demo.__file__).parent / "model"
END_OF_TEXT = 50256


@pytest.fixture(scope="module")
def token_bytes() -> tuple[bytes, ...]:
    return read_tokenizer(FOLDER).token_bytes


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: read_tokenizer(FOLDER), end_of_text_id=END_OF_TEXT)


def regex(pattern: str) -> str:
    return f"start: /{regex_to_lark(pattern, '')}/"


def allowed(constraint: Constraint) -> set[int]:
    words = np.zeros(-(-(END_OF_TEXT + 1) // 32), np.int32)
    constraint.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


LANGUAGES = [
    ("hello world", ["hello world"]),
    ("(?:yes)|(?:no)|(?:yes please)", ["yes", "no", "yes please"]),
    ("(?:)|a", ["", "a"]),
    ("(foo|bar)?baz{1,3}", [start + "ba" + "z" * n for start in ("", "foo", "bar") for n in (1, 2, 3)]),
    ("héllo wörld|日本語|😀 ok|a\nb", ["héllo wörld", "日本語", "😀 ok", "a\nb"]),
]


@pytest.mark.parametrize(("pattern", "language"), LANGUAGES, ids=[pattern for pattern, _ in LANGUAGES])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_exactly_what_can_go_on_is_allowed(
    grammars: Grammars, token_bytes: tuple[bytes, ...], pattern: str, language: list[str], data: st.DataObject
) -> None:
    """Each token whose bytes begin a rest of the language, also within a character; the end where a word is whole."""
    words = [word.encode() for word in language]
    constraint = grammars.compile(regex(pattern))
    done = b""
    while True:
        rests = [word[len(done) :] for word in words if word.startswith(done)]
        expected = {i for i, piece in enumerate(token_bytes) if piece and any(rest.startswith(piece) for rest in rests)}
        if b"" in rests:
            expected.add(END_OF_TEXT)
        assert expected == allowed(constraint)
        if expected == {END_OF_TEXT}:
            break
        assert not constraint.finished
        token_id = data.draw(st.sampled_from(sorted(expected)))
        if token_id == END_OF_TEXT:
            break
        constraint.accept(token_id)
        done += token_bytes[token_id]
    if done:
        assert constraint.finished == (done in words and not any(w != done and w.startswith(done) for w in words))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_any_walk_that_ends_is_a_match(grammars: Grammars, token_bytes: tuple[bytes, ...], seed: int) -> None:
    """Random allowed tokens until the grammar is finished."""
    # Not \d: its newest digits differ between Python's version of Unicode and the library's.
    pattern = "([0-9\u0966-\u096f]{1,3}-[a-fß]{2,5};){1,4}end"
    drawn = np.random.default_rng(seed)
    constraint = grammars.compile(regex(pattern))
    text = b""
    while not constraint.finished:
        token_id = int(drawn.choice(sorted(allowed(constraint))))
        constraint.accept(token_id)
        text += token_bytes[token_id]
    assert re.fullmatch(pattern, text.decode())


@pytest.mark.parametrize(("pattern", "text"), [(r"\d", "7"), (r"\d", "٣"), (r"\w", "é"), (r"\s", "\u2003")])
def test_classes_are_unicodes(grammars: Grammars, token_bytes: tuple[bytes, ...], pattern: str, text: str) -> None:
    """As in Python, not those of ASCII alone."""
    constraint = grammars.compile(regex(pattern))
    for byte in text.encode():
        constraint.accept(token_bytes.index(bytes([byte])))
    assert {END_OF_TEXT} == allowed(constraint)


LONG_PATTERNS = [
    ("a" * 2000 + "(", "unclosed group"),
    ("a " * 900 + "(", "unclosed group"),
    ("a" * 2000 + r"\b", "lookarounds not supported"),
    ("(" * 300 + ")" * 300, "maximum number of nested"),
]


@pytest.mark.parametrize(("pattern", "reason"), LONG_PATTERNS, ids=range(len(LONG_PATTERNS)))
def test_a_reason_is_told_of_a_long_pattern(grammars: Grammars, pattern: str, reason: str) -> None:
    """The library repeats the pattern around it."""
    with pytest.raises(GrammarError, match=reason) as caught:
        grammars.compile(regex(pattern))
    assert len(str(caught.value)) <= 300


def test_copies_go_their_own_ways(grammars: Grammars) -> None:
    """What one takes changes nothing of the other."""
    first = grammars.compile(regex("ab|ac"))
    second = first.copy()
    before = allowed(second)
    first.accept(next(iter(allowed(first) - {END_OF_TEXT})))
    assert before == allowed(second)
    assert allowed(first) != before


@pytest.mark.parametrize("grammar", ["start: /(/", "start: missing", 'start: %json {"type": "foo"}', "", "\ud800"])
def test_what_is_no_grammar_is_refused(grammars: Grammars, grammar: str) -> None:
    """By one exception that says why, in one line."""
    with pytest.raises(GrammarError) as caught:
        grammars.compile(grammar)
    assert "\n" not in str(caught.value)
    assert str(caught.value)


def test_a_token_that_was_not_allowed_is_an_error(grammars: Grammars, token_bytes: tuple[bytes, ...]) -> None:
    """Of this constraint, now and later."""
    constraint = grammars.compile(regex("ab"))
    with pytest.raises(GrammarError):
        constraint.accept(token_bytes.index(b"x"))
    with pytest.raises(GrammarError):
        allowed(constraint)


def test_references_as_deep_as_a_grammar_can_be_do_not_end_the_process(grammars: Grammars) -> None:
    """The library recurses along them; the thread that compiles has the stack for it."""
    items = '{"items": {"items": {"items": {"$ref": "#/$defs/d%d"}}}}'  # 8 MiB of stack end at some 450 of them
    definitions = ", ".join(f'"d{i}": {items % (i + 1)}' for i in range(900))
    grammar = f'start: %json {{"$defs": {{{definitions}, "d900": {{"type": "null"}}}}, "$ref": "#/$defs/d0"}}'
    assert len(grammar) < 65_536
    assert not grammars.compile(grammar).finished


def test_a_grammar_beyond_the_limits_is_refused_soon(grammars: Grammars) -> None:
    """A pattern whose automaton is huge: the library's fuel ends the work, not a clock."""
    with pytest.raises(GrammarError, match="too complex"):
        grammars.compile(regex(".*" * 2000))
