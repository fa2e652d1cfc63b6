"""Text and token ids: the tokenizer, and the incremental decoder that finds stop strings. Used by the routes only."""

import codecs
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from service.checkpoint.tokenizer import read_tokenizer

_REPLACEMENT = "\ufffd"
_CHARACTER_BITS = 21  # of a code point


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
        for stop in dict.fromkeys(stops):
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
    """The stop strings of a request as one automaton over characters (Aho and Corasick, 1975).

    Made once; each of the request's choices walks it on its own. A state stands for the longest beginning of a stop
    string that the text ends with; 0 is the empty one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self.first_characters = frozenset(stop[0] for stop in stops)
        self.completed: dict[int, str] = {}  # by state: the longest stop string that the text ends with
        self._longer: dict[int, int] = {}  # by `_edge`: the state of one character more
        depths = [0]  # by state
        for stop in stops:
            state = 0
            for depth, character in enumerate(stop, 1):
                state = self._longer.setdefault(_edge(state, character), len(depths))
                if state == len(depths):
                    depths.append(depth)
            self.completed[state] = stop
        self._fallbacks = array("i", bytes(4 * len(depths)))  # by state: that of the longest shorter beginning
        self.num_held = array("i", bytes(4 * len(depths)))  # by state: last characters that may become a stop string
        begun = {edge >> _CHARACTER_BITS for edge in self._longer}
        for edge, state in sorted(self._longer.items(), key=lambda item: depths[item[1]]):
            shorter, character = edge >> _CHARACTER_BITS, chr(edge & (1 << _CHARACTER_BITS) - 1)
            fallback = self.advance(self._fallbacks[shorter], character) if shorter else 0
            self._fallbacks[state] = fallback
            self.num_held[state] = depths[state] if state in begun else self.num_held[fallback]
            if fallback in self.completed:
                self.completed.setdefault(state, self.completed[fallback])

    def advance(self, state: int, character: str) -> int:
        """The state after one more character of text."""
        while (longer := self._longer.get(_edge(state, character))) is None:
            if not state:
                return 0
            state = self._fallbacks[state]
        return longer


def _edge(state: int, character: str) -> int:
    return state << _CHARACTER_BITS | ord(character)


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
        self._state = 0  # of the stop strings
        self._min_tokens = min_tokens  # a stop string completed by an earlier token does not count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._within = False  # whether the decoder has the beginning of a character
        self._held = ""
        self.num_tokens = 0  # pushed, up to and including the one that completed a stop string
        self.stop: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens; return the text that is certain now. `stop` and `num_tokens` tell whether a stop was found."""
        assert self.stop is None
        if not self._stops.first_characters:
            self.num_tokens += len(token_ids)
            table = self._token_bytes
            return self._decode(b"".join([table[token_id] for token_id in token_ids]))
        pieces = []
        for token_id in token_ids:
            self.num_tokens += 1
            pieces.append(self._search(self._decode(self._token_bytes[token_id])))
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

    def _decode(self, data: bytes) -> str:
        """The text that is certain. Whole characters, as nearly always, need no incremental decoder."""
        if not self._within:
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._within = bool(self._decoder.getstate()[0])
        return text

    def _search(self, text: str) -> str:
        """Walk the stop strings over `text`; return what of the held and the new text can be in none."""
        if not self._held and self._stops.first_characters.isdisjoint(text):
            return text
        text, num_held = self._held + text, len(self._held)
        for end, character in enumerate(text[num_held:], num_held + 1):
            self._state = self._stops.advance(self._state, character)
            stop = self._stops.completed.get(self._state)
            if stop is not None and self.num_tokens >= self._min_tokens:
                self.stop, self._held = stop, ""
                return text[:end] if self._include_stop else text[: end - len(stop)]
        certain = len(text) - self._stops.num_held[self._state]
        self._held = text[certain:]
        return text[:certain]
