"""The bare runner: milliseconds a decode step beside the limit of this card, plain torch and transformers' generate.

python -m bench.decode [--model FOLDER] [--device cpu|cuda] [--dtype float32] [--kv-cache-dtype fp8]
    [--steps 1@256,8@512] [--out FOLDER/NAME]

A step is batch@context. The limit is the time to read all weights and all keys and values once, at the bandwidth of a
large copy in the same run; plain torch is the model in torch's operators, on a GPU in one CUDA graph.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.random_model import SHAPE_345M, random_gpt2
from service.checkpoint.hub import read_config, read_state
from service.load.report import Panel, chart
from service.model.batch import SAMPLING, Batch, Runner
from service.model.formats import Format, Narrowed, format_for
from service.model.gpt2 import GPT2
from service.model.memory import block_bytes, make_runner

BLOCK_SIZE = 16
_ROUNDS = 7
Steps = Sequence[tuple[int, int]]  # batch, context


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    context: int
    step_ms: float
    step_ms_range: tuple[float, float]
    tokens_per_second: float
    limit_ms: float | None
    plain_ms: float | None
    transformers_tokens_per_second: float


def decode_batch(num_sequences: int, context: int, step: int) -> Batch:
    """One decode step of `num_sequences` sequences whose blocks lie apart; the token sampled before it goes in."""
    width = -(-context // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(num_sequences * width).astype(np.int32)
    tables = tables.reshape(num_sequences, width)
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
    runner: Runner,
    num_sequences: int,
    context: int,
    num_steps: int,
    *,
    ask: Callable[[Batch], Batch] = lambda batch: batch,
) -> float:
    """Median over steps of single tokens. `ask` may ask for more in each batch."""
    first, following = (ask(decode_batch(num_sequences, context, step)) for step in (0, 1))
    return median_seconds(runner, first, following, num_steps)


def median_seconds(runner: Runner, first: Batch, following: Batch, num_steps: int) -> float:
    """Median over steps launched as the engine does: one ahead on a GPU."""
    times = []
    for step in range(num_steps + 3):
        runner.launch(following if step else first)
        if step >= runner.depth:
            runner.collect()
        times.append(time.perf_counter())
    for _ in range(runner.depth):
        runner.collect()
    return statistics.median(np.diff(times[3:]).tolist())


def runner_for(model: GPT2, steps: Steps) -> Runner:
    """A runner with room for the largest of the steps."""
    num_blocks = max(num * -(-context // BLOCK_SIZE) for num, context in steps) + 1  # that fills steps up
    most = max(num for num, _ in steps)
    return make_runner(
        model,
        block_size=BLOCK_SIZE,
        max_num_seqs=most,
        max_num_batched_tokens=max(most, 16),
        kv_memory=max(num_blocks, -(-model.config.context_length // BLOCK_SIZE) + 1) * block_bytes(model, BLOCK_SIZE),
        utilization=1.0,
    )


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


def copy_bandwidth() -> float:
    """Bytes a second that this GPU's memory gives a large copy, those read and those written."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.nbytes / statistics.median(times[2:])


def limit_seconds(model: GPT2, num_sequences: int, context: int, *, bandwidth: float) -> float:
    """Reading every weight but the embeddings' unused rows, and every sequence's keys and values, once."""
    config = model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = config.num_layers * (4 * hidden + 2 * inner) * hidden + config.vocab_size * hidden
    cached = num_sequences * context * 2 * config.num_layers * hidden
    weight_bytes = 1 if isinstance(model.format, Narrowed) else model.dtype.itemsize
    return (weights * weight_bytes + cached * model.cache_dtype.itemsize) / bandwidth


def parse_steps(text: str) -> Steps:
    """Of the form 1@256,8@512."""
    return [(int(num), int(context)) for num, context in (step.split("@") for step in text.split(","))]


def parser_of(description: str | None, *, steps: str) -> argparse.ArgumentParser:
    """The flags of every benchmark of the bare runner."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by default bfloat16 on a GPU and float32 on a CPU")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--steps", type=parse_steps, default=steps, metavar="BATCH@CONTEXT,...")
    parser.add_argument("--repeats", type=int, default=100 if torch.cuda.is_available() else 16)
    parser.add_argument("--out", type=Path, help="write .json and, where there is one, .svg beside this name")
    return parser


def parse(description: str | None, *, steps: str) -> tuple[argparse.Namespace, Format]:
    """The command line of a benchmark of the bare runner, and the format of weights that it asks for."""
    arguments = parser_of(description, steps=steps).parse_args()
    return arguments, format_of(arguments)


def format_of(arguments: argparse.Namespace) -> Format:
    name = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    return format_for(name, torch.device(arguments.device), kv_cache=arguments.kv_cache_dtype)


def load(arguments: argparse.Namespace, weights: Format) -> GPT2:
    """The model that the command line names."""
    if arguments.model is None:
        return random_gpt2(weights=weights, device=arguments.device)
    config = read_config(arguments.model)
    state = read_state(arguments.model, config, dtype=weights.made_of, device=arguments.device)
    return GPT2(config, state, weights)


def machine(arguments: argparse.Namespace, weights: Format) -> dict[str, Any]:
    """On what the numbers were made."""
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": weights.name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def peer(arguments: argparse.Namespace, dtype: torch.dtype) -> transformers.GPT2LMHeadModel:
    if arguments.model is not None:
        model = transformers.GPT2LMHeadModel.from_pretrained(arguments.model, dtype=dtype)
    else:
        with torch.device(arguments.device):
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE_345M)).to(dtype)
    return model.to(arguments.device).eval()


def plain_ms(model: GPT2, num_sequences: int, context: int) -> float:
    """The model's plain operators in one CUDA graph, greedy, without sampling."""
    from bench.step import Step, captured, replay_ms  # needs Triton

    step = Step(model, num=num_sequences, context=context, prompt=False)
    return replay_ms(captured(lambda: step.plain().argmax(-1)), 0.2)


@torch.inference_mode()
def measure(arguments: argparse.Namespace, weights: Format) -> tuple[dict[str, Any], list[Row]]:
    model = load(arguments, weights)
    on_gpu = arguments.device.startswith("cuda")
    about = machine(arguments, weights) | {"transformers": transformers.__version__}
    if on_gpu:
        about["copy_bandwidth_tb_per_second"] = round(copy_bandwidth() / 1e12, 3)
    runner = runner_for(model, arguments.steps)
    # In turns: a GPU's clocks move by several per cent from one second to the next.
    rounds = [
        {
            (num, context): 1000 * step_seconds(runner, num, context, arguments.repeats)
            for num, context in arguments.steps
        }
        for _ in range(_ROUNDS if on_gpu else 1)
    ]
    runner.close()
    plain = {step: plain_ms(model, *step) if on_gpu else None for step in arguments.steps}
    theirs = peer(arguments, weights.dtype)
    rows = []
    for num, context in arguments.steps:
        times = [found[num, context] for found in rounds]
        milliseconds = statistics.median(times)
        limit = None
        if on_gpu:
            bandwidth = about["copy_bandwidth_tb_per_second"] * 1e12
            limit = 1000 * limit_seconds(model, num, context, bandwidth=bandwidth)
        rows.append(
            Row(
                batch=num,
                context=context,
                step_ms=milliseconds,
                step_ms_range=(min(times), max(times)),
                tokens_per_second=1000 * num / milliseconds,
                limit_ms=limit,
                plain_ms=plain[num, context],
                transformers_tokens_per_second=transformers_tokens_per_second(theirs, num, context, 16),
            )
        )
    return about, rows


def main() -> None:
    on_gpu = torch.cuda.is_available()
    arguments, weights = parse(__doc__, steps="1@256,8@512,32@512,64@192,128@192,256@192" if on_gpu else "1@256,8@256")
    about, rows = measure(arguments, weights)
    print(about)
    print(
        "batch context  step ms (range)            tokens/s  of the limit  plain torch ms  transformers tokens/s  ratio"
    )
    for row in rows:
        share = "-" if row.limit_ms is None else f"{row.limit_ms / row.step_ms:.0%}"
        plain = "-" if row.plain_ms is None else f"{row.plain_ms:.3f}"
        theirs = row.transformers_tokens_per_second
        span = " to ".join(f"{ms:.3f}" for ms in row.step_ms_range)
        print(
            f"{row.batch:5} {row.context:7} {row.step_ms:8.3f} {f'({span})':<18} {row.tokens_per_second:8.0f} "
            f"{share:>13} {plain:>15} {theirs:22.1f} {row.tokens_per_second / theirs:6.1f}"
        )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        arguments.out.with_suffix(".json").write_text(text)
        series: Panel = (
            "ms a decode step",
            {
                "ours": [row.step_ms for row in rows],
                "limit": [row.limit_ms for row in rows],
                "plain torch": [row.plain_ms for row in rows],
            },
        )
        title = f"{about['device']} · {about['dtype']} · torch {about['torch']} · {about['date']}"
        names = [f"{row.batch}@{row.context}" for row in rows]
        picture = chart(title, unit="batch@context", names=names, panels=[series])
        arguments.out.with_suffix(".svg").write_text(picture)


if __name__ == "__main__":
    main()
