"""The stream byte by byte, over httpx: what any client of server-sent events may rely on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.clients.conftest import MODEL, Server, plain, post, text
from tests.service.server import until_drained

_ASK: dict[str, Any] = {
    "prompt": ["“Naïve” 日本", "The people of"],
    "n": 2,
    "max_tokens": 20,
    "seed": 8,
    "temperature": 1.3,
    "logprobs": 2,
    "echo": True,
    "return_token_ids": True,
    "stop": [" the", "q"],
}


def stream(server: Server, **body: Any) -> tuple[httpx.Response, list[bytes]]:
    """The response, and its events as they are on the wire."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        data = b"".join(response.iter_raw())
    assert response.status_code == 200, data
    assert data.endswith(b"data: [DONE]\n\n")
    return response, data.split(b"\n\n")[:-1]


def joined(events: list[bytes]) -> list[dict[str, Any]]:
    """Choices from their pieces; each ends once, and says nothing after."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        for piece in json.loads(event.removeprefix(b"data: "))["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert whole["finish_reason"] is None
            assert piece["text"] or piece["finish_reason"] or piece["logprobs"]["tokens"]
            whole["text"] += piece["text"]
            whole |= {name: piece[name] for name in ("index", "finish_reason", "stop_reason")}
            for name, values in (piece["logprobs"] or {}).items():
                whole["logprobs"] = whole["logprobs"] or {}
                whole["logprobs"].setdefault(name, []).extend(values)
            for name in ("token_ids", "prompt_token_ids"):
                if name in piece:
                    whole.setdefault(name, []).extend(piece[name])
    return [choices[index] for index in sorted(choices)]


def test_every_event_is_one_line_of_ascii_json(server: Server) -> None:
    """data: {…} and a blank line; nothing that a client might take for a line's end; the headers that proxies need."""
    response, events = stream(server, **_ASK)
    assert "text/event-stream" in response.headers["content-type"]
    assert ("no-cache", "no") == (response.headers["cache-control"], response.headers["x-accel-buffering"])
    assert response.headers["x-request-id"]
    for event in events:
        assert event.startswith(b"data: ")
        assert event.isascii()
        assert not set(event) & {*b"\r\n\x0b\x0c\x1c\x1d\x1e\x85"}
    heads = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert 1 == len({(head["id"], head["object"], head["created"], head["model"]) for head in heads})
    assert all("usage" not in head for head in heads)


def test_pieces_joined_are_the_plain_answer(server: Server) -> None:
    """Texts, log-probabilities, ids and ends of every choice."""
    expected = plain(server, **_ASK)
    _, events = stream(server, **_ASK)
    choices = joined(events)
    for whole, pieces in zip(expected["choices"], choices, strict=True):
        # Two batches give numbers that may differ in their last bits.
        ours, theirs = whole["logprobs"].pop("top_logprobs"), pieces["logprobs"].pop("top_logprobs")
        assert ours[0] is theirs[0] is None
        for best, other in zip(ours[1:], theirs[1:], strict=True):
            assert best == pytest.approx(other, abs=1e-4)
        ours, theirs = whole["logprobs"].pop("token_logprobs"), pieces["logprobs"].pop("token_logprobs")
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-4)
    assert expected["choices"] == choices
    assert {"stop"} <= {choice["finish_reason"] for choice in expected["choices"]}


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_comes_last(server: Server, continuous: bool) -> None:
    """One more chunk without choices, with the usage of the plain answer; before it null, or the usage so far."""
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    _, events = stream(server, **_ASK, stream_options=options)
    *chunks, last = (json.loads(event.removeprefix(b"data: ")) for event in events[:-1])
    assert [] == last["choices"]
    usage = last["usage"]
    assert {"queue_ms", "prefill_ms", "decode_ms"} == usage.pop("timings").keys()
    expected = plain(server, **_ASK)["usage"]
    cached = (usage.pop("prompt_tokens_details"), expected.pop("prompt_tokens_details"))
    assert all(details["truncated_tokens"] == 0 for details in cached)
    assert expected == usage
    assert all((chunk["usage"] is not None) == continuous for chunk in chunks)


def test_a_line_separator_does_not_cut_an_event(server: Server) -> None:
    """U+2028 in a prompt that comes back is escaped."""
    text = "one\u2028two\u0085three\r\nfour"
    _, events = stream(server, prompt=text, echo=True, max_tokens=1)
    assert joined(events)[0]["text"].startswith(text)
    assert all(event.isascii() and b"\n" not in event and b"\r" not in event for event in events)


# While a request waits


@pytest.fixture(scope="module")
def patient_server() -> Iterator[Server]:
    """One sequence at a time, and a comment every 50 ms of silence."""
    yield from until_drained(
        Server("--kv-memory", "64MiB", "--max-num-seqs", "1", "--stream-keep-alive-seconds", "0.05")
    )


@pytest.fixture
def busy_server(patient_server: Server) -> Iterator[Server]:
    """It computes somebody else's long text for as long as the test takes, or until the text ends."""
    ask = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{patient_server.url}/v1/completions", json=ask, timeout=60) as response:
        events = response.iter_raw()  # its end would be the connection's
        assert next(events).startswith(b"data: ")
        yield patient_server


def test_comments_while_queued(busy_server: Server) -> None:
    """The status line and comments come at once; behind them stands the whole answer, and no comment within it."""
    ask = {"prompt": "The people of", "max_tokens": 8, "temperature": 0}
    _, events = stream(busy_server, **ask)
    num_comments = events.count(b": keep-alive")
    assert num_comments > 1
    assert [b": keep-alive"] * num_comments == events[:num_comments]
    assert text(busy_server, **ask) == joined(events[num_comments:])[0]["text"]


def test_openais_package_reads_over_comments(busy_server: Server) -> None:
    """What waits in the queue is streamed like any other."""
    ask: dict[str, Any] = {"model": MODEL, "prompt": "The people of", "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=f"{busy_server.url}/v1", api_key="none", max_retries=0) as client:
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)]
    assert text(busy_server, **ask) == "".join(pieces)


def test_a_refusal_after_the_status_line(busy_server: Server) -> None:
    """An error event of the same type and code as the HTTP error, and [DONE]; no chunk, so no finish."""
    ask = {"prompt": "The people of", "max_tokens": 8, "queue_timeout_seconds": 0.3}
    refused = post(busy_server, **ask)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    _, events = stream(busy_server, **ask)
    assert {b": keep-alive"} == set(events[:-2])
    assert refused.json() == json.loads(events[-2].removeprefix(b"data: "))
    assert events[-1] == b"data: [DONE]"
