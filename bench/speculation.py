"""Tokens a second on a CPU with drafts and without, in turns, on text that repeats and text that does not.

python -m bench.speculation [--model FOLDER] [--dtypes float32,int8] [--streams 1,4,16] [--tokens 2,4,8] [--rounds 5]
    [--threads N] [--out FILE]

Of each kind of text every stream has a prompt of its own and gets as many tokens as all others. The engine's own steps:
scheduler, runner, sampling. Times are from the first step that has no prompt any more to the end. Medians over the
rounds, in each of which every setting has its turn; ratios are to the run without drafts of the same round, by the
processor's time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import HELD_OUT
from bench.cpu import model_in, processor
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.core import Core
from service.engine.cores import available_cores
from service.engine.request import Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.speculation import FIXED_ROWS, Speculation
from service.model.batch import Runner
from service.model.config import ModelConfig
from service.model.memory import make_runner
from service.serve import DEMO_MODEL

PROMPT_TOKENS, NEW_TOKENS = 64, 128
BLOCK_SIZE = 16
LIMITS: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 256}  # as the service's
# What is said after a prompt that repeats, after one that does not, and what is drawn after that.
KINDS = {"list, greedy": 0.0, "prose, greedy": 0.0, "prose, drawn": 1.0}
NAMES = ("Ada", "Ben", "Carl", "Dora", "Emma", "Frank", "Grace", "Henry")


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    dtype: str
    streams: int
    drafts: int  # a sequence and step at most; 0: off
    tokens_per_second: float  # median over the rounds
    ratio: float  # to that without drafts, by the processor's time
    range: tuple[float, float]  # of the ratio
    predicted: float  # of the same numbers of rows and steps, if a step costs FIXED_ROWS and its rows
    tokens_a_step: float  # of each stream
    drafted: float  # share of the rows
    accepted: float  # share of the drafts
    same: int  # streams whose tokens are those without drafts


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    processor_seconds: float
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    texts: list[list[int]]


def prompts(kind: str, count: int) -> list[list[int]]:
    """Of PROMPT_TOKENS each."""
    encode = read_tokenizer(DEMO_MODEL).backend.encode
    if kind.startswith("prose"):
        ids = encode(HELD_OUT.read_text()).ids
        return [ids[start : start + PROMPT_TOKENS] for start in range(0, count * PROMPT_TOKENS, PROMPT_TOKENS)]
    found = []
    for number in range(count):
        items = [f"- {name} has {(number + place) % 9 + 2} books.\n" for place, name in enumerate(NAMES)]
        found.append(encode("".join(items) * 3).ids[:PROMPT_TOKENS])
    return found


def run(runner: Runner, config: ModelConfig, kind: str, count: int, drafts: int) -> _Run:
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=BLOCK_SIZE,
        **LIMITS,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        end_of_text_id=config.end_of_text_id,
        speculation=Speculation(most=drafts),
    )
    params = SamplingParams(NEW_TOKENS, temperature=KINDS[kind], seed=1, ignore_eos=True)
    for number, prompt in enumerate(prompts(kind, count)):
        scheduler.add(Request(number, tuple(prompt)), params)
    core = Core(scheduler, runner)
    texts: list[list[int]] = [[] for _ in range(count)]
    began, spent, before, num_steps = 0.0, 0.0, 0, 0
    while not core.idle:
        if not began and all(texts):
            began, spent = time.perf_counter(), time.process_time()
            before, num_steps = sum(map(len, texts)), scheduler.num_steps
        for delta in (*core.step(), *scheduler.take_held()):
            texts[delta.request_id] += delta.token_ids
    stats = scheduler.stats()
    return _Run(
        time.perf_counter() - began,
        time.process_time() - spent,
        sum(map(len, texts)) - before,
        scheduler.num_steps - num_steps,
        stats.num_draft_tokens,
        stats.num_accepted_tokens,
        texts,
    )


def measure(folder: Path, dtype: str, streams: Sequence[int], drafts: Sequence[int], rounds: int) -> list[Row]:
    """Every setting once before, unmeasured: oneDNN compiles a product for each number of rows when it first comes."""
    model = model_in(folder, dtype)
    runner = make_runner(model, block_size=BLOCK_SIZE, **LIMITS, kv_memory=2**30, utilization=1.0)
    rows = []
    for count in streams:
        for kind in KINDS:
            runs: dict[int, list[_Run]] = {most: [] for most in (0, *drafts)}
            settings = list(runs)
            for number in range(-1, rounds):
                first = number % len(settings)  # whoever comes after another is not always the same one
                for most in settings[first:] + settings[:first]:
                    each = run(runner, model.config, kind, count, most)
                    if number >= 0:
                        runs[most].append(each)
            for most, found in runs.items():
                rows.append(_row(kind, dtype, count, most, found, runs[0]))
                print(line(rows[-1]), flush=True)
    runner.close()
    return rows


def _row(kind: str, dtype: str, count: int, most: int, found: Sequence[_Run], without: Sequence[_Run]) -> Row:
    ratios = [off.processor_seconds / on.processor_seconds for off, on in zip(without, found, strict=True)]
    last = found[-1]
    drafted, own = last.num_drafted, last.num_tokens - last.num_accepted
    steps, rows = without[-1].num_steps, without[-1].num_tokens
    cost, cost_without = FIXED_ROWS * last.num_steps + own + drafted, FIXED_ROWS * steps + rows
    return Row(
        kind,
        dtype,
        count,
        most,
        statistics.median(each.num_tokens / each.seconds for each in found),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        cost_without / cost,
        last.num_tokens / count / last.num_steps,
        drafted / (drafted + own),
        last.num_accepted / max(1, drafted),
        sum(one == other for one, other in zip(last.texts, without[-1].texts, strict=True)),
    )


def line(row: Row) -> str:
    return (
        f"{row.dtype:9} {row.streams:7} {row.kind:15} {row.drafts:6} {row.tokens_per_second:9.1f} {row.ratio:6.2f} "
        f"({row.range[0]:.2f} to {row.range[1]:.2f}) {row.predicted:10.2f} {row.tokens_a_step:7.2f} "
        f"{row.drafted:10.0%} {row.accepted:9.0%} "
        f"{row.same:4}"
    )


HEADER = (
    "dtype     streams text            drafts  tokens/s  ratio (rounds)        predicted  a step"
    "    of rows    right same"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a GPT-2 folder; by default the demo model")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default="float32,int8")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default="1,4,16")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default="8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores(), help="by default as the service's")
    parser.add_argument("--out", type=Path, help="a file, beside which another has the same as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "model": "the demo model" if arguments.model == DEMO_MODEL else arguments.model.name,
        "prompt": PROMPT_TOKENS,
        "new": NEW_TOKENS,
        "rounds": arguments.rounds,
    }
    head = [", ".join(f"{name} {value}" for name, value in about.items()), "", HEADER]
    print("\n".join(head), flush=True)
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        rows += measure(arguments.model, dtype, arguments.streams, arguments.tokens, arguments.rounds)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join([*head, *map(line, rows)]) + "\n")
        found = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        arguments.out.with_suffix(".json").write_text(found + "\n")


if __name__ == "__main__":
    main()
