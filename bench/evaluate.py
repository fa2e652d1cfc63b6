"""`megatron-gpt2 eval` by the paper's protocols, on synthetic files of the real length: seconds, and tokens a second.

python -m bench.evaluate [--model FOLDER] [--share 0.01] [--repeats 2] [--out FILE.json] [flags of eval]

The files have as many tokens and words as WikiText-103's test set, and as many lines as LAMBADA's, with about as many
tokens in each: words of the vocabulary at random, of one token and where there must be more tokens than words of two.
A run is the command in a process of its own. The first of a kind of card also compiles its kernels.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.random_model import given_or_random
from service.api.text import Tokenizer, load_tokenizer
from service.checkpoint.hub import read_config
from service.evaluation.detokenizer import detokenize
from service.model.config import ModelConfig
from service.serve import DEMO_MODEL
from service.version import VERSION

NUM_WORDS, NUM_TOKENS = 245_566, 270_329  # of WikiText-103's test set, by the paper's protocol
NUM_LINES, LINE_WORDS = 5153, (50, 94)  # of LAMBADA's; a line's words, of which a ninth have two tokens
TARGET_SECONDS = {"wikitext103": 60, "lambada": 10}  # on one H100
_PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H200": 989}  # dense, 16 bits, by NVIDIA's data sheets


class Words:
    """English words of the vocabulary, which no rule of the detokenizer touches."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secrets
        pieces = [token.decode("ascii")[1:] for token in tokenizer.token_bytes if _is_word(token)]
        joined = [first + second for first, second in zip(pieces, reversed(pieces), strict=True)]
        self._of: dict[int, list[str]] = {1: [], 2: []}
        for word, ids, first_ids in zip(
            pieces + joined,
            tokenizer.encode([f" {word}" for word in pieces + joined]),
            tokenizer.encode(pieces + joined),
            strict=True,
        ):
            if len(ids) == len(first_ids) and len(ids) in self._of:  # as many where no space comes before it
                self._of[len(ids)].append(word)

    def text(self, num_words: int, num_tokens: int) -> str:
        """Words between single spaces; num_words <= num_tokens <= 2 * num_words."""
        sizes = [2] * (num_tokens - num_words) + [1] * (2 * num_words - num_tokens)
        self._random.shuffle(sizes)
        return " ".join(self._random.choice(self._of[size]) for size in sizes)


def _is_word(token: bytes) -> bool:
    return len(token) > 2 and token.startswith(b" ") and token[1:].isalpha() and token[1:].islower()


def wiki_text(words: Words, share: float) -> str:
    """WikiText-103's test set, as far as its length goes, or a share of it."""
    text = words.text(round(share * NUM_WORDS), round(share * NUM_TOKENS))
    assert detokenize(text) == text
    return text


def lambada_lines(words: Words, share: float) -> Iterator[str]:
    """LAMBADA's, as far as their number and length go."""
    lengths = random.Random(1)  # noqa: S311 - no secrets
    for _ in range(round(share * NUM_LINES)):
        num_words = lengths.randint(*LINE_WORDS)
        yield json.dumps({"text": words.text(num_words, num_words * 10 // 9)})


def measure(model: Path, task: str, data: Path, flags: list[str]) -> dict[str, Any]:
    """One run of the command, from its start to its end, and what it says itself."""
    out = data.with_name("report.json")
    command = [sys.executable, "-m", "service.cli", "eval", task, "--data", str(data), "--model", str(model)]
    began = time.perf_counter()
    subprocess.run([*command, "--out", str(out), *flags], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ours
    seconds = time.perf_counter() - began
    report = json.loads(out.read_text())
    data_found = {name: value for name, value in report["data"].items() if isinstance(value, int)}
    return {
        "task": task,
        **data_found,
        "command_seconds": round(seconds, 2),
        "scoring_seconds": report["seconds"],
        "tokens_per_second": report["tokens_per_second"],
        "model": {name: value for name, value in report["model"].items() if name in ("dtype", "device")},
        "verdict": report["verdict"],
    }


def tflops_of(config: ModelConfig, run: Mapping[str, Any], *, context: float) -> float:
    """10^12 operations a second of the layers' products and of attention, at a mean context; the head's left out."""
    hidden = config.hidden_size
    products = 2 * config.num_layers * (4 * hidden + 2 * config.intermediate_size) * hidden
    attention = 4 * config.num_layers * hidden * context
    return float((products + attention) * run["tokens_per_second"] / 1e12)


def card() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--share", type=float, default=1.0, help="of the real lengths")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments, flags = parser.parse_known_args()
    about = {
        "device": card(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": VERSION,
        "date": time.strftime("%Y-%m-%d"),
        "weights": "random 345M" if arguments.model is None else arguments.model.name,
        "share": arguments.share,
        "flags": flags,
    }
    print(about)
    runs = []
    with given_or_random(arguments.model) as model, tempfile.TemporaryDirectory() as scratch:
        words = Words(load_tokenizer(DEMO_MODEL, end_of_text_id=50256))
        config = read_config(model)
        files = {"wikitext103": Path(scratch) / "wiki.test.tokens", "lambada": Path(scratch) / "lambada_test.jsonl"}
        files["wikitext103"].write_text(wiki_text(words, arguments.share))
        files["lambada"].write_text("\n".join(lambada_lines(words, arguments.share)) + "\n")
        for _ in range(arguments.repeats):
            for task, file in files.items():
                run = measure(model, task, file, flags)
                mean_context = config.context_length / 2 if task == "wikitext103" else sum(LINE_WORDS) / 4
                run["tflops"] = round(tflops_of(config, run, context=mean_context), 3)
                peak = next((peak for name, peak in _PEAK_TFLOPS.items() if name in about["device"]), None)
                run["share_of_peak"] = None if peak is None else round(run["tflops"] / peak, 3)
                if arguments.share == 1:
                    run["target_seconds"] = TARGET_SECONDS[task]
                runs.append(run)
                print(run)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
