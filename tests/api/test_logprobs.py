"""Log-probabilities: names that lose nothing, places in the text, and when an entry leaves."""

import codecs
from itertools import chain
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.logprobs import ARRAYS, LogprobStream
from service.api.text import StopStrings, TextStream, Tokenizer
from tests.api.fake_engine import logprob_entries, logprobs_of
from tests.api.test_text import TOKENS, known_id

tokens = st.lists(st.sampled_from(TOKENS), max_size=12)


def test_every_token_has_a_name_of_its_own(tokenizer: Tokenizer) -> None:
    """Text where its bytes are text, with its space and its real characters; else its bytes; never nothing."""
    names = tokenizer.names
    assert 50257 == len(names) == len(set(names))
    assert (" that", "\ufffd", "<|endoftext|>", "\n\n") == (names[326], names[4210], names[50256], names[628])
    for token_id, data in enumerate(tokenizer.spelled_bytes):
        try:
            assert data.decode() == names[token_id] != ""
        except UnicodeDecodeError:
            assert "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) == names[token_id]


def test_pieces_of_characters_are_told_apart(tokenizer: Tokenizer) -> None:
    """A thumb in two tokens: alternatives at one place are each rendered alone, and keys never collide."""
    ids = [41840, 235]
    stream = LogprobStream(tokenizer, 20, skip_special=True)
    stream.push(ids, logprobs_of(ids, 20))
    assert [] == stream.release(0)["tokens"]
    entries = stream.release(1)
    assert [r"bytes:\xf0\x9f\x91", r"bytes:\x8d"] == entries["tokens"]
    assert "👍".encode() == b"".join(map(bytes, entries["bytes"]))
    for (chosen, best), shown, token in zip(
        logprob_entries(ids, 20), entries["top_logprobs"], entries["tokens"], strict=True
    ):
        assert len(best.keys() | {token}) in (len(shown), len(shown) + 1)
        assert chosen == shown[token]
        assert "" not in shown
        assert set(best.values()) <= set(shown.values())


def naive_places(pieces: list[bytes], start: int) -> list[tuple[int, int]]:
    """Of each piece, by decoding every beginning: the character of its first byte, and characters to its end."""

    def characters(data: bytes) -> int:
        """Up to and with the one that the last byte of `data` belongs to."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return len(decoder.decode(data)) + bool(decoder.getstate()[0])

    places = []
    for i, piece in enumerate(pieces):
        before = b"".join(pieces[:i])
        first = characters(before + piece[:1]) - 1 if piece else characters(before)
        places.append((start + first, start + characters(before + piece)))
    return places


@settings(max_examples=300, deadline=None)
@given(prompt=tokens, deliveries=st.lists(tokens, max_size=6), echo=st.booleans(), skip=st.booleans(), data=st.data())
def test_entries_are_in_place_and_leave_with_their_text(
    tokenizer: Tokenizer, prompt: list[str], deliveries: list[list[str]], echo: bool, skip: bool, data: st.DataObject
) -> None:
    """Any ids, any deliveries, any stop strings: offsets, bytes, values; and no entry before its text or after it."""
    prompt_ids = [known_id(tokenizer, token) for token in prompt] or [50256]
    ids = [[known_id(tokenizer, token) for token in delivery] for delivery in deliveries]
    num_top = data.draw(st.sampled_from([0, 1, 5]))
    stops = data.draw(st.lists(st.text("ab \n👍", min_size=1, max_size=4), max_size=2))
    table = tokenizer.token_bytes if skip else tokenizer.spelled_bytes
    prompt_text = tokenizer.decode(prompt_ids, spelled=True) if prompt else ""

    text = TextStream(tokenizer, StopStrings(stops), skip_special=skip)
    stream = LogprobStream(tokenizer, num_top, skip_special=skip)
    released: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    expected: list[tuple[int, int]] = []
    sent = ""
    if echo:
        scores = logprobs_of(prompt_ids[1:], num_top) if len(prompt_ids) > 1 else None
        stream.push_prompt(prompt_ids, scores, text=prompt_text)
        spelled = [tokenizer.spelled_bytes[token_id] for token_id in prompt_ids]
        expected = [(min(a, len(prompt_text)), min(b, len(prompt_text))) for a, b in naive_places(spelled, 0)]
        sent = prompt_text
    start = len(sent)
    taken: list[int] = []
    for delivery in ids:
        before = text.num_tokens
        sent += text.push(delivery)
        new = delivery[: text.num_tokens - before]
        taken += new
        stream.push(new, logprobs_of(delivery, num_top))
        for name, values in stream.release(len(sent)).items():
            released[name] += values
        ends = [end for _, end in expected + naive_places([table[token_id] for token_id in taken], start)]
        held = next((i for i, end in enumerate(ends) if end > len(sent)), len(ends))
        assert held == len(released["tokens"])
        if text.stop is not None:
            break
    for name, values in stream.release(None).items():
        released[name] += values

    everything = (prompt_ids if echo else []) + taken
    expected += naive_places([table[token_id] for token_id in taken], start)
    assert everything == released["token_ids"]
    assert [tokenizer.names[token_id] for token_id in everything] == released["tokens"]
    assert [offset for offset, _ in expected] == released["text_offset"]
    data_of = [tokenizer.spelled_bytes[token_id] for token_id in prompt_ids] if echo else []
    data_of += [table[token_id] for token_id in taken]
    assert [list(piece) for piece in data_of] == released["bytes"]
    scored = [(None, None), *logprob_entries(prompt_ids[1:], num_top)] if echo else []
    for (chosen, best), value, top, token in zip(
        chain(scored, logprob_entries(taken, num_top)),
        released["token_logprobs"],
        released["top_logprobs"],
        released["tokens"],
        strict=True,
    ):
        assert chosen == value
        shown = None if best is None else {tokenizer.names[other]: logprob for other, logprob in best.items()}
        assert top == (None if shown is None else shown | {token: value})
