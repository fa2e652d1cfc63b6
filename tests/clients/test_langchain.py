"""LangChain's OpenAI LLM: invoke, batches, streams, and the fields it always sends."""

from typing import Any

import openai
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_openai import OpenAI

from tests.clients.conftest import MODEL, plain, text
from tests.service.server import Server

_ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "temperature": 0.7, "seed": 5}
# For requests beside each other: in other company logits differ by their rounding, which a draw may turn on.
_ASK_GREEDILY = _ASK | {"temperature": 0.0}
_PROMPTS = ["My fellow citizens", "The Senate", "In the year"]


@pytest.fixture
def llm(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **_ASK)


@pytest.fixture
def greedy_llm(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **_ASK_GREEDILY)


def test_invoke(llm: OpenAI, server: Server) -> None:
    """The text of a plain request, also with a stop."""
    expected = text(server, prompt=_PROMPTS[0], **_ASK)
    assert expected == llm.invoke(_PROMPTS[0])
    stop = expected[4:7]
    assert expected.split(stop)[0] == llm.invoke(_PROMPTS[0], stop=[stop])


def test_a_batch_of_prompts(llm: OpenAI, greedy_llm: OpenAI, server: Server) -> None:
    """Several prompts in one request, and as requests beside each other."""
    expected = [choice["text"] for choice in plain(server, prompt=_PROMPTS, **_ASK)["choices"]]
    result = llm.generate(_PROMPTS)
    assert expected == [generations[0].text for generations in result.generations]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 3 * 16
    assert [text(server, prompt=prompt, **_ASK_GREEDILY) for prompt in _PROMPTS] == greedy_llm.batch(_PROMPTS)


def test_a_stream(llm: OpenAI) -> None:
    """Its pieces are the text of invoke."""
    pieces = list(llm.stream(_PROMPTS[0]))
    assert len(pieces) > 4
    assert llm.invoke(_PROMPTS[0]) == "".join(pieces)


async def test_asynchronously(llm: OpenAI, greedy_llm: OpenAI) -> None:
    """Invoke, batch and stream."""
    expected = llm.invoke(_PROMPTS[0])
    assert expected == await llm.ainvoke(_PROMPTS[0])
    assert expected == "".join([piece async for piece in llm.astream(_PROMPTS[0])])
    assert greedy_llm.batch(_PROMPTS) == await greedy_llm.abatch(_PROMPTS)


def test_samples_and_log_probabilities(server: Server) -> None:
    """`n`, `best_of` and `logprobs` as its constructor takes them."""
    llm = OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        n=2,
        best_of=3,
        logprobs=2,
        logit_bias={"262": -100},
        frequency_penalty=0.5,
        presence_penalty=0.5,
        **_ASK,
    )
    (generations,) = llm.generate(_PROMPTS[:1]).generations
    assert len(generations) == 2
    for generation in generations:
        assert generation.generation_info is not None
        scored = generation.generation_info["logprobs"]
        assert generation.text == "".join(scored["tokens"])
        assert 262 not in scored["token_ids"]


class Tokens(BaseCallbackHandler):
    """Keeps the tokens of the log-probabilities that come with each chunk."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        entries = chunk.generation_info["logprobs"] or {"tokens": []}
        self.tokens += entries["tokens"]


def test_a_streamed_log_probability_reaches_a_callback(server: Server) -> None:
    """Every token has its entry in the chunk that brings it."""
    llm = OpenAI(base_url=f"{server.url}/v1", api_key="none", logprobs=1, **_ASK)
    callback = Tokens()
    text = "".join(llm.stream(_PROMPTS[0], config={"callbacks": [callback]}))
    assert text == "".join(callback.tokens)
    assert len(callback.tokens) == 16


def test_a_refusal(llm: OpenAI) -> None:
    """OpenAI's exceptions come through, from invoke and from a stream."""
    with pytest.raises(openai.BadRequestError, match="1024"):
        llm.invoke("word " * 2000)
    with pytest.raises(openai.BadRequestError, match="1024"):
        list(llm.stream("word " * 2000))
