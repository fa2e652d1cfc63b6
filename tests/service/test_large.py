"""The 345M shape with random weights, in fp32: served over HTTP, and beside transformers."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from service.api.text import Tokenizer
from service.checkpoint.hub import read_config, read_state
from service.engine.request import Request, SamplingParams
from service.model.gpt2 import GPT2, logits_of
from tests.model.test_runner import generate
from tests.service.conftest import DEMO
from tests.service.reference import SCORE_MARGIN
from tests.service.server import Client, Server

_PROMPT_LENGTHS = (1, 7, 40)
_NUM_TOKENS = 12
_PATHS_WHILE_LOADING = ("/livez", "/metrics", "/version", "/docs", "/openapi.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough for tokens to vary, and for the best scores to lie apart."""
    folder = tmp_path_factory.mktemp("345m")
    config = GPT2Config(n_layer=24, n_embd=1024, n_head=16, n_positions=1024, vocab_size=50257, dtype="float32")
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("weight") and "ln_" in name else 0.0
            parameter.uniform_(centre - 0.1, centre + 0.1, generator=generator)
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / name, folder)
    return folder


@dataclass(frozen=True, slots=True)
class Served:
    """A ready server, and what it answered as soon as its port was open."""

    server: Server
    early: dict[str, httpx.Response]  # by path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    server = Server(str(folder))
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            early = {"/v1/completions": http.post("/v1/completions", json={"prompt": "Hello"})}
            early |= {path: http.get(path) for path in ("/readyz", "/v1/models", *_PATHS_WHILE_LOADING)}
        server.wait_ready()
        yield Served(server, early)
        server.process.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_port_answers_while_the_model_loads(served: Served) -> None:
    """What needs the model is 503 with Retry-After, in the envelope; health and documentation answer."""
    for path in ("/v1/completions", "/v1/models"):
        response = served.early[path]
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert ("service_unavailable", "service_unavailable", None) == (error["type"], error["code"], error["param"])
    assert served.early["/readyz"].status_code == 503
    assert served.early["/readyz"].json()["phase"] in ("start", "download", "load", "warmup")
    assert {200} == {served.early[path].status_code for path in _PATHS_WHILE_LOADING}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50256, (length,), generator=generator).tolist() for length in _PROMPT_LENGTHS]


@dataclass(frozen=True, slots=True)
class Expected:
    """transformers' greedy tokens for each of the prompts, and the logits of each token."""

    tokens: list[list[int]]
    logits: torch.Tensor  # [prompts * tokens, vocabulary]


@pytest.fixture(scope="module")
def expected(theirs: GPT2LMHeadModel) -> Expected:
    """No two best scores are near each other, and tokens vary."""
    tokens, logits = [], []
    for prompt in prompts():
        inputs = torch.tensor([prompt])
        output = theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=_NUM_TOKENS,
            do_sample=False,
            pad_token_id=50256,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits.append(torch.cat(output.logits))
        best = logits[-1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > SCORE_MARGIN
        tokens.append(output.sequences[0, len(prompt) :].tolist())
    assert len({token for each in tokens for token in each}) > _NUM_TOKENS
    return Expected(tokens, torch.cat(logits))


async def test_greedy_text_over_http(
    served: Served, connect: Callable[[Server], Client], tokenizer: Tokenizer, expected: Expected
) -> None:
    """Three prompts of different lengths in one request give the text of transformers' tokens."""
    body = {"prompt": prompts(), "max_tokens": _NUM_TOKENS, "temperature": 0}
    answer = await connect(served.server).complete(**body)
    assert [tokenizer.decode(tokens) for tokens in expected.tokens] == [choice["text"] for choice in answer["choices"]]
    assert sum(map(len, expected.tokens)) == answer["usage"]["completion_tokens"]


def test_greedy_ids_and_logits(
    folder: Path, theirs: GPT2LMHeadModel, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits within 1e-4, of a prompt's 64 positions and of each token sampled in a batch over the paged cache."""
    config = read_config(folder)
    ours = GPT2(config, read_state(folder, config, dtype=torch.float32))
    token_ids = torch.randint(0, 50257, (64,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits = theirs(token_ids[None]).logits[0]
    torch.testing.assert_close(logits_of(ours, token_ids.tolist()), logits, atol=1e-4, rtol=0)

    compute = ours.logits
    rows: list[torch.Tensor] = []

    def compute_and_keep(hidden: torch.Tensor) -> torch.Tensor:
        rows.extend(compute(hidden))
        return torch.stack(rows[-len(hidden) :])

    monkeypatch.setattr(ours, "logits", compute_and_keep)
    params = SamplingParams(_NUM_TOKENS, temperature=0.0)
    requests = [Request(number, tuple(prompt)) for number, prompt in enumerate(prompts())]
    assert dict(enumerate(expected.tokens)) == generate(ours, requests, params, num_blocks=128)
    differences = torch.stack([(expected.logits - row).abs().amax(-1) for row in rows])
    nearest = differences.min(-1)
    assert nearest.values.max() < 1e-4
    assert list(range(len(expected.logits))) == sorted(nearest.indices.tolist())
