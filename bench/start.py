"""Seconds from the command to an answer, by phases, and the memory of every process: ready, used, and its cache full.

python -m bench.start [--models demo,float32,float16,bfloat16] [--repeats 5] [--cold] [--fill] [--imports]
                      [--out FILE] [-- flags of serve]

A model is a folder, the demo model, or one of the 345M's shape with random weights in files of a dtype, which are
written first. `--cold` takes the files of the weights and of the installed packages out of the page cache before each
start, but for pages that another process has mapped; the rest of the system stays in it. Memory is of the last start:
all of a process (rss), what no other process has mapped (uss), its share of the rest added (pss), and of rss what is no
file's (anon), which no other memory can make room for. Mapped weights are in rss and uss, and not in anon.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from bench.random_model import write_random_model
from bench.served import Service
from service.checkpoint.hub import layout, read_config, weight_files
from service.checkpoint.tokenizer import read_tokenizer
from service.serve import DEMO_MODEL
from service.version import VERSION

MIB = 2**20
LOOK_SECONDS = 0.02
# What each process imports before it does anything of its own.
IMPORTS = {
    "supervisor": "import service.cli, service.serve",
    "api": "import service.api.process",
    "engine": "import service.engine.process, service.engine.loading, service.engine.loop",
}
# Of what the engine's log says it begins: what it has done by then.
PHASES = {"imported": "download", "load": "load", "warmup": "warmup"}
BESIDE_BYTES = 600e6  # that both processes may take beside weights, a margin of 15 % for these, and the cache


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the command."""

    listening: float  # the supervisor's imports are done, and the settings checked
    api: float  # the API process answers
    imported: float  # the engine has imported all it needs
    load: float  # it has found the model, and read config and tokenizer
    warmup: float  # it has the weights
    loaded: float  # it has its cache, and has made a step
    ready: float  # /readyz is 200
    answer: float  # to a first request, for one token
    processor: float  # seconds of processor time that all processes have used until /readyz was 200


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in MiB."""

    when: str
    process: str
    rss: float
    pss: float
    uss: float
    anon: float


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    dtype: str
    cold: bool
    median: Start
    best: Start
    memory: Sequence[Memory]
    rss_mib: float  # of all processes, at the moment of the most
    bound_mib: float
    weights_mib: float
    cache_mib: float


async def start(
    model: Path, flags: list[str], *, measure_memory: bool, fill: bool
) -> tuple[Start, list[Memory], dict[str, str]]:
    service = Service(model, flags)
    try:
        async with httpx.AsyncClient(base_url=service.url, timeout=600) as client:
            await client.get("/livez")
            api = time.perf_counter() - service.began
            await service.ready(client, look_seconds=LOOK_SECONDS)
            ready = time.perf_counter() - service.began
            processor = sum(sum(process.cpu_times()[:2]) for process in tree(service))
            await ask(client, "The", num_tokens=1)
            answer = time.perf_counter() - service.began
            _, about = await service.metrics(client)
            memory: list[Memory] = []
            if measure_memory:
                memory += taken(service, "ready")
                for _ in range(4):
                    await ask(client, "The people of the United States", num_tokens=32)
                memory += taken(service, "used")
                if fill:
                    await fill_cache(client, service, about)
                    memory += taken(service, "full")
    finally:
        service.end()
    phases = {name: service.said(f"phase: {word}") for name, word in PHASES.items()}
    times = Start(
        listening=service.listening_seconds,
        api=api,
        **phases,
        loaded=service.said("model loaded"),
        ready=ready,
        answer=answer,
        processor=processor,
    )
    loaded = next(line for line in service.log if "model loaded" in line)
    return times, memory, about | {"cache_tokens": str(cache_tokens(loaded))}


def cache_tokens(line: str) -> int:
    """How many the KV cache holds, by the line that the engine logs."""
    found = re.search(r"(\d+) KV blocks of (\d+) tokens", line)
    assert found is not None, line
    return int(found[1]) * int(found[2])


async def ask(client: httpx.AsyncClient, prompt: str | list[int], *, num_tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(response.text)


async def fill_cache(client: httpx.AsyncClient, service: Service, about: dict[str, str]) -> None:
    """Prompts of the whole context, each of them another, until every block has held something."""
    context_length, vocab_size = int(about["context_length"]), int(about["vocab_size"])
    num_tokens = cache_tokens(next(line for line in service.log if "model loaded" in line))
    rng = random.Random(0)  # noqa: S311
    prompts = [
        rng.choices(range(vocab_size - 1), k=context_length - 1) for _ in range(num_tokens // context_length + 2)
    ]
    for begin in range(0, len(prompts), 2):  # more at once, and some would be told to come again
        await asyncio.gather(*(ask(client, prompt, num_tokens=1) for prompt in prompts[begin : begin + 2]))


def tree(service: Service) -> list[psutil.Process]:
    """The supervisor and every process below it."""
    supervisor = psutil.Process(service.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def taken(service: Service, when: str) -> list[Memory]:
    """Of every process, the standard library's resource tracker too."""
    found = []
    named = {process.pid: name for name, process in service.processes().items()}
    for process in tree(service):
        info = process.memory_full_info()
        status = Path(f"/proc/{process.pid}/status").read_text()
        anon = int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024
        name = named.get(process.pid, "tracker")
        found.append(Memory(when, name, info.rss / MIB, info.pss / MIB, info.uss / MIB, anon))
    return found


def drop(folder: Path) -> None:
    """Take the weights and the installed packages out of the page cache."""
    files = [*weight_files(folder)]
    for name in ("purelib", "platlib"):
        files += [file for file in Path(sysconfig.get_paths()[name]).rglob("*") if file.is_file()]
    os.sync()  # what is not on the disk yet stays
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> Row:
    starts = []
    for number in range(arguments.repeats):
        if arguments.cold:
            drop(folder)
        last = number == arguments.repeats - 1
        times, memory, about = asyncio.run(start(folder, arguments.flags, measure_memory=last, fill=arguments.fill))
        starts.append(times)
    config = read_config(folder, vocab_size=len(read_tokenizer(folder).token_bytes))
    sizes = {ours: math.prod(shape) for ours, shape, _ in layout(config).values()}
    itemsize = getattr(torch, about["dtype"]).itemsize
    weights = sum(sizes.values()) * itemsize
    cache = 2 * config.num_layers * config.hidden_size * itemsize * int(about["cache_tokens"])
    totals = [sum(each.rss for each in memory if each.when == when) for when in {each.when for each in memory}]
    return Row(
        model=name,
        dtype=about["dtype"],
        cold=arguments.cold,
        median=over(starts, statistics.median),
        best=over(starts, min),
        memory=memory,
        rss_mib=max(totals),
        bound_mib=(1.15 * weights + cache + BESIDE_BYTES) / MIB,
        weights_mib=weights / MIB,
        cache_mib=cache / MIB,
    )


def over(starts: Sequence[Start], of: Any) -> Start:
    return Start(**{name: of([getattr(each, name) for each in starts]) for name in Start.__dataclass_fields__})


def imports(repeats: int) -> dict[str, dict[str, Any]]:
    """What each process imports: seconds without the tracing of it, and by the tracing which packages take the most."""
    found = {}
    for name, source in IMPORTS.items():
        timed = f"import time; t = time.perf_counter(); {source}; import sys; "
        timed += "print(time.perf_counter() - t, len(sys.modules))"
        plain = [run("-c", timed).stdout.split() for _ in range(repeats)]
        own: dict[str, float] = {}
        for line in run("-X", "importtime", "-c", source).stderr.splitlines():
            if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([^.\s]+)", line):
                own[match[2]] = own.get(match[2], 0.0) + int(match[1]) / 1e6
        most = sorted(own.items(), key=lambda item: -item[1])[:8]
        seconds = statistics.median(float(each[0]) for each in plain)
        found[name] = {"seconds": seconds, "modules": int(plain[0][1]), "most": dict(most)}
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)  # noqa: S603


@contextlib.contextmanager
def folders(names: Sequence[str]) -> Iterator[list[tuple[str, Path]]]:
    """Each model's name and folder; those that are written go in the end."""
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for name in names:
            if name == "demo":
                found.append((name, DEMO_MODEL))
            elif name in ("float32", "float16", "bfloat16"):
                found.append(
                    (f"345M, {name} file", write_random_model(Path(scratch) / name, dtype=getattr(torch, name)))
                )
            else:
                found.append((Path(name).name, Path(name)))
        yield found


def processor_name() -> str:
    with contextlib.suppress(OSError, IndexError):
        return str(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0])
    return platform.processor() or "CPU"


def show(rows: Sequence[Row]) -> None:
    names = list(Start.__dataclass_fields__)
    print("seconds, median (best)" + " " * 5 + "".join(f"{name:>14}" for name in names))
    for row in rows:
        cells = (f"{getattr(row.median, name):.2f} ({getattr(row.best, name):.2f})" for name in names)
        print(f"{row.model + ' in ' + row.dtype:27}" + "".join(f"{cell:>14}" for cell in cells))
    print("MiB                        when   process        rss    pss    uss   anon")
    for row in rows:
        for each in row.memory:
            print(
                f"{row.model:26} {each.when:6} {each.process:10} "
                f"{each.rss:7.0f}{each.pss:7.0f}{each.uss:7.0f}{each.anon:7.0f}"
            )
        print(
            f"{row.model:26} rss of all at most {row.rss_mib:.0f}, bound {row.bound_mib:.0f} "
            f"(1.15 x {row.weights_mib:.0f} + {row.cache_mib:.0f} + {BESIDE_BYTES / MIB:.0f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,float32,float16,bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--fill", action="store_true", help="fill the cache too: minutes, for the 345M")
    parser.add_argument("--imports", action="store_true", help="measure each process's imports too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="of serve, after --")
    arguments = parser.parse_args()
    about: dict[str, Any] = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "repeats": arguments.repeats,
        "flags": arguments.flags,
        "version": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(about)
    if arguments.imports:
        about["imports"] = imports(arguments.repeats)
        for name, each in about["imports"].items():
            most = ", ".join(f"{package} {seconds:.2f}" for package, seconds in each["most"].items())
            print(f"{name:10} imports {each['modules']} modules in {each['seconds']:.2f} s; by tracing: {most}")
    with folders(arguments.models.split(",")) as models:
        rows = [measure(name, folder, arguments) for name, folder in models]
    show(rows)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
