"""The evaluations give what transformers gives, one window at a time, by Megatron-LM's own masks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from service.cli import main
from service.evaluation.detokenizer import detokenize
from service.serve import DEMO_MODEL
from tests.evaluation.test_items import megatron_targets

HELD_OUT = (Path(__file__).parents[1] / "data" / "held_out.txt").read_text()
# As WikiText has it: headings, empty lines, spaces around marks; and it ends in the middle of a line.
WIKI = (
    " \n = A title = \n \n"
    + HELD_OUT[:6500].replace(",", " ,").replace("-", " @-@ ").replace("\n", " \n ")
    + "\n \n= ="
)
TEXTS = {"wiki": WIKI, "short": " = Title = \n \n Few words , and no more . \n", "one window": WIKI[:4000] + "\n\n\n"}


class Slow:
    """transformers, a window at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(folder).eval()
        self.tokenizer = GPT2Tokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, split_special_tokens=True)["input_ids"])

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Any:
        """[T - 1, V] of the tokens that follow."""
        return F.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)

    def loss(self, ids: list[int], *, width: int, stride: int) -> float:
        """The sum over a text's targets."""
        found = 0.0
        by_window: dict[int, list[int]] = {}
        for window, target in megatron_targets(len(ids), width=width, stride=stride):
            by_window.setdefault(window, []).append(target)
        for window, targets in by_window.items():
            start = window * stride
            logprobs = self.logprobs(ids[start : start + width])
            found -= sum(logprobs[target - 1 - start, ids[target]].item() for target in targets)
        return found


@pytest.fixture(scope="module")
def slow(small_model: Path) -> Slow:
    return Slow(small_model)


def evaluate(model: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of a run in this process."""
    out = folder / "report.json"
    task, *rest = arguments
    assert 0 == main(["eval", task, *rest, "--model", str(model), "--out", str(out), "--device", "cpu"])
    assert [] == list(folder.glob("*.partial"))
    report: dict[str, Any] = json.loads(out.read_text())
    return report


@pytest.mark.parametrize("stride", [32, 512, 1024])
@pytest.mark.parametrize("name", TEXTS)
def test_wikitext_is_transformers(slow: Slow, small_model: Path, tmp_path: Path, name: str, stride: int) -> None:
    """The loss within 1e-4 for each stride, over the ends of files and empty lines; perplexities follow from it."""
    file = tmp_path / "wiki.test.tokens"
    file.write_text(TEXTS[name])
    report = evaluate(small_model, tmp_path, "wikitext103", "--data", str(file), "--stride", str(stride))
    ids = slow.ids(detokenize(TEXTS[name]))
    loss = slow.loss(ids, width=1024, stride=stride) / (len(ids) - 1)
    figures = report["figures"]
    assert abs(loss - figures["loss"]) <= 1e-4
    num_words = len(TEXTS[name].strip().split(" "))
    assert math.exp(loss * (len(ids) - 1) / (num_words - 1)) == pytest.approx(figures["adjusted_perplexity"], rel=1e-3)
    assert (num_words, len(ids)) == (report["data"]["original_tokens"], report["data"]["tokens"])
    assert report["verdict"].startswith("not to be compared with the paper's 19.31")


@pytest.mark.parametrize("strict", [True, False])
def test_lambada_is_transformers(tmp_path: Path, strict: bool) -> None:
    """A line is right where each token of the word is the likeliest; the perplexity is the word's."""
    slow = Slow(DEMO_MODEL)
    passages = [" ".join(line.split()[:25]) for line in HELD_OUT.splitlines() if len(line.split()) > 5][:10]
    for passage in passages[:6]:  # with the word that the model itself would say
        word = slow.tokenizer.decode(slow.logprobs(slow.ids(passage))[-1].argmax())
        passages.append(passage + word if word.startswith(" ") else passage)
    file = tmp_path / "lambada_test.jsonl"
    file.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    arguments = ["--data", str(file), "--strict" if strict else "--no-strict"]
    figures = evaluate(DEMO_MODEL, tmp_path, "lambada", *arguments)["figures"]
    hits, total = 0, 0.0
    for passage in passages:
        if strict:
            word = passage.split()[-1]
            context, label = slow.ids(passage[: passage.rfind(word)].strip()), slow.ids(" " + word)
        else:
            *context, last = slow.ids(passage)
            label = [last]
        logprobs = slow.logprobs([*context, *label])[len(context) - 1 : -1]
        hits += logprobs.argmax(-1).tolist() == label
        total += logprobs[range(len(label)), label].sum().item()
    assert hits == figures["correct"]
    assert hits / len(passages) == figures["accuracy"]
    assert math.exp(-total / len(passages)) == pytest.approx(figures["perplexity"], rel=1e-3)
    assert 0 < hits < len(passages)


@pytest.mark.parametrize("stride", [None, 300])
def test_text_is_transformers(slow: Slow, small_model: Path, tmp_path: Path, stride: int | None) -> None:
    """After an end of text; 512 apart, if nothing is said."""
    file = tmp_path / "text.txt"
    file.write_text(HELD_OUT)
    arguments = [] if stride is None else ["--stride", str(stride)]
    report = evaluate(small_model, tmp_path, "text", str(file), *arguments)
    ids = [50256]
    for number, document in enumerate(HELD_OUT.split("<|endoftext|>")):
        ids += [*([50256] if number else []), *slow.ids(document)]
    loss = slow.loss(ids, width=1024, stride=stride or 512)
    assert abs(loss / (len(ids) - 1) - report["figures"]["loss"]) <= 1e-4
    assert loss / math.log(2) / len(HELD_OUT.encode()) == pytest.approx(report["figures"]["bits_per_byte"], rel=1e-4)
    assert report["verdict"] is None
