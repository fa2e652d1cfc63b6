"""Log-probabilities in the shape of OpenAI's legacy completions, and without loss. Used by a choice that has them."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.api.text import Tokenizer
from service.engine.request import Logprobs

ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "bytes")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One token's place in the parallel lists; `end` is how many characters hold all of its bytes."""

    token: str
    token_logprob: float | None
    top_logprobs: dict[str, float] | None
    text_offset: int
    token_id: int
    bytes: list[int]
    end: int

    @property
    def columns(self) -> tuple[Any, ...]:
        return self.token, self.token_logprob, self.top_logprobs, self.text_offset, self.token_id, self.bytes


class _Places:
    """Where the bytes of tokens lie in the text that they decode to (errors replaced), in characters."""

    def __init__(self, start: int) -> None:
        self._num_characters = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> tuple[int, int]:
        """The character that the first byte belongs to, and the number of characters up to that of the last byte."""
        # The first byte alone: it may go on with a character, break one off, or begin its own.
        first = self._feed(data[:1])
        end = self._feed(data[1:])
        return (first - 1 if data else first), end

    def _feed(self, data: bytes) -> int:
        self._num_characters += len(self._decoder.decode(data))
        return self._num_characters + bool(self._decoder.getstate()[0])


class LogprobStream:
    """The entries of one choice, in order: its prompt's, when that is echoed, then one a sampled token.

    `bytes` are those that a token has in the text, so a generated end of text has none where it is skipped.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special: bool) -> None:
        self._names = tokenizer.names
        self._prompt_bytes = tokenizer.spelled_bytes
        self._bytes = tokenizer.token_bytes if skip_special else tokenizer.spelled_bytes
        self._num_top = num_top
        self._places = _Places(0)
        self._waiting: deque[_Entry] = deque()

    def push_prompt(self, token_ids: Sequence[int], logprobs: Logprobs | None, *, text: str) -> None:
        """The echoed prompt, before all else: `logprobs` are of all its tokens but the first, `text` is its text."""
        places = _Places(0)
        values = [(None, None), *(self._values(token_ids[1:], logprobs) if logprobs is not None else ())]
        for token_id, (chosen, best) in zip(token_ids, values, strict=True):
            self._add(token_id, chosen, best, self._prompt_bytes[token_id], places, limit=len(text))
        self._places = _Places(len(text))

    def push(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        """Sampled tokens; `logprobs` may go on past them."""
        for token_id, (chosen, best) in zip(token_ids, self._values(token_ids, logprobs), strict=True):
            self._add(token_id, chosen, best, self._bytes[token_id], self._places)

    def release(self, num_characters: int | None) -> dict[str, list[Any]]:
        """The entries whose bytes all lie in the first `num_characters` of the text, once; None is all of it."""
        released = []
        while self._waiting and (num_characters is None or self._waiting[0].end <= num_characters):
            released.append(self._waiting.popleft().columns)
        columns = map(list, zip(*released, strict=True)) if released else ([] for _ in ARRAYS)
        return dict(zip(ARRAYS, columns, strict=True))

    def _add(
        self,
        token_id: int,
        chosen: float | None,
        best: dict[str, float] | None,
        data: bytes,
        places: _Places,
        *,
        limit: int | None = None,
    ) -> None:
        """`limit` is where the text ends: an empty prompt's implicit token has none."""
        offset, end = places.push(data)
        if limit is not None:
            offset, end = min(offset, limit), min(end, limit)
        self._waiting.append(_Entry(self._names[token_id], chosen, best, offset, token_id, list(data), end))

    def _values(self, token_ids: Sequence[int], logprobs: Logprobs) -> list[tuple[float, dict[str, float]]]:
        """Of each token: its own log-probability, and those of the best tokens by name, its own among them."""
        chosen = np.frombuffer(logprobs.chosen, np.float32).tolist()
        count = len(chosen)
        top_ids = np.frombuffer(logprobs.top_ids, np.int32).reshape(count, self._num_top).tolist()
        top = np.frombuffer(logprobs.top, np.float32).reshape(count, self._num_top).tolist()
        names = self._names
        values = []
        for token_id, value, ids, best in zip(token_ids, chosen, top_ids, top, strict=False):
            named = {names[other]: logprob for other, logprob in zip(ids, best, strict=True)}
            named.setdefault(names[token_id], value)
            values.append((value, named))
        return values
