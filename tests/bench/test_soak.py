"""What the soak finds: memory that grows, and answers that are not what was asked for."""

import json
import random
from collections import Counter
from typing import Any

import pytest

from bench.mixture import Answer, Ask, Choice, Mixture
from bench.soak import is_fault
from bench.watch import Growth

TIMES = [float(5 * number) for number in range(97)]  # eight minutes
WARM_UP = 120
ASK = Ask("ids", {"prompt": [[1], [2]], "n": 2, "max_tokens": 3, "ignore_eos": True})


def growth(mib_a_minute: float, noise: float, base: float = 1000) -> Growth:
    """Of a process that takes 300 MiB in the warm-up, and from then on more and more; beside that it is uneven."""
    rng = random.Random(0)
    values = [
        base + 300 * min(at, WARM_UP) / WARM_UP + mib_a_minute * max(0, at - WARM_UP) / 60 + rng.uniform(-noise, noise)
        for at in TIMES
    ]
    return Growth.of("engine", TIMES, values)


@pytest.mark.parametrize("mib_a_minute", [0, 5, 30])
def test_growth_is_what_comes_after_the_warm_up(mib_a_minute: float) -> None:
    """The last half is four minutes."""
    found = growth(mib_a_minute, 0)
    assert mib_a_minute == pytest.approx(found.a_minute, abs=1e-6)
    assert 4 * mib_a_minute == pytest.approx(found.last_half, abs=1e-6)


@pytest.mark.parametrize(("base", "bound"), [(100, 32), (700, None), (5_000, 64), (70_000, 64)])
def test_a_leak_is_beyond_the_bound_and_unevenness_is_not(base: float, bound: float | None) -> None:
    """However much a process, or a GPU, has: 5 % of it within 32 and 64 MiB."""
    even, leak = growth(0, 40, base), growth(30, 40, base)
    assert even.last_half < even.bound
    assert leak.last_half > leak.bound
    assert bound or 0.05 * leak.last == pytest.approx(leak.bound)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"level": "INFO"}', False),
        ('{"level": "WARNING"}', False),
        ('{"level": "ERROR"}', True),
        ("Traceback (most recent call last):", True),
        ("[1]", True),
        ("\n", False),
    ],
)
def test_what_is_no_line_of_the_log_is_a_fault(line: str, fault: bool) -> None:
    assert fault == is_fault(line)


@pytest.mark.parametrize(
    ("message", "explained"),
    [("the engine ended (exit code -9); restarting it in 0 s", True), ("a step failed", False), ("unexpected", False)],
)
def test_faults_explain_what_is_said_of_an_engine(message: str, explained: bool) -> None:
    """And nothing else."""
    line = json.dumps({"level": "ERROR", "message": message})
    assert is_fault(line)
    assert explained != is_fault(line, injected=True)


def test_a_mixture_has_every_kind_streamed_and_not_and_is_the_same_again() -> None:
    """Prompt and answer fit the context together."""
    mixture, again = (Mixture(1, context_length=256, vocab_size=50257) for _ in range(2))
    asks = [mixture.next() for _ in range(2000)]
    assert [ask.body for ask in asks] == [again.next().body for _ in asks]
    kinds = Counter((ask.kind, ask.stream) for ask in asks)
    assert {"ids", "stop", "leaves", "logprobs", "guided_json", "shared prefix"} <= {kind for kind, _ in kinds}
    whole = {"best_of", "timeout_seconds", "queue_timeout_seconds"}  # never streamed
    assert all((kind, stream) in kinds for kind, _ in kinds for stream in {False, kind not in whole})
    sizes = [len(ask.body["prompt"]) + ask.body["max_tokens"] for ask in asks if ask.kind == "ids"]  # type: ignore
    assert 256 >= max(sizes)


def answer(**other: Any) -> Answer:
    """Right for ASK, but for `other`."""
    right: dict[str, Any] = {"choices": {index: Choice("a", "length") for index in range(4)}, "completion_tokens": 12}
    return Answer(**{"status": 200, **right, **other})


def test_a_right_answer_has_no_fault() -> None:
    assert ASK.fault(answer()) is None


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"status": 500}, "status 500"),
        ({"error": "broken"}, "broken"),
        ({"done": False}, "DONE"),
        ({"choices": {0: Choice("a", "length")}}, "choices"),
        ({"choices": {index: Choice("a") for index in range(4)}}, "finish_reason"),
        ({"completion_tokens": None}, "completion_tokens"),
        ({"completion_tokens": 11}, "completion_tokens"),
        ({"completion_tokens": 13}, "completion_tokens"),
    ],
)
def test_what_is_missing_or_too_much_is_told(other: dict[str, Any], told: str) -> None:
    assert told in (ASK.fault(answer(**other)) or "")


@pytest.mark.parametrize(("kind", "text"), [("guided_json", "{"), ("guided_choice", "maybe"), ("logit_bias", " the")])
def test_a_text_that_was_not_asked_for_is_told(kind: str, text: str) -> None:
    mixture = Mixture(0, context_length=1024, vocab_size=50257)
    ask = next(ask for ask in iter(mixture.next, None) if ask.kind == kind)
    wrong = Answer(200, {0: Choice(text, "stop")}, completion_tokens=1)
    assert "another text" in (ask.fault(wrong) or "")
