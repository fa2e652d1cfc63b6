"""Tokenizer files: what is read, and what is refused before it could stream wrong text."""

import json
import shutil
from pathlib import Path

import pytest

from service.checkpoint.errors import CheckpointError
from service.checkpoint.tokenizer import read_tokenizer
from service.serve import DEMO_MODEL


def write(folder: Path, vocabulary: dict[str, int]) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def test_vocab_and_merges_alone_are_a_tokenizer() -> None:
    """All of GPT-2's 50,257 tokens, each its own bytes."""
    assert 50257 == len(set(read_tokenizer(DEMO_MODEL).token_bytes))


def test_missing_files_are_named(tmp_path: Path) -> None:
    """Both forms, and the folder."""
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: has neither tokenizer\.json nor both"):
        read_tokenizer(tmp_path)
    shutil.copy(DEMO_MODEL / "vocab.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor both"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "\0"])
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, text: str) -> None:
    """Also beside good files of the other form: the first that is there counts."""
    write(tmp_path, {"a": 0})
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("last", "seen"), [(5, 2), (50300, 2)])
def test_ids_with_a_gap_are_refused(tmp_path: Path, last: int, seen: int) -> None:
    """The error names the first id that is missing or too many."""
    write(tmp_path, {"a": 0, "b": 1, "c": last})
    with pytest.raises(CheckpointError, match=rf"vocab\.json: its 3 ids are not 0 to 2: see {seen}"):
        read_tokenizer(tmp_path)


def test_a_token_outside_the_alphabet_is_refused(tmp_path: Path) -> None:
    """A vocabulary that is not byte-level would stream wrong text."""
    write(tmp_path, {"a": 0, "\u65e5": 1, "<|endoftext|>": 2})
    with pytest.raises(CheckpointError, match="token 1 is not spelled in the byte-level alphabet"):
        read_tokenizer(tmp_path)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    """Word pieces and the like have no bytes of their own."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        read_tokenizer(tmp_path)
