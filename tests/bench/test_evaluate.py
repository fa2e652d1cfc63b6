"""The synthetic files of the evaluations' benchmark have the counts of the real ones."""

from pathlib import Path

import pytest

from bench.evaluate import NUM_LINES, NUM_TOKENS, NUM_WORDS, Words, lambada_lines, wiki_text
from service.api.text import Tokenizer, load_tokenizer
from service.evaluation import tasks
from service.evaluation.data import Data
from service.serve import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL, end_of_text_id=50256)


def test_the_wiki_file_has_the_test_set_s_words_and_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As the paper's protocol counts them, to the last: it is taken for the test set."""
    (tmp_path / "wiki").write_text(wiki_text(Words(tokenizer), 1.0))
    task = tasks.wikitext103(Data.read(tmp_path / "wiki", "--data"), tokenizer, context_length=1024)
    assert (NUM_WORDS, NUM_TOKENS) == (task.data["original_tokens"], task.data["tokens"])
    assert task.incomparable is None


def test_the_lambada_file_has_as_many_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of about 80 tokens each, and each can be scored."""
    (tmp_path / "lambada").write_text("\n".join(lambada_lines(Words(tokenizer), 1.0)) + "\n")
    task = tasks.lambada(Data.read(tmp_path / "lambada", "--data"), tokenizer, context_length=1024)
    assert NUM_LINES == len(task.items)
    assert task.incomparable is None
    assert 79 < sum(len(item.ids) for item in task.items) / NUM_LINES < 81
