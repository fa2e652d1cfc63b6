"""The embedded model's folder: its files, its tokenizer, and that its weights still write English."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.demo.train import Settings

MODEL = Path(__file__).parents[2] / "service" / "demo" / "model"
HELD_OUT = Path(__file__).parents[1] / "data" / "held_out.txt"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """transformers' tokenizer of the folder."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    """The model as transformers loads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The 40 most likely next ids."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    ],
)
def test_tokenizer_files_are_those_of_gpt2(name: str, digest: str) -> None:
    """Byte for byte OpenAI's files."""
    assert digest == hashlib.sha256((MODEL / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" Hello world", [18435, 995]),
        ("\n", [198]),
        ("\n\n", [628]),
        (":", [25]),
        ("<|endoftext|>", [50256]),
        ("don't we'll I'm", [9099, 470, 356, 1183, 314, 1101]),
        ("12345 67", [10163, 2231, 8275]),
        ("  two  spaces\tTab", [220, 734, 220, 9029, 197, 33349]),
        (
            "Plants create energy through a process known as photosynthesis.",
            [3646, 1187, 2251, 2568, 832, 257, 1429, 1900, 355, 5205, 44411, 13],
        ),
        (
            "naïve café 😀 日本語",
            [2616, 38776, 40304, 30325, 222, 10545, 245, 98, 17312, 105, 45739, 252],
        ),
    ],
)
def test_tokenizer_encodes_as_gpt2(tokenizer: Any, text: str, ids: list[int]) -> None:
    """GPT-2's known encodings, and back."""
    assert ids == tokenizer(text)["input_ids"]
    assert text == tokenizer.decode(ids)


def test_folder_is_small() -> None:
    """The wheel carries it: 20 MB in all."""
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 20_000_000


def test_folder_explains_itself() -> None:
    """Card, notice and curve ship with the weights."""
    assert {"README.md", "NOTICE", "curve.png", "training.json"} <= {path.name for path in MODEL.iterdir()}


def test_config_has_the_limits_of_the_345m() -> None:
    """GPT-2's vocabulary, positions and end-of-text."""
    config = json.loads((MODEL / "config.json").read_text())
    expected = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": 50257,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "dtype": "float16",
    }
    assert expected == {name: config[name] for name in expected}


def test_weights_are_fp16_with_one_tied_table(model: Any) -> None:
    """The file holds each tensor once, all finite; the head is the token table."""
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert {torch.float16} == {tensor.dtype for tensor in tensors.values()}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not any("lm_head" in name for name in tensors)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_weights_are_of_the_committed_recipe() -> None:
    """What training recorded are the settings that training has."""
    recorded = json.loads((MODEL / "training.json").read_text())["settings"]
    assert {name: getattr(Settings(), name) for name in recorded} == recorded


def test_card_states_the_measured_perplexities() -> None:
    """The card's numbers are those that training measured."""
    card = (MODEL / "README.md").read_text()
    for perplexity in json.loads((MODEL / "training.json").read_text())["held_out_perplexity"].values():
        assert f"| {perplexity} |" in card


@torch.no_grad()
def test_perplexity_on_unseen_text(model: Any, tokenizer: Any) -> None:
    """Measured on works kept from training: 73.12; zeros in one matrix gave 74.1 or more, random weights 50,000."""
    total, count = 0.0, 0
    for document in HELD_OUT.read_text().split("\n<|endoftext|>\n"):
        ids = tokenizer("<|endoftext|>" + document, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert math.exp(total / count) < 73.8


def test_late_positions_are_trained(model: Any, tokenizer: Any) -> None:
    """A long context does not hurt: the last 256 of 1,024 positions predict as well as the ones before."""
    text = HELD_OUT.read_text().replace("\n<|endoftext|>\n", "\n\n")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :1025]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[-256:].mean() < losses[:256].mean() + 0.5


@pytest.mark.parametrize(
    "prompt",
    ["Plants create energy through a process known as photosynthesis.", "The people of the United States", "Mr. Darcy"],
)
def test_greedy_text_is_no_trivial_loop(model: Any, tokenizer: Any, prompt: str) -> None:
    """Even without sampling it goes on in several words, and repeats neither one nor two of them at once."""
    ids = greedy(model, tokenizer, prompt)
    assert len(set(ids)) >= 9
    assert ids[2:] != ids[:-2]
    assert not any(a == b for a, b in itertools.pairwise(ids) if tokenizer.decode([a]) != "\n")
