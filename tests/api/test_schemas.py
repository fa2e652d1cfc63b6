"""What a request may hold: every refusal is a 400 that names its parameter, in both modes alike."""

import json
from typing import Any

import pytest

from service.api.body import parse_body
from service.api.errors import ApiError
from service.api.schemas import CompletionRequest
from tests.api.conftest import Service

INT64 = 2**63

VALUES: dict[str, list[Any]] = {
    "max_tokens": [0, -1, True, "16", 1.5, INT64, 10**400, [], {}],
    "temperature": [-0.1, 2.1, True, "1", [1], 10**400],
    "top_p": [-0.1, 1.1, False, "0.5"],
    "top_k": [-2, 1.0, True, "5", INT64],
    "min_p": [-0.1, 1.1, True],
    "n": [0, 129, True, "2", 1.0],
    "seed": [INT64, -INT64 - 1, True, "1", 1.0],
    "min_tokens": [-1, True, "1", 17],
    "stream": ["true", 1, ""],
    "ignore_eos": ["true", 1],
    "stop": ["", [""], ["a", ""], [1], 1, True, ["a"] * 65, "x" * 1025, [["a"]], [None]],
    "prompt": [
        [],
        1,
        True,
        {},
        [1, "a"],
        ["a", [1]],
        [[1], 1],
        [True],
        [1.0],
        [None],
        [[1.5]],
        [[[1]]],
        [["a"]],
        [[True]],
    ],
    "echo": ["true", 1],
    "logprobs": [-1, 21, True, "1", 1.0],
    "best_of": [0, 129, True, 1.0],
    "presence_penalty": [-2.1, 2.1, True, "1"],
    "frequency_penalty": [-2.1, 2.1, False, "1"],
    "repetition_penalty": [0, -1, True, "1", 10**400],
    "logit_bias": [
        [],
        {"a": 1},
        {"-1": 1},
        {"1": 100.5},
        {"1": True},
        {"1": "1"},
        {"50257": 0},
        {"9" * 11: 1},
        {"": 1},
    ],
    "bad_words": ["a", [""], [1], ["x"] * 257, True],
    "allowed_token_ids": [[], [-1], [50257], ["1"], [True], 1],
    "stop_token_ids": [[-1], [50257], ["1"], [1.0], 5, [0] * 1025],
    "include_stop_str_in_output": [1, "true"],
    "skip_special_tokens": [0, "false"],
    "split_special_tokens": [0],
    "return_token_ids": [1],
    "truncate_prompt_tokens": [0, -2, True, "5", 1.0],
    "truncation_side": ["middle", 1],
    "cache_salt": [1, "x" * 257],
    "priority": [1.5, True, "1", 2**31],
    "timeout_seconds": [0, -1, True, "1", 86401],
    "queue_timeout_seconds": [0, -1, True],
    "repetition_stop": ["yes", 1, []],
    "model": [1, True, ["demo"]],
    "user": [1, True],
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, name) for name, values in VALUES.items() for value in values],
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [50257]}, "prompt"),
    ({"prompt": [[0], [10**30]]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"allowed_token_ids": [5], "logit_bias": {"5": -100}}, "logit_bias"),
    ({"allowed_token_ids": [5], "logit_bias": {"6": 100}}, "logit_bias"),
    ({"repetition_stop": {"max_pattern_tokens": 0}}, "repetition_stop.max_pattern_tokens"),
    ({"repetition_stop": {"min_repeats": 1}}, "repetition_stop.min_repeats"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": [1]}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
]

UNSUPPORTED: list[tuple[str, Any]] = [
    ("suffix", "end"),
    ("guided_grammar", "root ::= 'a'"),
    ("structured_outputs", {"regex": "a"}),
    ("use_beam_search", True),
    ("use_beam_search", 1),
    ("stop_regex", "a+"),
    ("prompt_logprobs", 0),
    ("prompt_embeds", "AAAA"),
    ("typical_p", 0.9),
    ("no_repeat_ngram_size", 2),
]

HARMLESS: list[dict[str, Any]] = [
    dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt"}),
    dict.fromkeys(("suffix", "use_beam_search", "prompt_logprobs")),
    {"temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "best_of": 1},
    {"logit_bias": {}, "stop": [], "bad_words": [], "stop_token_ids": [], "suffix": "", "echo": False},
    {"repetition_penalty": 1.0, "use_beam_search": False, "response_format": {"type": "text"}},
    {"skip_special_tokens": True, "include_stop_str_in_output": False, "priority": 3, "request_id": "x"},
    {"n": 2, "best_of": 2},
    {"n": 2, "best_of": 2, "stream": True},
    {"repetition_stop": False},
    {"repetition_stop": {}},
    {"stream": False, "stream_options": {"include_usage": "yes"}},
    {"stream_options": {"include_usage": None, "other": 1}},
    {"no_such_field": [1, {"a": None}], "messages": []},
    {"stop": ["x"] * 64},
    {"stop": "x" * 1024},
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
async def test_refused(api: Service, body: dict[str, Any], param: str) -> None:
    """400 in the envelope with the parameter in its field and its message; the engine hears nothing."""
    for stream in (False, True):
        response = await api.http.post("/v1/completions", json={"stream": stream} | body)
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} == error.keys()
        assert (400, "invalid_request_error") == (response.status_code, error["type"])
        assert error["param"] == param or error["param"].startswith(f"{param}.")  # an item of a list
        assert error["message"].startswith(f"{error['param']}: ")
    assert [] == api.engine.submitted


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_unsupported(name: str, value: Any) -> None:
    """A field that would change the answer is never silently ignored."""
    with pytest.raises(ApiError, match=f"^{name}: is not supported") as caught:
        parse_body(json.dumps({name: value}).encode(), CompletionRequest)
    assert (400, name) == (caught.value.status, caught.value.body["error"]["param"])


@pytest.mark.parametrize("body", HARMLESS, ids=lambda body: next(iter(body)))
async def test_harmless(api: Service, body: dict[str, Any]) -> None:
    """Nulls are defaults, values that ask for nothing are accepted, unknown fields are ignored."""
    response = await api.http.post("/v1/completions", json={"prompt": "Hello"} | body)
    assert 200 == response.status_code, response.text


async def test_best_of_cannot_be_streamed(api: Service) -> None:
    """What is chosen at the end cannot come token by token."""
    response = await api.http.post("/v1/completions", json={"best_of": 2, "stream": True})
    assert (400, "best_of") == (response.status_code, response.json()["error"]["param"])


async def test_best_of_counts_for_the_number_of_sequences(api: Service) -> None:
    """Prompts x max(n, best_of) have a limit."""
    response = await api.http.post("/v1/completions", json={"prompt": ["a"] * 9, "best_of": 128})
    assert (400, "prompt") == (response.status_code, response.json()["error"]["param"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"temperature": NaN}',
        b'{"ignored": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": 1' + b"0" * 10_000 + b"}",
        b'{"prompt": "a"} x',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
async def test_a_body_that_is_no_json_object(api: Service, body: bytes) -> None:
    """400 and strict JSON back, also for a NaN, invalid UTF-8, a lone surrogate and a nesting without end."""
    response = await api.http.post("/v1/completions", content=body)
    assert 400 == response.status_code
    assert "invalid_json" == response.json()["error"]["code"]


async def test_numbers_beyond_floats_are_refused(api: Service) -> None:
    """1e999 is infinite, which no parameter takes."""
    floats = [name for name, field in CompletionRequest.model_fields.items() if "float" in str(field.annotation)]
    assert {"temperature", "top_p", "min_p", "repetition_penalty", "timeout_seconds"} <= set(floats)
    for name in floats:
        response = await api.http.post("/v1/completions", content=b'{"%b": 1e999}' % name.encode())
        assert (400, name) == (response.status_code, response.json()["error"]["param"])


async def test_the_context_is_a_limit_on_prompt_and_completion_together(api: Service) -> None:
    """1,000 + 24 fits; 1,000 + 25 and a prompt of the whole context do not, and both numbers are told."""
    prompt = [0] * 1000
    await api.complete(prompt=prompt, max_tokens=24)
    for stream in (False, True):
        body = {"prompt": prompt, "max_tokens": 25, "stream": stream}
        response = await api.http.post("/v1/completions", json=body)
        error = response.json()["error"]
        assert (400, "context_length_exceeded", "max_tokens") == (response.status_code, error["code"], error["param"])
        assert all(number in error["message"] for number in ("1024", "1000", "25", "1025"))
    for length in (1024, 5000):
        response = await api.http.post("/v1/completions", json={"prompt": [[1], [0] * length]})
        error = response.json()["error"]
        assert (400, "context_length_exceeded", "prompt") == (response.status_code, error["code"], error["param"])
        assert str(length) in error["message"]
    await api.complete(prompt=[0] * 1023)
    assert 1 == api.engine.submits[-1].params.max_tokens


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(api: Service) -> None:
    """More than context x 128 bytes, the longest token's, are never encoded."""
    for text in ("x" * (1024 * 128 + 1), "日" * (1024 * 128 // 3 + 1)):
        response = await api.http.post("/v1/completions", json={"prompt": ["short", text]})
        error = response.json()["error"]
        assert (400, "context_length_exceeded", "prompt") == (response.status_code, error["code"], error["param"])
        assert "1024" in error["message"]
        assert "131072" in error["message"]
