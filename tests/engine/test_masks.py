"""The bits of a mask against plain sets of ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.masks import Mask
from service.engine.request import SamplingParams
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE

SMALL = st.integers(0, 9)
IDS = st.one_of(SMALL, st.integers(0, VOCAB_SIZE - 1))


def ids(words: np.ndarray[tuple[int], np.dtype[np.int32]]) -> set[int]:
    """The ids whose bits are set, by the words' own definition."""
    return {32 * number + bit for number, word in enumerate(words.tolist()) for bit in range(32) if word >> bit & 1}


@settings(max_examples=300, deadline=None)
@given(
    allowed=st.one_of(st.none(), st.sets(IDS, min_size=1)),
    banned=st.sets(IDS),
    bad_words=st.lists(st.lists(SMALL, min_size=2, max_size=4), max_size=30),
    stops=st.sets(IDS, max_size=3),
    min_tokens=st.integers(0, 3),
    tokens=st.lists(SMALL, min_size=1, max_size=6),
    num_prompt=st.integers(1, 6),
    grammar=st.sampled_from([None, "a", "b"]),
)
def test_a_mask_allows_what_every_field_allows(
    allowed: set[int] | None,
    banned: set[int],
    bad_words: list[list[int]],
    stops: set[int],
    min_tokens: int,
    tokens: list[int],
    num_prompt: int,
    grammar: str | None,
) -> None:
    """Nothing past the vocabulary; and where nothing is left, end of text alone, which then ends the text."""
    num_generated = max(0, len(tokens) - num_prompt)
    params = SamplingParams(
        9,
        min_tokens=min_tokens,
        stop_token_ids=tuple(stops),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        banned_token_ids=tuple(banned),
        bad_words=tuple(map(tuple, bad_words)),
        grammar=grammar,
    )
    constraint = None if grammar is None else FakeConstraint(grammar)
    expected = (set(range(VOCAB_SIZE)) if allowed is None else allowed) - banned
    if num_generated < min_tokens:
        expected -= {END_OF_TEXT, *stops}
    expected -= {word[-1] for word in bad_words if tokens[-len(word) + 1 :] == word[:-1]}
    if constraint is not None:
        expected &= constraint.allowed
    mask = Mask(params, vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT)
    for _ in range(2):  # asked again, as after a step that did not fit, it says the same
        words = mask.words(tokens, num_generated, constraint)
        if words is None:
            assert expected == set(range(VOCAB_SIZE))
        else:
            assert (-(-VOCAB_SIZE // 32), "int32") == (len(words), str(words.dtype))
            assert (expected or {END_OF_TEXT}) == ids(words)
            assert (not expected) == mask.is_end(words)
    if not mask.follows:  # then it is the same after any tokens
        again = mask.words((), num_generated, constraint)
        assert (None if words is None else ids(words)) == (None if again is None else ids(again))


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, False),
        ({"min_tokens": 5}, False),  # a row's min_length says it
        ({"min_tokens": 5, "stop_token_ids": (END_OF_TEXT,)}, False),
        ({"min_tokens": 5, "stop_token_ids": (7,)}, True),
        ({"stop_token_ids": (7,)}, False),
        ({"allowed_token_ids": (7,)}, True),
        ({"banned_token_ids": (7,)}, True),
        ({"bad_words": ((7, 8),)}, True),
        ({"grammar": "x"}, True),
    ],
)
def test_a_mask_is_needed_only_for_what_a_row_cannot_say(fields: dict[str, object], needed: bool) -> None:
    """So that plain rows have none."""
    params = SamplingParams(9, **fields)  # type: ignore[arg-type]
    assert needed == Mask.needed(params, end_of_text_id=END_OF_TEXT)
