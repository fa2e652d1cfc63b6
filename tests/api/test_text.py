"""The tokenizer's facts, and text that streams: joined pieces are the whole text, for every split and stop string."""

import codecs
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.text import (
    StopStrings,
    TextStream,
    Tokenizer,
    load_tokenizer,
)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("This is a test.", [1212, 318, 257, 1332, 13]),
        ("café", [66, 1878, 2634]),
        ("日本語", [33768, 98, 17312, 105, 45739, 252]),
        ("👍", [41840, 235]),
        ("\ufffd", [4210]),
        ("\n\n", [628]),
        ("a<|endoftext|>b", [64, 50256, 65]),
        ("", []),
    ],
)
def test_known_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """GPT-2's published ids; the end of text spelled out is its one id; nothing is put around a text."""
    assert [ids] == tokenizer.encode([text])


@given(st.text())
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Decoding what was encoded gives the text back, but for the end of text, which has none."""
    assert text.replace("<|endoftext|>", "") == tokenizer.decode(tokenizer.encode([text])[0])


def test_every_token_is_its_own_bytes(tokenizer: Tokenizer) -> None:
    """All 256 bytes are tokens, no two tokens have the same bytes, and the longest has 128."""
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)
    assert len(tokenizer.token_bytes) == len(set(tokenizer.token_bytes)) == 50257
    assert tokenizer.longest_token_bytes == 128
    assert tokenizer.token_bytes[50256] == b""


def test_tokenizer_json_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """tokenizer.json is read where there is one, also without the end of text among its special tokens."""
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = load_tokenizer(tmp_path, end_of_text_id=50256)
    assert tokenizer.token_bytes == read.token_bytes
    assert [[15496, 995, 50256, 0]] == read.encode(["Hello world<|endoftext|>!"])


# Pieces of emoji and CJK, bytes that are no UTF-8, short tokens that overlap each other, and the end of text.
TOKENS = [
    "a",
    "b",
    "ab",
    "aba",
    "Ġ",
    "Ċ",
    "Ġab",
    "ï",
    "¿",
    "½",
    "ð",
    "Ł",
    "ĳ",
    "į",
    "æ",
    "Ĺ",
    "¥",
    "ÿ",
    "<|endoftext|>",
]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[str]], list[str], int]:
    """Deliveries of tokens, stop strings over the same characters, and min_tokens."""
    deliveries = draw(st.lists(st.lists(st.sampled_from(TOKENS), max_size=5), max_size=12))
    stops = draw(st.lists(st.text("ab \n日👍\ufffd", min_size=1, max_size=5), max_size=4))
    stops += [stop[1:] for stop in stops if len(stop) > 1 and draw(st.booleans())]  # two that end at one character
    return deliveries, stops, draw(st.sampled_from([0, 0, 0, 3, 10]))


@settings(max_examples=400, deadline=None)
@given(runs())
def test_pieces_joined_are_the_whole_text(tokenizer: Tokenizer, run: tuple[list[list[str]], list[str], int]) -> None:
    """Against a naive search: the text, its cut, the stop string, the tokens counted, and what is held back."""
    deliveries, stops, min_tokens = run
    ids = [[known_id(tokenizer, token) for token in delivery] for delivery in deliveries]
    text, stop, num_tokens = naive(tokenizer, list(chain(*ids)), stops, min_tokens)

    stream = TextStream(tokenizer, StopStrings(stops), min_tokens=min_tokens)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    so_far = emitted = ""
    for delivery in ids:
        emitted += stream.push(delivery)
        if stream.stop is not None:
            break
        so_far += decoder.decode(b"".join(tokenizer.token_bytes[token_id] for token_id in delivery))
        assert so_far[: len(so_far) - longest_beginning(so_far, stops)] == emitted
    emitted += stream.finish()
    assert (text, stop, num_tokens) == (emitted, stream.stop, stream.num_tokens)


def known_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.backend.token_to_id(token)
    assert token_id is not None, token
    return token_id


def naive(tokenizer: Tokenizer, ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, str | None, int]:
    """Decode every beginning from scratch; of the stop strings, take the one that ends first, the longest of those."""
    data = [tokenizer.token_bytes[token_id] for token_id in ids]
    whole = b"".join(data).decode("utf-8", "replace")
    ends = sorted(
        (start + len(stop), -len(stop), stop)
        for stop in stops
        for start in range(len(whole))
        if whole.startswith(stop, start)
    )
    known = [
        len(codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(data[:i]))) for i in range(len(ids) + 1)
    ]
    for end, _, stop in ends:
        completed_by = next((i for i in range(len(ids) + 1) if known[i] >= end), len(ids))
        if completed_by >= min_tokens:
            return whole[: end - len(stop)], stop, completed_by
    return whole, None, len(ids)


def longest_beginning(text: str, stops: list[str]) -> int:
    """The length of the longest end of `text` that begins a stop string and is not all of it."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


def test_many_long_stop_strings_cost_little(tokenizer: Tokenizer) -> None:
    """The worst that is allowed, 64 stop strings of 1,024 characters nearly equal: two look-ups a character at most."""
    stops = StopStrings(["a" * (1023 - i) + "b" for i in range(64)])
    lookups = 0

    class Counted(dict[int, int]):
        def get(self, key: int, default: Any = None) -> Any:
            nonlocal lookups
            lookups += 1
            return super().get(key, default)

    stops._longer = Counted(stops._longer)
    stream = TextStream(tokenizer, stops)
    tokens = tokenizer.encode(["aaaa" * 300 + "c", "a" * 900 + "b"])
    for token in chain(*tokens):
        stream.push([token])
    assert lookups <= 2 * (1201 + 901)


@settings(max_examples=300, deadline=None)
@given(runs())
def test_a_token_that_completes_a_stop_is_one_of_those_told(
    tokenizer: Tokenizer, run: tuple[list[list[str]], list[str], int]
) -> None:
    """The step at which a stop string is found always has such an id, whatever the ids and the stops."""
    deliveries, stops, _ = run
    told = tokenizer.completing(stops)
    assert (50257 + 7) // 8 * bool(stops) == len(told)
    stream = TextStream(tokenizer, StopStrings(stops))
    for token in chain(*deliveries):
        token_id = known_id(tokenizer, token)
        stream.push([token_id])
        if stream.stop is not None:
            assert told[token_id // 8] >> token_id % 8 & 1
            break


@given(st.lists(st.text("abth e日", min_size=1, max_size=6), min_size=1, max_size=3))
def test_the_tokens_told_are_few_and_right(tokenizer: Tokenizer, stops: list[str]) -> None:
    """Exactly those that contain a stop string or begin with a tail of one."""
    told = tokenizer.completing(stops)
    found = {token_id for token_id in range(50257) if told[token_id // 8] >> token_id % 8 & 1}
    tails = tuple(stop.encode()[i:] for stop in stops for i in range(1, len(stop.encode())))
    whole = [stop.encode() for stop in stops]
    expected = {
        token_id
        for token_id, data in enumerate(tokenizer.spelled_bytes)
        if data.startswith(tails) or any(stop in data for stop in whole)
    }
    assert expected == found


def test_the_end_of_text_can_be_plain_text(tokenizer: Tokenizer) -> None:
    """Seven tokens, wherever it stands."""
    plain = [27, 91, 437, 1659, 5239, 91, 29]
    assert [[*plain, 1279, *plain[1:]], [64, *plain, 65]] == tokenizer.encode(
        ["<|endoftext|> <|endoftext|>", "a<|endoftext|>b"], split_special=True
    )
    assert "a<|endoftext|>b" == tokenizer.decode([64, 50256, 65], spelled=True)


@settings(max_examples=200, deadline=None)
@given(runs(), st.booleans())
def test_a_stop_that_stays_ends_the_text(
    tokenizer: Tokenizer, run: tuple[list[list[str]], list[str], int], skip_special: bool
) -> None:
    """With include_stop the text is the cut one and the stop string."""
    deliveries, stops, min_tokens = run
    ids = [known_id(tokenizer, token) for token in chain(*deliveries)]
    cut, kept = (
        TextStream(
            tokenizer, StopStrings(stops), min_tokens=min_tokens, include_stop=include, skip_special=skip_special
        )
        for include in (False, True)
    )
    texts = ["", ""]
    for i, stream in enumerate((cut, kept)):
        for token_id in ids:
            if stream.stop is None:
                texts[i] += stream.push([token_id])
        texts[i] += stream.finish()
    assert (cut.stop, cut.num_tokens) == (kept.stop, kept.num_tokens)
    assert texts[0] + (cut.stop or "") == texts[1]
