"""The bare runner: milliseconds a decode step and tokens/s by batch, beside transformers' generate in the same run.

python -m bench.decode [--model FOLDER] [--device cpu|cuda] [--dtype float32] [--batches 1,8] [--context 256] [--out F]
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from bench.random_model import write_random_model
from service.checkpoint.hub import read_config, read_state
from service.model.batch import SAMPLING, Batch
from service.model.gpt2 import GPT2
from service.model.runner import TorchRunner

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    context: int
    step_ms: float
    tokens_per_second: float
    transformers_tokens_per_second: float
    ratio: float


def decode_batch(num_sequences: int, context: int, step: int) -> Batch:
    """One decode step of `num_sequences` sequences whose blocks lie apart; the token sampled before it goes in."""
    width = -(-context // BLOCK_SIZE)
    tables = np.arange(num_sequences * width, dtype=np.int32).reshape(num_sequences, width)
    position = context - 1
    sampling = np.zeros(num_sequences, dtype=SAMPLING)
    sampling["top_p"] = 1
    rows = np.arange(num_sequences, dtype=np.int32)
    return Batch(
        token_ids=rows % 50000,
        token_sources=rows if step else np.full(num_sequences, -1, np.int32),
        positions=np.full(num_sequences, position, np.int32),
        slots=tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE,
        query_starts=np.arange(num_sequences + 1, dtype=np.int32),
        context_lengths=np.full(num_sequences, context, np.int32),
        block_tables=tables,
        num_decodes=num_sequences,
        sample_indices=rows,
        sample_positions=np.full(num_sequences, context, np.int32),
        sampling=sampling,
    )


def step_seconds(
    model: GPT2,
    num_sequences: int,
    context: int,
    num_steps: int,
    *,
    ask: Callable[[Batch], Batch] = lambda batch: batch,
) -> float:
    """Median over steps launched as the engine does: one ahead on a GPU. `ask` may ask for more in each batch."""
    runner = TorchRunner(model, num_blocks=num_sequences * -(-context // BLOCK_SIZE), block_size=BLOCK_SIZE)
    times = []
    for step in range(num_steps + 3):
        runner.launch(ask(decode_batch(num_sequences, context, step)))
        if step >= runner.depth:
            runner.collect()
        times.append(time.perf_counter())
    runner.close()
    return statistics.median(np.diff(times[3:]).tolist())


def transformers_tokens_per_second(
    model: transformers.GPT2LMHeadModel, num_sequences: int, context: int, num_tokens: int
) -> float:
    """Greedy generate with its cache; prefill left out by a difference of two runs."""
    prompt = torch.randint(0, 50000, (num_sequences, context - num_tokens), device=model.device)

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=50256,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    return num_sequences * (num_tokens - 1) / (seconds(num_tokens) - seconds(1))


def parse(description: str | None, *, batches: str) -> tuple[argparse.Namespace, torch.dtype]:
    """The command line of a benchmark of the bare runner, and the dtype that it asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by default bfloat16 on a GPU and float32 on a CPU")
    parser.add_argument("--batches", default=batches)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    return arguments, getattr(torch, name)


def machine(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, object]:
    """On what the numbers were made."""
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    arguments, dtype = parse(__doc__, batches="1,4,8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or write_random_model(Path(scratch))
        config = read_config(folder)
        ours = GPT2(config, read_state(folder, config, dtype=dtype, device=arguments.device))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(arguments.device).eval()
    rows = []
    for size in map(int, arguments.batches.split(",")):
        seconds = step_seconds(ours, size, arguments.context, arguments.steps)
        peer = transformers_tokens_per_second(theirs, size, arguments.context, arguments.steps)
        rows.append(Row(size, arguments.context, 1000 * seconds, size / seconds, peer, size / seconds / peer))
    about = machine(arguments, dtype) | {"transformers": transformers.__version__}
    print(about)
    print("batch context  step ms  tokens/s  transformers tokens/s  ratio")
    for row in rows:
        print(
            f"{row.batch:5} {row.context:7} {row.step_ms:8.3f} {row.tokens_per_second:9.1f} "
            f"{row.transformers_tokens_per_second:22.1f} {row.ratio:6.2f}"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
