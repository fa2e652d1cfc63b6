"""PUT and POST /api: what is taken, what the engine is asked, and what comes back. What is refused is beside it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from service.api.beams import NUM_MORE_CANDIDATES, BeamSearch
from service.api.megatron import MegatronBeams, MegatronTexts
from service.engine.request import ModelInfo, SamplingParams
from service.engine.request import Request as EngineRequest
from tests.api.conftest import Service, Start
from tests.api.fake_engine import MODEL, Script, logprob_entries, random_tokens

NEWLINE, EMPTY_LINE, COLON, END = 198, 628, 25, 50256
HELLO = 15496


async def put(api: Service, **body: Any) -> dict[str, Any]:
    response = await api.http.put("/api", json={"prompts": ["Hello"]} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def says(*token_ids: int) -> Script:
    """An engine that generates these."""
    return lambda request, params, choice: token_ids


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_texts_begin_with_their_prompts(api: Service, method: str) -> None:
    """Each prompt with what the engine gave for it: text, the text of each token, and ids."""
    prompts = ["Hello world", "naïve café 😀:", "<|endoftext|>"]
    response = await api.http.request(method, "/api", json={"prompts": prompts, "tokens_to_generate": 5})
    answer = response.json()
    MegatronTexts.model_validate(answer, strict=True)
    assert answer["logprobs"] is None
    (submit,) = api.engine.submits
    for number, request in enumerate(submit.requests):
        ids = [*request.prompt, *random_tokens(request, submit.params, 0)]
        assert len(request.prompt) + 5 == len(ids)
        assert ids == answer["tokens"][number]
        assert api.tokenizer.decode(ids, spelled=True) == answer["text"][number]
        assert answer["text"][number].startswith(prompts[number])
        pieces = [api.tokenizer.spelled_bytes[token_id].decode("utf-8", "replace") for token_id in ids]
        assert pieces == answer["segments"][number]
    assert {"text", "segments", "tokens", "logprobs"} == answer.keys()


async def test_pieces_of_a_character_become_replacement_marks(api: Service) -> None:
    """In segments; the text has the character."""
    answer = await put(api, prompts=["😀"], tokens_to_generate=1)
    assert ["\ufffd", "\ufffd"] == answer["segments"][0][:2]
    assert answer["text"][0].startswith("😀")


async def test_defaults(api: Service) -> None:
    """64 tokens from the full distribution, and another seed each time; null is the default everywhere."""
    await put(api)
    nulls = "tokens_to_generate logprobs temperature top_k top_p top_p_decay top_p_bound add_BOS stop_on_double_eol"
    nulls += " stop_on_eol prevent_newline_after_colon random_seed no_log beam_width stop_token length_penalty"
    await put(api, **dict.fromkeys((*nulls.split(), "max_len", "sentences")))
    await put(api, random_seed=-1, anything={"else": 1}, no_log=True)
    seeds = {submit.params.seed for submit in api.engine.submits}
    assert len(seeds) == 3
    for submit in api.engine.submits:
        expected = SamplingParams(max_tokens=64, temperature=1.0, seed=submit.params.seed)
        assert expected == submit.params
        assert submit.completing_ids == b""
        assert [(HELLO,)] == [request.prompt for request in submit.requests]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tokens_to_generate": 7}, {"max_tokens": 7}),
        ({"logprobs": True}, {"num_logprobs": 0}),
        ({"logprobs": True, "tokens_to_generate": 0}, {"num_logprobs": 0, "max_tokens": 0}),
        ({"temperature": 100}, {"temperature": 100.0}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"temperature": 1e-9}, {"temperature": 0.0}),
        ({"top_k": 1000}, {"top_k": 1000}),
        ({"top_k": 1}, {"temperature": 0.0, "top_k": 1}),
        ({"top_p": 0.9}, {"top_p": 0.9}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_p": 0, "top_k": 5}, {"top_k": 5}),
        ({"top_p": 0.9, "top_k": 0}, {"top_p": 0.9}),
        ({"top_p": 0.9, "top_p_decay": 0.5}, {"top_p": 0.9, "top_p_decay": 0.5}),
        ({"top_p": 0.9, "top_p_bound": 0.9}, {"top_p": 0.9, "top_p_bound": 0.9}),
        ({"top_p": 1, "top_p_decay": 1, "top_p_bound": 1}, {"top_p_decay": 1.0, "top_p_bound": 1.0}),
        ({"stop_on_eol": True}, {"stop_token_ids": (NEWLINE, EMPTY_LINE), "ignore_eos": True}),
        ({"stop_on_double_eol": True}, {"stop_token_ids": (EMPTY_LINE,), "ignore_eos": True}),
        (
            {"stop_on_double_eol": True, "stop_on_eol": True},
            {"stop_token_ids": (EMPTY_LINE,), "ignore_eos": True},
        ),
        ({"prevent_newline_after_colon": True}, {"bad_words": ((COLON, NEWLINE),)}),
        ({"random_seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"random_seed": 0}, {"seed": 0}),
    ],
    ids=str,
)
async def test_fields_reach_the_engine(api: Service, body: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each as the engine's own number."""
    await put(api, **body)
    (submit,) = api.engine.submits
    everything = {"max_tokens": 64, "seed": submit.params.seed} | expected
    assert SamplingParams(**everything) == submit.params


async def test_top_k_of_a_small_vocabulary_is_off(start: Start) -> None:
    """Where it is all of it or more, as there is nothing to leave out."""
    api: Service = await start(ready=False)
    small: ModelInfo = msgspec.structs.replace(MODEL, vocab_size=1000)
    api.engine.ready(small)
    await api.wait_phase("ready")
    for top_k in (999, 1000):
        await put(api, prompts=["!"], top_k=top_k)
    assert [999, 0] == [submit.params.top_k for submit in api.engine.submits]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hello", [END, HELLO]),
        ("", [END]),
        ("<|endoftext|>", [END, 27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
async def test_add_bos(api: Service, prompt: str, expected: list[int]) -> None:
    """The end of text comes first, and is spelled out; that spelled out in a prompt is plain text, as upstream."""
    answer = await put(api, prompts=[prompt], add_BOS=True, tokens_to_generate=1)
    assert tuple(expected) == api.engine.submitted[0].prompt
    assert expected == answer["tokens"][0][:-1]
    assert answer["text"][0].startswith(f"<|endoftext|>{prompt}")
    assert answer["segments"][0][0] == "<|endoftext|>"


async def test_equal_prompts_are_samples_of_one(api: Service) -> None:
    """So one seed gives each a text of its own, and the next time the same ones; in the order of the prompts."""
    prompts = ["Hello", "a", "Hello", "Hello", "a"]
    first = await put(api, prompts=prompts, random_seed=3)
    (submit,) = api.engine.submits
    assert [((HELLO,), 3), ((64,), 2)] == [(request.prompt, request.n) for request in submit.requests]
    assert 5 == len(set(first["text"]))
    for prompt, ids in zip(prompts, first["tokens"], strict=True):
        assert (HELLO if prompt == "Hello" else 64) == ids[0]
    hello, a = submit.requests
    sampled = [(hello, 0), (a, 0), (hello, 1), (hello, 2), (a, 1)]
    expected = [[*request.prompt, *random_tokens(request, submit.params, choice)] for request, choice in sampled]
    assert expected == first["tokens"]
    assert first == await put(api, prompts=prompts, random_seed=3)
    assert first["text"][0] == (await put(api, prompts=["Hello"], random_seed=3))["text"][0]


# Where a text ends

# Fields, the prompt, what the engine would say, how much of it stays, and why it ends there.
LINES: list[tuple[dict[str, Any], str, Sequence[int], int, str]] = [
    ({}, "Hello", (5, END, 6), 2, "stop"),
    ({}, "Hello", (NEWLINE, NEWLINE, EMPTY_LINE, 6), 4, "length"),
    ({"stop_on_eol": True}, "Hello", (5, END, 6, NEWLINE, 7), 4, "stop"),
    ({"stop_on_eol": True}, "Hello\n", (5, EMPTY_LINE, 7), 2, "stop"),
    ({"stop_on_double_eol": True}, "Hello", (5, END, EMPTY_LINE, 7), 3, "stop"),
    ({"stop_on_double_eol": True}, "Hello", (NEWLINE, 5, NEWLINE, NEWLINE, NEWLINE, 7), 4, "stop"),
    ({"stop_on_double_eol": True}, "Hello", (NEWLINE, END, NEWLINE, 7), 4, "length"),
    ({"stop_on_double_eol": True}, "Hello\n", (NEWLINE, 5, 6), 1, "stop"),
    ({"stop_on_double_eol": True}, "Hello\n", (5, NEWLINE, NEWLINE, 6), 3, "stop"),
    ({"stop_on_double_eol": True}, "Hello\n\n", (NEWLINE, 5, NEWLINE, NEWLINE), 4, "stop"),
    ({"stop_on_double_eol": True, "stop_on_eol": True}, "Hello", (NEWLINE, 5, NEWLINE, NEWLINE, 6), 4, "stop"),
    ({"stop_on_double_eol": True}, "Hello", (NEWLINE, 5), 2, "length"),
]


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 64])
@pytest.mark.parametrize(("fields", "prompt", "said", "length", "reason"), LINES, ids=str)
async def test_where_a_text_ends(
    api: Service,
    fields: dict[str, Any],
    prompt: str,
    said: Sequence[int],
    length: int,
    reason: str,
    tokens_per_delta: int,
) -> None:
    """With the token that ends it, also across the prompt's end and in the middle of what comes at once."""
    api.engine.script = says(*said)
    api.engine.tokens_per_delta = tokens_per_delta
    answer = await put(api, prompts=[prompt], logprobs=True, **fields)
    (request,) = api.engine.submitted
    ids = [*request.prompt, *said[:length]]
    assert ids == answer["tokens"][0]
    assert api.tokenizer.decode(ids, spelled=True) == answer["text"][0]
    assert [chosen for chosen, _ in logprob_entries(ids[1:], 0)] == answer["logprobs"][0]
    metrics = (await api.http.get("/metrics")).text
    assert f'megatron_gpt2_requests_finished_total{{finish_reason="{reason}"}} 1.0' in metrics
    assert f"megatron_gpt2_generated_tokens_total {float(length)}" in metrics


async def test_a_line_that_ends_a_text_ends_it_in_the_engine(api: Service) -> None:
    """Two newlines are no stop token, so the engine is told; the other texts go on. It sends newlines at once."""
    api.engine.script = lambda request, params, choice: [NEWLINE, NEWLINE, 5] if request.prompt == (64,) else [6, 7]
    api.engine.tokens_before_gate = 2
    api.engine.gate.clear()
    asking = asyncio.ensure_future(put(api, prompts=["a", "Hello"], stop_on_double_eol=True))
    await api.engine.wait_for(lambda: bool(api.engine.aborted))
    (submit,) = api.engine.submits
    assert [(submit.requests[0].id, 0)] == [(abort.request_id, abort.choice) for abort in api.engine.aborted]
    assert [[64, NEWLINE, NEWLINE], [HELLO, 6, 7]] == (await asking)["tokens"]
    assert submit.completing_ids[NEWLINE // 8] >> NEWLINE % 8 & 1


# Log-probabilities


@pytest.mark.parametrize("tokens_to_generate", [0, 1, 6])
async def test_logprobs_are_of_all_tokens_but_the_first(api: Service, tokens_to_generate: int) -> None:
    """Of prompts and what follows; equal prompts have the same; a prompt of one token has none."""
    prompts = ["Hello world, hello", "Hello", "Hello world, hello"]
    answer = await put(api, prompts=prompts, tokens_to_generate=tokens_to_generate, logprobs=True)
    assert [1, None] == [request.score_from for request in api.engine.submitted]
    for ids, segments, logprobs in zip(answer["tokens"], answer["segments"], answer["logprobs"], strict=True):
        assert len(segments) - 1 == len(logprobs)
        assert [chosen for chosen, _ in logprob_entries(ids[1:], 0)] == logprobs
    assert [4 + tokens_to_generate, 1 + tokens_to_generate, 4 + tokens_to_generate] == list(map(len, answer["tokens"]))


@pytest.mark.parametrize("more", [{"prompts": ["a", "b", "b"]}, {"beam_width": 3}])
async def test_a_client_that_leaves_ends_the_work(api: Service, more: dict[str, Any]) -> None:
    """Of every text and beam, and it is counted."""
    api.engine.gate.clear()
    api.engine.tokens_before_gate = 1
    asking = asyncio.ensure_future(put(api, **more))
    if "beam_width" in more:  # in the middle of the search
        await api.engine.wait_for(lambda: len(api.engine.submits) > 5)
        api.engine.tokens_before_gate = 0
        await api.engine.wait_for(lambda: api.engine.num_open == 3)
    else:
        await api.wait_metric("megatron_gpt2_generated_tokens_total", 3)
    asking.cancel()
    await api.engine.wait_for(lambda: api.engine.num_open == 0)
    await api.wait_metric("megatron_gpt2_requests_aborted_total", 1)
    metrics = (await api.http.get("/metrics")).text
    assert 'megatron_gpt2_requests_finished_total{finish_reason="abort"} 3.0' in metrics


async def test_metrics_count_it(api: Service) -> None:
    """Its tokens, its texts, and its time as one request's."""
    await put(api, prompts=["Hello", "Hello world", "Hello"], tokens_to_generate=4)
    metrics = (await api.http.get("/metrics")).text.splitlines()
    assert "megatron_gpt2_prompt_tokens_total 4.0" in metrics
    assert "megatron_gpt2_generated_tokens_total 12.0" in metrics
    assert 'megatron_gpt2_requests_finished_total{finish_reason="length"} 3.0' in metrics
    assert "megatron_gpt2_request_seconds_count 1.0" in metrics
    assert "megatron_gpt2_time_to_first_token_seconds_count 3.0" in metrics
    assert "megatron_gpt2_queue_seconds_count 2.0" in metrics
    assert 'megatron_gpt2_http_responses_total{method="PUT",route="/api",status="200"} 1.0' in metrics


# Beam search


def best_of(request: EngineRequest, num_top: int) -> list[tuple[int, float]]:
    """What the fake engine says of the token after a request's prompt."""
    (token_id,) = random_tokens(request, SamplingParams(1, temperature=0.0), 0)
    return list(logprob_entries([token_id], num_top)[0][1].items())


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 1, "tokens_to_generate": 3},
        {"beam_width": 4, "tokens_to_generate": 5, "length_penalty": 2},
        {"beam_width": 32, "tokens_to_generate": 3, "length_penalty": 0.5},
        {"beam_width": 3, "tokens_to_generate": 1, "add_BOS": True, "random_seed": 5},
    ],
    ids=str,
)
async def test_beams(api: Service, fields: dict[str, Any]) -> None:
    """As many as asked for, best first; each step is one request a beam, and after the first one more a beam."""
    prompt = (END, HELLO) if "add_BOS" in fields else (HELLO,)
    width, num_tokens = fields["beam_width"], fields["tokens_to_generate"]
    search = BeamSearch(
        width=width, num_tokens=num_tokens, stop_token=END, length_penalty=fields.get("length_penalty", 1.0)
    )
    num_best = width + NUM_MORE_CANDIDATES
    expected_prompts = []
    while search.open:
        contexts = [prompt + beam.token_ids for beam in search.open]
        expected_prompts.append(contexts)
        search.advance([best_of(EngineRequest(0, context), num_best) for context in contexts])
    answer = await put(api, **fields)
    MegatronBeams.model_validate(answer, strict=True)
    assert [[*prompt, *hypothesis.token_ids] for hypothesis in search.best()] == answer["tokens"]
    assert [hypothesis.score for hypothesis in search.best()] == answer["scores"]
    assert width == len(answer["text"])
    for text, segments, ids in zip(answer["text"], answer["segments"], answer["tokens"], strict=True):
        assert api.tokenizer.decode(ids, spelled=True) == text
        assert len(segments) == len(ids)
    assert expected_prompts == [[request.prompt for request in submit.requests] for submit in api.engine.submits]
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=num_best)
    assert {params} == {submit.params for submit in api.engine.submits}
    assert {(1, None)} == {(request.n, request.score_from) for request in api.engine.submitted}


async def test_a_stop_token_ends_a_beam(api: Service) -> None:
    """It is the last token of its text, and the search may end early."""
    (stop_token, logprob), *_ = best_of(EngineRequest(0, (HELLO,)), 4)
    answer = await put(api, beam_width=1, stop_token=stop_token)
    assert ([[HELLO, stop_token]], [logprob]) == (answer["tokens"], answer["scores"])
    assert 1 == len(api.engine.submits)


async def test_no_newline_after_a_colon_in_beams(api: Service) -> None:
    """Also when the colon is the prompt's last; elsewhere it may come."""

    def newline_first(request: EngineRequest, params: SamplingParams, choice: int) -> list[int]:
        return [NEWLINE]  # its own best: 198 % 3 == 0

    api.engine.script = newline_first
    free = await put(api, prompts=["a:"], beam_width=2, tokens_to_generate=2)
    assert [64, COLON, NEWLINE, NEWLINE] == free["tokens"][0]
    kept = await put(api, prompts=["a:"], beam_width=2, tokens_to_generate=2, prevent_newline_after_colon=True)
    assert all(ids[2] != NEWLINE for ids in kept["tokens"])
    assert [64, COLON, NEWLINE + 7, NEWLINE] == kept["tokens"][0]
