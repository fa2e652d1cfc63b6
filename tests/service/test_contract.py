"""The completions contract at its edges: what clients send by habit, what is refused, and bodies that mean harm."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.service.scripted_model import CONTEXT, ScriptedModel
from tests.service.server import Client, Server

Body = dict[str, Any]
_DRAWN: Body = {"prompt": "My fellow citizens", "max_tokens": 12, "temperature": 0.9, "seed": 11}
_ENVELOPE = {"message", "type", "param", "code"}
_VOCAB = 50257


def _choice(answer: Body) -> Body:
    choice: Body = answer["choices"][0]
    return choice


# What clients send by habit


@pytest.mark.parametrize("stream", [False, True])
async def test_1023_tokens_of_prompt_and_1_of_answer(demo: Client, stream: bool) -> None:
    """lm-evaluation-harness's largest request: every token has its entry, the first a null, and one is generated."""
    ask: Body = {"prompt": [262, 318, 257] * 341, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    assert CONTEXT - 1 == len(ask["prompt"])
    response = await demo.post(**ask, seed=1234, stream=stream)
    assert response.status_code == 200, response.text
    if stream:
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: {")]
        chunks = [_choice(json.loads(event)) for event in events]
        scores = [score for chunk in chunks for score in chunk["logprobs"]["token_logprobs"]]
        assert chunks[-1]["finish_reason"] == "length"
    else:
        answer = response.json()
        scores = _choice(answer)["logprobs"]["token_logprobs"]
        assert _choice(answer)["finish_reason"] == "length"
        assert (CONTEXT - 1, 1) == (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    assert CONTEXT == len(scores)
    assert scores[0] is None
    assert all(score <= 0 for score in scores[1:])


async def test_a_prompt_that_fills_the_context_is_scored(demo: Client) -> None:
    """With `echo` and no token to generate there is room for 1,024; for one more there is none."""
    ask: Body = {"prompt": [262] * CONTEXT, "echo": True, "logprobs": 0}
    answer = await demo.complete(**ask, max_tokens=0)
    assert CONTEXT == len(_choice(answer)["logprobs"]["token_logprobs"])
    assert answer["usage"]["completion_tokens"] == 0
    refused = await demo.post(**ask, max_tokens=1)
    assert (400, "context_length_exceeded") == (refused.status_code, refused.json()["error"]["code"])


@pytest.mark.parametrize("num_stops", [1, 4, 5, 64])
async def test_any_number_of_stops_up_to_64(scripted: Client, scripted_model: ScriptedModel, num_stops: int) -> None:
    """OpenAI's four are no bound: the last of the list is found as the first would be."""
    stops = [f"never {place}" for place in range(num_stops - 1)] + ["日本語"]
    choice = _choice(await scripted.complete(prompt="", max_tokens=60, stop=stops))
    assert scripted_model.text(60).split("日本語")[0] == choice["text"]
    assert ("stop", "日本語") == (choice["finish_reason"], choice["stop_reason"])


@pytest.fixture
async def optional_fields(demo: Client) -> list[str]:
    """Names of all fields but the prompt, as the service tells them."""
    schema = (await demo.http.get("/openapi.json")).json()
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"stop", "best_of", "guided_json", "stream_options"} < fields.keys()
    return [name for name in fields if name != "prompt"]


async def test_null_is_the_default_of_every_optional_field(demo: Client, optional_fields: list[str]) -> None:
    """All at once, and each alone: the answer is the one without the field."""
    expected = _choice(await demo.complete(**_DRAWN))
    drawn = {"max_tokens", "temperature", "seed"}
    nothing = dict.fromkeys(name for name in optional_fields if name not in drawn)
    assert expected == _choice(await demo.complete(**_DRAWN, **nothing))
    greedy: Body = {"prompt": _DRAWN["prompt"], "temperature": 0}
    expected = _choice(await demo.complete(**greedy))
    for name in optional_fields:
        if name != "temperature":
            assert expected == _choice(await demo.complete(**greedy, **{name: None})), name


@pytest.mark.parametrize(
    "field",
    [
        {"top_p": 1},
        {"top_p": 1.0},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": _VOCAB},
        {"min_p": 0},
        {"n": 1},
        {"best_of": 1},
        {"stop": []},
        {"stop": None},
        {"stop_token_ids": []},
        {"bad_words": []},
        {"logit_bias": {}},
        {"logit_bias": {"262": 0}},
        {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1.0},
        {"echo": False, "stream": False, "ignore_eos": False, "min_tokens": 0},
        {"suffix": None, "user": "somebody", "priority": 0, "cache_salt": ""},
        {"stream_options": {"include_usage": True}},  # without stream
        {"response_format": {"type": "text"}},
        {"spaces_between_special_tokens": True, "add_special_tokens": False, "use_beam_search": False},
        {"no_such_field": {"deep": [1, {"deeper": None}]}, "request_id": "7", "messages": []},
    ],
    ids=json.dumps,
)
async def test_what_asks_for_nothing_changes_nothing(demo: Client, field: Body) -> None:
    """Defaults spelled out, and fields that no server knows: the answer is that of the request without them."""
    plain, spelled = await demo.complete(**_DRAWN), await demo.complete(**_DRAWN, **field)
    assert _choice(plain) == _choice(spelled)


async def test_a_bare_bearer_is_no_key(demo_server: Server) -> None:
    """lm-evaluation-harness sends `Authorization: Bearer ` where it has no key; without keys any header is taken."""
    url = httpx.URL(demo_server.url)
    for value in (b"Bearer ", b"Bearer", b"Bearer none", b"Basic eDp5", b""):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: %b\r\n" % value
        writer.write(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 "), (value, answer)
        writer.close()
        await writer.wait_closed()


async def test_the_request_of_vllms_bench_client(demo: Client) -> None:
    """The fields it sends, streamed, with all the tokens asked for and the usage at the end."""
    streamed = await demo.stream(
        model="megatron-gpt2-demo",
        prompt="The people of",
        temperature=0.0,
        repetition_penalty=1.0,
        max_tokens=24,
        logprobs=None,
        stream_options={"include_usage": True},
        ignore_eos=True,
    )
    assert ({0: "length"}, True) == (streamed.finish_reasons, streamed.done)
    assert streamed.usage is not None
    assert (3, 24) == (streamed.usage["prompt_tokens"], streamed.usage["completion_tokens"])


# What is refused

_REFUSED: list[tuple[Body, int, str]] = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"model": 7}, 400, "model"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": {}}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [[1], "a"]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [1.0]}, 400, "prompt"),
    ({"prompt": [_VOCAB]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [[262], [2**63]]}, 400, "prompt"),
    ({"prompt": ["a"] * 1025}, 400, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, 400, "prompt"),
    ({"prompt": [262] * 1024}, 400, "prompt"),
    ({"prompt": [262] * 1000, "max_tokens": 25}, 400, "max_tokens"),
    ({"prompt": "word " * 5000}, 400, "prompt"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": "16"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, 400, "min_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"min_p": 1.1}, 400, "min_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 129}, 400, "n"),
    ({"n": 3, "best_of": 2}, 400, "best_of"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": -1}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"echo": 1}, 400, "echo"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["x", ""]}, 400, "stop"),
    ({"stop": "x" * 1025}, 400, "stop"),
    ({"stop": ["x"] * 65}, 400, "stop"),
    ({"stop": 7}, 400, "stop"),
    ({"stop_token_ids": [_VOCAB]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
    ({"presence_penalty": 2.1}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.1}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"logit_bias": {str(_VOCAB): 1}}, 400, "logit_bias"),
    ({"logit_bias": {"the": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"262": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"262": True}}, 400, "logit_bias"),
    ({"logit_bias": [262]}, 400, "logit_bias"),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
    ({"allowed_token_ids": [_VOCAB]}, 400, "allowed_token_ids"),
    ({"bad_words": [""]}, 400, "bad_words"),
    ({"guided_regex": "("}, 400, "guided_regex"),
    ({"guided_json": {"type": "no such type"}}, 400, "guided_json"),
    ({"guided_json": "{"}, 400, "guided_json"),
    ({"guided_choice": []}, 400, "guided_choice"),
    ({"response_format": {"type": "no such type"}}, 400, "response_format"),
    ({"suffix": "the end"}, 400, "suffix"),
    ({"use_beam_search": True}, 400, "use_beam_search"),
    ({"stop_regex": "a+"}, 400, "stop_regex"),
    ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ({"prompt_embeds": "AA=="}, 400, "prompt_embeds"),
    ({"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, 400, "truncation_side"),
    ({"seed": 2**63}, 400, "seed"),
    ({"seed": "7"}, 400, "seed"),
    ({"priority": "high"}, 400, "priority"),
    ({"timeout_seconds": 0}, 400, "timeout_seconds"),
    ({"queue_timeout_seconds": -1}, 400, "queue_timeout_seconds"),
    ({"repetition_stop": {"min_repeats": 1}}, 400, "repetition_stop"),
]


@pytest.mark.parametrize(("fields", "status", "param"), _REFUSED, ids=lambda value: str(value)[:60])
async def test_a_refusal_is_the_same_with_and_without_stream(
    demo: Client, fields: Body, status: int, param: str
) -> None:
    """An HTTP status and our envelope in both, naming the parameter: nothing of it is put into a 200."""
    body = {"prompt": "x"} | fields
    plain, streamed = await demo.post(**body), await demo.post(**body, stream=True)
    assert (status, status) == (plain.status_code, streamed.status_code)
    assert plain.json() == streamed.json()
    assert plain.headers["content-type"] == streamed.headers["content-type"] == "application/json"
    error = plain.json()["error"]
    assert _ENVELOPE == error.keys()
    assert (param, "invalid_request_error") == (error["param"].split(".")[0], error["type"])


@pytest.mark.parametrize("fields", [{"timeout_seconds": 0.05}, {"queue_timeout_seconds": 0.05}], ids=str)
async def test_a_deadline_in_the_queue_is_the_same_with_and_without_stream(scripted: Client, fields: Body) -> None:
    """504 and 429, each an HTTP status: the queue was not left before it passed."""
    running = asyncio.create_task(scripted.post(prompt="", max_tokens=1000, n=2))
    await scripted.wait_metric("requests_running", 2)
    plain, streamed = [await scripted.post(prompt="x", **fields, stream=stream) for stream in (False, True)]
    running.cancel()
    await asyncio.wait([running])
    status = 504 if "timeout_seconds" in fields else 429
    assert (status, status) == (plain.status_code, streamed.status_code)
    assert plain.json()["error"].keys() == streamed.json()["error"].keys() == _ENVELOPE
    for response in (plain, streamed):
        assert (status == 429) == ("retry-after" in response.headers)


# Bodies that mean harm


def _with(field: str, value: str) -> bytes:
    return b'{"prompt": "x", "max_tokens": 1, "%b": %b}' % (field.encode(), value.encode())


def _hostile() -> dict[str, bytes]:
    """Made when needed: some are megabytes."""
    return {
        **{
            f"{name} as {field}": _with(field, name)
            for field in ("temperature", "seed", "logit_bias", "no_such_field")
            for name in ("NaN", "Infinity", "-Infinity")
        },
        "NaN as a bias": _with("logit_bias", '{"262": NaN}'),
        "1e999 as a temperature": _with("temperature", "1e999"),
        "-1e999 as a bias": _with("logit_bias", '{"262": -1e999}'),
        "1e999 tokens": _with("max_tokens", "1e999"),
        "1e999 as an id": b'{"prompt": [1e999]}',
        "5,000 digits as a seed": _with("seed", "9" * 5000),
        "5,000 digits of tokens": _with("max_tokens", "9" * 5000),
        "5,000 digits as an id": b'{"prompt": [%b]}' % (b"9" * 5000),
        "5,000 digits as a bias's id": _with("logit_bias", '{"%s": 1}' % ("9" * 5000)),
        "a million digits as a number": _with("temperature", "0." + "1" * 1_000_000 + "e9"),
        "an id beyond int64": b'{"prompt": [[9223372036854775808]]}',
        "an id below int64": b'{"prompt": [-9223372036854775809]}',
        "ids over the vocabulary": b'{"prompt": [262, 50257]}',
        "numbers as strings": b'{"prompt": "x", "max_tokens": "5", "temperature": "0.5", "n": "1"}',
        "100,000 lists within lists": b"[" * 100_000 + b"]" * 100_000,
        "100,000 lists that never close": b'{"prompt": ' + b"[" * 100_000,
        "100,000 objects within objects": b'{"no_such_field": ' * 100_000 + b"1" + b"}" * 100_000,
        "a schema of 100,000 levels": _with("guided_json", '{"not": ' * 100_000 + "{}" + "}" * 100_000),
        "a schema of 400 levels as text": _with("guided_json", json.dumps('{"not": ' * 100_000)),
        "a pattern of a huge automaton": _with("guided_regex", json.dumps(".*" * 2000)),
        "invalid UTF-8": b'{"prompt": "\xff\xfe\x80"}',
        "a byte of a character": b'{"prompt": "\xf0\x9f\xa6"}',
        "half a surrogate pair": b'{"prompt": "\\ud83e"}',
        "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
        "no body": b"",
        "half a body": b'{"prompt": "x"',
        "two bodies": b'{"prompt": "x"}{"prompt": "x"}',
        "zeros": b"\0" * 1000,
        "null": b"null",
        "a list": b"[]",
        "a string": b'"x"',
        "a form": b"prompt=x&max_tokens=1",
        "a long text": b'{"prompt": "%b"}' % (b"word " * 1_600_000),
        "two million ids": b'{"prompt": [%b262]}' % (b"262," * 2_000_000),
        "300,000 prompts": b'{"prompt": [%b"x"]}' % (b'"x",' * 300_000),
        "300,000 stops": _with("stop", "[" + '"x",' * 300_000 + '"x"]'),
        "300,000 biases": _with("logit_bias", json.dumps({str(token_id): 1 for token_id in range(300_000)})),
        "9 MiB": b'{"prompt": "%b"}' % (b"x" * (9 << 20)),
    }


_MIB = b"x" * (1 << 20)
_NUM_MIB = 100


async def _declared() -> AsyncIterator[bytes]:
    for _ in range(_NUM_MIB):
        yield _MIB


def _check_refusal(response: httpx.Response, name: str) -> None:
    def no_constant(constant: str) -> None:
        raise AssertionError(f"{name}: {constant} is no JSON")

    assert response.status_code in (400, 413), (name, response.text[:500])
    error = json.loads(response.content, parse_constant=no_constant)["error"]
    assert _ENVELOPE == error.keys()
    assert error["type"] == "invalid_request_error", name
    assert len(response.content) < 10_000, name  # it does not send the body back


async def test_hostile_bodies_are_refused_while_others_stream_on(
    scripted_server: Server, connect: Callable[[Server], Client], scripted: Client, scripted_model: ScriptedModel
) -> None:
    """Each is a 400 or 413 in the envelope, the next request is served, and a stream gives the text it gives alone."""
    expected = scripted_model.text(scripted_model.end)
    streaming = asyncio.create_task(scripted.stream(prompt="", max_tokens=scripted_model.end))
    await scripted.wait_metric("requests_running", 1)
    hostile = connect(scripted_server).http
    headers = {"Content-Type": "application/json"}
    for name, body in _hostile().items():
        _check_refusal(await hostile.post("/v1/completions", content=body, headers=headers), name)
        if streaming.done():  # a slow machine: go on beside another stream
            assert expected == (await streaming).text(), name
            streaming = asyncio.create_task(scripted.stream(prompt="", max_tokens=scripted_model.end))
        answer = await scripted.complete(prompt="", max_tokens=1)
        assert scripted_model.text(1) == _choice(answer)["text"], name
    assert expected == (await streaming).text()


@pytest.mark.parametrize("declared", [True, False])
async def test_100_mib_are_refused_unread(
    scripted_server: Server, scripted: Client, scripted_model: ScriptedModel, declared: bool
) -> None:
    """With a Content-Length at once, in chunks at the first too many; neither is kept, and a stream goes on."""
    streaming = asyncio.create_task(scripted.stream(prompt="", max_tokens=200))
    await scripted.wait_metric("requests_running", 1)
    before = scripted_server.api.memory_info().rss
    headers = {"Content-Type": "application/json"}
    if declared:
        headers["Content-Length"] = str(_NUM_MIB * len(_MIB))
    response = await scripted.http.post("/v1/completions", content=_declared(), headers=headers)
    assert response.status_code == 413
    _check_refusal(response, "100 MiB")
    assert scripted_server.api.memory_info().rss - before < 32 << 20
    assert scripted_model.text(1) == _choice(await scripted.complete(prompt="", max_tokens=1))["text"]
    assert scripted_model.text(200) == (await streaming).text()
