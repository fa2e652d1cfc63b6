"""Engines over several devices: milliseconds a decode step of one split over ranks, and of several at the same time.

python -m bench.parallel [--layouts 1x1,2x1,1x2] [--steps 1@256,64@192] [--model FOLDER] [--out FOLDER/NAME]

A layout is tensor x data parallelism: 2x1 is one engine over two devices, 1x2 two engines of one device each, which
step at the same time, each with as many sequences as the step says. Tokens a second are those of all engines, and the
gain is theirs over the first layout's. Devices are GPUs, or without any, threads of the CPU.
"""

import argparse
import json
import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from bench.decode import BLOCK_SIZE, Steps, format_of, machine, parser_of, step_seconds
from bench.random_model import given_or_random
from service.engine.config import EngineConfig

_ROUNDS = 5
_SECONDS = 600  # for all engines to be ready


@dataclass(frozen=True, slots=True)
class Row:
    tensor: int
    data: int
    batch: int  # of each engine
    context: int
    step_ms: float  # of the slowest engine
    tokens_per_second: float  # of all
    gain: float  # of the tokens a second, over the first layout's


def main() -> None:
    parser = parser_of(__doc__, steps="1@256,8@512,64@192,256@192")
    parser.add_argument("--layouts", type=parse_layouts, default="1x1,2x1,1x2", metavar="TENSORxDATA,...")
    arguments = parser.parse_args()
    with given_or_random(arguments.model) as folder:
        rows: list[Row] = []
        for tensor, data in arguments.layouts:
            rows += measured(folder, tensor, data, arguments, rows)
            for row in rows[-len(arguments.steps) :]:
                print(
                    f"{row.tensor} x {row.data}  {row.batch:4}@{row.context:<4}  {row.step_ms:7.3f} ms  "
                    f"{row.tokens_per_second:9,.0f} tokens/s  x {row.gain:.2f}",
                    flush=True,
                )
    if arguments.out is not None:
        about = machine(arguments, format_of(arguments)) | {"rows": [asdict(row) for row in rows]}
        arguments.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def parse_layouts(text: str) -> list[tuple[int, int]]:
    """Of the form 1x1,2x1."""
    return [(int(tensor), int(data)) for tensor, data in (layout.split("x") for layout in text.split(","))]


def measured(folder: Path, tensor: int, data: int, arguments: argparse.Namespace, before: list[Row]) -> list[Row]:
    """The layout's rows. Its engines are processes that begin each measurement together."""
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(data)
    engines = []
    for number in range(data):
        ours, theirs = spawn.Pipe(duplex=False)
        config = engine_config(folder, tensor, data, number, arguments)
        engine = spawn.Process(target=run, args=(config, arguments.steps, arguments.repeats, together, theirs))
        engine.start()
        theirs.close()
        engines.append((engine, ours))
    by_engine: list[list[float]] = [ours.recv() for _, ours in engines]
    for engine, _ in engines:
        engine.join()
    rows = []
    for place, (batch, context) in enumerate(arguments.steps):
        seconds = [engine[place] for engine in by_engine]
        tokens_per_second = sum(batch / each for each in seconds)
        first = before[place].tokens_per_second if before else tokens_per_second
        gain = tokens_per_second / first
        rows.append(Row(tensor, data, batch, context, 1000 * max(seconds), tokens_per_second, gain))
    return rows


def engine_config(folder: Path, tensor: int, data: int, number: int, arguments: argparse.Namespace) -> EngineConfig:
    most = max(batch for batch, _ in arguments.steps)
    return EngineConfig(
        model=str(folder),
        revision=None,
        offline=True,
        cache_dir=tempfile.gettempdir(),
        device=arguments.device,
        dtype=arguments.dtype or "auto",
        kv_cache_dtype=arguments.kv_cache_dtype,
        deterministic=False,
        tensor_parallel_size=tensor,
        engine_number=number,
        data_parallel_size=data,
        max_num_seqs=most,
        max_num_batched_tokens=max(most, 16),
        block_size=BLOCK_SIZE,
        kv_memory=None,
        gpu_memory_utilization=0.9,
        cpu_threads=1,
        speculation="off",
        speculation_tokens=1,
        max_event_interval_ms=0,
        log_level="warning",
        json_lines=False,
    )


def run(config: EngineConfig, steps: Steps, repeats: int, together: Barrier, connection: Connection) -> None:
    """An engine's process: send the median seconds of each step."""
    from service.engine.loading import Reporter, load

    try:
        with Reporter(lambda *_: None) as reporter:
            runner = load(config, reporter).runner
    except BaseException:
        together.abort()  # the others would wait for it
        raise
    rounds = []
    for _ in range(_ROUNDS):
        together.wait(_SECONDS)
        rounds.append([step_seconds(runner, *step, repeats) for step in steps])
    connection.send(torch.tensor(rounds).median(0).values.tolist())
    runner.close()


if __name__ == "__main__":
    main()
