"""A service that speculates, from outside: the answers of one that does not, in every form."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.conftest import Connect
from tests.service.server import Client, Server, eventually, until_drained

# In which drafts cannot move a bit; and prompts shorter than a block, which share none.
_ARGUMENTS = ("--deterministic",)
_REPEATING, _ORDINARY = "one two, one two, one", "My fellow citizens of the"
_BODIES: list[dict[str, Any]] = [
    {"prompt": _REPEATING, "temperature": 0},
    {"prompt": _REPEATING, "temperature": 0.8, "top_p": 0.9, "seed": 4, "n": 3},
    {"prompt": [_REPEATING, _ORDINARY], "temperature": 0, "logprobs": 3, "echo": True},
    {"prompt": _ORDINARY, "temperature": 1.0, "seed": 1, "n": 2, "logprobs": 0, "return_token_ids": True},
    {"prompt": _REPEATING, "temperature": 0, "stop": ["two, one two, one two, one tw"], "min_tokens": 20},
    {"prompt": _REPEATING, "temperature": 0, "repetition_stop": {"max_pattern_tokens": 8, "min_repeats": 5}},
    {"prompt": _REPEATING, "temperature": 0, "frequency_penalty": 0.02, "logit_bias": {"11": 0.5}},
    {"prompt": _REPEATING, "temperature": 0, "bad_words": ["two, one two"]},
    {"prompt": _REPEATING, "temperature": 0, "best_of": 3, "seed": 1},
]


@pytest.fixture(scope="module")
def plain_server() -> Iterator[Server]:
    yield from until_drained(Server(*_ARGUMENTS))


@pytest.fixture(scope="module")
def speculating_server() -> Iterator[Server]:
    yield from until_drained(Server(*_ARGUMENTS, "--speculation", "ngram"))


@pytest.fixture
def clients(plain_server: Server, speculating_server: Server, connect: Connect) -> list[Client]:
    return [connect(plain_server), connect(speculating_server)]


@pytest.mark.parametrize("number", range(len(_BODIES)))
async def test_an_answer_is_the_same(clients: list[Client], number: int) -> None:
    """Choices and usage, whole; and streamed, its pieces joined, with its end."""
    body = {"max_tokens": 60, **_BODIES[number]}
    expected, got = [await client.complete(**body) for client in clients]
    assert expected["choices"] == got["choices"]
    assert expected["usage"] == got["usage"]
    if "best_of" not in body:
        streamed = await clients[1].stream(**body)
        for choice in expected["choices"]:
            assert choice["text"] == "".join(streamed.pieces[choice["index"]])
            assert choice["finish_reason"] == streamed.finish_reasons[choice["index"]]


async def test_the_metrics_tell_what_was_right(clients: list[Client]) -> None:
    """Every right draft is a step less; a service that does not speculate has none."""
    names = ("steps_total", "accepted_draft_tokens_total", "draft_tokens_total")
    ask: dict[str, Any] = {"prompt": _REPEATING, "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    grown = []
    for client in clients:
        before = [await client.metric(name) for name in names]
        await client.complete(**ask)

        async def told(client: Client = client, before: list[float] = before) -> bool:
            found = [await client.metric(name) for name in names]
            return 200 == found[0] + found[1] - before[0] - before[1]

        await eventually(told)
        grown.append([await client.metric(name) - value for name, value in zip(names, before, strict=True)])
    assert [200, 0, 0] == grown[0]
    _, accepted, drafted = grown[1]
    assert 50 < accepted <= drafted  # how many depends on the time that steps take
