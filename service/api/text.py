"""Text and token ids: the tokenizer, and the incremental decoder that finds stop strings. Used by the routes only."""

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from service.checkpoint.tokenizer import read_tokenizer

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A byte-level BPE: every token is a fixed byte string; the end of text is one token, without text."""

    backend: Backend
    plain_backend: Backend  # the same, but the end of text spelled out is plain text to it
    token_bytes: tuple[bytes, ...]  # by id
    spelled_bytes: tuple[bytes, ...]  # the same, but tokens without text have the bytes of their spelling
    names: tuple[str, ...]  # by id, what log-probabilities call the token; no two are equal
    end_of_text: str
    end_of_text_id: int
    longest_token_bytes: int
    index: "TokenIndex" = field(repr=False)

    def encode(self, texts: Sequence[str], *, split_special: bool = False) -> list[list[int]]:
        """The ids of each text. Nothing is added; the end of text spelled out in a text is its one id.

        With `split_special` it is plain text. Lets go of the GIL. A long text takes seconds, so call it in a thread.
        """
        backend = self.plain_backend if split_special else self.backend
        return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], *, spelled: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. `spelled` spells the end of text out."""
        table = self.spelled_bytes if spelled else self.token_bytes
        return b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", "replace")

    def completing(self, stops: Sequence[str]) -> bytes:
        """The ids that can complete one of `stops`: bit i % 8 of byte i // 8. Empty without stops.

        Such a token contains a stop string, or begins with a tail of one.
        """
        if not stops:
            return b""
        found = np.zeros(len(self.names), dtype=bool)
        for stop in stops:
            if _REPLACEMENT in stop:  # any broken byte decodes to it
                found[:] = True
            else:
                self.index.mark_completing(stop.encode(), found)
        return np.packbits(found, bitorder="little").tobytes()


class TokenIndex:
    """Which tokens contain or begin with given bytes."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._joined = np.frombuffer(b"".join(token_bytes), np.uint8)
        lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        self._owners = np.repeat(np.arange(len(token_bytes)), lengths)  # of each byte
        ids = sorted(range(len(token_bytes)), key=token_bytes.__getitem__)
        self._sorted = [token_bytes[token_id] for token_id in ids]
        self._sorted_ids = np.asarray(ids)
        self._longest = int(lengths.max())

    def mark_completing(self, stop: bytes, found: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Set `found` for the ids of tokens that contain `stop` or begin with a tail of it."""
        for length in range(1, min(len(stop), self._longest + 1)):
            tail = stop[-length:]
            start = bisect_left(self._sorted, tail)
            end = bisect_right(self._sorted, tail + b"\xff" * self._longest, lo=start)
            found[self._sorted_ids[start:end]] = True
        if len(stop) > self._longest:
            return
        starts = np.flatnonzero(self._joined[: len(self._joined) - len(stop) + 1] == stop[0])
        for place in range(1, len(stop)):
            starts = starts[self._joined[starts + place] == stop[place]]
        owners = self._owners[starts]
        found[owners[owners == self._owners[starts + len(stop) - 1]]] = True


def load_tokenizer(folder: Path, *, end_of_text_id: int) -> Tokenizer:
    """The tokenizer in `folder`. Raises CheckpointError, but not in a folder that the engine has loaded."""
    files = read_tokenizer(folder)
    end_of_text = files.backend.id_to_token(end_of_text_id)
    assert end_of_text is not None, "the ids have no gap, and the config's is among them"
    files.backend.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    plain_backend = Backend.from_str(files.backend.to_str())
    plain_backend.encode_special_tokens = True
    token_bytes = list(files.token_bytes)
    token_bytes[end_of_text_id] = b""
    spelled_bytes = [
        data or str(files.backend.id_to_token(token_id)).encode() for token_id, data in enumerate(token_bytes)
    ]
    return Tokenizer(
        backend=files.backend,
        plain_backend=plain_backend,
        token_bytes=tuple(token_bytes),
        spelled_bytes=tuple(spelled_bytes),
        names=_names(spelled_bytes),
        end_of_text=end_of_text,
        end_of_text_id=end_of_text_id,
        longest_token_bytes=max(map(len, token_bytes)),
        index=TokenIndex(spelled_bytes),
    )


def _names(spelled_bytes: Sequence[bytes]) -> tuple[str, ...]:
    """A token's text, or where that is no text or another token's, its bytes as in bytes:\\xf0\\x9f."""
    names: dict[str, None] = {}
    for token_id, data in enumerate(spelled_bytes):
        hexadecimal = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        try:
            name = data.decode() or hexadecimal
        except UnicodeDecodeError:
            name = hexadecimal
        if name in names:
            name = hexadecimal
        while name in names:
            name += f" {token_id}"
        names[name] = None
    return tuple(names)


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
    complete first, or with `include_stop` after it. Held back is only what may still become a stop string, or a
    character. After a stop, push nothing. `skip_special` leaves the end of text without text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: StopStrings,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes if skip_special else tokenizer.spelled_bytes
        self._stops = stops
        self._include_stop = include_stop
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

    def push_stop_token(self, token_id: int) -> str:
        """Take a token that ended the sequence: it counts, and has text only with `include_stop`."""
        if self._include_stop:
            return self.push([token_id])
        self.num_tokens += 1
        return ""

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
                return text[: end + 1] if self._include_stop else text[: end + 1 - len(stop)]
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
