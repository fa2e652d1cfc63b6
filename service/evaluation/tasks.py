"""The evaluations: what of a file is scored, and what comes of it. Sources: docs/evaluation.md."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.api.text import Tokenizer
from service.evaluation.data import Data
from service.evaluation.detokenizer import detokenize
from service.evaluation.errors import EvaluationError
from service.evaluation.items import Item, Outcome, Windows
from service.evaluation.statistics import loss_interval, wilson_interval

_PAPER_PERPLEXITY, _PAPER_ACCURACY = 19.31, 0.4518
_PAPER_STRIDE = 32
_STRIDE = 512  # of other texts: a sixteenth of that work, and at least half a context before each token
_TEST_SET = (245_566, 270_329)  # of WikiText-103's: pieces between spaces, tokens
_LAMBADA_LINES = 5153
_MOST_LINE_BYTES = 2**16
_MOST_EXPONENT = 20.0  # Megatron-LM's cap
_MOST_NAMED = 5  # faults that an error names

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One evaluation of one file."""

    name: str
    protocol: Figures  # what it is: equal where results may be compared
    data: Figures
    items: Sequence[Item]
    figures: Callable[[Sequence[Outcome]], Figures]  # of the outcomes of all items, in their order
    # Why the figure is none to compare with the paper's; else None. Of the model, the scorer says that.
    incomparable: str | None
    paper: tuple[str, float] | None  # the figure that the paper has, and its value
    skipped: list[Figures] = field(default_factory=list)  # lines that are not counted, and why


def wikitext103(data: Data, tokenizer: Tokenizer, *, context_length: int, stride: int = _PAPER_STRIDE) -> Task:
    """The paper's perplexity: one stream of tokens in overlapping windows, counted by the words of the raw file.

    Raises EvaluationError.
    """
    text = data.text()
    num_original = len(text.strip().split(" "))
    ids = tokenizer.encode([detokenize(text)], split_special=True)[0]
    _check_stride(stride, context_length)
    if len(ids) < 2 or num_original < 2:
        raise data.error("a text of two words or more is needed")
    items = Windows(ids, width=context_length, stride=stride)

    def figures(outcomes: Sequence[Outcome]) -> Figures:
        found = _loss(items, outcomes)
        ratio = (len(ids) - 1) / (num_original - 1)
        found["adjusted_perplexity"] = _exp(found["loss"] * ratio)
        if found["loss_interval"] is not None:
            found["adjusted_perplexity_interval"] = [_exp(end * ratio) for end in found["loss_interval"]]
        return found

    incomparable = None
    if (num_original, len(ids)) != _TEST_SET:
        incomparable = (
            f"the text has {num_original:,} words and {len(ids):,} tokens, and WikiText-103's test set "
            f"{_TEST_SET[0]:,} and {_TEST_SET[1]:,}"
        )
    elif stride != _PAPER_STRIDE:
        incomparable = f"the stride is {stride}, and the paper's {_PAPER_STRIDE}"
    return Task(
        "wikitext103",
        {"window": context_length, "stride": stride, "detokenized": True, "adjusted_by": "(T - 1) / (To - 1)"},
        data.about | {"original_tokens": num_original, "tokens": len(ids)},
        items,
        figures,
        incomparable,
        ("adjusted_perplexity", _PAPER_PERPLEXITY),
    )


def lambada(
    data: Data, tokenizer: Tokenizer, *, context_length: int, strict: bool = True, skip_bad_lines: bool = False
) -> Task:
    """The paper's accuracy: whether greedy decoding gives the last word of each line; not `strict`, the last token.

    Raises EvaluationError, also for a line that cannot be used, unless `skip_bad_lines`.
    """
    contexts: list[str] = []
    words: list[str] = []
    numbers: list[int] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(data.content.splitlines(), 1):
        text = _passage(line)
        if isinstance(text, _Fault):
            bad.append((number, text.reason))
            continue
        word = text.split()[-1]
        contexts.append(text[: text.rfind(word)].strip() if strict else text)
        words.append(" " + word if strict else "")
        numbers.append(number)
    encoded = tokenizer.encode(contexts + words, split_special=True)
    items: list[Item] = []
    for number, context, label in zip(numbers, encoded[: len(numbers)], encoded[len(numbers) :], strict=True):
        ids, score_from = (context + label, len(context)) if strict else (context, len(context) - 1)
        if score_from < 1:
            bad.append((number, "nothing comes before its last word"))
        elif len(ids) > context_length + 1:
            bad.append((number, f"its {len(ids)} tokens are more than {context_length + 1}"))
        else:
            items.append(Item(tuple(ids), score_from))
    bad.sort()
    if bad and not skip_bad_lines:
        raise data.error(f"{_named(bad)} (--skip-bad-lines leaves such lines out)")
    if not items:
        raise data.error(f"has no line that can be used{': ' + _named(bad) if bad else ''}")

    def figures(outcomes: Sequence[Outcome]) -> Figures:
        hits = sum(outcome.is_greedy for outcome in outcomes)
        return {
            "correct": hits,
            "accuracy": hits / len(outcomes),
            "accuracy_interval": list(wilson_interval(hits, len(outcomes))),
            # Of the last word, as lm-evaluation-harness counts it.
            "perplexity": _exp(-math.fsum(outcome.logprob for outcome in outcomes) / len(outcomes)),
        }

    incomparable = None
    if not strict:
        incomparable = "only the last token of each word was asked for; the paper's figure is of whole words"
    elif len(items) != _LAMBADA_LINES or bad:
        incomparable = f"{len(items):,} lines were scored, and LAMBADA's test set has {_LAMBADA_LINES:,}"
    return Task(
        "lambada",
        {"strict": strict, "target": "the last word" if strict else "the last token"},
        data.about | {"lines": len(items) + len(bad), "lines_scored": len(items)},
        items,
        figures,
        incomparable,
        ("accuracy", _PAPER_ACCURACY),
        [{"line": number, "reason": reason} for number, reason in bad],
    )


def text(data: Data, tokenizer: Tokenizer, *, context_length: int, stride: int | None = None) -> Task:
    """The perplexity of any text, after an end of text; spelled out in it, that is its one token.

    Raises EvaluationError.
    """
    content = data.text()
    stride = min(_STRIDE, context_length) if stride is None else stride
    _check_stride(stride, context_length)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode([content])[0]]
    items = Windows(ids, width=context_length, stride=stride)

    def figures(outcomes: Sequence[Outcome]) -> Figures:
        found = _loss(items, outcomes)
        found["bits_per_byte"] = found["loss"] * (len(ids) - 1) / math.log(2) / len(data.content)
        found["word_perplexity"] = _exp(found["loss"] * (len(ids) - 1) / max(1, len(content.split())))
        return found

    protocol = {"window": context_length, "stride": stride, "begins_with": "end of text"}
    return Task("text", protocol, data.about | {"tokens": len(ids) - 1}, items, figures, None, None)


def _loss(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Figures:
    """Nats a token, and its exponential."""
    losses = [-outcome.logprob for outcome in outcomes]
    counts = [len(item.ids) - item.score_from for item in items]
    loss = math.fsum(losses) / sum(counts)
    interval = loss_interval(losses, counts)
    return {
        "tokens_scored": sum(counts),
        "loss": loss,
        "loss_interval": None if interval is None else list(interval),
        "perplexity": _exp(loss),
        "perplexity_interval": None if interval is None else [_exp(end) for end in interval],
    }


def _exp(exponent: float) -> float:
    return math.exp(min(_MOST_EXPONENT, exponent))


@dataclass(frozen=True, slots=True)
class _Fault:
    reason: str


def _passage(line: bytes) -> str | _Fault:
    """The text of a line of LAMBADA, which has a word, or what is wrong with the line."""
    if len(line) > _MOST_LINE_BYTES:
        return _Fault(f"its {len(line):,} bytes are more than {_MOST_LINE_BYTES:,}")
    if not line.strip():
        return _Fault("it is empty")
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Fault("it is not UTF-8")
    except (ValueError, RecursionError) as error:
        return _Fault(f"it is no JSON ({error})")
    passage = found.get("text") if isinstance(found, dict) else None
    if not isinstance(passage, str):
        return _Fault('it is no JSON object with a string "text"')
    if not _is_unicode(passage):
        return _Fault('its "text" has half a surrogate pair')
    return passage if passage.strip() else _Fault('its "text" is empty')


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(bad: Sequence[tuple[int, str]]) -> str:
    named = "; ".join(f"line {number}: {reason}" for number, reason in bad[:_MOST_NAMED])
    return named + (f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else "")


def _check_stride(stride: int, context_length: int) -> None:
    if not 1 <= stride <= context_length:
        raise EvaluationError(f"--stride: must be from 1 to {context_length}, the model's context (got {stride})")
