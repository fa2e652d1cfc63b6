"""Services that the client packages talk to, and transformers as the oracle of their numbers. Run by `make clients`.

Nothing here may reach another machine: the packages are told so, and a connection that tries all the same fails.
"""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

# Read by the packages when they are imported, here and in the commands that the tests start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(Path(sys.prefix) / "huggingface"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the service has the other core
    "OPENAI_API_KEY": "none",
}

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from tests.service.server import Server, until_drained

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "service" / "demo" / "model"
MODEL = "megatron-gpt2-demo"
CONTEXT = 1024


@pytest.fixture(scope="session", autouse=True)
def no_other_machine() -> Iterator[None]:
    """A connection to anything but this machine is refused, with the address in the message."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"a client package wants to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model in fp32."""
    yield from until_drained(Server("--kv-memory", "256MiB"))


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of another shape, with random weights large enough that its tokens are not all equally likely."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=48, n_head=3, n_positions=CONTEXT, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture(scope="session")
def random_server(random_folder: Path) -> Iterator[Server]:
    yield from until_drained(Server(str(random_folder), "--kv-memory", "256MiB"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 of a short context: whatever is asked of it costs little."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=32)).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture(scope="session")
def small_server(small_folder: Path) -> Iterator[Server]:
    yield from until_drained(Server(str(small_folder), "--kv-memory", "64MiB"))


def post(server: Server, **body: Any) -> httpx.Response:
    """What any client gets for this body, without a client package."""
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=100)


def plain(server: Server, **body: Any) -> dict[str, Any]:
    """A plain answer, which must be a 200."""
    response = post(server, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text(server: Server, **body: Any) -> str:
    """The text of a plain answer of one choice."""
    (choice,) = plain(server, **body)["choices"]
    found: str = choice["text"]
    return found


@dataclass(frozen=True, slots=True)
class Oracle:
    """transformers' model and tokenizer of a folder, in fp32."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-probability of `continuation` after `context`, and whether greedy decoding would give it."""
        logits = self.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = torch.tensor(continuation)
        logprobs = logits.log_softmax(-1).gather(1, expected[:, None])
        return float(logprobs.double().sum()), bool((logits.argmax(-1) == expected).all())

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> str:
        """The text of `num_tokens` greedy tokens, fewer where the end of text comes before."""
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        found: str = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        return found


def load_oracle(folder: Path) -> Oracle:
    torch.set_num_threads(1)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return Oracle(model, AutoTokenizer.from_pretrained(folder))
