"""PUT and POST /api: what is refused, and that every error has the message twice, in `message` too."""

import asyncio
from typing import Any

import httpx
import pytest

from service.engine.request import Finish
from tests.api.conftest import Service, Start
from tests.api.test_megatron import put

TWO = ["a", "b"]


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """An answer of this status with the message twice; its error object."""
    assert status == response.status_code, response.text
    body = response.json()
    assert {"message", "error"} == body.keys()
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    assert error["message"] == body["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompts"),
        ({"prompts": None}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"] * 129}, "prompts"),
        ({"prompts": ["a", 5]}, "prompts.1"),
        ({"prompts": ["a", None]}, "prompts.1"),
        ({"prompts": [[1]]}, "prompts.0"),
        ({"prompts": ["a", ""]}, "prompts"),
        ({"prompts": [""], "add_BOS": False}, "prompts"),
        ({"sentences": ["a"]}, "sentences"),
        ({"prompts": ["a"], "max_len": 64}, "max_len"),
        ({"prompts": ["a"], "tokens_to_generate": -1}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": 1.5}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": "5"}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": True}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": 10**30}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": 0}, "tokens_to_generate"),
        ({"prompts": ["a"], "tokens_to_generate": 0, "logprobs": False}, "tokens_to_generate"),
        ({"prompts": ["a"], "logprobs": 1}, "logprobs"),
        ({"prompts": ["a"], "temperature": 0}, "temperature"),
        ({"prompts": ["a"], "temperature": -1}, "temperature"),
        ({"prompts": ["a"], "temperature": 100.1}, "temperature"),
        ({"prompts": ["a"], "temperature": True}, "temperature"),
        ({"prompts": ["a"], "temperature": "1"}, "temperature"),
        ({"prompts": ["a"], "top_k": -1}, "top_k"),
        ({"prompts": ["a"], "top_k": 1001}, "top_k"),
        ({"prompts": ["a"], "top_k": 1.0}, "top_k"),
        ({"prompts": ["a"], "top_p": -0.1}, "top_p"),
        ({"prompts": ["a"], "top_p": 1.1}, "top_p"),
        ({"prompts": ["a"], "top_p": False}, "top_p"),
        ({"prompts": ["a"], "top_p": 0.5, "top_k": 1}, "top_p"),
        ({"prompts": ["a"], "top_p_decay": 0.5}, "top_p_decay"),
        ({"prompts": ["a"], "top_p_decay": 0.5, "top_p": 0}, "top_p_decay"),
        ({"prompts": ["a"], "top_p_decay": 1.1, "top_p": 0.5}, "top_p_decay"),
        ({"prompts": ["a"], "top_p_decay": -0.1, "top_p": 0.5}, "top_p_decay"),
        ({"prompts": ["a"], "top_p_bound": 0.5}, "top_p_bound"),
        ({"prompts": ["a"], "top_p_bound": 0.0, "top_p": 0.5}, "top_p_bound"),
        ({"prompts": ["a"], "top_p_bound": 0.6, "top_p": 0.5}, "top_p_bound"),
        ({"prompts": ["a"], "add_BOS": 1}, "add_BOS"),
        ({"prompts": ["a"], "stop_on_double_eol": "yes"}, "stop_on_double_eol"),
        ({"prompts": ["a"], "stop_on_eol": 0}, "stop_on_eol"),
        ({"prompts": ["a"], "prevent_newline_after_colon": 1}, "prevent_newline_after_colon"),
        ({"prompts": ["a"], "random_seed": -2}, "random_seed"),
        ({"prompts": ["a"], "random_seed": 1.0}, "random_seed"),
        ({"prompts": ["a"], "random_seed": 2**63}, "random_seed"),
        ({"prompts": ["a"], "no_log": 1}, "no_log"),
        ({"prompts": ["a"], "beam_width": 0}, "beam_width"),
        ({"prompts": ["a"], "beam_width": 33}, "beam_width"),
        ({"prompts": ["a"], "beam_width": 2.0}, "beam_width"),
        ({"prompts": ["a"], "beam_width": True}, "beam_width"),
        ({"prompts": TWO, "beam_width": 2}, "beam_width"),
        ({"prompts": ["a"], "beam_width": 2, "tokens_to_generate": 0}, "tokens_to_generate"),
        ({"prompts": ["a"], "beam_width": 2, "tokens_to_generate": 0, "logprobs": True}, "tokens_to_generate"),
        ({"prompts": ["a"], "beam_width": 2, "logprobs": True}, "logprobs"),
        ({"prompts": ["a"], "beam_width": 2, "temperature": 0.5}, "temperature"),
        ({"prompts": ["a"], "beam_width": 2, "top_k": 1}, "top_k"),
        ({"prompts": ["a"], "beam_width": 2, "top_p": 0.5}, "top_p"),
        ({"prompts": ["a"], "beam_width": 2, "stop_on_eol": True}, "stop_on_eol"),
        ({"prompts": ["a"], "beam_width": 2, "stop_on_double_eol": True}, "stop_on_double_eol"),
        ({"prompts": ["a"], "beam_width": 2, "stop_token": 50257}, "stop_token"),
        ({"prompts": ["a"], "beam_width": 2, "stop_token": -1}, "stop_token"),
        ({"prompts": ["a"], "beam_width": 2, "stop_token": 5.0}, "stop_token"),
        ({"prompts": ["a"], "beam_width": 2, "length_penalty": 10.5}, "length_penalty"),
        ({"prompts": ["a"], "beam_width": 2, "length_penalty": "1"}, "length_penalty"),
        ({"prompts": ["a"], "beam_width": 2, "length_penalty": True}, "length_penalty"),
        ({"prompts": ["a"], "stop_token": 50256}, "stop_token"),
        ({"prompts": ["a"], "length_penalty": 1.0}, "length_penalty"),
    ],
    ids=lambda value: str(value)[:80],
)
@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_what_is_wrong_is_named(api: Service, method: str, body: dict[str, Any], param: str) -> None:
    """A 400 whose message, there twice, begins with the field; nothing has been asked of the engine."""
    error = check_error(await api.http.request(method, "/api", json=body), 400)
    assert (param, "invalid_request_error") == (error["param"], error["type"])
    assert error["message"].startswith(f"{param}: ")
    assert [] == api.engine.submits


@pytest.mark.parametrize(("old", "new"), [("max_len", "tokens_to_generate"), ("sentences", "prompts")])
async def test_a_field_of_former_times_has_a_hint(api: Service, old: str, new: str) -> None:
    error = check_error(await api.http.put("/api", json={"prompts": ["a"], old: 5}), 400)
    assert error["message"].endswith(f"use {new}")


@pytest.mark.parametrize(("length", "tokens", "param"), [(1000, 25, "tokens_to_generate"), (1024, 1, "prompts")])
@pytest.mark.parametrize("more", [{}, {"beam_width": 2}])
async def test_the_context_is_a_limit_on_prompt_and_what_follows(
    api: Service, length: int, tokens: int, param: str, more: dict[str, Any]
) -> None:
    """With both numbers; the longest prompt counts, and its end-of-text token with it."""
    body: dict[str, Any] = {"prompts": [" a" * (length - 1)], "add_BOS": True, "tokens_to_generate": tokens} | more
    error = check_error(await api.http.put("/api", json=body), 400)
    assert (param, "context_length_exceeded") == (error["param"], error["code"])
    assert f"the prompt has {length} and tokens_to_generate is {tokens}" in error["message"]
    assert [] == api.engine.submits


async def test_the_whole_context_can_be_filled(api: Service) -> None:
    answer = await put(api, prompts=["a", " a" * 1000], tokens_to_generate=24)
    assert [25, 1024] == list(map(len, answer["tokens"]))


async def test_a_text_that_no_context_holds_is_refused_unread(api: Service) -> None:
    error = check_error(await api.http.put("/api", json={"prompts": ["a" * (1024 * 128 + 1)]}), 400)
    assert ("prompts", "context_length_exceeded") == (error["param"], error["code"])


async def test_sequences_are_bounded(start: Start) -> None:
    """By the server's own limit, below Megatron-LM's: prompts, and beams."""
    api: Service = await start(max_choices=3)
    assert 3 == len((await put(api, prompts=["a", "b", "c"], tokens_to_generate=1))["text"])
    assert 3 == len((await put(api, beam_width=3, tokens_to_generate=1))["text"])
    assert "prompts" == check_error(await api.http.put("/api", json={"prompts": ["a"] * 4}), 400)["param"]
    body = {"prompts": ["a"], "beam_width": 4}
    assert "beam_width" == check_error(await api.http.put("/api", json=body), 400)["param"]


# Every error has the message twice


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"a"', b'{"prompts": ["a"], "temperature": NaN}', b"\xff"])
async def test_a_body_that_is_no_json_object(api: Service, content: bytes) -> None:
    assert "invalid_json" == check_error(await api.http.put("/api", content=content), 400)["code"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
async def test_other_methods(api: Service, method: str) -> None:
    """A 405 that allows both."""
    response = await api.http.request(method, "/api")
    assert "method_not_allowed" == check_error(response, 405)["code"]
    assert {"PUT", "POST"} == set(response.headers["allow"].split(", "))


async def test_a_body_over_the_limit(start: Start) -> None:
    api: Service = await start(max_body_bytes=1000)
    assert "request_too_large" == check_error(await api.http.put("/api", content=b" " * 1001), 413)["code"]

    async def undeclared() -> Any:
        for _ in range(11):
            yield b" " * 100

    check_error(await api.http.put("/api", content=undeclared()), 413)


async def test_while_loading_it_is_unavailable(start: Start) -> None:
    api: Service = await start(ready=False)
    response = await api.http.put("/api", json={"prompts": ["a"]})
    assert "service_unavailable" == check_error(response, 503)["code"]
    assert int(response.headers["retry-after"]) > 0


async def test_a_fault_of_the_server(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody expected is told without its details, and in the same form."""
    monkeypatch.setattr("service.api.megatron.sample_texts", None)
    error = check_error(await api.http.put("/api", json={"prompts": ["a"]}), 500)
    assert "internal_error" == error["code"]
    assert "NoneType" not in error["message"]


@pytest.mark.parametrize("more", [{}, {"beam_width": 3}])
@pytest.mark.parametrize(("finish", "status"), [(Finish.ERROR, 500), (Finish.ABORT, 503)])
async def test_what_the_engine_could_not_finish(
    api: Service, more: dict[str, Any], finish: Finish, status: int
) -> None:
    """The others of the request are given up."""
    api.engine.gate.clear()
    prompts = ["a"] if more else ["a", "b", "b"]
    asking = asyncio.ensure_future(api.http.put("/api", json={"prompts": prompts} | more))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.engine.end(api.engine.submitted[0], finish, "a step raised" if finish is Finish.ERROR else None)
    check_error(await asking, status)
    await api.engine.wait_for(lambda: api.engine.num_open == 0)
    metrics = (await api.http.get("/metrics")).text
    assert 'megatron_gpt2_requests_finished_total{finish_reason="error"} 3.0' in metrics


async def test_an_error_of_another_route_has_no_message(api: Service) -> None:
    """Only the envelope."""
    for path in ("/v1/completions", "/apis"):
        assert {"error"} == (await api.http.put(path, json={})).json().keys()
