"""LiteLLM: text_completion with a base of one's own, streams, and its mapping of errors."""

from typing import Any

import litellm
import pytest

from tests.clients.conftest import MODEL, plain, text
from tests.service.server import Server

_PROMPT = "My fellow citizens"
_SAMPLING: dict[str, Any] = {"max_tokens": 16, "temperature": 0.7, "seed": 5}


@pytest.fixture
def ask(server: Server) -> dict[str, Any]:
    address = {"api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    return {"model": f"text-completion-openai/{MODEL}", **address, **_SAMPLING}


def test_a_plain_answer(ask: dict[str, Any], server: Server) -> None:
    """Text, finish and usage are those of the service; several prompts come in order."""
    expected = plain(server, prompt=_PROMPT, **_SAMPLING)
    answer = litellm.text_completion(prompt=_PROMPT, **ask)
    assert expected["choices"][0]["text"] == answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert (3, 16) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    prompts = [_PROMPT, "The Senate"]
    expected = plain(server, prompt=prompts, **_SAMPLING)
    answer = litellm.text_completion(prompt=prompts, **ask)
    assert [choice["text"] for choice in expected["choices"]] == [choice.text for choice in answer.choices]


def test_log_probabilities(ask: dict[str, Any]) -> None:
    """With the prompt's, in the legacy shape."""
    (choice,) = litellm.text_completion(prompt=_PROMPT, logprobs=1, echo=True, **ask).choices
    assert choice.text.startswith(_PROMPT)
    assert choice.text == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs[0] is None


def test_a_stream(ask: dict[str, Any], server: Server) -> None:
    """Its pieces are the plain text."""
    pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(prompt=_PROMPT, stream=True, **ask)]
    assert text(server, prompt=_PROMPT, **_SAMPLING) == "".join(pieces)


async def test_asynchronously(ask: dict[str, Any], server: Server) -> None:
    """Plain and streamed."""
    expected = text(server, prompt=_PROMPT, **_SAMPLING)
    assert expected == (await litellm.atext_completion(prompt=_PROMPT, **ask)).choices[0].text
    stream = await litellm.atext_completion(prompt=_PROMPT, stream=True, **ask)
    assert expected == "".join([chunk.choices[0].text or "" async for chunk in stream])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "text-completion-openai/gpt-4"}, litellm.NotFoundError),
        ({"temperature": 3}, litellm.BadRequestError),
        ({"max_tokens": 2000}, litellm.ContextWindowExceededError),
        ({"prompt": "word " * 2000}, litellm.ContextWindowExceededError),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(ask: dict[str, Any], stream: bool, fields: dict[str, Any], error: type[Exception]) -> None:
    """Each is LiteLLM's own exception; its fallbacks to a longer context go by the one for the context."""
    with pytest.raises(error):
        list(litellm.text_completion(**{"prompt": _PROMPT} | ask | fields, stream=stream))


def test_an_error_within_a_stream_is_no_success(ask: dict[str, Any]) -> None:
    """A deadline that passes after the first token raises; the stream does not just end."""
    stream = litellm.text_completion(
        prompt=_PROMPT, stream=True, **ask | {"max_tokens": 1000, "timeout_seconds": 1.0, "ignore_eos": True}
    )
    pieces = []
    with pytest.raises(litellm.InternalServerError, match="deadline"):  # noqa: PT012 - it comes within the loop
        for chunk in stream:
            pieces.append(chunk.choices[0].text or "")
    assert "".join(pieces)
