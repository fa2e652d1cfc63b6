"""From fields to the engine's numbers: what each field becomes, over HTTP to a fake engine."""

from typing import Any

import pytest

from service.engine.request import SamplingParams
from tests.api.conftest import Service


async def submitted(api: Service, **body: Any) -> SamplingParams:
    await api.complete(**body)
    return api.engine.submits[-1].params


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {},
            {
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
                "logit_bias": (),
                "allowed_token_ids": None,
                "banned_token_ids": (),
                "bad_words": (),
                "grammar": None,
                "num_logprobs": None,
            },
        ),
        (
            {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.3},
            {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.3},
        ),
        ({"logprobs": 0}, {"num_logprobs": 0}),
        ({"logprobs": 20}, {"num_logprobs": 20}),
        ({"best_of": 3}, {"num_logprobs": 0}),
        ({"best_of": 3, "logprobs": 2}, {"num_logprobs": 2}),
        ({"n": 3, "best_of": 3}, {"num_logprobs": None}),
        ({"stop_token_ids": [13, 13, 50256]}, {"stop_token_ids": (13, 50256)}),
        ({"stop": ["<|endoftext|>"], "stop_token_ids": [13]}, {"stop_token_ids": (50256, 13)}),
        ({"allowed_token_ids": [9, 5, 9]}, {"allowed_token_ids": (5, 9)}),
        ({"max_tokens": 0, "echo": True}, {"max_tokens": 0}),
    ],
    ids=str,
)
async def test_fields_become_numbers(api: Service, body: dict[str, Any], expected: dict[str, Any]) -> None:
    """Defaults ask for nothing; duplicates are one."""
    params = await submitted(api, **body)
    assert expected == {name: getattr(params, name) for name in expected}


async def test_a_bias_of_100_forces_and_of_minus_100_bans(api: Service) -> None:
    """They are sets, exact whatever the logits are; what lies between is added."""
    params = await submitted(api, logit_bias={"5": 100, "6": 100, "7": -100, "8": 99.5, "9": -1})
    assert ((5, 6), (7,)) == (params.allowed_token_ids, params.banned_token_ids)
    assert ((8, 99.5), (9, -1.0)) == params.logit_bias
    both = await submitted(api, logit_bias={"5": 100, "6": 100}, allowed_token_ids=[6, 7])
    assert (6,) == both.allowed_token_ids


async def test_bad_words_are_banned_alone_and_after_a_space(api: Service) -> None:
    """One token is banned outright; of several, the sequence."""
    encode = api.tokenizer.encode
    params = await submitted(api, bad_words=["hello", " uncharacteristically"])
    single = {ids[0] for ids in encode(["hello", " hello"]) if len(ids) == 1}
    assert single == set(params.banned_token_ids)
    expected = {tuple(ids) for ids in encode(["hello", " hello", " uncharacteristically"]) if len(ids) > 1}
    assert expected == set(params.bad_words)


@pytest.mark.parametrize(
    ("prompt", "truncation", "kept", "dropped"),
    [
        ([1, 2, 3, 4, 5], {"truncate_prompt_tokens": 2}, [(4, 5)], 3),
        ([1, 2, 3, 4, 5], {"truncate_prompt_tokens": 2, "truncation_side": "right"}, [(1, 2)], 3),
        ([1, 2, 3], {"truncate_prompt_tokens": 3}, [(1, 2, 3)], 0),
        ([[1, 2, 3], [4]], {"truncate_prompt_tokens": 1}, [(3,), (4,)], 2),
        ([7] * 2000, {"truncate_prompt_tokens": -1, "max_tokens": 24}, [(7,) * 1000], 1000),
        ([7] * 2000, {"truncate_prompt_tokens": -1}, [(7,) * 1008], 992),
        (" world" * 30_000, {"truncate_prompt_tokens": 5}, [(995,) * 5], 29_995),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_truncation_is_asked_for_and_told(
    api: Service, prompt: Any, truncation: dict[str, Any], kept: list[tuple[int, ...]], dropped: int
) -> None:
    """The usage says how many tokens were dropped; what was dropped is no prompt token."""
    answer = await api.complete(prompt=prompt, **truncation)
    assert kept == [request.prompt for request in api.engine.submitted]
    assert dropped == answer["usage"]["prompt_tokens_details"]["truncated_tokens"]
    assert sum(map(len, kept)) == answer["usage"]["prompt_tokens"]


async def test_the_end_of_text_in_a_prompt_can_be_plain_text(api: Service) -> None:
    """Its own id by default; with split_special_tokens the seven tokens of its letters."""
    await api.complete(prompt="<|endoftext|>")
    await api.complete(prompt="<|endoftext|>", split_special_tokens=True)
    assert [(50256,), (27, 91, 437, 1659, 5239, 91, 29)] == [request.prompt for request in api.engine.submitted]


async def test_what_concerns_the_queue_and_the_cache_rides_on_each_request(api: Service) -> None:
    """priority and cache_salt."""
    await api.complete(prompt=["a", "b"], priority=3, cache_salt="tenant")
    assert [(3, "tenant")] * 2 == [(request.priority, request.cache_salt) for request in api.engine.submitted]


async def test_the_engine_is_told_which_tokens_can_complete_a_stop(api: Service) -> None:
    """Those that contain the stop string or begin with a tail of it; without stop strings, none."""
    await api.complete(stop=[" the"])
    await api.complete()
    told, none = (submit.completing_ids for submit in api.engine.submits)
    (the,), (e,), (other,) = api.tokenizer.encode([" the", "e", "q"])
    assert [1, 1, 0] == [told[token_id // 8] >> token_id % 8 & 1 for token_id in (the, e, other)]
    assert b"" == none


@pytest.mark.parametrize(
    ("body", "patient"),
    [
        ({}, True),
        ({"stop": "x"}, True),
        ({"stream": True}, False),
        ({"repetition_stop": {}}, False),
    ],
)
async def test_whoever_wants_the_whole_answer_is_patient(api: Service, body: dict[str, Any], patient: bool) -> None:
    """The engine then tells its tokens at the end; not where pieces are streamed, or decide where it ends."""
    if body.get("stream"):
        async with api.http.stream("POST", "/v1/completions", json={"prompt": "x"} | body) as answer:
            await answer.aread()
    else:
        await api.complete(**body)
    assert patient == api.engine.submits[-1].patient
