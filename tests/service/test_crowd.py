"""Sixty-four requests at once each get what they get alone, and what the definition of sampling says."""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.api.text import Tokenizer
from tests.service.conftest import DEMO
from tests.service.reference import Reference
from tests.service.server import Client, eventually

NUM_REQUESTS = 64
_ENGLISH = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> Reference:
    return Reference(DEMO, tokenizer)


def mixed_requests(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Prompts of 1 to 900 tokens, a third beginning alike; every kind of sampling; one to three choices, once 12."""
    rng = random.Random(0)
    english = tokenizer.encode([_ENGLISH.read_text()])[0]
    requests = []
    for number in range(NUM_REQUESTS):
        length = [1, 900, 2, 15, 16, 17][number] if number < 6 else round(900 ** rng.random())
        start = 0 if number % 3 == 0 else rng.randrange(len(english) - length)
        sampling = rng.choice(
            [
                {"temperature": 0},
                {"temperature": 1.0},
                {"temperature": 2.0, "min_p": 0.02},
                {"temperature": 0.7, "top_k": 40},
                {"temperature": 1.0, "top_p": 0.9},
                {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
            ]
        )
        requests.append(
            {
                "prompt": english[start : start + length],
                "max_tokens": 100 if number == 0 else rng.randint(1, 12),
                "n": 12 if number == 0 else rng.choice([1, 1, 2, 3]),  # which by themselves outgrow the blocks
                "seed": rng.randrange(-(2**63), 2**63),
                "ignore_eos": rng.random() < 0.5,
                **sampling,
            }
        )
    return requests


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's choices, and how many tokens it counted."""

    texts: list[str]
    finish_reasons: list[str]
    num_tokens: int


async def plain(client: Client, body: dict[str, Any]) -> Answer:
    answer = await client.complete(**body)
    choices = answer["choices"]
    assert list(range(body["n"])) == [choice["index"] for choice in choices]
    return Answer(
        [choice["text"] for choice in choices],
        [choice["finish_reason"] for choice in choices],
        answer["usage"]["completion_tokens"],
    )


async def streamed(client: Client, body: dict[str, Any]) -> Answer:
    stream = await client.stream(**body, stream_options={"include_usage": True})
    assert stream.done
    assert stream.error is None
    assert stream.usage is not None
    return Answer(
        [stream.text(choice) for choice in range(body["n"])],
        [stream.finish_reasons[choice] for choice in range(body["n"])],
        stream.usage["completion_tokens"],
    )


async def test_a_crowd_gets_what_each_gets_alone(demo: Client, tokenizer: Tokenizer, reference: Reference) -> None:
    """Half of 64 stream, blocks run out on the way; texts part only where the numbers were within the margin."""
    requests = mixed_requests(tokenizer)
    crowd = await asyncio.gather(
        *(streamed(demo, body) if number % 2 else plain(demo, body) for number, body in enumerate(requests))
    )
    await eventually(lambda: demo.metric("preemptions_total"))  # the crowd has run out of blocks on its way
    alone = [await plain(demo, body) for body in requests]
    num_parted = 0
    for body, together, single in zip(requests, crowd, alone, strict=True):
        body = dict(body)
        prompt = body.pop("prompt")
        for choice, texts in enumerate(zip(together.texts, single.texts, strict=True)):
            if texts[0] != texts[1]:
                num_parted += 1
                assert reference.check(list(texts), prompt, choice, **body).tied
        if together.texts == single.texts:
            assert together == single
    assert num_parted <= 3  # of more than 100; a tie is a matter of one token in thousands


async def test_a_crowd_gets_what_sampling_is_defined_to_give(
    demo: Client, tokenizer: Tokenizer, reference: Reference
) -> None:
    """Against transformers' logits and another implementation of the filters and of the draw."""
    requests = mixed_requests(tokenizer)[6:18]
    answers = await asyncio.gather(*(plain(demo, body) for body in requests))
    num_tokens = num_checked = 0
    for body, answer in zip(requests, answers, strict=True):
        body = dict(body)
        prompt = body.pop("prompt")
        num_tokens += answer.num_tokens
        for choice, text in enumerate(answer.texts):
            num_checked += len(reference.check([text], prompt, choice, **body).token_ids)
    assert num_checked > num_tokens / 2


def test_the_reference_refuses_another_text(reference: Reference) -> None:
    """A text of other tokens, one cut short, and one of another seed are none of the request's."""
    body: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    walk = reference.walk([11], 0, **body)
    assert not walk.tied
    text = reference.tokenizer.decode(walk.token_ids)
    reference.check([text], [11], 0, **body)
    for other in (text[:-1], text + " and", "x" + text[1:]):
        with pytest.raises(AssertionError):
            reference.check([other], [11], 0, **body)
