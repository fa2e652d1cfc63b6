"""The demo model: transformers, used as its MegatronGPT2 page shows, gives the text that the service gives."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from service.api.text import Tokenizer
from tests.service.conftest import DEMO
from tests.service.reference import Reference
from tests.service.server import COMMAND, Client, Server

PAGE_PROMPT = "Plants create energy through a process known as photosynthesis."
PAGE_LENGTH = 50  # tokens, the prompt's included
_HALF_MARGIN = 0.05  # between two logits of about 10, which are 1/128 apart in fp16
_PROMPTS = [
    PAGE_PROMPT,
    "In",
    "Mr. Speaker, Mr. Vice President, members of the Congress:",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of",
    "In the beginning God created the heavens and the earth. " * 12,
    "日本語 🦜\n\n\n",
]


@pytest.fixture(scope="module")
def half_server() -> Iterator[Server]:
    """The demo model in fp16, as it is stored."""
    server = Server("--dtype", "float16")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def same_text(theirs: str, ours: str, tokenizer: Tokenizer) -> None:
    """Equal; or parted where the two best scores, in fp32, were too close for fp16 to tell."""
    if theirs != ours:
        reference = Reference(DEMO, tokenizer, score_margin=_HALF_MARGIN)
        prompt = tokenizer.encode([PAGE_PROMPT])[0]
        max_tokens = PAGE_LENGTH - len(prompt)
        assert reference.check([theirs, ours], prompt, 0, temperature=0, max_tokens=max_tokens).tied


async def test_the_pages_pipeline(
    half_server: Server, connect: Callable[[Server], Client], tokenizer: Tokenizer
) -> None:
    """`pipeline(task="text-generation", model=..., dtype="auto")`, greedy: fp16 there and here."""
    generator = pipeline(task="text-generation", model=str(DEMO), dtype="auto", device=-1)
    assert torch.float16 == generator.model.dtype
    max_tokens = PAGE_LENGTH - len(tokenizer.encode([PAGE_PROMPT])[0])
    (theirs,) = generator(PAGE_PROMPT, do_sample=False, max_new_tokens=max_tokens, return_full_text=False)
    ours = await connect(half_server).complete(prompt=PAGE_PROMPT, max_tokens=max_tokens, temperature=0)
    same_text(theirs["generated_text"], ours["choices"][0]["text"], tokenizer)


async def test_the_pages_generate(
    half_server: Server, connect: Callable[[Server], Client], tokenizer: Tokenizer
) -> None:
    """`AutoModelForCausalLM.from_pretrained(...).generate(**inputs, max_length=50)`, greedy: fp16 there and here."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float16)
    their_tokenizer = AutoTokenizer.from_pretrained(DEMO)
    inputs = their_tokenizer(PAGE_PROMPT, return_tensors="pt")
    (output,) = model.generate(**inputs, max_length=PAGE_LENGTH, do_sample=False)
    theirs = their_tokenizer.decode(output, skip_special_tokens=True)
    max_tokens = PAGE_LENGTH - inputs["input_ids"].shape[1]
    ours = await connect(half_server).complete(prompt=PAGE_PROMPT, max_tokens=max_tokens, temperature=0)
    assert theirs.startswith(PAGE_PROMPT)
    same_text(theirs.removeprefix(PAGE_PROMPT), ours["choices"][0]["text"], tokenizer)


async def test_greedy_text_in_fp32(demo: Client, tokenizer: Tokenizer) -> None:
    """A list of prompts, of 1 to 150 tokens, in one request: each continues as transformers' generate continues it."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    answer = await demo.complete(prompt=_PROMPTS, max_tokens=30, temperature=0)
    reference = Reference(DEMO, tokenizer)
    num_checked = 0
    for prompt, choice in zip(tokenizer.encode(_PROMPTS), answer["choices"], strict=True):
        inputs = torch.tensor([prompt])
        (output,) = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=30, do_sample=False, pad_token_id=50256
        )
        theirs = tokenizer.decode(output[len(prompt) :].tolist())
        if theirs != choice["text"]:
            assert reference.check([theirs, choice["text"]], prompt, 0, temperature=0, max_tokens=30).tied
        else:
            num_checked += 1
    assert num_checked >= len(_PROMPTS) - 1


async def test_generate_prints_what_the_service_answers(demo: Client) -> None:
    """`megatron-gpt2 generate TEXT`, without a server, greedy in fp32: the prompt and the same continuation."""
    answer = await demo.complete(prompt=PAGE_PROMPT, max_tokens=20, temperature=0)
    command = [COMMAND, "generate", PAGE_PROMPT, "--max-tokens", "20", "--temperature", "0", "--cpu-threads", "1"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    assert PAGE_PROMPT + answer["choices"][0]["text"] + "\n" == printed.decode()
