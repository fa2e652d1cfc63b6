"""POST /v1/completions over HTTP: the whole answer, the stream, their equality, and how the parameters arrive."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest

from service.api import answers
from tests.api.conftest import Service, Start
from tests.api.fake_engine import random_tokens


async def events(api: Service, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    response = await api.http.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert ["data: [DONE]", ""] == lines[-2:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if not line.startswith(":")]


def joined(chunks: list[dict[str, Any]]) -> dict[int, tuple[str, str, str | None]]:
    """Text, finish_reason and stop_reason by choice. The reason must be null until the last chunk of a choice."""
    texts: dict[int, str] = {}
    ends: dict[int, tuple[str, str | None]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in ends
        assert choice["text"] or choice["finish_reason"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = choice["finish_reason"], choice["stop_reason"]
    return {index: (text, *ends[index]) for index, text in texts.items()}


def whole(answer: dict[str, Any]) -> dict[int, tuple[str, str, str | None]]:
    return {c["index"]: (c["text"], c["finish_reason"], c["stop_reason"]) for c in answer["choices"]}


def say(api: Service, text: str) -> None:
    """Make the engine generate exactly `text`, and the end of text after it."""
    tokens = [*api.tokenizer.encode([text])[0], 50256]
    api.engine.script = lambda _request, _params, _choice: tokens


async def test_a_plain_answer_has_every_field_of_the_contract(api: Service) -> None:
    """Ids, choices, usage and fingerprint in the body, the timings in a header; the model is its first name."""
    api.engine.cached_tokens = 1
    before = int(time.time())
    response = await api.http.post(
        "/v1/completions",
        json={"model": "org/alias", "prompt": "Hello world", "seed": 3},
    )
    answer = response.json()
    answers.Completion.model_validate(answer, strict=True)
    assert {
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "system_fingerprint",
    } == answer.keys()
    assert answer["id"].startswith("cmpl-")
    assert ("text_completion", "demo") == (answer["object"], answer["model"])
    assert before <= answer["created"] <= time.time()
    text = api.tokenizer.decode(random_tokens(api.engine.submitted[0], api.engine.submits[0].params, 0))
    expected = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert [expected] == answer["choices"]
    usage = {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}
    assert usage | {"prompt_tokens_details": {"cached_tokens": 1, "truncated_tokens": 0}} == answer["usage"]
    timings = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
    assert ["queue", "prefill", "decode"] == [name for name, _ in timings]
    assert all(float(milliseconds) >= 0 for _, milliseconds in timings)


async def test_the_stream_joined_is_the_plain_answer(api: Service) -> None:
    """Same text, reasons and usage for several prompts and samples; every chunk has the shape of the whole answer."""
    body = {"prompt": ["Once", "upon a time"], "n": 3, "seed": -7, "max_tokens": 30}
    plain = await api.complete(**body)
    chunks = await events(api, **body, stream_options={"include_usage": True})
    assert whole(plain) == joined(chunks)
    for chunk in chunks:
        answers.Completion.model_validate(chunk, strict=True)
        assert chunk["id"] == chunks[0]["id"]
    assert [None] * (len(chunks) - 1) == [chunk["usage"] for chunk in chunks[:-1]]
    assert [] == chunks[-1]["choices"]
    usage = chunks[-1]["usage"]
    assert {"queue_ms", "prefill_ms", "decode_ms"} == usage.pop("timings").keys()
    assert plain["usage"] == usage


async def test_a_stream_has_its_headers_and_no_usage_unasked(api: Service) -> None:
    """Proxies neither buffer nor cache it."""
    response = await api.http.post("/v1/completions", json={"stream": True})
    assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
    assert ("no-cache", "no") == (
        response.headers["cache-control"],
        response.headers["x-accel-buffering"],
    )
    assert "usage" not in response.text


async def test_continuous_usage_counts_one_choice(api: Service) -> None:
    """Each chunk has the tokens of its own prompt and the running count of its own choice."""
    chunks = await events(
        api,
        prompt=[[1, 2], [3]],
        max_tokens=4,
        stream_options={"continuous_usage_stats": True, "include_usage": True},
    )
    last = {chunk["choices"][0]["index"]: chunk["usage"] for chunk in chunks if chunk["choices"]}
    assert (2, 4, 6) == tuple(last[0][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens"))
    assert (1, 4, 5) == tuple(last[1][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens"))
    assert 8 == chunks[-1]["usage"]["completion_tokens"]


async def test_choices_are_prompt_major(api: Service) -> None:
    """index = prompt * n + sample, which is also the order of the list; a prompt's place is not part of its draw."""
    answer = await api.complete(prompt=["a", "b", "a"], n=2, seed=5, max_tokens=8)
    texts = [choice["text"] for choice in answer["choices"]]
    assert list(range(6)) == [choice["index"] for choice in answer["choices"]]
    expected = [
        api.tokenizer.decode(random_tokens(request, api.engine.submits[0].params, sample))
        for request in api.engine.submitted
        for sample in (0, 1)
    ]
    assert expected == texts
    assert texts[0:2] == texts[4:6]
    assert 4 == len(set(texts))


async def test_cached_tokens_count_each_prompt_once(api: Service) -> None:
    """Summed over prompts, not over the samples that share one."""
    api.engine.cached_tokens = 2
    answer = await api.complete(prompt=[[1, 2, 3], [4, 5, 6]], n=3)
    assert {"cached_tokens": 4, "truncated_tokens": 0} == answer["usage"]["prompt_tokens_details"]
    assert 6 == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({}, [(50256,)]),
        ({"prompt": None}, [(50256,)]),
        ({"prompt": ""}, [(50256,)]),
        ({"prompt": [[]]}, [(50256,)]),
        ({"prompt": ["", "Hello world"]}, [(50256,), (15496, 995)]),
        ({"prompt": "Hello world"}, [(15496, 995)]),
        ({"prompt": ["Hello", " world"]}, [(15496,), (995,)]),
        ({"prompt": [15496, 995]}, [(15496, 995)]),
        ({"prompt": [[15496], [995, 0]]}, [(15496,), (995, 0)]),
        ({"prompt": "<|endoftext|>Hello"}, [(50256, 15496)]),
    ],
)
async def test_prompt_forms(api: Service, body: dict[str, Any], prompts: list[tuple[int, ...]]) -> None:
    """All four forms, and the empty prompt as the start of a document."""
    await api.complete(**body)
    assert prompts == [request.prompt for request in api.engine.submitted]


async def test_a_long_prompt_is_read_in_a_thread_the_same(api: Service) -> None:
    """1,000 tokens and 24 more fit."""
    answer = await api.complete(prompt=" world" * 1000, max_tokens=24)
    assert (1000, 24) == (
        answer["usage"]["prompt_tokens"],
        answer["usage"]["completion_tokens"],
    )
    assert (995,) * 1000 == api.engine.submitted[0].prompt


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {},
            {
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "max_tokens": 16,
                "min_tokens": 0,
            },
        ),
        ({"temperature": 1e-6}, {"temperature": 0.0}),
        (
            {"temperature": 2, "top_p": 0.5, "min_p": 0.25},
            {"temperature": 2.0, "top_p": 0.5, "min_p": 0.25},
        ),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"top_k": 60000}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"top_p": 0, "top_k": 7}, {"top_p": 1.0, "top_k": 1}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"ignore_eos": True, "min_tokens": 3}, {"ignore_eos": True, "min_tokens": 3}),
        ({"stop": ["x", "<|endoftext|>"]}, {"stop_token_ids": (50256,)}),
        ({"stop": []}, {"stop_token_ids": ()}),
        ({"prompt": [0] * 1020}, {"max_tokens": 4}),
        ({"prompt": [[0], [0] * 1020]}, {"max_tokens": 4}),
    ],
)
async def test_parameters_reach_the_engine(api: Service, body: dict[str, Any], expected: dict[str, Any]) -> None:
    """Defaults, the values that mean off, and what is mapped."""
    await api.complete(**body)
    params = api.engine.submits[0].params
    assert expected == {name: getattr(params, name) for name in expected}


async def test_without_a_seed_each_request_draws_its_own(api: Service) -> None:
    """63 random bits a request, the same for all its prompts."""
    await api.complete(prompt=["a", "b"])
    await api.complete(prompt="a")
    first, second = (submit.params.seed for submit in api.engine.submits)
    assert first != second
    assert 0 <= first < 2**63


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_the_text_and_ends_the_sequence(api: Service, stream: bool) -> None:
    """Cut inside a token, counted up to that token, told in stop_reason; the engine is told to stop computing."""
    say(api, "one two three four five six")
    api.engine.tokens_before_gate = 4
    api.engine.gate.clear()  # the engine cannot end by itself
    body = {"max_tokens": 100, "stop": ["nothing", "hree", "four"]}
    if stream:
        chunks = await events(api, **body, stream_options={"include_usage": True})
        got, usage = joined(chunks), chunks[-1]["usage"]
    else:
        answer = await api.complete(**body)
        got, usage = whole(answer), answer["usage"]
    assert {0: ("one two t", "stop", "hree")} == got
    assert 3 == usage["completion_tokens"]
    await api.engine.wait_for(lambda: bool(api.engine.aborted))
    assert 0 == api.engine.num_open


async def test_tokens_after_a_stop_are_dropped(api: Service) -> None:
    """A delivery that goes past the stop is cut; usage counts up to the token that completed it."""
    say(api, "one two three four five six")
    api.engine.tokens_per_delta = 100
    answer = await api.complete(max_tokens=100, stop=" th")
    assert {0: ("one two", "stop", " th")} == whole(answer)
    assert 3 == answer["usage"]["completion_tokens"]
    metrics = (await api.http.get("/metrics")).text
    assert "megatron_gpt2_generated_tokens_total 3.0" in metrics
    assert "megatron_gpt2_dropped_tokens_total 4.0" in metrics


async def test_stop_wins_over_length_and_one_choice_stops_alone(api: Service) -> None:
    """The last permitted token completes a stop: `stop`. The other choice goes on to its own end."""
    tokens = api.tokenizer.encode(["a b c d", "w x y z"])
    api.engine.script = lambda _request, _params, choice: tokens[choice]
    answer = await api.complete(n=2, max_tokens=4, stop="d")
    assert {0: ("a b c ", "stop", "d"), 1: ("w x y z", "length", None)} == whole(answer)


async def test_an_unfinished_stop_string_is_released(api: Service) -> None:
    """Held while it could go on, sent at the end."""
    say(api, "so it goes STO")
    chunks = await events(api, max_tokens=100, stop="STOP")
    assert {0: ("so it goes STO", "stop", None)} == joined(chunks)


async def test_min_tokens_suppresses_stop_strings(api: Service) -> None:
    """A stop string completed by an earlier token is text."""
    say(api, "a b a b a b")
    answer = await api.complete(max_tokens=6, stop=" b", min_tokens=3)
    assert {0: ("a b a", "stop", " b")} == whole(answer)
    assert 4 == answer["usage"]["completion_tokens"]


async def test_end_of_text(api: Service) -> None:
    """It has no text and is counted; named as a stop it is the stop_reason; with ignore_eos it is passed over."""
    tokens = [64, 50256, 65]
    api.engine.script = lambda _request, _params, _choice: tokens
    answer = await api.complete()
    assert {0: ("a", "stop", None)} == whole(answer)
    assert 2 == answer["usage"]["completion_tokens"]
    assert {0: ("a", "stop", "<|endoftext|>")} == whole(await api.complete(stop=["<|endoftext|>", "q"]))
    assert {0: ("ab", "length", None)} == whole(await api.complete(ignore_eos=True, max_tokens=3))
    stopped = await api.complete(ignore_eos=True, max_tokens=3, stop="<|endoftext|>")
    assert {0: ("a", "stop", "<|endoftext|>")} == whole(stopped)


async def test_characters_are_never_broken(api: Service) -> None:
    """Emoji and CJK come token by token, each token a part of a character; no piece has a broken one."""
    text = "日本語 👨‍👩‍👧 naïve “quotes” 🙂 \u2028 end"
    say(api, text)
    chunks = await events(api, max_tokens=100)
    assert "\ufffd" not in "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert {0: (text, "stop", None)} == joined(chunks)
    assert len(chunks) < len(api.tokenizer.encode([text])[0])


async def test_a_broken_end_is_replaced(api: Service) -> None:
    """Half a character at max_tokens is U+FFFD, in the stream as in the plain answer."""
    say(api, "ok 👍")
    tokens = len(api.tokenizer.encode(["ok 👍"])[0]) - 1
    chunks = await events(api, max_tokens=tokens)
    plain = await api.complete(max_tokens=tokens)
    assert {0: ("ok \ufffd", "length", None)} == joined(chunks) == whole(plain)


async def test_openai_clients_get_the_same_text(api: Service) -> None:
    """openai-python: plain, streamed and asynchronous, with its own arguments."""
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": "Say",
        "max_tokens": 40,
        "seed": 11,
        "temperature": 0.7,
    }
    expected = (await api.complete(**body))["choices"][0]["text"]

    def synchronous() -> tuple[str, str, list[str]]:
        with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
            plain = client.completions.create(**body)
            stream = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
            chunks = list(stream)
            assert chunks[-1].usage is not None
            assert plain.usage is not None
            assert plain.usage.completion_tokens == chunks[-1].usage.completion_tokens
            streamed = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
            return (
                plain.choices[0].text,
                streamed,
                [model.id for model in client.models.list()],
            )

    plain, streamed, names = await asyncio.to_thread(synchronous)
    assert (expected, expected, ["demo", "org/alias"]) == (plain, streamed, names)
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(**body)
        assert expected == answer.choices[0].text
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="demo", prompt="x", suffix="y")
        assert "suffix" == caught.value.param
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-4", prompt="x")
        assert "model_not_found" == missing.value.code


async def test_64_requests_at_once_get_what_they_get_alone(api: Service) -> None:
    """Mixed lengths, samples, seeds and stops, half of them streamed."""
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [i % 7] * (1 + 13 * i),
            "n": 1 + i % 3,
            "seed": i,
            "max_tokens": 1 + i % 40,
            "stop": ["e", "th"] if i % 5 == 0 else None,
        }
        for i in range(64)
    ]

    async def one(i: int) -> dict[int, tuple[str, str, str | None]]:
        return joined(await events(api, **bodies[i])) if i % 2 else whole(await api.complete(**bodies[i]))

    alone = [await one(i) for i in range(0, 64, 8)]
    together = await asyncio.gather(*(one(i) for i in range(64)))
    assert alone == together[::8]
    for i, got in enumerate(together):
        assert set(range(bodies[i]["n"])) == got.keys()
    assert 0 == api.engine.num_open


async def test_the_model_name_is_checked(start: Start) -> None:
    """Any served name, or none; another is a 404 in both modes."""
    api = await start(model_names=["only"])
    for stream in (False, True):
        response: httpx.Response = await api.http.post("/v1/completions", json={"model": "demo", "stream": stream})
        error = response.json()["error"]
        assert (404, "model_not_found", "model") == (
            response.status_code,
            error["code"],
            error["param"],
        )
    assert "only" == (await api.complete(model="only"))["model"]
