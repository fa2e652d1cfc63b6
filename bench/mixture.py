"""Completion requests of every kind in a random mix, and what must be true of the answers. Used by soak.py."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

TEXT = "Plants create energy through a process known as photosynthesis, which turns light, water and air into sugar. "
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
A, A_TEXT = 257, " a"  # a token of GPT-2


@dataclass(slots=True)
class Choice:
    """Of an answer, streamed or not."""

    text: str = ""
    finish_reason: str | None = None
    num_logprobs: int = 0


@dataclass(slots=True)
class Answer:
    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    completion_tokens: int | None = None
    done: bool = True  # of a stream: [DONE] has come
    error: str | None = None

    @property
    def was_cut(self) -> bool:
        """An honest end before its time: a 500 or 503, or an error event and [DONE]."""
        return self.error is not None and self.done and self.status in (200, 500, 503)

    def take(self, part: Body) -> None:
        """A whole answer, or an event of one."""
        if "error" in part:
            self.error = json.dumps(part["error"])
            return
        for each in part["choices"]:
            choice = self.choices.setdefault(each["index"], Choice())
            choice.text += each["text"]
            choice.finish_reason = each["finish_reason"] or choice.finish_reason
            choice.num_logprobs += len((each["logprobs"] or {}).get("tokens", ()))
        if part.get("usage"):
            self.completion_tokens = part["usage"]["completion_tokens"]


Check = Callable[[Answer], bool]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. A client with `leaves_after` seconds is gone by then, whatever it was told."""

    kind: str
    body: Body | bytes
    statuses: frozenset[int] = frozenset({200})
    check: Check = lambda answer: True
    leaves_after: float | None = None

    @property
    def stream(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True

    def fault(self, answer: Answer) -> str | None:
        """What is wrong with the answer, in few words."""
        if answer.status not in self.statuses:
            return f"status {answer.status}: {answer.error}"
        if answer.status != 200 or not isinstance(self.body, dict):
            return None
        if answer.error is not None:
            return f"error event {answer.error}"
        if not answer.done:
            return "a stream without [DONE]"
        prompt = self.body["prompt"]
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        if sorted(answer.choices) != list(range(num_prompts * self.body.get("n", 1))):
            return f"choices {sorted(answer.choices)}"
        if reasons := {each.finish_reason for each in answer.choices.values()} - {"stop", "length"}:
            return f"finish_reason {reasons}"
        num_samples = self.body.get("best_of") or self.body.get("n", 1)
        most = num_prompts * num_samples * self.body["max_tokens"]
        if answer.completion_tokens is None or answer.completion_tokens > most:
            return f"completion_tokens {answer.completion_tokens} of {most}"
        if self.body.get("ignore_eos") and "stop" not in self.body and answer.completion_tokens < most:
            return f"completion_tokens {answer.completion_tokens} instead of {most}"
        return None if self.check(answer) else f"another text: {[each.text[:80] for each in answer.choices.values()]}"


def all_match(matches: Callable[[str], bool]) -> Check:
    """Of a grammar: a text that has come to its end is one of the grammar's."""
    return lambda answer: all(matches(each.text) for each in answer.choices.values() if each.finish_reason == "stop")


def is_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() == set(SCHEMA["required"])


class Mixture:
    """Endless; the same for the same seed."""

    def __init__(self, seed: int, *, context_length: int, vocab_size: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._shared = self._ids(context_length // 2)  # what many prompts begin with
        self._kinds = (
            self._ids_of_any_length,
            self._text,
            self._several,
            self._shared_prefix,
            self._best_of,
            self._adjusted,
            self._biased,
            self._logprobs,
            self._echo,
            self._stops,
            self._grammar,
            self._refused,
            self._deadline,
            self._leaves,
        )

    def next(self) -> Ask:
        ask = self._rng.choice(self._kinds)()
        if isinstance(ask.body, dict) and "stream" not in ask.body and self._rng.random() < 0.5:
            ask.body.update(stream=True, stream_options={"include_usage": True})
        return ask

    def _ids(self, count: int) -> list[int]:
        return self._rng.choices(range(self._vocab_size - 1), k=count)

    def _length(self, most: int) -> int:
        """From 1 to `most`, as often of each magnitude."""
        length: float = most ** self._rng.random()
        return round(length)

    def _drawn(self) -> Body:
        sampling: list[Body] = [
            {"temperature": 0},
            {"temperature": 1.0, "seed": self._rng.randrange(2**32)},
            {"temperature": 0.7, "top_k": 40},
            {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
        ]
        return dict(self._rng.choice(sampling))

    def _ids_of_any_length(self) -> Ask:
        prompt = self._ids(self._length(self._context_length - 1))
        room = self._context_length - len(prompt)
        body = {"prompt": prompt, "max_tokens": self._length(room), "ignore_eos": True, **self._drawn()}
        return Ask("ids", body)

    def _text(self) -> Ask:
        start = self._rng.randrange(len(TEXT) - 1)
        return Ask("text", {"prompt": TEXT[start:], "max_tokens": self._length(200), **self._drawn()})

    def _several(self) -> Ask:
        prompts = [self._ids(self._length(60)) for _ in range(self._rng.randint(1, 6))]
        n = self._rng.randint(1, 4)
        body = {"prompt": prompts, "n": n, "max_tokens": self._length(60), "ignore_eos": True, **self._drawn()}
        return Ask("several prompts and choices", body)

    def _shared_prefix(self) -> Ask:
        prompt = self._shared[: self._length(len(self._shared))] + self._ids(4)
        body = {"prompt": prompt, "max_tokens": self._length(60), "ignore_eos": True, **self._drawn()}
        return Ask("shared prefix", body)

    def _best_of(self) -> Ask:
        body = {"prompt": self._ids(self._length(100)), "n": 2, "best_of": self._rng.randint(2, 6), "max_tokens": 20}
        return Ask("best_of", {**body, "stream": False})

    def _adjusted(self) -> Ask:
        penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
        body = {"prompt": self._ids(self._length(300)), "max_tokens": self._length(100), **penalties, **self._drawn()}
        return Ask("penalties", body)

    def _biased(self) -> Ask:
        count = self._length(30)
        body = {"prompt": TEXT, "max_tokens": count, "logit_bias": {str(A): 100}, **self._drawn()}
        return Ask("logit_bias", body, check=lambda answer: answer.choices[0].text == A_TEXT * count)

    def _logprobs(self) -> Ask:
        count = self._length(40)
        body = {"prompt": self._ids(self._length(100)), "max_tokens": count, "ignore_eos": True, "logprobs": 5}
        return Ask("logprobs", body, check=lambda answer: answer.choices[0].num_logprobs == count)

    def _echo(self) -> Ask:
        body = {"prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": self._rng.choice([0, 1, 16])}
        return Ask("echo", body, check=lambda answer: answer.choices[0].text.startswith(TEXT))

    def _stops(self) -> Ask:
        stops = self._rng.sample([" the", ",", "e", "photo", "\n\n", " in a", "never to be seen"], 3)
        body = {"prompt": TEXT, "max_tokens": self._length(200), "stop": stops, **self._drawn()}
        return Ask("stop", body, check=lambda answer: not any(stop in answer.choices[0].text for stop in stops))

    def _grammar(self) -> Ask:
        words = ["yes", "no", "it depends"]
        kinds: list[tuple[str, Body, Callable[[str], object]]] = [
            ("guided_regex", {"guided_regex": "[a-z]{3,8}-[0-9]{2}"}, re.compile("[a-z]{3,8}-[0-9]{2}").fullmatch),
            ("guided_json", {"guided_json": SCHEMA}, is_json),
            ("guided_choice", {"guided_choice": words}, words.__contains__),
        ]
        kind, fields, check = self._rng.choice(kinds)
        body = {"prompt": TEXT, "max_tokens": 60, **fields, **self._drawn()}
        return Ask(kind, body, check=all_match(lambda text: bool(check(text))))

    def _refused(self) -> Ask:
        refused: list[tuple[Body | bytes, int]] = [
            ({"prompt": TEXT, "max_tokens": -1}, 400),
            ({"prompt": TEXT, "temperature": "0"}, 400),
            ({"prompt": self._ids(self._context_length), "max_tokens": 1}, 400),
            ({"prompt": [self._vocab_size], "max_tokens": 1}, 400),
            ({"prompt": TEXT, "max_tokens": 1, "best_of": 2, "stream": True}, 400),
            ({"prompt": TEXT, "max_tokens": 1, "guided_regex": "("}, 400),
            ({"prompt": TEXT, "model": "nobody"}, 404),
            (b'{"prompt": ', 400),
        ]
        body, status = self._rng.choice(refused)
        return Ask("refused", body, frozenset({status}))

    def _deadline(self) -> Ask:
        field, status = self._rng.choice([("timeout_seconds", 504), ("queue_timeout_seconds", 429)])
        body = {"prompt": self._ids(50), "max_tokens": self._length(400), field: 0.05, "stream": False}
        return Ask(field, body, frozenset({200, status}))

    def _leaves(self) -> Ask:
        ask = self._rng.choice([self._ids_of_any_length, self._several])()
        return Ask("leaves", ask.body, leaves_after=self._rng.random() ** 2)
