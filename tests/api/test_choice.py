"""What a choice gives back: echo, log-probabilities, token ids and ends, streamed and whole, over a fake engine."""

import asyncio
from typing import Any

import pytest

from service.api import answers
from service.engine.request import Delta, Finish, Publish
from tests.api.conftest import Service
from tests.api.fake_engine import logprob_entries, logprobs_of
from tests.api.test_completions import events, say

ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "bytes")


async def both(api: Service, **body: Any) -> list[dict[str, Any]]:
    """The choices of the plain answer; the stream's pieces joined must be the same."""
    plain = (await api.complete(**body))["choices"]
    chunks = await events(api, **body)
    joined: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        earlier = joined.setdefault(choice["index"], {"text": "", "logprobs": None} | {"finish_reason": None})
        assert earlier["finish_reason"] is None
        earlier["text"] += choice["text"]
        earlier |= {name: choice[name] for name in ("index", "finish_reason", "stop_reason")}
        if choice["logprobs"] is not None:
            arrays = earlier["logprobs"] = earlier["logprobs"] or {name: [] for name in ARRAYS}
            assert 1 == len({len(values) for values in choice["logprobs"].values()})
            for name in ARRAYS:
                arrays[name] += choice["logprobs"][name]
        if "token_ids" in choice:
            earlier.setdefault("token_ids", []).extend(choice["token_ids"])
        if "prompt_token_ids" in choice:
            assert "prompt_token_ids" not in earlier
            earlier["prompt_token_ids"] = choice["prompt_token_ids"]
    assert plain == [joined[index] for index in sorted(joined)]
    for choice in plain:
        answers.Choice.model_validate(choice, strict=True)
    return plain


async def test_logprobs_have_the_legacy_shape_and_the_bytes(api: Service) -> None:
    """One entry a sampled token, also the end of text; the best tokens and the actual one; the values exact."""
    say(api, "one two three")
    (choice,) = await both(api, logprobs=3, max_tokens=10)
    logprobs, ids = choice["logprobs"], [*api.tokenizer.encode(["one two three"])[0], 50256]
    assert set(ARRAYS) == logprobs.keys()
    assert ids == logprobs["token_ids"]
    assert ["one", " two", " three", "<|endoftext|>"] == logprobs["tokens"]
    assert [0, 3, 7, 13] == logprobs["text_offset"]
    assert b"one two three" == b"".join(map(bytes, logprobs["bytes"][:3]))
    for i, (chosen, best) in enumerate(logprob_entries(ids, 3)):
        assert chosen == logprobs["token_logprobs"][i]
        expected = {api.tokenizer.names[token_id]: value for token_id, value in best.items()}
        assert expected | {logprobs["tokens"][i]: chosen} == logprobs["top_logprobs"][i]


async def test_logprobs_0_are_the_actual_token_alone(api: Service) -> None:
    """The object is there, with one entry in each map."""
    (choice,) = await both(api, logprobs=0, max_tokens=5, seed=1)
    logprobs = choice["logprobs"]
    assert [{name: value} for name, value in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)] == (
        logprobs["top_logprobs"]
    )
    assert 5 == len(logprobs["tokens"])


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 100])
async def test_echo_begins_with_the_prompt_and_its_scores(api: Service, tokens_per_delta: int) -> None:
    """A null for the first token, no other; tokens join to the text; offsets count from the prompt's start."""
    api.engine.tokens_per_delta = tokens_per_delta
    say(api, " world, naïve “quotes” 🙂")
    prompt = "Hello <|endoftext|>日本"
    (choice,) = await both(api, prompt=prompt, echo=True, logprobs=2, max_tokens=30)
    logprobs, text = choice["logprobs"], choice["text"]
    assert prompt + " world, naïve “quotes” 🙂" == text
    assert [None] == [value for value in logprobs["token_logprobs"] if value is None]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert text == b"".join(map(bytes, logprobs["bytes"])).decode()
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:") and token != "<|endoftext|>":
            assert token == text[offset : offset + len(token)]
    assert 1 == api.engine.submitted[0].score_from


async def test_a_prompt_is_scored_once_for_all_its_choices(api: Service) -> None:
    """With choice 0; the others begin with the same scores, whatever came of them before."""
    prompts = [[1, 2, 3], [4, 5]]
    body: dict[str, Any] = {"prompt": prompts, "echo": True, "logprobs": 2, "n": 3, "seed": 1, "max_tokens": 2}
    for choice, prompt in zip(await both(api, **body), [prompt for prompt in prompts for _ in range(3)], strict=True):
        expected = [chosen for chosen, _ in logprob_entries(prompt[1:], 2)]
        assert [None, *expected] == choice["logprobs"]["token_logprobs"][: len(prompt)]
        assert prompt == choice["logprobs"]["token_ids"][: len(prompt)]
    assert {1} == {request.score_from for request in api.engine.submitted}

    api.engine.gate.clear()
    answer = asyncio.ensure_future(api.complete(**body | {"prompt": prompts[0]}))
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 5)
    request = api.engine.submitted[-1]
    parts = [(2, (7,), None), (1, (8, 9), Finish.LENGTH), (2, (10,), Finish.LENGTH), (0, (11, 12), Finish.LENGTH)]
    for choice, ids, finish in parts:
        scores = None if choice else logprobs_of(request.prompt[1:], 2)
        delta = Delta(request.id, choice, ids, finish, logprobs=logprobs_of(ids, 2), prompt_logprobs=scores)
        api.engine.send(Publish(deltas=(delta,)))
    expected_ids = [[*prompts[0], 11, 12], [*prompts[0], 8, 9], [*prompts[0], 7, 10]]
    assert expected_ids == [choice["logprobs"]["token_ids"] for choice in (await answer)["choices"]]


async def test_echo_without_logprobs_scores_nothing(api: Service) -> None:
    """And each choice of each prompt starts with its own prompt, as it was sent."""
    choices = await both(api, prompt=["ab", "", "c d"], echo=True, n=2, seed=4, max_tokens=3)
    assert [None] * 3 == [request.score_from for request in api.engine.submitted[:3]]
    for choice, prompt in zip(choices, ["ab", "ab", "", "", "c d", "c d"], strict=True):
        assert choice["text"].startswith(prompt)
        assert choice["logprobs"] is None
    (by_ids,) = await both(api, prompt=[15496, 50256, 995], echo=True, seed=1, max_tokens=1)
    assert by_ids["text"].startswith("Hello<|endoftext|> world")


async def test_echo_with_max_tokens_0_scores_the_prompt(api: Service) -> None:
    """Entries are the prompt's tokens; nothing is generated or counted. One token has nothing to score."""
    body = {"echo": True, "max_tokens": 0, "logprobs": 1}
    answer = await api.complete(prompt="Hello world", **body)
    (choice,) = answer["choices"]
    assert ("Hello world", "length", 2) == (choice["text"], choice["finish_reason"], len(choice["logprobs"]["tokens"]))
    assert 0 == answer["usage"]["completion_tokens"]
    assert [choice] == await both(api, prompt="Hello world", **body)
    (single,) = await both(api, prompt=[15496], **body)
    assert [None] == single["logprobs"]["token_logprobs"]
    (empty,) = await both(api, prompt="", **body)
    assert ("", [50256]) == (empty["text"], empty["logprobs"]["token_ids"])


async def test_an_entry_comes_for_each_sampled_token_also_where_the_text_is_cut(api: Service) -> None:
    """The stop is cut out of the text, not out of the log-probabilities."""
    say(api, "one two three four five")
    (choice,) = await both(api, stop="hre", logprobs=1, max_tokens=20)
    assert ("one two t", "hre") == (choice["text"], choice["stop_reason"])
    assert ["one", " two", " three"] == choice["logprobs"]["tokens"]


async def test_an_entry_travels_with_the_last_byte_of_its_token(api: Service) -> None:
    """What is held back for a stop string holds the entries of its tokens back, no others."""
    say(api, "so it STOmps on")
    text, tokens = "", ""
    for chunk in await events(api, logprobs=0, max_tokens=20, stop="STOP"):
        choice = chunk["choices"][0]
        text += choice["text"]
        tokens += "".join(choice["logprobs"]["tokens"])
        spoken = tokens.removesuffix("<|endoftext|>")
        assert text in (spoken, spoken + " ")  # of " S", whose space can be in no stop
    assert "so it STOmps on<|endoftext|>" == tokens


async def test_stop_token_ids_end_the_text_without_theirs(api: Service) -> None:
    """The reason is the id; with include_stop_str_in_output its text stays; the token is counted."""
    say(api, "one two three")
    two = api.tokenizer.encode([" two"])[0][0]
    body = {"stop_token_ids": [two], "max_tokens": 9}
    (choice,) = await both(api, **body)
    assert ("one", "stop", two) == (choice["text"], choice["finish_reason"], choice["stop_reason"])
    assert 2 == (await api.complete(**body))["usage"]["completion_tokens"]
    (choice,) = await both(api, **body, include_stop_str_in_output=True)
    assert ("one two", two) == (choice["text"], choice["stop_reason"])


async def test_include_stop_str_in_output_ends_after_the_stop(api: Service) -> None:
    """Also inside a token."""
    say(api, "one two three four")
    (choice,) = await both(api, stop="hre", include_stop_str_in_output=True, max_tokens=20)
    assert ("one two thre", "stop", "hre") == (choice["text"], choice["finish_reason"], choice["stop_reason"])


@pytest.mark.parametrize(
    ("body", "text", "stop_reason"),
    [
        ({}, "a", None),
        ({"skip_special_tokens": False}, "a", None),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "a<|endoftext|>", None),
        ({"include_stop_str_in_output": True}, "a", None),
        ({"ignore_eos": True}, "ab", None),
        ({"ignore_eos": True, "skip_special_tokens": False}, "a<|endoftext|>b", None),
        ({"ignore_eos": True, "stop": "<|endoftext|>"}, "a", "<|endoftext|>"),
        ({"ignore_eos": True, "stop": "<|endoftext|>", "skip_special_tokens": False}, "a", "<|endoftext|>"),
        ({"ignore_eos": True, "stop": "text|>b", "skip_special_tokens": False}, "a<|endof", "text|>b"),
        ({"stop_token_ids": [50256]}, "a", None),
    ],
    ids=str,
)
async def test_the_end_of_text_has_text_only_where_it_is_asked_for(
    api: Service, body: dict[str, Any], text: str, stop_reason: str | None
) -> None:
    """skip_special_tokens is about its text, ignore_eos about going on, a stop that names it about ending."""
    api.engine.script = lambda _request, _params, _choice: [64, 50256, 65]
    (choice,) = await both(api, max_tokens=3, **body)
    assert (text, stop_reason) == (choice["text"], choice["stop_reason"])


async def test_return_token_ids_gives_all_sampled_and_the_prompt_s(api: Service) -> None:
    """Up to and including the one that ended the text."""
    say(api, "one two three four")
    ids = api.tokenizer.encode(["one two three"])[0]
    (choice,) = await both(api, prompt="Hello world", return_token_ids=True, stop=" thr", max_tokens=9)
    assert (ids, [15496, 995]) == (choice["token_ids"], choice["prompt_token_ids"])
    (plain,) = await both(api, max_tokens=2)
    assert {"index", "text", "logprobs", "finish_reason", "stop_reason"} == plain.keys()


async def test_repetition_stop_ends_a_loop(api: Service) -> None:
    """At the token that completes the last repeat, in any delivery; without it the text goes on."""
    api.engine.script = lambda _request, _params, _choice: [5, *([11, 12, 13] * 30)]
    for tokens_per_delta in (1, 7, 100):
        api.engine.tokens_per_delta = tokens_per_delta
        options = {"max_pattern_tokens": 3, "min_repeats": 3}
        (choice,) = await both(api, max_tokens=80, repetition_stop=options, return_token_ids=True)
        assert ("stop", "repetition") == (choice["finish_reason"], choice["stop_reason"])
        assert [5, *([11, 12, 13] * 3)] == choice["token_ids"]
    (choice,) = await both(api, max_tokens=80, repetition_stop=True, return_token_ids=True)
    assert 1 + 3 * 4 == len(choice["token_ids"])
    (choice,) = await both(api, max_tokens=80, return_token_ids=True)
    assert 80 == len(choice["token_ids"])


async def test_best_of_gives_the_likeliest(api: Service) -> None:
    """By mean log-probability, best first, renumbered; usage counts all that were sampled."""
    scripts = [[0, 1], [3, 3], [4, 4], [1]]  # each third id is the best of its logprobs
    api.engine.script = lambda _request, params, choice: scripts[choice] + [50256] * (params.max_tokens > 2)
    body = {"best_of": 4, "n": 2, "max_tokens": 2, "ignore_eos": True, "return_token_ids": True}
    answer = await api.complete(prompt=["a", "b"], logprobs=1, **body)
    means = []
    for ids in scripts:
        values = [chosen for chosen, _ in logprob_entries(ids, 1)]
        means.append(sum(values) / len(values))
    expected = [scripts[i] for i in sorted(range(4), key=lambda i: -means[i])[:2]]
    assert expected * 2 == [choice["token_ids"] for choice in answer["choices"]]
    assert [0, 1, 2, 3] == [choice["index"] for choice in answer["choices"]]
    assert 2 * sum(map(len, scripts)) == answer["usage"]["completion_tokens"]
    unasked = await api.complete(prompt=["a", "b"], **body)
    assert [None] * 4 == [choice["logprobs"] for choice in unasked["choices"]]


async def test_the_log_probabilities_of_an_answer_are_bounded(api: Service) -> None:
    """A small body that asks for gigabytes is a 400; what lm-evaluation-harness may send at most is not."""
    body = {"prompt": [1] * 1023, "echo": True, "max_tokens": 1, "logprobs": 20}
    response = await api.http.post(
        "/v1/completions", json=body | {"best_of": 128, "n": 128, "prompt": [[1] * 1023] * 2}
    )
    assert (400, "logprobs") == (response.status_code, response.json()["error"]["param"])
    assert [] == api.engine.submitted
    await api.complete(**body)
