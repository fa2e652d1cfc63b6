"""What deterministic mode costs: a step of its runner beside the same step of the one that is served without it.

python -m bench.deterministic [--device cpu|cuda] [--model FOLDER] [--dtypes float32,int8] [--steps 8@96,+256]
    [--rounds 9] [--threads 1] [--out FOLDER]

Both compute the same batches over the same weights, in turns; medians over the rounds. On a CPU of the processor's
time, which other work on the machine does not take from, and of the clock's; on a GPU of the clock's, of steps that are
launched one ahead as the engine does.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cpu import DTYPES, processor
from bench.decode import BLOCK_SIZE, load, median_seconds
from bench.mixed import mixed_batch
from service.model.batch import Batch, Runner
from service.model.deterministic import DeterministicRunner
from service.model.formats import format_for
from service.model.gpt2 import GPT2
from service.model.memory import block_bytes, make_runner, what_kernels_lack

# Dtypes, steps and rounds.
ON_CPU = ",".join(DTYPES), "1@96,8@96,16@96,+256", 9
ON_GPU = "bfloat16", "1@192,8@192,64@192,256@192,+128,+1024,63@192+128", 3
_STEP = re.compile(r"(?:([1-9]\d*)@([1-9]\d*))?(?:\+([1-9]\d*))?")
# Of which a round takes the median on a GPU: few where each takes long.
_CAPTURED_STEPS, _DETERMINISTIC_STEPS = 30, 3


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of a single token each, all at the same context, beside a prompt; 0 is none."""

    rows: int
    context: int
    prompt: int

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} at {self.context}"
        if not self.prompt:
            return f"decode, {rows}"
        return f"{rows}, prompt of {self.prompt}" if self.rows else f"prompt of {self.prompt} tokens"

    def batch(self) -> Batch:
        """Of tokens that the host has."""
        batch = mixed_batch(self.rows, self.context, int(self.prompt > 0), length=self.prompt)
        return replace(batch, token_sources=np.full_like(batch.token_sources, -1))


def parse_steps(text: str) -> list[Step]:
    """Of the form 8@96,+256,63@192+128. Raises ValueError."""
    matches = [_STEP.fullmatch(part) for part in text.split(",")]
    found = [match.groups("0") for match in matches if match is not None and match[0]]
    if len(found) < len(matches):
        raise ValueError(text)
    return [Step(*map(int, numbers)) for numbers in found]


@dataclass(frozen=True, slots=True)
class Row:
    dtype: str
    step: str
    normal_ms: float  # of the processor's time; of a GPU's steps by the clock
    deterministic_ms: float
    ratio: float
    normal_wall_ms: float
    deterministic_wall_ms: float

    def line(self, width: int, *, by_clock: bool) -> str:
        """Of the table, with the step's name in so many columns."""
        places = 3 if by_clock else 1
        name = f"{self.dtype:10}{self.step:{width}}"
        first = f"{self.normal_ms:7.{places}f}{self.deterministic_ms:15.{places}f}{self.ratio:7.2f}"
        return name + first + f"{self.normal_wall_ms:23.1f}{self.deterministic_wall_ms:15.1f}" * (not by_clock)


def seconds(runner: Runner, batch: Batch) -> tuple[float, float]:
    """One step's: of the processor, and by the clock; both by the clock where steps are launched one ahead."""
    if runner.depth:
        num_steps = _DETERMINISTIC_STEPS if isinstance(runner, DeterministicRunner) else _CAPTURED_STEPS
        median = median_seconds(runner, batch, batch, num_steps)
        return median, median
    began, spent = time.perf_counter(), time.process_time()
    runner.launch(batch)
    runner.collect()
    return time.process_time() - spent, time.perf_counter() - began


def runners_for(model: GPT2, batches: Sequence[Batch]) -> tuple[Runner, Runner]:
    """The one that is served, and the deterministic one, each with room for the largest of the batches."""
    blocks = max(-(-model.config.context_length // BLOCK_SIZE), *(batch.block_tables.max() + 1 for batch in batches))
    limits: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": max(len(batch.sampling) for batch in batches),
        "max_num_batched_tokens": max(16, *(len(batch.token_ids) for batch in batches)),
        "kv_memory": (int(blocks) + 1) * block_bytes(model, BLOCK_SIZE),  # one that fills steps up
        "utilization": 1.0,
    }
    return make_runner(model, **limits), make_runner(model, **limits, deterministic=True)


def measure(model: GPT2, steps: Sequence[Step], rounds: int) -> list[Row]:
    """Raises ValueError for a step that is longer than the model's context."""
    for step in steps:
        if max(step.context, step.prompt) > model.config.context_length:
            raise ValueError(f"--steps: {step}: the model has a context of {model.config.context_length}")
    batches = [step.batch() for step in steps]
    runners = runners_for(model, batches)
    rows = []
    for step, batch in zip(steps, batches, strict=True):
        found = [[seconds(runner, batch) for runner in runners] for _ in range(rounds + 1)][1:]
        normal, deterministic = (
            [1e3 * statistics.median(pair[number][kind] for pair in found) for kind in (0, 1)] for number in (0, 1)
        )
        ratio = statistics.median(other[0] / one[0] for one, other in found)
        rows.append(Row(model.format.name, str(step), normal[0], deterministic[0], ratio, normal[1], deterministic[1]))
    for runner in runners:
        runner.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--dtypes", help=f"by default {ON_CPU[0]}, or {ON_GPU[0]}")
    parser.add_argument(
        "--steps", type=parse_steps, metavar="ROWS@CONTEXT+PROMPT,...", help=f"by default {ON_CPU[1]}, or {ON_GPU[1]}"
    )
    parser.add_argument("--rounds", type=int, help=f"by default {ON_CPU[2]}, or {ON_GPU[2]}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for deterministic.json and deterministic.txt")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu and (lack := what_kernels_lack(device)):
        parser.error(f"--device: the kernels, which are to be compared with, lack {lack}")
    default_dtypes, default_steps, default_rounds = ON_GPU if on_gpu else ON_CPU
    steps = arguments.steps or parse_steps(default_steps)
    rounds = arguments.rounds or default_rounds
    torch.set_num_threads(arguments.threads)
    about = {
        "processor": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    width = 1 + max(len(str(step)) for step in steps)
    kind = "ms by the clock" if on_gpu else "ms of processor time"
    lines += [
        f"{kind:{10 + width}} normal  deterministic  ratio" + "   by the clock: normal  deterministic" * (not on_gpu)
    ]
    print("\n".join(lines), flush=True)
    rows: list[Row] = []
    for dtype in (arguments.dtypes or default_dtypes).split(","):
        for row in measure(load(arguments, format_for(dtype, device)), steps, rounds):
            rows.append(row)
            lines.append(row.line(width, by_clock=on_gpu))
            print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "deterministic.txt").write_text("\n".join(lines) + "\n")
        found = about | {"rows": [asdict(row) for row in rows]}
        (arguments.out / "deterministic.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
