"""What deterministic mode costs on a CPU: a step of its runner beside the same step of the other one.

python -m bench.deterministic [--model FOLDER] [--dtypes float32,int8] [--rounds 9] [--threads 1] [--out FOLDER]

Both compute the same batches over the same weights, in turns; medians over the rounds of the processor's time, which
other work on the machine does not take from, and of the clock's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.cpu import BLOCK_SIZE, DTYPES, model_in, processor
from bench.mixed import mixed_batch
from bench.random_model import given_or_random
from service.model.batch import Batch
from service.model.deterministic import DeterministicRunner
from service.model.runner import TorchRunner

CONTEXT = 96


@dataclass(frozen=True, slots=True)
class Row:
    dtype: str
    step: str
    normal_ms: float  # of the processor's time
    deterministic_ms: float
    ratio: float
    normal_wall_ms: float
    deterministic_wall_ms: float


def known(batch: Batch) -> Batch:
    """The same of tokens that the host has."""
    return replace(batch, token_sources=np.full_like(batch.token_sources, -1))


STEPS: dict[str, Callable[[], Batch]] = {
    f"decode, 1 row at {CONTEXT}": lambda: known(mixed_batch(1, CONTEXT, 0)),
    f"decode, 8 rows at {CONTEXT}": lambda: known(mixed_batch(8, CONTEXT, 0)),
    f"decode, 16 rows at {CONTEXT}": lambda: known(mixed_batch(16, CONTEXT, 0)),
    "prompt of 256 tokens": lambda: known(mixed_batch(0, 0, 1, length=256)),
}


def seconds(runner: TorchRunner, batch: Batch) -> tuple[float, float]:
    """One step's: of the processor, and by the clock."""
    began, spent = time.perf_counter(), time.process_time()
    runner.launch(batch)
    runner.collect()
    return time.process_time() - spent, time.perf_counter() - began


def measure(folder: Path, dtype: str, rounds: int) -> list[Row]:
    model = model_in(folder, dtype)
    num_blocks = 16 * -(-256 // BLOCK_SIZE)
    runners = [kind(model, num_blocks=num_blocks, block_size=BLOCK_SIZE) for kind in (TorchRunner, DeterministicRunner)]
    rows = []
    for name, make in STEPS.items():
        batch = make()
        found = [[seconds(runner, batch) for runner in runners] for _ in range(rounds + 1)][1:]
        normal, deterministic = (
            [1e3 * statistics.median(pair[number][kind] for pair in found) for kind in (0, 1)] for number in (0, 1)
        )
        ratio = statistics.median(other[0] / one[0] for one, other in found)
        rows.append(Row(dtype, name, normal[0], deterministic[0], ratio, normal[1], deterministic[1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=",".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for deterministic.json and deterministic.txt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = {
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    lines += ["ms of processor time             normal  deterministic  ratio   by the clock: normal  deterministic"]
    print("\n".join(lines), flush=True)
    rows: list[Row] = []
    with given_or_random(arguments.model) as folder:
        for dtype in arguments.dtypes:
            for row in measure(folder, dtype, arguments.rounds):
                rows.append(row)
                lines.append(
                    f"{row.dtype:10}{row.step:22}{row.normal_ms:7.1f}{row.deterministic_ms:15.1f}{row.ratio:7.2f}"
                    f"{row.normal_wall_ms:23.1f}{row.deterministic_wall_ms:15.1f}"
                )
                print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "deterministic.txt").write_text("\n".join(lines) + "\n")
        found = about | {"rows": [asdict(row) for row in rows]}
        (arguments.out / "deterministic.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
