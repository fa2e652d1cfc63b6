"""Text and token ids: the tokenizer, and the incremental decoder that finds stop strings. Used by the routes only."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from service.checkpoint.tokenizer import read_tokenizer


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A byte-level BPE: every token is a fixed byte string; the end of text is one token, without text."""

    backend: Backend
    token_bytes: tuple[bytes, ...]  # by id
    end_of_text: str
    end_of_text_id: int
    longest_token_bytes: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Nothing is added; the end of text spelled out in a text is its one id.

        Lets go of the GIL. A long text takes seconds, so call it in a thread.
        """
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join([self.token_bytes[token_id] for token_id in token_ids]).decode("utf-8", "replace")


def load_tokenizer(folder: Path, *, end_of_text_id: int) -> Tokenizer:
    """The tokenizer in `folder`. Raises CheckpointError, but not in a folder that the engine has loaded."""
    files = read_tokenizer(folder)
    end_of_text = files.backend.id_to_token(end_of_text_id)
    assert end_of_text is not None, "the ids have no gap, and the config's is among them"
    files.backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    token_bytes = list(files.token_bytes)
    token_bytes[end_of_text_id] = b""
    return Tokenizer(
        backend=files.backend,
        token_bytes=tuple(token_bytes),
        end_of_text=end_of_text,
        end_of_text_id=end_of_text_id,
        longest_token_bytes=max(map(len, token_bytes)),
    )


class StopStrings:
    """The stop strings of a request, made once; each of its choices walks them on its own."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        # Longest first: of two that end at one character, the longer one begins earlier and cuts more.
        self.stops = tuple(sorted(dict.fromkeys(stops), key=len, reverse=True))
        self.first_characters = frozenset(stop[0] for stop in self.stops)
        self.fallbacks = tuple(_fallbacks(stop) for stop in self.stops)


def _fallbacks(stop: str) -> list[int]:
    """For each length 1..len(stop): how long a shorter beginning of `stop` also ends there (Knuth-Morris-Pratt)."""
    table = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = table[matched - 1]
        matched += stop[matched] == stop[i]
        table[i] = matched
    return table


class TextStream:
    """The text of one choice, token by token.

    The pieces joined are the one-shot decode of all bytes (errors replaced), cut before the stop string that is
    complete first. Held back is only what may still become a stop string, or a character. After a stop, push nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopStrings, *, min_tokens: int = 0) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._stops = stops
        self._matched = [0] * len(stops.stops)  # how much of each stop string the text so far ends with
        self._min_tokens = min_tokens  # a stop string completed by an earlier token does not count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.num_tokens = 0  # pushed, up to and including the one that completed a stop string
        self.stop: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that is certain now. `stop` and `num_tokens` tell whether a stop was found."""
        assert self.stop is None
        if not self._stops.stops:
            self.num_tokens += len(token_ids)
            return self._decoder.decode(b"".join([self._token_bytes[token_id] for token_id in token_ids]))
        pieces = []
        for token_id in token_ids:
            self.num_tokens += 1
            pieces.append(self._search(self._decoder.decode(self._token_bytes[token_id])))
            if self.stop is not None:
                break
        return "".join(pieces)

    def finish(self) -> str:
        """No token follows: the rest of the text, which may still complete a stop string with a broken character."""
        if self.stop is not None:
            return ""
        rest = self._search(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return rest + held

    def _search(self, text: str) -> str:
        """Walk the stop strings over `text`; return what of the held and the new text can be in none."""
        if not self._held and self._stops.first_characters.isdisjoint(text):
            return text
        text = self._held + text
        for end in range(len(self._held), len(text)):
            stop = self._advance(text[end])
            if stop is not None and self.num_tokens >= self._min_tokens:
                self.stop, self._held = stop, ""
                return text[: end + 1 - len(stop)]
        certain = len(text) - max(self._matched, default=0)
        self._held = text[certain:]
        return text[:certain]

    def _advance(self, character: str) -> str | None:
        """Take one character; return the longest stop string that it completes."""
        found = None
        for i, (stop, fallbacks) in enumerate(zip(self._stops.stops, self._stops.fallbacks, strict=True)):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                found = found or stop
                matched = fallbacks[matched - 1]
            self._matched[i] = matched
        return found
