"""Milliseconds of a step's graph by format of weights, and of keys and values: in turns, on one GPU.

python -m bench.formats [--formats bfloat16,int8,int8+fp8] [--steps 1@256,8@512] [--rounds 5] [--out FOLDER/NAME]

A format is WEIGHTS, or WEIGHTS+fp8 with keys and values in fp8. The limit is as in bench/decode.py; the first format is
what the others are compared with. Random weights of the 345M's shape; an error is of the kernels, against plain
operators on the same numbers.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver

from bench.decode import copy_bandwidth, limit_seconds, parse_steps
from bench.random_model import random_gpt2
from bench.step import Step
from service.model.formats import Narrowed, format_for
from service.model.gpt2 import GPT2
from service.model.kernels.plan import Plan, Product
from service.model.kernels.plans import head_for, plan_for

FORMATS = "bfloat16,int8,fp8,bfloat16+fp8,int8+fp8,fp8+fp8"
STEPS = "1@256,1@1000,8@512,32@512,64@192,128@192,256@192,256@512"


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    context: int
    dtype: str
    ms: float  # median over the rounds
    least_ms: float
    most_ms: float
    ratio: float  # of the first format's to this, median over the rounds
    limit_ms: float
    error: float


def model_of(text: str, num_layers: int = 24) -> GPT2:
    name, _, kv_cache = text.partition("+")
    weights = format_for(name, torch.device("cuda"), kv_cache=kv_cache or "auto")
    return random_gpt2(weights=weights, device="cuda", num_layers=num_layers)


def shapes(model: GPT2, num_tokens: int) -> tuple[Plan, Product]:
    """As they are served."""
    shared_memory = driver.active.utils.get_device_properties(0)["max_shared_mem"]
    kind: dict[str, Any] = {"dtype": model.dtype, "narrow": isinstance(model.format, Narrowed)}
    kind["shared_memory"] = shared_memory
    head_size = model.config.head_size
    plan = plan_for(num_tokens, decodes_only=True, split=False, head_size=head_size, **kind)
    return plan, head_for(num_tokens, **kind)


@torch.inference_mode()
def compiled(job: tuple[str, int, int]) -> None:
    """The kernels of one step, for another process to find."""
    text, batch, context = job
    model = model_of(text, num_layers=1)
    Step(model, num=batch, context=context, prompt=False).run(*shapes(model, batch))
    torch.cuda.synchronize()


@torch.inference_mode()
def measure(formats: list[str], steps: list[tuple[int, int]], rounds: int) -> list[Row]:
    bandwidth = copy_bandwidth()
    models = {text: model_of(text) for text in formats}
    rows = []
    for batch, context in steps:
        made = {text: Step(model, num=batch, context=context, prompt=False) for text, model in models.items()}
        plans = {text: shapes(model, batch) for text, model in models.items()}
        errors = {text: step.error(*plans[text])[0] for text, step in made.items()}
        times = [
            {text: step.milliseconds(*plans[text], seconds=0.1) for text, step in made.items()} for _ in range(rounds)
        ]
        for text in formats:
            found = [each[text] for each in times]
            row = Row(
                batch,
                context,
                models[text].format.name,
                statistics.median(found),
                min(found),
                max(found),
                statistics.median(each[formats[0]] / each[text] for each in times),
                1000 * limit_seconds(models[text], batch, context, bandwidth=bandwidth),
                errors[text],
            )
            rows.append(row)
            print(
                f"{batch:4}@{context:<5} {row.dtype:20} {row.ms:.4f} ms ({row.least_ms:.4f} to {row.most_ms:.4f}) "
                f"x {row.ratio:.3f}, {row.limit_ms / row.ms:4.0%} of the limit, error {row.error:.1e}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=FORMATS, type=lambda text: text.split(","))
    parser.add_argument("--steps", default=STEPS, type=parse_steps)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write .json beside this name")
    arguments = parser.parse_args()
    began = time.monotonic()
    jobs = [(text, batch, context) for text in arguments.formats for batch, context in arguments.steps]
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, jobs))
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(f"{about}, compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows = measure(arguments.formats, arguments.steps, arguments.rounds)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(
            json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
