"""What formats of weights, and of keys and values, cost in accuracy on a GPU, by plain operators on the same numbers.

python -m bench.accuracy [--formats bfloat16,int8] [--text FILE] [--out FOLDER/NAME]

Each format is measured with keys and values as its own and in fp8: the demo model's perplexity of a held-out text, and
how far the logits of a random 345M are from float32's. That the kernels compute what plain operators do is what
tests/model/test_gpu_narrow.py shows.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.random_model import random_gpt2
from service.checkpoint.hub import read_config, read_state
from service.checkpoint.tokenizer import read_tokenizer
from service.model.formats import Format, format_for
from service.model.gpt2 import GPT2, logits_of
from service.serve import DEMO_MODEL

HELD_OUT = Path(__file__).parent.parent / "tests" / "data" / "held_out.txt"
FORMATS = ("bfloat16", "float16", "int8", "fp8")
HEADING = (
    "dtype                perplexity, demo   random 345M: worst logit, relative error, greedy agreement (with float32)"
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of a format, against the first."""

    dtype: str
    perplexity: float  # of the demo model
    worst_logit: float  # largest difference, random 345M
    relative_error: float  # of all its logits
    greedy_agreement: float

    def __str__(self) -> str:
        return (
            f"{self.dtype:20} {self.perplexity:16.3f} {self.worst_logit:25.4f} {self.relative_error:15.2e} "
            f"{self.greedy_agreement:17.1%}"
        )


def accuracy(
    formats: Sequence[Format], demo: Callable[[Format], GPT2], large: Callable[[Format], GPT2], text: str
) -> list[Accuracy]:
    """Every format's, over a text by the demo model and a random prompt by a larger one."""
    token_ids = read_tokenizer(DEMO_MODEL).backend.encode(text).ids
    prompt = np.random.default_rng(1).integers(0, 50256, 256).tolist()
    reference: torch.Tensor | None = None
    found = []
    for weights in formats:
        perplexity = perplexity_of(demo(weights), token_ids)
        logits = logits_of(large(weights), prompt)
        reference = logits if reference is None else reference
        found.append(
            Accuracy(
                weights.name,
                perplexity,
                float((logits - reference).abs().max()),
                float((logits - reference).norm() / reference.norm()),
                float((logits.argmax(1) == reference.argmax(1)).float().mean()),
            )
        )
    return found


def perplexity_of(model: GPT2, token_ids: Sequence[int]) -> float:
    """Over stretches of one context each, of which every token but the first is predicted."""
    loss, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, model.config.context_length):
        ids = token_ids[start : start + model.config.context_length]
        logprobs = logits_of(model, ids)[:-1].log_softmax(1)
        loss -= float(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
        count += len(ids) - 1
    return float(np.exp(loss / count))


def demo_model(weights: Format) -> GPT2:
    """On the GPU; every format is made of the files' own numbers."""
    config = read_config(DEMO_MODEL)
    state = read_state(DEMO_MODEL, config, dtype=weights.made_of, device="cuda")
    return GPT2(config, state, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=",".join(FORMATS))
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="of which the demo model's perplexity is taken")
    parser.add_argument("--out", type=Path, help="write .json and .txt beside this name")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda")
    formats = [
        format_for(name, device, kv_cache=kv_cache)
        for name in ("float32", *arguments.formats)
        for kv_cache in ("auto", "fp8")
    ]
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    rows = accuracy(
        formats,
        demo_model,
        lambda weights: random_gpt2(weights=weights, device="cuda"),
        arguments.text.read_text(),
    )
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), "", HEADING, *map(str, rows)]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        found = about | {"accuracy": [asdict(row) for row in rows]}
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
