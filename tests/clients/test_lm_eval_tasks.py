"""lm-evaluation-harness's own tasks `lambada_openai` and `wikitext`, over local files, beside `megatron-gpt2 eval`.

They agree where the protocols do, and differ where docs/evaluation.md says so.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import lm_eval.tasks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from service.evaluation.detokenizer import detokenize
from tests.clients.conftest import CONTEXT, MODEL, ROOT, Server
from tests.service.server import COMMAND

TASKS = Path(lm_eval.tasks.__file__).parent
LAMBADA, WIKITEXT = TASKS / "lambada" / "lambada_openai.yaml", TASKS / "wikitext" / "wikitext.yaml"
PARAGRAPHS = [line for line in (ROOT / "tests/data/held_out.txt").read_text().splitlines() if len(line.split()) > 8]
# Beginnings of them, the last word after a single space. The demo model finds it in some.
PASSAGES = [
    " ".join(words[:num_words])
    for words in (paragraph.split() for paragraph in PARAGRAPHS)
    for num_words in (9, 20, 33, 52)
    if num_words <= len(words)
][:40]
# As WikiText has them, with every rule of the detokenizer.
PAGE = (
    " \n = Robert <unk> ( actor ) = \n \n The players ' union paid $ 1 @,@ 000 @,@ 000 , i.e. 2 @.@ 5 % , for a "
    "well @-@ known play ; it was called ' Herons ' : a success ! Was it [ sic ] ? It was { really } so . He said \" "
    "it 's mine \" , at 20 ° C , in N parts , /' [0-9]/ . \n \n = = Career = = \n \n = = = 2000 @-@ 2005 = = = \n \n "
    '= = = = Film = = = = \n \n In 2004 <unk> landed a role as " Craig " in the episode " Teddy \'s Story " . \n '
)
# Texts that the detokenizer leaves as they are, of less than a context and of several.
SHORT = " ".join(PARAGRAPHS)[:2000]
LONG = "\n".join(PARAGRAPHS).translate({ord(quote): None for quote in "\"'"})


@pytest.fixture(scope="module")
def harness(server: Server) -> Any:
    """The harness's client of the service, with the arguments of docs/evaluation.md."""
    url = f"{server.url}/v1/completions"
    return get_model("local-completions")(base_url=url, model=MODEL, max_length=CONTEXT, tokenizer_backend="auto")


def write_task(folder: Path, name: str, like: Path, rows: list[dict[str, str]]) -> None:
    """The harness's own task under another name, over `rows` instead of the hub's data set."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "include": str(like),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "training_split": None,
        "validation_split": None,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def by_harness(model: Any, folder: Path, like: Path, rows: list[dict[str, str]]) -> dict[str, float]:
    """What the harness finds, by metric."""
    write_task(folder, "ours", like, rows)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=["ours"], task_manager=manager, bootstrap_iters=0)
    return {name.partition(",")[0]: value for name, value in results["results"]["ours"].items()}


def by_eval(task: str, file: Path, *arguments: str) -> dict[str, Any]:
    """The figures of `megatron-gpt2 eval`."""
    data = [str(file)] if task == "text" else ["--data", str(file)]
    out = file.with_name("report.json")
    subprocess.run([COMMAND, "eval", task, *data, "--out", str(out), *arguments], check=True, capture_output=True)
    report: dict[str, Any] = json.loads(out.read_text())
    return report["figures"] | {"skipped": report["skipped"]}


def by_both(harness: Any, folder: Path, texts: list[str], *arguments: str) -> list[tuple[bool, float]]:
    """Accuracy and perplexity of `texts`, by lambada_openai and then by `eval lambada`."""
    theirs = by_harness(harness, folder, LAMBADA, [{"text": text} for text in texts])
    file = folder / "lambada_test.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = by_eval("lambada", file, *arguments)
    return [(theirs["acc"], theirs["perplexity"]), (ours["accuracy"], ours["perplexity"])]


# LAMBADA


def test_lambada_is_the_same(server: Server, harness: Any, tmp_path: Path) -> None:
    """Where each last word stands after one space: the same accuracy, and perplexity to 1e-4, also without a server."""
    theirs, there = by_both(harness, tmp_path, PASSAGES, "--url", server.url)
    here = by_eval("lambada", tmp_path / "lambada_test.jsonl", "--kv-memory", "256MiB", "--cpu-threads", "1")
    assert theirs[0] == there[0] == here["accuracy"]
    assert theirs[1] == pytest.approx(there[1], rel=1e-4)
    assert theirs[1] == pytest.approx(here["perplexity"], rel=1e-4)
    assert 3 < here["correct"] < len(PASSAGES)


def test_a_word_of_several_tokens(server: Server, harness: Any, tmp_path: Path) -> None:
    """Right only where each of its tokens is the likeliest, in both."""
    right = "Mr. Speaker, Mr. Vice President, Members of Congress, distinguished guests,"  # " guests" and ","
    wrong = "Mr. Speaker, Mr. Vice President, Members of Congress, distinguished guests."
    assert right in PARAGRAPHS[-1] or any(right in paragraph for paragraph in PARAGRAPHS)
    for text, expected in ((right, 1), (wrong, 0)):
        theirs, ours = by_both(harness, tmp_path, [text], "--url", server.url)
        assert expected == theirs[0] == ours[0]


def test_other_spaces_are_taken_otherwise(server: Server, harness: Any, tmp_path: Path) -> None:
    """`eval` strips the context and puts one space before the word, whatever was there, as Megatron-LM does. The
    harness splits at single spaces alone, and scores what is there."""
    start, word = "He said that he was a", "man"
    plain, expected = by_both(harness, tmp_path, [f"{start} {word}"], "--url", server.url)
    assert plain[1] == pytest.approx(expected[1], rel=1e-4)
    before = [f"{start}{spaces}{word}" for spaces in ("  ", "\n", "\t", "\u00a0")]
    texts = [*before, f"{start} {word} ", f"{start} {word}\n", f" {start} {word}"]
    _, ours = by_both(harness, tmp_path, texts, "--url", server.url)
    assert ours[0] == expected[0]
    assert ours[1] == pytest.approx(expected[1], rel=1e-4)
    for text in texts:
        theirs = by_harness(harness, tmp_path, LAMBADA, [{"text": text}])
        assert theirs["perplexity"] != pytest.approx(expected[1], rel=0.01), repr(text)


def test_lines_that_eval_refuses(server: Server, harness: Any, tmp_path: Path) -> None:
    """A word with nothing before it, which the harness scores after an end of text, and a line longer than the context,
    which it cuts at the left."""
    long = "x " * 1100 + PASSAGES[0]
    theirs, ours = by_both(harness, tmp_path, ["Once", long, PASSAGES[0]], "--skip-bad-lines", "--url", server.url)
    assert ours[1] != pytest.approx(theirs[1], rel=0.01)
    skipped = by_eval("lambada", tmp_path / "lambada_test.jsonl", "--skip-bad-lines", "--url", server.url)["skipped"]
    assert [1, 2] == [each["line"] for each in skipped]


def test_an_end_of_text_within_a_line(server: Server, harness: Any, tmp_path: Path) -> None:
    """To the harness it is that token, in `eval` plain text, as a file's text is."""
    context, word = "The end.<|endoftext|>My fellow citizens of the Senate and of the House of", " Representatives"
    theirs, ours = by_both(harness, tmp_path, [context + word], "--url", server.url)
    assert theirs[1] != pytest.approx(ours[1], rel=1e-3)
    items = [{"context": context, "continuation": word}]  # whose text is read as the harness's
    (result,) = httpx.post(f"{server.url}/v1/score", json={"items": items}).json()["results"]
    assert theirs[1] == pytest.approx(math.exp(-result["logprob"]), rel=1e-4)


# WikiText


def test_the_detokenizer_is_the_harness_s() -> None:
    """Character by character, on a page with every rule, each of which changes it."""
    assert wikitext_detokenizer({"page": PAGE}) == detokenize(PAGE)
    for mark in (
        "@-@",
        "@,@",
        "@.@",
        " 's",
        " ,",
        " .",
        " ;",
        " :",
        " !",
        " ?",
        "( ",
        "[ ",
        "{ ",
        "= =",
        " ° ",
        " N ",
        " \n",
    ):
        assert mark in PAGE
        assert mark not in detokenize(PAGE)


_PIECES = [*" \n'\"()[]{}=°,.:;!?-/0N", "s", "'s", " @-@ ", " @,@ ", " @.@ ", "= = ", "word", "é", "/' [0-9]/", "\t"]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(_PIECES), max_size=40).map("".join))
def test_the_detokenizer_is_the_harness_s_on_any_text(text: str) -> None:
    """Whatever the marks stand next to."""
    assert wikitext_detokenizer({"page": text}) == detokenize(text)


def test_a_text_within_the_context_is_the_same(server: Server, harness: Any, tmp_path: Path) -> None:
    """One window after an end of text in both: bits per byte and word perplexity are those of `eval text`."""
    assert SHORT == detokenize(SHORT) == SHORT.strip()
    theirs = by_harness(harness, tmp_path, WIKITEXT, [{"page": SHORT}])
    (tmp_path / "short.txt").write_text(SHORT)
    ours = by_eval("text", tmp_path / "short.txt", "--url", server.url)
    assert ours["tokens_scored"] <= CONTEXT - 2
    assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    assert theirs["byte_perplexity"] == pytest.approx(2 ** ours["bits_per_byte"], rel=1e-5)
    assert theirs["word_perplexity"] == pytest.approx(ours["word_perplexity"], rel=1e-5)


def test_a_page_of_wikitext_is_counted_by_its_raw_text(server: Server, harness: Any, tmp_path: Path) -> None:
    """Both score the detokenized text; the harness divides by the bytes and words of the page as it was, of which those
    between its ends and its first and last word count too."""
    theirs = by_harness(harness, tmp_path, WIKITEXT, [{"page": PAGE}])
    (tmp_path / "page.txt").write_text(detokenize(PAGE))
    ours = by_eval("text", tmp_path / "page.txt", "--url", server.url)
    loss = ours["loss"] * ours["tokens_scored"]
    assert theirs["bits_per_byte"] == pytest.approx(loss / math.log(2) / len(PAGE.encode()), rel=1e-5)
    assert theirs["word_perplexity"] == pytest.approx(math.exp(loss / len(re.split(r"\s+", PAGE))), rel=1e-5)
    assert len(re.split(r"\s+", PAGE)) == len(PAGE.split()) + 2


def test_a_longer_text_has_other_windows(server: Server, harness: Any, tmp_path: Path) -> None:
    """The harness's windows of 1,022 tokens begin with one token of context, but for the last, which is filled up with
    it: no stride gives the same, though it is near."""
    assert LONG == detokenize(LONG)
    theirs = by_harness(harness, tmp_path, WIKITEXT, [{"page": LONG}])["bits_per_byte"]
    (tmp_path / "long.txt").write_text(LONG)
    for stride in (512, CONTEXT - 2, CONTEXT):
        ours = by_eval("text", tmp_path / "long.txt", "--stride", str(stride), "--url", server.url)["bits_per_byte"]
        assert theirs == pytest.approx(ours, rel=0.02)
        assert theirs != pytest.approx(ours, rel=1e-4)


# The command


def test_the_documented_command(server: Server, tmp_path: Path) -> None:
    """That of docs/evaluation.md, over local data, its first task by the page's file for one: it ends well, and its
    results have both tasks."""
    page = (ROOT / "docs/evaluation.md").read_text()
    found = re.search(r"^\$ (lm_eval .*)$", page, re.MULTILINE)
    assert found is not None
    command = found[1].replace("http://127.0.0.1:8000", server.url)
    (task,) = re.findall(r"^```yaml\n(include: .*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "local_lambada.yaml").write_text(task.replace("/path/to/lm_eval/tasks", str(TASKS)))
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES[:5]))
    write_task(tmp_path, "local_wikitext", WIKITEXT, [{"page": PAGE}])
    command = command.replace("lambada_openai,wikitext", "local_lambada,local_wikitext")
    words = [word.replace("results", str(tmp_path / "results")) for word in shlex.split(command)]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    subprocess.run([*words, "--include_path", str(tmp_path)], check=True, capture_output=True, cwd=tmp_path)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    assert {"local_lambada", "local_wikitext"} == figures.keys()
    assert {"acc,none", "perplexity,none"} <= figures["local_lambada"].keys()
    assert {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"} <= figures["local_wikitext"].keys()
