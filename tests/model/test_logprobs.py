"""Log-probabilities of chosen tokens and of the best, against numpy in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.model.batch import NUM_TOP, TopLogprobs
from service.model.logprobs import logprob_words, unpack_logprobs


def logprobs(logits: torch.Tensor, token_ids: list[int]) -> TopLogprobs:
    return unpack_logprobs(logprob_words(logits, torch.tensor(token_ids)).numpy())


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.sampled_from([1, NUM_TOP - 1, NUM_TOP, NUM_TOP + 1, 300, 5000]),
    st.booleans(),
    st.integers(-90, 90),
)
def test_values_and_order_are_those_of_the_softmax(seed: int, rows: int, size: int, tied: bool, shift: int) -> None:
    """Best first, equals by id; the chosen value is, to the bit, the one in the top for the same token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * 3 + shift
    if tied:
        logits = logits.round()
    chosen = torch.randint(size, (rows,), generator=generator)
    chosen[0] = logits[0].argmax()
    found = logprobs(logits, chosen.tolist())
    doubles = logits.double().numpy()
    expected = doubles - np.log(np.exp(doubles - doubles.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= doubles.max(-1, keepdims=True)
    assert (rows, NUM_TOP) == found.top.shape == found.top_ids.shape
    assert ["f4", "i4", "f4"] == [found.chosen.dtype, found.top_ids.dtype, found.top.dtype]
    np.testing.assert_allclose(found.chosen, expected[np.arange(rows), chosen], atol=2e-5, rtol=0)
    num_top = min(NUM_TOP, size)
    for row in range(rows):
        ids, top = found.top_ids[row, :num_top], found.top[row, :num_top]
        np.testing.assert_allclose(top, expected[row, ids], atol=2e-5, rtol=0)
        best = np.sort(logits[row].numpy())[::-1][:num_top]
        np.testing.assert_array_equal(logits[row].numpy()[ids], best)
        assert sorted(zip(-best, ids, strict=True)) == list(zip(-best, ids, strict=True))
        assert len(set(ids.tolist())) == num_top
        for token, value in zip(ids, top, strict=True):
            assert token != chosen[row] or value == found.chosen[row]
        np.testing.assert_array_equal(found.top[row, num_top:], -np.inf)
    if not tied:
        assert found.top_ids[0, 0] == chosen[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_number(value: float) -> None:
    """Its token is NOT_FINITE or a prompt's; all its values are NaN, and its neighbours' are as without it."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(9))
    clean = logprobs(logits, [5, 6, 7, 8])
    logits[1, 77], logits[3, 0] = value, value
    found = logprobs(logits, [5, -1, 7, 8])
    assert [False, True, False, True] == np.isnan(found.chosen).tolist() == np.isnan(found.top).all(-1).tolist()
    for row in (0, 2):
        assert clean.chosen[row] == found.chosen[row]
        np.testing.assert_array_equal(clean.top[row], found.top[row])
        np.testing.assert_array_equal(clean.top_ids[row], found.top_ids[row])
