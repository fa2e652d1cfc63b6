"""PUT /api of a real server: the other routes' numbers, transformers' beams, and Megatron-LM's own client."""

import asyncio
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from service.api.text import Tokenizer
from tests.api.test_beams import megatron
from tests.service.conftest import DEMO
from tests.service.reference import Reference
from tests.service.server import Client, Connect, Server, Start, eventually

_PROMPTS = ["The people of the United States", "In", "My dear friend, naïve café 😀", "God said:"]
_SALUTATION = "To the Senate and House of Representatives:"  # the demo model goes on with an empty line
_NEWLINE = 198
_CLIENT = Path(__file__).with_name("megatron_client.py")


async def put(client: Client, *prompts: str, **fields: Any) -> dict[str, Any]:
    response = await client.http.put("/api", json={"prompts": prompts} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> Reference:
    return Reference(DEMO, tokenizer)


# The same as the other routes


async def test_greedy_text_is_that_of_completions(demo: Client) -> None:
    """After each of several prompts of unequal length, as many tokens as were asked for."""
    answer = await put(demo, *_PROMPTS, tokens_to_generate=24, top_k=1)
    expected = await demo.complete(prompt=_PROMPTS, max_tokens=24, temperature=0, return_token_ids=True)
    choices = expected["choices"]
    assert [prompt + choice["text"] for prompt, choice in zip(_PROMPTS, choices, strict=True)] == answer["text"]
    assert [choice["prompt_token_ids"] + choice["token_ids"] for choice in choices] == answer["tokens"]


@pytest.mark.parametrize("tokens_to_generate", [0, 9])
async def test_logprobs_are_those_of_an_echo(demo: Client, tokens_to_generate: int) -> None:
    """Of the raw distribution, prompt included, without the first token's null; also where the draw is filtered."""
    filtered = {"temperature": 0.7, "top_p": 0.4}
    answer = await put(demo, *_PROMPTS, tokens_to_generate=tokens_to_generate, logprobs=True, random_seed=5, **filtered)
    expected = await demo.complete(
        prompt=_PROMPTS, max_tokens=tokens_to_generate, echo=True, logprobs=0, seed=5, **filtered
    )
    for choice, ids, logprobs in zip(expected["choices"], answer["tokens"], answer["logprobs"], strict=True):
        assert choice["logprobs"]["token_ids"] == ids
        np.testing.assert_allclose(logprobs, choice["logprobs"]["token_logprobs"][1:], atol=1e-4, rtol=0)


async def test_a_seed_gives_the_same_texts(demo: Client) -> None:
    """And equal prompts texts of their own; without a seed they are others each time."""
    prompts = ["The king"] * 4
    first = await put(demo, *prompts, random_seed=1)
    again = await put(demo, *prompts, random_seed=1)  # after it: in other company logits differ by their rounding
    other, free, freer = await asyncio.gather(
        put(demo, *prompts, random_seed=2),
        put(demo, *prompts),
        put(demo, *prompts, random_seed=-1),
    )
    assert first == again
    assert 16 == len({text for answer in (first, other, free, freer) for text in answer["text"]})


# The rules that are its own


@pytest.mark.parametrize("temperature", [1.0, 100.0])
async def test_top_p_falls_to_the_best_token_alone(demo: Client, tokenizer: Tokenizer, temperature: float) -> None:
    """With a decay of nearly nothing, one token is drawn and greedy ones follow; a bound of top_p keeps it there."""
    ask = {"tokens_to_generate": 12, "top_p": 0.95, "random_seed": 4, "temperature": temperature}
    fallen = await put(demo, "The king", **ask, top_p_decay=1e-9)
    held = await put(demo, "The king", **ask, top_p_decay=1e-9, top_p_bound=0.95)
    steady = await put(demo, "The king", **ask)
    assert steady == held
    assert fallen != steady
    begun = fallen["tokens"][0][:-11]
    assert steady["tokens"][0][: len(begun)] == begun
    greedy = await demo.complete(prompt=begun, max_tokens=11, temperature=0, return_token_ids=True)
    assert begun + greedy["choices"][0]["token_ids"] == fallen["tokens"][0]


async def test_lines_end_a_text(demo: Client) -> None:
    """The demo model writes an empty line as two newlines: at the first, at the second, or across the prompt's end."""
    at_first, at_second, across, beyond = await asyncio.gather(
        put(demo, _SALUTATION, top_k=1, stop_on_eol=True),
        put(demo, _SALUTATION, top_k=1, stop_on_double_eol=True),
        put(demo, f"{_SALUTATION}\n", top_k=1, stop_on_double_eol=True),
        put(demo, _SALUTATION, top_k=1, tokens_to_generate=12),
    )
    assert [f"{_SALUTATION}\n"] == at_first["text"]
    assert [f"{_SALUTATION}\n\n"] == at_second["text"] == across["text"]
    assert beyond["text"][0].startswith(f"{_SALUTATION}\n\nThe Constitution")


async def test_no_newline_after_a_colon(demo: Client, tokenizer: Tokenizer) -> None:
    """Nor after the prompt's, sampled or by beams; a newline elsewhere may come."""
    ask = {"tokens_to_generate": 40, "prevent_newline_after_colon": True}
    answers = await asyncio.gather(
        put(demo, _SALUTATION, **ask, top_k=1),
        put(demo, *[_SALUTATION] * 20, **ask),
        put(demo, _SALUTATION, **ask, beam_width=4),
    )
    rows = [ids for answer in answers for ids in answer["tokens"]]
    assert 25 == len(rows)
    for ids in rows:
        pairs = list(pairwise(ids))
        assert (25, _NEWLINE) not in pairs
        assert 25 in ids
    assert any(_NEWLINE in ids for ids in rows)


async def test_an_end_of_text_is_spelled_out(demo: Client) -> None:
    """Where add_BOS put it, and where the text ended with it."""
    answer = await put(demo, "", "Amen.", add_BOS=True, tokens_to_generate=3, top_k=1)
    assert all(text.startswith("<|endoftext|>") for text in answer["text"])
    expected = await demo.complete(prompt=[[50256], answer["tokens"][1][:-3]], max_tokens=3, temperature=0)
    texts = ["<|endoftext|>", "<|endoftext|>Amen."]
    assert [text + choice["text"] for text, choice in zip(texts, expected["choices"], strict=True)] == answer["text"]


# Beams


@torch.inference_mode()
def transformers_beams(
    reference: Reference, prompt: list[int], *, width: int, num_tokens: int, stop_token: int, length_penalty: float
) -> list[tuple[list[int], float]]:
    found = reference.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=stop_token,
        pad_token_id=50256,
        length_penalty=length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        generated = row[len(prompt) :]
        end = generated.index(stop_token) + 1 if stop_token in generated else len(generated)
        rows.append((prompt + generated[:end], score))
    return rows


@pytest.mark.parametrize(
    ("prompt", "width", "stop", "length_penalty"),
    [
        ("The people of the United States", 4, None, 1.0),
        ("The people of the United States", 16, None, 2.0),
        ("In the beginning", 32, None, 1.0),
        ("In the beginning", 2, ",", 0.0),
        ("My dear friend", 5, ".", 0.0),
        ("My dear friend", 8, ",", -1.0),
    ],
)
async def test_beams_are_transformers_where_the_rules_agree(
    demo: Client,
    reference: Reference,
    tokenizer: Tokenizer,
    prompt: str,
    width: int,
    stop: str | None,
    length_penalty: float,
) -> None:
    """Without a stop, or where a longer beam is never worth more than its beginning."""
    stop_token = 50256 if stop is None else tokenizer.encode([stop])[0][0]
    ids = tokenizer.encode([prompt])[0]
    rules = {"width": width, "num_tokens": 20, "stop_token": stop_token, "length_penalty": length_penalty}
    expected = transformers_beams(reference, ids, **rules)
    assert (stop is not None) == any(tokens[-1] == stop_token for tokens, _ in expected)
    fields: dict[str, Any] = {} if stop is None else {"stop_token": stop_token}
    answer = await put(demo, prompt, beam_width=width, tokens_to_generate=20, length_penalty=length_penalty, **fields)
    assert [tokens for tokens, _ in expected] == answer["tokens"]
    np.testing.assert_allclose(answer["scores"], [score for _, score in expected], atol=1e-3, rtol=1e-4)
    assert [tokenizer.decode(tokens, spelled=True) for tokens, _ in expected] == answer["text"]


@pytest.mark.parametrize("width", [1, 3, 6])
async def test_beams_are_megatrons_where_the_rules_differ(
    demo: Client, reference: Reference, tokenizer: Tokenizer, width: int
) -> None:
    """A reward for length and a stop token that comes up: what is kept depends on when the search ends."""
    ids = tuple(tokenizer.encode(["My dear friend"])[0])

    @torch.inference_mode()
    def next_logprobs(tokens: tuple[int, ...]) -> Any:
        return reference.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).double().numpy()

    rules = {"width": width, "num_tokens": 12, "stop_token": 11, "length_penalty": 1.0}
    expected = megatron(next_logprobs, ids, **rules)
    answer = await put(demo, "My dear friend", beam_width=width, tokens_to_generate=12, stop_token=11)
    assert [[*ids, *tokens] for tokens, _ in expected] == answer["tokens"]
    np.testing.assert_allclose(answer["scores"], [score for _, score in expected], atol=1e-4, rtol=0)


async def test_beams_find_what_they_share(demo: Client) -> None:
    """Of a long prompt and 20 steps with 4 beams, the engine computes the prompt once and the blocks' ends."""
    before = [await demo.metric(f"prefix_cache_{name}_total") for name in ("queries", "hits")]
    await put(demo, "The law of the land is this. " * 30, beam_width=4, tokens_to_generate=20)

    async def counted() -> list[float]:
        now = [await demo.metric(f"prefix_cache_{name}_total") for name in ("queries", "hits")]
        asked, found = (after - earlier for after, earlier in zip(now, before, strict=True))
        return [asked, found] if asked >= 77 * 240 else []

    asked, found = await eventually(counted)
    num_prompt = (asked - 4 * sum(range(1, 20))) / 77
    assert asked - found <= num_prompt + 76 * 16
    assert found > 0.9 * asked


async def test_a_drain_lets_a_search_end(start: Start, connect: Connect) -> None:
    """Its later steps are part of what was open; a new request is refused, and the service then ends with 0."""
    server = start()
    client = connect(server)
    ask = {"beam_width": 8, "tokens_to_generate": 200}
    searching = asyncio.create_task(put(client, "The people", **ask))
    await client.wait_metric("prompt_tokens_total", 2)  # it has begun: whether a step runs depends on the moment
    server.process.terminate()
    await client.wait_status("/readyz", 503)
    refused = await client.http.put("/api", json={"prompts": ["a"]})
    assert (503, "service_unavailable") == (refused.status_code, refused.json()["error"]["code"])
    assert refused.json()["message"]
    assert not searching.done(), "the drain was to be seen while the search was open"
    assert [202] * 8 == list(map(len, (await searching)["tokens"]))
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_client_that_leaves_a_search_ends_it(demo: Client) -> None:
    """No step follows the one that it left in, and nothing is held."""
    begun, aborted = [await demo.metric(f"{name}_total") for name in ("prompt_tokens", "requests_aborted")]
    searching = asyncio.create_task(put(demo, "The people", beam_width=8, tokens_to_generate=900))
    await demo.wait_metric("prompt_tokens_total", begun + 2)
    searching.cancel()
    await asyncio.wait([searching])
    await demo.wait_metric("requests_aborted_total", aborted + 1, seconds=2)
    await demo.wait_metric("kv_cache_usage_ratio", 0, seconds=2)


# Megatron-LM's own client


async def test_megatrons_client(demo_server: Server, demo: Client) -> None:
    """It prints texts, and the message of a refusal, and goes on after one."""
    lines = [
        "The people of the",
        "1",
        "The people",
        "-1",
        "The people",
        "5000",
        "",
        "8",
        "The people",
        "'8'",
        "Amen",
        "0",
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        _CLIENT,
        httpx.URL(demo_server.url).netloc.decode(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    assert (b"", 0) == (err, process.returncode)
    said = out.decode().replace("Enter number of tokens to generate: ", "").split("Enter prompt: ")[1:-1]
    assert 6 == len(said)
    assert said[0].startswith("Megatron Response: \nThe people of the ")
    assert said[1].startswith("Error 400: tokens_to_generate: ")
    assert "1024" in said[2]
    assert "5000" in said[2]
    assert "Error 400: prompts: an empty prompt needs add_BOS\n" == said[3]
    assert said[4].startswith("Error 400: tokens_to_generate: ")
    assert "Error 400: tokens_to_generate: 0 is only possible with logprobs\n" == said[5]
