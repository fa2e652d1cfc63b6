"""Tokens a second on a CPU beside transformers' generate and llama.cpp, and what bf16 and int8 cost in accuracy.

python -m bench.cpu [--model FOLDER] [--batches 1,4,8,16] [--dtypes int8] [--rounds 5] [--threads N] [--out FOLDER]

The systems of a group generate greedily from the same random prompts, prefill included, in turns: each round runs each
of them once, so what else the machine does meets all alike. Medians over the rounds. On a machine with other work take
one thread and compare by the processor's time. llama.cpp is measured where the packages gguf and llama-cpp-python are
(bench/gguf_model.py).
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.accuracy import HEADING, HELD_OUT, accuracy
from bench.random_model import given_or_random
from service.checkpoint.hub import read_config, read_state
from service.engine.core import Core
from service.engine.cores import available_cores
from service.engine.request import Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.model.formats import format_for
from service.model.gpt2 import GPT2
from service.model.memory import make_runner
from service.serve import DEMO_MODEL

PROMPT_TOKENS, NEW_TOKENS = 32, 64
BLOCK_SIZE = 16
DTYPES = ("float32", "bfloat16", "int8")
# Of ours, transformers' and llama.cpp's, what is measured side by side: together they fit in a laptop's memory.
GROUPS = (("int8", "bfloat16", "Q8_0"), ("bfloat16", "bfloat16", "F16"), ("float32", "float32", ""))
Generate = Callable[[Sequence[Sequence[int]]], list[list[int]]]  # prompts to their new tokens


@dataclass(frozen=True, slots=True)
class Row:
    system: str
    batch: int
    tokens_per_second: float  # median over the rounds
    range: tuple[float, float]
    ratio: float  # median over the rounds of our tokens a second to these
    tokens_per_processor_second: float  # median; what other work takes of the cores does not count
    group: str  # what it was measured beside


def model_in(folder: Path, dtype: str) -> GPT2:
    config, weights = read_config(folder), format_for(dtype, torch.device("cpu"))
    return GPT2(config, read_state(folder, config, dtype=weights.made_of), weights)


def ours(folder: Path, dtype: str, most: int) -> Generate:
    """The engine's own steps: scheduler, runner, sampling."""
    model = model_in(folder, dtype)
    config = model.config
    limits: dict[str, Any] = {"max_num_seqs": max(most, 16), "max_num_batched_tokens": 256}  # as the service's
    runner = make_runner(model, block_size=BLOCK_SIZE, **limits, kv_memory=None, utilization=1.0)
    params = SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True)

    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        scheduler = Scheduler(
            num_blocks=runner.num_blocks,
            block_size=BLOCK_SIZE,
            **limits,
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            end_of_text_id=config.end_of_text_id,
        )
        for number, prompt in enumerate(prompts):
            scheduler.add(Request(number, tuple(prompt)), params)
        core = Core(scheduler, runner)
        found: list[list[int]] = [[] for _ in prompts]
        while not core.idle:
            for delta in core.step():
                found[delta.request_id] += delta.token_ids
        return found

    return generate


def theirs(folder: Path, dtype: str) -> Generate:
    """transformers, with its own defaults."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # nothing ends before all tokens are there

    @torch.inference_mode()
    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=50256)
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    return generate


def llama_cpp(file: Path, *, threads: int, most: int) -> Generate:
    from bench.gguf_model import LlamaCpp  # where its packages are

    system = LlamaCpp(file, threads=threads, most_prompts=most, context=PROMPT_TOKENS + NEW_TOKENS)
    return lambda prompts: system.generate(prompts, NEW_TOKENS)


def measure(systems: dict[str, Generate], batches: Sequence[int], rounds: int) -> list[Row]:
    """Every system at every batch, in turns; each once before at the first, unmeasured."""
    random = np.random.default_rng(0)
    speeds: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in systems for batch in batches}
    costs: dict[tuple[str, int], list[float]] = {key: [] for key in speeds}
    for number in range(-1, rounds):
        for batch in batches if number >= 0 else batches[:1]:
            prompts = random.integers(0, 50256, (batch, PROMPT_TOKENS)).tolist()
            for name, generate in systems.items():
                began, spent = time.perf_counter(), time.process_time()
                tokens = generate(prompts)
                seconds, spent = time.perf_counter() - began, time.process_time() - spent
                assert [len(row) for row in tokens] == [NEW_TOKENS] * batch, name
                if number >= 0:
                    speeds[name, batch].append(batch * NEW_TOKENS / seconds)
                    costs[name, batch].append(batch * NEW_TOKENS / spent)
    own = next(iter(systems))
    return [
        Row(
            name,
            batch,
            statistics.median(found),
            (min(found), max(found)),
            statistics.median(ours / theirs for ours, theirs in zip(speeds[own, batch], found, strict=True)),
            statistics.median(costs[name, batch]),
            f"{own}, in turns",
        )
        for (name, batch), found in speeds.items()
    ]


def processor() -> str:
    names = [line.partition(":")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def report(rows: Sequence[Row], batches: Sequence[int]) -> list[str]:
    """Tables of tokens a second, and a second of a processor's time, and of ours to each, by group."""
    lines: list[str] = []
    for title in ("tokens a second (ours / theirs)", "tokens a processor's second (ours / theirs)"):
        lines += ["", title.ljust(46) + "".join(f"{f'batch {batch}':<18}" for batch in batches)]
        for group in dict.fromkeys(row.group for row in rows):
            found = {(row.system, row.batch): row for row in rows if row.group == group}
            names = list(dict.fromkeys(name for name, _ in found))
            lines += [group]
            for name in names:
                cells = []
                for batch in batches:
                    row = found[name, batch]
                    cell = (row.tokens_per_second, row.ratio)
                    if "processor" in title:
                        cost = row.tokens_per_processor_second
                        cell = (cost, found[names[0], batch].tokens_per_processor_second / cost)
                    cells.append("{:10.1f} ({:5.2f})".format(*cell))
                lines += [f"  {name}".ljust(38) + "".join(cells)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default="1,4,8,16")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=",".join(DTYPES), help="of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores(), help="by default as the service's")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="of which the demo model's perplexity is taken")
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.txt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    about: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "prompt": PROMPT_TOKENS,
        "new": NEW_TOKENS,
    }
    with given_or_random(arguments.model) as folder, tempfile.TemporaryDirectory() as scratch:
        most = max(arguments.batches)
        has_llama_cpp = all(map(importlib.util.find_spec, ("gguf", "llama_cpp")))
        files: dict[str, Path] = {}
        if has_llama_cpp:  # first, as it takes the weights' memory several times
            from bench.gguf_model import VERSION, write_gguf

            about["llama_cpp_python"] = VERSION
            files = {kind: write_gguf(folder, Path(scratch) / f"{kind}.gguf", kind) for kind in ("F16", "Q8_0")}
        rows: list[Row] = []
        for dtype, peer, kind in GROUPS:
            if dtype not in arguments.dtypes:
                continue
            systems = {f"ours {dtype}": ours(folder, dtype, most), f"transformers {peer}": theirs(folder, peer)}
            if kind in files:
                systems[f"llama.cpp {kind}"] = llama_cpp(files[kind], threads=arguments.threads, most=most)
            rows += measure(systems, arguments.batches, arguments.rounds)
            print("\n".join(report(rows, arguments.batches)), flush=True)  # what there is, should it be stopped
            systems.clear()
        formats = [format_for(dtype, torch.device("cpu")) for dtype in DTYPES]
        demo, large = (lambda weights, path=path: model_in(path, weights.name) for path in (DEMO_MODEL, folder))
        costs = accuracy(formats, demo, large, arguments.text.read_text())
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), "", *report(rows, arguments.batches), ""]
    lines += [HEADING, *map(str, costs)]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "cpu.txt").write_text("\n".join(lines) + "\n")
        found = about | {"rows": [asdict(row) for row in rows], "accuracy": [asdict(cost) for cost in costs]}
        (arguments.out / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
