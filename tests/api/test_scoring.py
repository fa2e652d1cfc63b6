"""POST /v1/score: how items are split and checked, what the engine is asked, and what comes back."""

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from service.api.scoring import Scores
from service.engine.request import Delta, Finish, Logprobs, Publish, SamplingParams
from tests.api.conftest import Service, Start
from tests.api.fake_engine import logprob_entries

Text = str | list[int]


async def score(api: Service, *items: tuple[Text, Text], **body: Any) -> dict[str, Any]:
    named = [{"context": context, "continuation": continuation} for context, continuation in items]
    response = await api.http.post("/v1/score", json={"items": named} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_each_item_has_its_scores(api: Service) -> None:
    """In the order of the items: the engine's numbers, each token's name and id, and whether all are the best."""
    api.engine.cached_tokens = 1
    answer = await score(api, ([15496], [3, 6]), ([15496], [3, 7]), ("Hello", " 👍"), model="org/alias")
    Scores.model_validate(answer, strict=True)
    assert answer["id"].startswith("score-")
    assert ("score", "demo") == (answer["object"], answer["model"])
    continuations = [[3, 6], [3, 7], [50169, 235]]
    for result, ids in zip(answer["results"], continuations, strict=True):
        entries = logprob_entries(ids, 1)
        assert [chosen for chosen, _ in entries] == result["token_logprobs"]
        assert sum(result["token_logprobs"]) == pytest.approx(result["logprob"], rel=1e-12)
        assert [api.tokenizer.names[token_id] for token_id in ids] == result["tokens"]
        assert ids == result["token_ids"]
        assert (1, len(ids)) == (result["context_tokens"], result["continuation_tokens"])
    assert [True, False, False] == [result["is_greedy"] for result in answer["results"]]
    details = {"cached_tokens": 3, "truncated_tokens": 0}
    usage = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9, "prompt_tokens_details": details}
    assert usage == answer["usage"]


async def test_all_items_are_one_group_that_generates_nothing(api: Service) -> None:
    """So that the engine batches them and finds their shared contexts; only continuations are scored."""
    await score(api, ([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ("", "Hello"))
    (submit,) = api.engine.submits
    assert SamplingParams(max_tokens=0, temperature=0.0, num_logprobs=1) == submit.params
    assert b"" == submit.completing_ids
    expected = [((1, 2, 3, 4, 5), 3), ((1, 2, 3, 6), 3), ((50256, 15496), 1)]
    assert expected == [(request.prompt, request.score_from) for request in submit.requests]


@pytest.mark.parametrize(
    ("context", "continuation", "context_ids", "continuation_ids"),
    [
        ("Hello", " world", [15496], [995]),
        ("Hello ", "world", [15496], [995]),
        ("Hello  ", "world", [15496], [220, 995]),
        ("", "Hello", [50256], [15496]),
        (None, "Hello", [50256], [15496]),
        (" ", "world", [50256], [995]),
        ("a<|endoftext|>", "b", [64, 50256], [65]),
        ("<|endoftext|>", "Hello", [50256], [15496]),
        ("Hello", "<|endoftext|>", [15496], [50256]),
        ([15496], [995], [15496], [995]),
        ([], [995], [50256], [995]),
        ("", [995], [50256], [995]),
        ([], " world", [50256], [995]),
        ([50256], [50256], [50256], [50256]),
    ],
    ids=str,
)
async def test_where_an_item_is_split(
    api: Service, context: Text, continuation: Text, context_ids: list[int], continuation_ids: list[int]
) -> None:
    """The context's trailing spaces go over; an empty context is the end of text; ids are taken as they are."""
    (result,) = (await score(api, (context, continuation)))["results"]
    assert continuation_ids == result["token_ids"]
    assert tuple(context_ids + continuation_ids) == api.engine.submitted[0].prompt
    assert (len(context_ids), len(continuation_ids)) == (result["context_tokens"], result["continuation_tokens"])


def harness_split(api: Service, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What lm-evaluation-harness does to a pair of texts before it sends them."""

    def encode(text: str) -> list[int]:
        return api.tokenizer.encode([text])[0]

    if context == "":
        return [50256], encode(continuation)
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces > 0:
        continuation = context[-num_spaces:] + continuation
        context = context[:-num_spaces]
    whole = encode(context + continuation)
    context_ids = encode(context)
    return context_ids or [50256], whole[len(context_ids) :]


async def test_texts_are_split_as_lm_evaluation_harness_does(api: Service) -> None:
    """Also where the two would merge into other tokens than the context's own."""
    drawn = random.Random(0)
    pieces = ["a", "The", " the", " ", "\n", "ing", "é", "日本", "👍", ".", "<|endoftext|>", "\u3000"]
    pairs = [
        ("".join(drawn.choices(pieces, k=drawn.randrange(5))), "".join(drawn.choices(pieces, k=drawn.randrange(1, 4))))
        for _ in range(300)
    ]
    expected = {pair: harness_split(api, *pair) for pair in pairs}
    items = [pair for pair in pairs if expected[pair][1]]
    assert len(items) > 250
    answer = await score(api, *items)
    for pair, result, request in zip(items, answer["results"], api.engine.submitted, strict=True):
        context_ids, continuation_ids = expected[pair]
        assert continuation_ids == result["token_ids"], pair
        assert (*context_ids, *continuation_ids) == request.prompt
        assert len(context_ids) == request.score_from


ITEM = {"context": "a", "continuation": " b"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "items", None),
        ({"items": []}, "items", None),
        ({"items": "a"}, "items", None),
        ({"items": ["a"]}, "items.0", None),
        ({"items": [ITEM] * 1025}, "items", None),
        ({"items": [ITEM, {"context": "a"}]}, "items.1.continuation", None),
        ({"items": [ITEM, {"context": "a", "continuation": None}]}, "items.1.continuation", None),
        ({"items": [ITEM, {"context": "a", "continuation": ""}]}, "items.1.continuation", None),
        ({"items": [ITEM, {"context": [1], "continuation": []}]}, "items.1.continuation", None),
        ({"items": [ITEM, {"context": "a", "continuation": [1]}]}, "items.1", None),
        ({"items": [ITEM, {"context": [1], "continuation": "a"}]}, "items.1", None),
        ({"items": [{"context": [50257], "continuation": [1]}]}, "items.0.context", None),
        ({"items": [{"context": [1], "continuation": [-1]}]}, "items.0.continuation", None),
        ({"items": [{"context": [1], "continuation": [10**30]}]}, "items.0.continuation", None),
        ({"items": [{"context": [1], "continuation": [True]}]}, "items.0.continuation", None),
        ({"items": [{"context": [1], "continuation": [1.5]}]}, "items.0.continuation", None),
        ({"items": [{"context": 5, "continuation": "a"}]}, "items.0.context", None),
        ({"items": [{"context": "Hel", "continuation": "lo"}]}, "items.0.continuation", None),
        (
            {"items": [ITEM, {"context": [1] * 1024, "continuation": [1, 1]}]},
            "items.1",
            "context_length_exceeded",
        ),
        (
            {"items": [ITEM, {"context": "", "continuation": [1] * 1025}]},
            "items.1",
            "context_length_exceeded",
        ),
        (
            {"items": [ITEM, {"context": "a", "continuation": " world" * 1025}]},
            "items.1",
            "context_length_exceeded",
        ),
        (
            {"items": [ITEM, {"context": "a" * 2**17, "continuation": "a"}]},
            "items.1",
            "context_length_exceeded",
        ),
        ({"items": [ITEM], "timeout_seconds": 0}, "timeout_seconds", None),
        ({"items": [ITEM], "timeout_seconds": "5"}, "timeout_seconds", None),
    ],
    ids=lambda value: str(value)[:80],
)
async def test_what_is_wrong_is_named(api: Service, body: dict[str, Any], param: str, code: str | None) -> None:
    """The item and its field; and nothing has been asked of the engine."""
    response = await api.http.post("/v1/score", json=body)
    error = response.json()["error"]
    assert (400, "invalid_request_error") == (response.status_code, error["type"]), error
    assert (param, code) == (error["param"], error["code"])
    assert error["message"].startswith(f"{param}: ")
    assert [] == api.engine.submits


async def test_a_text_that_no_context_holds_is_refused_unread(api: Service) -> None:
    """Before it is encoded: what is told is its length in characters."""
    item = {"context": "a" * (1024 * 128), "continuation": "b"}
    response = await api.http.post("/v1/score", json={"items": [ITEM, item]})
    assert "a text of 131073 characters cannot fit" in response.json()["error"]["message"]


async def test_the_whole_context_can_be_filled(api: Service) -> None:
    """1,024 tokens and one that is only predicted, as 1,024 items."""
    answer = await score(api, *[([7] * 1024, [token_id]) for token_id in range(1024)])
    assert list(range(1024)) == [result["token_ids"][0] for result in answer["results"]]
    assert 1025 * 1024 == answer["usage"]["prompt_tokens"]


async def test_an_unknown_model_is_not_found(api: Service) -> None:
    response = await api.http.post("/v1/score", json={"items": [ITEM], "model": "gpt-4"})
    assert (404, "model_not_found") == (response.status_code, response.json()["error"]["code"])


async def test_while_loading_it_is_unavailable(start: Start) -> None:
    api: Service = await start(ready=False)
    response = await api.http.post("/v1/score", json={"items": [ITEM]})
    assert (503, "service_unavailable") == (response.status_code, response.json()["error"]["code"])
    assert int(response.headers["retry-after"]) > 0


async def test_an_answer_that_takes_too_long_is_a_504(api: Service) -> None:
    """And the engine's work ends."""
    api.engine.gate.clear()
    response = await api.http.post("/v1/score", json={"items": [ITEM, ITEM], "timeout_seconds": 0.1})
    assert (504, "deadline_exceeded") == (response.status_code, response.json()["error"]["code"])
    await api.engine.wait_for(lambda: api.engine.num_open == 0 and len(api.engine.aborted) == 2)


@pytest.mark.parametrize(("finish", "status"), [(Finish.ERROR, 500), (Finish.ABORT, 503)])
async def test_what_the_engine_could_not_finish_is_an_error(api: Service, finish: Finish, status: int) -> None:
    """One item that fails fails the request: an answer has all its results. The others are given up."""
    api.engine.gate.clear()
    answer = asyncio.ensure_future(api.http.post("/v1/score", json={"items": [ITEM, ITEM]}))
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 2)
    api.engine.end(api.engine.submitted[0], finish, "a step raised" if finish is Finish.ERROR else None)
    assert status == (await answer).status_code
    await api.engine.wait_for(lambda: api.engine.num_open == 0)
    metrics = (await api.http.get("/metrics")).text
    assert 'megatron_gpt2_requests_finished_total{finish_reason="error"} 2.0' in metrics


async def test_a_client_that_leaves_ends_the_work(api: Service) -> None:
    """Every item's, and it is counted."""
    api.engine.gate.clear()
    answer = asyncio.ensure_future(api.http.post("/v1/score", json={"items": [ITEM, ITEM, ITEM]}))
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 3)
    answer.cancel()
    await api.engine.wait_for(lambda: api.engine.num_open == 0 and len(api.engine.aborted) == 3)
    await api.wait_metric("megatron_gpt2_requests_aborted_total", 1)
    metrics = (await api.http.get("/metrics")).text
    assert 'megatron_gpt2_requests_finished_total{finish_reason="abort"} 3.0' in metrics


async def test_metrics_count_it(api: Service) -> None:
    """Its tokens as prompt tokens, its items as ended sequences, its time as one request's."""
    await score(api, ("Hello", " world"), ("", "Hello"))
    metrics = (await api.http.get("/metrics")).text.splitlines()
    assert "megatron_gpt2_prompt_tokens_total 4.0" in metrics
    assert 'megatron_gpt2_requests_finished_total{finish_reason="length"} 2.0' in metrics
    assert "megatron_gpt2_request_seconds_count 1.0" in metrics
    assert "megatron_gpt2_queue_seconds_count 2.0" in metrics
    assert "megatron_gpt2_generated_tokens_total 0.0" in metrics


async def test_greedy_is_told_by_the_id(api: Service) -> None:
    """A token as likely as the best one, but after it, is not what greedy decoding gives."""
    tied = Logprobs(
        np.array([-0.5, -0.5], np.float32).tobytes(),
        np.array([[7], [9]], np.int32).tobytes(),
        np.array([[-0.5], [-0.5]], np.float32).tobytes(),
    )
    api.engine.gate.clear()
    answer = asyncio.ensure_future(score(api, ([1], [7, 9]), ([1], [7, 8])))
    await api.engine.wait_for(lambda: len(api.engine.submitted) == 2)
    for request in api.engine.submitted:
        api.engine.send(Publish(deltas=(Delta(request.id, 0, (), Finish.LENGTH, prompt_logprobs=tied),)))
    assert [True, False] == [result["is_greedy"] for result in (await answer)["results"]]


async def test_logprob_is_summed_in_double(api: Service) -> None:
    """A long continuation loses nothing to fp32."""
    ids = [(7 * i) % 50256 for i in range(1023)]
    (result,) = (await score(api, ([1], ids)))["results"]
    exact = np.sum(np.array([chosen for chosen, _ in logprob_entries(ids, 1)], np.float64))
    assert exact == pytest.approx(result["logprob"], rel=1e-14)
