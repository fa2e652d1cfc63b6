"""What of a file is scored: LAMBADA's rules, what both formats refuse, and the figures."""

import json
import math
from pathlib import Path

import pytest

from service.api.text import Tokenizer, load_tokenizer
from service.evaluation.data import Data
from service.evaluation.errors import EvaluationError
from service.evaluation.items import Outcome
from service.evaluation.tasks import Task, lambada, text, wikitext103
from service.serve import DEMO_MODEL

CONTEXT = 1024


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL, end_of_text_id=50256)


def lines_of(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": each}).encode() + b"\n" for each in texts)


def write(folder: Path, content: bytes, name: str = "lambada_test.jsonl") -> Data:
    file = folder / name
    file.write_bytes(content)
    return Data.read(file, "--data")


def decoded(task: Task, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(item.ids[: item.score_from]), tokenizer.decode(item.ids[item.score_from :]))
        for item in task.items
    ]


@pytest.mark.parametrize(
    ("passage", "context", "label"),
    [
        ("He gave it to Gabriel", "He gave it to", " Gabriel"),
        ("The dog saw the dog", "The dog saw the", " dog"),  # the word's last occurrence
        ("a  b\n Yahweh  ", "a  b", " Yahweh"),
        ("\tHe said: \u201cno\u201d", "He said:", " \u201cno\u201d"),
        ("mind over <|endoftext|>", "mind over", " <|endoftext|>"),  # plain text
    ],
)
def test_strict_is_the_last_word_of_all_tokens(
    tmp_path: Path, tokenizer: Tokenizer, passage: str, context: str, label: str
) -> None:
    """Context and word are stripped and tokenized apart, the word after one space."""
    task = lambada(write(tmp_path, lines_of(passage)), tokenizer, context_length=CONTEXT)
    assert [(context, label)] == decoded(task, tokenizer)
    (item,) = task.items
    assert list(item.ids[: item.score_from]) == tokenizer.encode([context], split_special=True)[0]


def test_not_strict_is_the_last_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of the passage as it stands."""
    passage = "He gave it to Nebuchadnezzar"
    (item,) = lambada(write(tmp_path, lines_of(passage)), tokenizer, context_length=CONTEXT, strict=False).items
    assert tokenizer.encode([passage])[0] == list(item.ids)
    assert 1 == len(item.ids) - item.score_from


BAD_LINES = {
    b"": "it is empty",
    b"   ": "it is empty",
    b'{"text": "a b"': "it is no JSON",
    b'{"text": "caf\xe9 b"}': "it is not UTF-8",
    b'["a b"]': 'no JSON object with a string "text"',
    b'{"text": 5}': 'no JSON object with a string "text"',
    b'{"texts": "a b"}': 'no JSON object with a string "text"',
    b'{"text": " "}': 'its "text" is empty',
    b'{"text": "a \\ud83d"}': "half a surrogate pair",
    b'{"text": "alone"}': "nothing comes before its last word",
    b"[" * 60_000: "it is no JSON",
    b'{"text": "' + b"a " * 40_000 + b'"}': "bytes are more than 65,536",
    b'{"text": "' + b"a " * 1100 + b'"}': "tokens are more than 1025",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes) -> None:
    """By its number and its fault; where lines are skipped, it is in the report and counted nowhere else."""
    data = write(tmp_path, lines_of("one two") + line + b"\n" + lines_of("three four"))
    with pytest.raises(EvaluationError) as caught:
        lambada(data, tokenizer, context_length=CONTEXT)
    assert f"--data: {data.file}: line 2: " in str(caught.value)
    assert BAD_LINES[line] in str(caught.value)
    assert len(str(caught.value)) < 400
    task = lambada(data, tokenizer, context_length=CONTEXT, skip_bad_lines=True)
    assert [("one", " two"), ("three", " four")] == decoded(task, tokenizer)
    (skipped,) = task.skipped
    assert 2 == skipped["line"]
    assert BAD_LINES[line] in skipped["reason"]
    assert (3, 2) == (task.data["lines"], task.data["lines_scored"])


def test_many_bad_lines_are_named_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write(tmp_path, b"x\n" * 3 + lines_of("alone", "one two") + b"x\n" * 5)
    with pytest.raises(EvaluationError) as caught:
        lambada(data, tokenizer, context_length=CONTEXT)
    places = [str(caught.value).find(f"line {number}:") for number in range(1, 11)]
    assert [place > 0 for place in places] == [True] * 4 + [False, True] + [False] * 4
    assert sorted(place for place in places if place > 0) == [place for place in places if place > 0]
    assert "; and 4 more" in str(caught.value)


def test_a_file_without_a_good_line_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(EvaluationError, match="no line that can be used: line 1"):
        lambada(write(tmp_path, b"x\n"), tokenizer, context_length=CONTEXT, skip_bad_lines=True)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, empty, too large: the flag and the file are named."""
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_bytes(b" \n \n")
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(2**25 + 1)
    for file, message in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "blank", "is empty"),
        (large, "33,554,433 bytes are more than 33,554,432"),
    ):
        with pytest.raises(EvaluationError, match=f"^--flag: {file}: .*{message}"):
            Data.read(file, "--flag")


@pytest.mark.parametrize("task", [wikitext103, text])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one two\nthree\ncaf\xe9 four\n", "line 3: is not UTF-8"),
        ("one\ntwo".encode("utf-16-le"), "line 1: has a byte of zeros"),
        ("one\ntwo".encode("utf-16"), "line 1: has a byte of zeros"),
        ("one".encode("utf-8-sig"), "line 1: begins with a byte order mark"),
    ],
    ids=["latin-1", "utf-16 without a mark", "utf-16", "utf-8 with a mark"],
)
def test_a_wrong_encoding_is_named_by_its_line(
    tmp_path: Path, tokenizer: Tokenizer, task: type[Task], content: bytes, message: str
) -> None:
    data = write(tmp_path, content, "wiki.test.tokens")
    with pytest.raises(EvaluationError, match=f"{data.file}: {message}"):
        task(data, tokenizer, context_length=CONTEXT)


@pytest.mark.parametrize("stride", [0, -1, 1025])
def test_a_stride_out_of_range(tmp_path: Path, tokenizer: Tokenizer, stride: int) -> None:
    """Above the context it would leave tokens out."""
    for task in (wikitext103, text):
        with pytest.raises(EvaluationError, match=rf"^--stride: must be from 1 to 1024.*\(got {stride}\)"):
            task(write(tmp_path, b"one two three"), tokenizer, context_length=CONTEXT, stride=stride)


def test_wikitext_counts_words_of_the_raw_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Pieces between spaces of the stripped file, line ends being none; tokens of the detokenized one."""
    raw = " \n = Title = \n \n a well @-@ known man 's  word . \n "
    task = wikitext103(write(tmp_path, raw.encode()), tokenizer, context_length=CONTEXT)
    assert len(raw.strip().split(" ")) == task.data["original_tokens"] == 14
    (item,) = task.items
    assert "\n= Title =\n\na well-known man's  word.\n" == tokenizer.decode(item.ids)
    assert len(item.ids) == task.data["tokens"]
    found = task.figures([Outcome(-10.0, False)])
    assert 10 / (len(item.ids) - 1) == found["loss"]
    assert math.exp(10 / 13) == pytest.approx(found["adjusted_perplexity"])
    assert math.exp(20) == task.figures([Outcome(-1e6, False)])["perplexity"]


def test_text_begins_with_the_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """So that its first token is scored too; spelled out, the end of text is one token. Bits and words are counted."""
    task = text(write(tmp_path, "naïve\n<|endoftext|>two words\n".encode()), tokenizer, context_length=CONTEXT)
    (item,) = task.items
    assert 1 == item.score_from
    assert 50256 == item.ids[0]
    assert 2 == item.ids.count(50256)
    found = task.figures([Outcome(-30.0, False)])
    assert 1 / math.log(2) == pytest.approx(found["bits_per_byte"])
    assert math.exp(30 / 3) == pytest.approx(found["word_perplexity"])
    assert len(item.ids) - 1 == found["tokens_scored"]


def test_accuracy_is_of_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = lambada(write(tmp_path, lines_of(*["a b"] * 4)), tokenizer, context_length=CONTEXT)
    found = task.figures([Outcome(-1.0, True), Outcome(-2.0, False), Outcome(-3.0, True), Outcome(-4.0, True)])
    assert (3, 0.75) == (found["correct"], found["accuracy"])
    assert math.exp(2.5) == pytest.approx(found["perplexity"])
    assert found["accuracy_interval"][0] < 0.75 < found["accuracy_interval"][1]
