"""A healthy service, from outside: OpenAI's client, limits, languages, and clients that leave."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.service.scripted_model import CONTEXT, ScriptedModel
from tests.service.server import Client, Server, eventually

_GONE_SECONDS = 2.0  # for the blocks of a client that left to be free again
_LONG: dict[str, Any] = {"prompt": "The", "max_tokens": 1000, "ignore_eos": True}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}])
async def test_the_openai_package(demo_server: Server, demo: Client, sampling: dict[str, Any]) -> None:
    """Plain, streamed and asynchronous give one text, and the numbers that go with it."""
    ask: dict[str, Any] = {"model": "megatron-gpt2-demo", "prompt": "My fellow citizens", "max_tokens": 24, **sampling}
    expected = (await demo.complete(**ask))["choices"][0]
    address = {"base_url": f"{demo_server.url}/v1", "api_key": "none"}

    def use_plainly() -> None:
        with openai.OpenAI(**address) as client:
            assert [ask["model"]] == [model.id for model in client.models.list()]
            plain = client.completions.create(**ask)
            assert expected["text"] == plain.choices[0].text
            assert expected["finish_reason"] == plain.choices[0].finish_reason
            assert plain.usage is not None
            assert plain.usage.prompt_tokens == 3
            chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
            assert expected["text"] == "".join(chunk.choices[0].text for chunk in chunks[:-1])
            assert expected["finish_reason"] == chunks[-2].choices[0].finish_reason
            assert chunks[-1].usage is not None
            assert plain.usage.completion_tokens == chunks[-1].usage.completion_tokens

    await asyncio.to_thread(use_plainly)
    async with openai.AsyncOpenAI(**address) as client:
        assert expected["text"] == (await client.completions.create(**ask)).choices[0].text
        stream = await client.completions.create(**ask, stream=True)
        assert expected["text"] == "".join([chunk.choices[0].text async for chunk in stream])


async def test_openais_errors(demo_server: Server) -> None:
    """A refusal is the package's own exception for its status, with our code and parameter."""
    async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.completions.create(model="gpt-4", prompt="x")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.completions.create(model="megatron-gpt2-demo", prompt="x", temperature=3)
        assert wrong.value.param == "temperature"


async def test_an_empty_prompt_begins_a_document(demo: Client) -> None:
    """No prompt, "" and the end of text are one thing: a prompt of one token."""
    ask = {"max_tokens": 12, "temperature": 0}
    answers = [
        await demo.complete(**ask, **prompt)
        for prompt in ({}, {"prompt": ""}, {"prompt": "<|endoftext|>"}, {"prompt": [50256]}, {"prompt": None})
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {1} == {answer["usage"]["prompt_tokens"] for answer in answers}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_contexts_edge(demo: Client, stream: bool) -> None:
    """1,000 + 24 tokens are answered in full; 1,000 + 25 are refused before anything is sent, with both numbers."""
    ask: dict[str, Any] = {"prompt": [262] * 1000, "temperature": 0, "ignore_eos": True, "max_tokens": CONTEXT - 1000}
    if stream:
        streamed = await demo.stream(**ask, stream_options={"include_usage": True})
        assert {0: "length"} == streamed.finish_reasons
        assert streamed.usage is not None
        assert streamed.usage["completion_tokens"] == 24
    else:
        answer = await demo.complete(**ask)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 24
    refused = await demo.post(**ask | {"max_tokens": 25, "stream": stream})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1000" in error["message"]
    assert "25" in error["message"]


# Languages


async def test_languages_stream_without_a_broken_character(scripted: Client, scripted_model: ScriptedModel) -> None:
    """Emoji, CJK and other scripts, streamed to the end of the text: every piece is whole characters."""
    num_tokens = 2 * scripted_model.num_line_tokens
    prompt = [11] * (scripted_model.end - num_tokens + 1)
    ask: dict[str, Any] = {"prompt": prompt, "max_tokens": CONTEXT - len(prompt)}
    streamed, answer = await asyncio.gather(
        scripted.stream(**ask, stream_options={"include_usage": True}), scripted.complete(**ask)
    )
    expected = scripted_model.text(num_tokens, num_prompt_tokens=len(prompt))
    assert "日本語のテキストは" in expected
    assert expected == streamed.text() == answer["choices"][0]["text"]
    assert "\ufffd" not in "".join(streamed.pieces[0])
    assert {0: "stop"} == streamed.finish_reasons
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert streamed.usage is not None
    assert num_tokens + 1 == streamed.usage["completion_tokens"] == answer["usage"]["completion_tokens"]


async def test_an_answer_that_ends_within_a_character(scripted: Client, scripted_model: ScriptedModel) -> None:
    """Cut after any number of tokens, the stream joined is the plain answer: U+FFFD stands at most at the very end."""
    for num_tokens in range(1, 24):
        streamed = await scripted.stream(prompt="", max_tokens=num_tokens)
        answer = await scripted.complete(prompt="", max_tokens=num_tokens)
        assert scripted_model.text(num_tokens) == streamed.text() == answer["choices"][0]["text"]
        assert "\ufffd" not in "".join(streamed.pieces[0])[:-1]


async def test_random_bytes_stream_as_they_are_answered(scripted: Client, scripted_model: ScriptedModel) -> None:
    """At temperature 2, characters in pieces and pieces of none: joined they are the plain answer, for every seed."""
    ask: dict[str, Any] = {"prompt": [11] * (scripted_model.end + 2), "max_tokens": 60, "temperature": 2.0}
    texts = set()
    for seed in range(4):
        streamed = await scripted.stream(**ask, seed=seed)
        answer = await scripted.complete(**ask, seed=seed)
        assert answer["choices"][0]["text"] == streamed.text()
        texts.add(streamed.text())
    assert len(texts) == 4
    for text in texts:
        assert "\ufffd" in text
        assert not text.replace("\ufffd", "").isascii()


@pytest.mark.parametrize("stop", ["🏳️‍🌈", "日本語", "途切", "🇫🇷, hands"])
async def test_a_stop_string_of_several_tokens(scripted: Client, scripted_model: ScriptedModel, stop: str) -> None:
    """Cut exactly before it, streamed or not, and the tokens counted are those up to its last byte."""
    ask: dict[str, Any] = {"prompt": "", "max_tokens": 200, "stop": ["never there", stop]}
    streamed = await scripted.stream(**ask, stream_options={"include_usage": True})
    answer = await scripted.complete(**ask)
    assert scripted_model.text(200).split(stop)[0] == streamed.text() == answer["choices"][0]["text"]
    assert ("stop", stop) == (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"])
    assert streamed.usage is not None
    num_tokens = answer["usage"]["completion_tokens"]
    assert num_tokens == streamed.usage["completion_tokens"]
    assert stop in scripted_model.text(num_tokens)
    assert stop not in scripted_model.text(num_tokens - 1)


# Clients that leave


async def gauges(client: Client) -> tuple[float, float, float]:
    """Sequences running and waiting, and the share of KV blocks in use."""
    return (
        await client.metric("requests_running"),
        await client.metric("requests_waiting"),
        await client.metric("kv_cache_usage_ratio"),
    )


async def nothing_left(client: Client) -> None:
    async def free() -> bool:
        return await gauges(client) == (0, 0, 0)

    await eventually(free, seconds=_GONE_SECONDS)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_stream_frees_its_blocks(demo: Client, n: int) -> None:
    """It read one event and closed the connection."""
    aborted = await demo.metric("requests_aborted_total")
    async with demo.http.stream("POST", "/v1/completions", json=_LONG | {"stream": True, "n": n}) as response:
        lines = response.aiter_lines()
        assert json.loads((await anext(lines)).removeprefix("data: "))["choices"]
        await demo.wait_metric("requests_running", n)
        assert await demo.metric("kv_cache_usage_ratio") > 0
    await nothing_left(demo)
    assert aborted + 1 == await demo.metric("requests_aborted_total")


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_plain_request_frees_its_blocks(demo: Client, n: int) -> None:
    """It closed the connection while it waited for the answer."""
    aborted = await demo.metric("requests_aborted_total")
    asking = asyncio.create_task(demo.post(**_LONG, n=n))
    await demo.wait_metric("requests_running", n)
    assert await demo.metric("kv_cache_usage_ratio") > 0
    asking.cancel()
    await asyncio.wait([asking])
    await nothing_left(demo)
    assert aborted + 1 == await demo.metric("requests_aborted_total")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_the_queue_is_forgotten(scripted: Client, stream: bool) -> None:
    """Two sequences run at a time; of two more requests, one leaves while it waits, and the other has its turn."""
    running = asyncio.create_task(scripted.post(prompt="", max_tokens=1000, n=2))
    await scripted.wait_metric("requests_running", 2)
    leaving = asyncio.create_task(scripted.post(prompt="", max_tokens=1000, stream=stream))
    await scripted.wait_metric("requests_waiting", 1)
    staying = asyncio.create_task(scripted.complete(prompt="", max_tokens=3))
    await scripted.wait_metric("requests_waiting", 2)
    leaving.cancel()
    await scripted.wait_metric("requests_waiting", 1, seconds=_GONE_SECONDS)
    running.cancel()
    assert (await staying)["usage"]["completion_tokens"] == 3
    await asyncio.wait([running, leaving])
    await nothing_left(scripted)


async def test_a_choice_that_stops_early_leaves_its_place(scripted: Client, scripted_model: ScriptedModel) -> None:
    """Prompts as different lengths of ids reach the end of text at different times; each has its own end."""
    lengths = scripted_model.end, scripted_model.end - 10
    answer = await scripted.complete(prompt=[[11] * length for length in lengths], max_tokens=20)
    expected = [
        scripted_model.text(num, num_prompt_tokens=length) for num, length in zip((1, 11), lengths, strict=True)
    ]
    assert expected == [choice["text"] for choice in answer["choices"]]
    assert {"stop"} == {choice["finish_reason"] for choice in answer["choices"]}
    assert answer["usage"]["completion_tokens"] == 2 + 12


# What operators read


async def test_every_log_line_is_json_and_none_has_a_prompt(demo_server: Server, demo: Client) -> None:
    """A line a request, with its id and figures; the text of prompts and answers stays out of the log."""
    secret = "Xylophone-quartz-vexing"
    request_id = "test-of-the-log"
    body = {"prompt": secret, "max_tokens": 2, "user": secret}
    response = await demo.http.post("/v1/completions", json=body, headers={"X-Request-Id": request_id})
    assert request_id == response.headers["x-request-id"]

    async def logged() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in demo_server.log]
        return [line["figures"] for line in lines if line.get("figures", {}).get("request_id") == request_id]

    (figures,) = await eventually(logged)
    assert (200, 2) == (figures["status"], figures["completion_tokens"])
    assert secret not in "".join(demo_server.log)


async def test_two_services_cannot_have_one_port(demo_server: Server) -> None:
    """The second says so in a line and ends with 2."""
    port = str(httpx.URL(demo_server.url).port)
    process = await asyncio.create_subprocess_exec(
        demo_server.process.args[0], "serve", "--port", port, stderr=asyncio.subprocess.PIPE
    )
    _, log = await process.communicate()
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}".encode() in log
