"""OpenAI's package: plain, streamed, asynchronous, its own retries, and its exceptions."""

from collections import defaultdict
from typing import Any

import openai
import pytest

from tests.clients.conftest import DEMO, MODEL, Server, load_oracle, plain, post
from tests.service.server import Server as StartedServer

_ASK: dict[str, Any] = {"model": MODEL, "prompt": "My fellow citizens", "max_tokens": 24, "temperature": 0.8, "seed": 3}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def async_client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_plain_answer(client: openai.OpenAI, server: Server) -> None:
    """The package's typed answer holds what was sent: nothing is lost, and its usage and times are numbers."""
    expected = plain(server, **_ASK)
    answer = client.completions.create(**_ASK)
    assert expected["choices"] == [choice.model_dump() for choice in answer.choices]
    assert ("text_completion", MODEL) == (answer.object, answer.model)
    assert answer.usage is not None
    assert expected["usage"]["completion_tokens"] == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_the_text_is_transformers_text(client: openai.OpenAI) -> None:
    """Greedy, for several prompts in one request, in order."""
    oracle = load_oracle(DEMO)
    prompts = ["The people of the United States", "In the year", "Plants create energy through"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=20, temperature=0)
    assert [0, 1, 2] == [choice.index for choice in answer.choices]
    assert [oracle.greedy(oracle.encode(prompt), 20) for prompt in prompts] == [
        choice.text for choice in answer.choices
    ]


def test_a_stream(client: openai.OpenAI, server: Server) -> None:
    """Its pieces are the plain text, its last chunk the usage, and only a choice's last chunk has a finish."""
    expected = plain(server, **_ASK)
    chunks = list(client.completions.create(**_ASK, stream=True, stream_options={"include_usage": True}))
    assert expected["choices"][0]["text"] == "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert [*[None] * (len(chunks) - 2), "length"] == [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert expected["usage"]["total_tokens"] == chunks[-1].usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_of_a_stream_do_not_mix(client: openai.OpenAI, server: Server) -> None:
    """Two prompts of three samples: each index has the text of that index, and one finish."""
    ask = _ASK | {"prompt": ["The Senate", "My dear sister"], "n": 3}
    texts, finishes = defaultdict(str), defaultdict(list)
    for chunk in client.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            finishes[choice.index].append(choice.finish_reason)
    expected = plain(server, **ask)["choices"]
    assert [choice["text"] for choice in expected] == [texts[index] for index in range(6)]
    assert {index: ["length"] for index in range(6)} == finishes
    assert len(set(texts.values())) == 6


def test_log_probabilities_with_the_prompt(client: openai.OpenAI) -> None:
    """The package reads the four parallel lists; tokens join to the text, and the prompt's first has no score."""
    answer = client.completions.create(
        model=MODEL, prompt="The people of", max_tokens=5, temperature=0, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    scored = choice.logprobs
    assert scored is not None
    assert choice.text == "".join(scored.tokens or [])
    assert len({len(scored.tokens), len(scored.token_logprobs), len(scored.top_logprobs), len(scored.text_offset)}) == 1
    assert [choice.text[:offset] for offset in scored.text_offset] == [
        "".join(scored.tokens[:place]) for place in range(len(scored.tokens))
    ]
    assert scored.token_logprobs[0] is None
    for token, logprob, top in list(zip(scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    for token, top in list(zip(scored.tokens, scored.top_logprobs, strict=True))[-5:]:
        assert token == max(top, key=top.__getitem__)  # they are greedy


def test_the_best_of_several(client: openai.OpenAI) -> None:
    """`best_of` gives the likeliest, which is among the samples of the same seed."""
    ask = _ASK | {"temperature": 1.0, "max_tokens": 8}
    samples = client.completions.create(**ask, n=5, logprobs=0).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = client.completions.create(**ask, best_of=5)
    assert max(samples, key=mean).text == best.choices[0].text
    assert best.usage is not None
    assert sum(len(choice.logprobs.tokens) for choice in samples) == best.usage.completion_tokens


async def test_asynchronously(async_client: openai.AsyncOpenAI, server: Server) -> None:
    """Plain and streamed."""
    expected = plain(server, **_ASK)["choices"][0]["text"]
    assert expected == (await async_client.completions.create(**_ASK)).choices[0].text
    stream = await async_client.completions.create(**_ASK, stream=True)
    assert expected == "".join([chunk.choices[0].text async for chunk in stream])


def test_models(client: openai.OpenAI) -> None:
    """Listed, and found by id."""
    (model,) = client.models.list().data
    assert (MODEL, "model") == (model.id, model.object)
    assert model == client.models.retrieve(MODEL)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_its_own_retries_bridge_the_loading() -> None:
    """The port answers 503 with Retry-After until the model is ready; the package waits as it is told."""
    server = StartedServer()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=30) as client:
            response = client.completions.with_raw_response.create(**_ASK)
        assert response.retries_taken > 0
        assert response.parse().choices[0].finish_reason == "length"
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", None),
        ({"max_tokens": 2000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"suffix": "the end"}, openai.BadRequestError, "suffix", None),
        ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError, "use_beam_search", None),
        ({"logit_bias": {"50257": 1}}, openai.BadRequestError, "logit_bias", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    client: openai.OpenAI,
    stream: bool,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    code: str | None,
) -> None:
    """The package's own exception for the status, before a stream begins, with our parameter and code."""
    with pytest.raises(error) as refused:
        client.completions.create(**_ASK | fields, stream=stream)
    assert (param, "invalid_request_error") == (refused.value.param, refused.value.type)
    assert code is None or code == refused.value.code


def test_chat_and_embeddings_are_told_what_to_use(client: openai.OpenAI) -> None:
    """404, and the message names the route that there is."""
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="Hello")


def test_a_deadline(client: openai.OpenAI) -> None:
    """A plain answer that takes too long is a 504; a stream that does is an exception after its last piece."""
    ask = _ASK | {"max_tokens": 1000, "extra_body": {"timeout_seconds": 1.0, "ignore_eos": True}}
    with pytest.raises(openai.InternalServerError) as plain_error:
        client.completions.create(**ask)
    assert plain_error.value.status_code == 504
    pieces = []
    with pytest.raises(openai.APIError) as stream_error:  # noqa: PT012 - it comes within the loop
        for chunk in client.completions.create(**ask, stream=True):
            assert chunk.choices[0].finish_reason is None
            pieces.append(chunk.choices[0].text)
    assert pieces
    assert not isinstance(stream_error.value, openai.APIStatusError)
    assert plain_error.value.code == stream_error.value.code


def test_a_request_id(client: openai.OpenAI, server: Server) -> None:
    """The package shows the id of the answer's header, ours or the one that was sent."""
    own = client.completions.with_raw_response.create(**_ASK, extra_headers={"X-Request-Id": "my-request"})
    assert own.request_id == "my-request"
    assert post(server, **_ASK).headers["x-request-id"]
