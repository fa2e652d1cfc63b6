"""Several times as many requests as the service can answer: what it still answers, and how soon it refuses the rest.

python -m bench.overload [--model FOLDER] [--times 10] [--seconds 30] [--out FOLDER/NAME] [-- flags of serve]

Its peak is measured first, by clients that ask again when they are answered; then three times the load of requests that
come at random, whatever became of those before. The client has a core of its own. The exit status is 1 where a request
had neither an answer nor a 429, where more waited than may, or where a process grew with the second load and again with
the third, as a leak does and what an allocator keeps does not. Goodput and the time of refusals are told; --check
judges them too: 90 % of the peak, and 50 ms at the 99th percentile.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import httpx

from bench.random_model import given_or_demo, given_or_random
from bench.served import Service
from bench.timeline import keep
from bench.watch import Watch, growth_table
from service.load.crowd import Crowd
from service.load.figures import Figures, figures_of
from service.load.plan import Level, Plan, Server
from service.load.report import table

MAX_GROWTH_MIB = 16.0  # with each load after the first
MIN_GOODPUT = 0.9  # of the peak
MAX_REFUSAL_MS = 50.0  # at the 99th percentile
_WARMUP_SECONDS = 3.0
_QUEUED = 4  # times the sequences that run at a time: so many may wait
_SAMPLE_SECONDS = 0.5


async def overload(
    service: Service, crowd: Crowd, plan: Plan, *, times: float
) -> tuple[list[Figures], Watch, list[str]]:
    """The peak and the overload, three times, what was sampled in the latter, and what was wrong."""

    async def measure(level: Level) -> Figures:
        tallies, interrupted = await asyncio.to_thread(crowd.measure, level)
        return figures_of(level, plan, tallies, interrupted=interrupted)

    async with httpx.AsyncClient(base_url=service.url, timeout=60) as observer:
        _, model = await service.metrics(observer)
        num_rows = int(model["max_num_seqs"])
        peak = await measure(Level("closed", 2 * num_rows))
        watch = Watch(service, observer)
        watching = asyncio.create_task(watch.run(_SAMPLE_SECONDS))
        crowded, after = [], []
        for _ in range(3):
            crowded.append(await measure(Level("open", times * peak.requests_per_second)))
            after.append(await watch.idle())
        watching.cancel()
        (ended,) = await asyncio.gather(watching, return_exceptions=True)
    faults = [] if isinstance(ended, asyncio.CancelledError) else [f"the service could not be watched: {ended!r}"]
    rows = [peak, *crowded]
    faults += [f"{count} x {error}" for row in rows for error, count in row.errors.items() if error != "429"]
    faults += [
        f"{name}: {grown:.1f} MiB more after the second load, and again after the third"
        for name, memory in after[0].memory_mib.items()
        if (grown := growth([memory, *(sample.memory_mib[name] for sample in after[1:])])) > MAX_GROWTH_MIB
    ]
    for name in ("waiting", "queued_tokens"):
        if left := getattr(after[-1], name):
            faults.append(f"{name} is {left:g} in the end")
    return rows, watch, faults


def growth(memory: Sequence[float]) -> float:
    """What was added with every load, given the memory after each."""
    return min(after - before for before, after in pairwise(memory))


def judged(peak: Figures, crowded: Figures) -> list[str]:
    """What of the two figures falls short."""
    share = crowded.tokens_per_second / peak.tokens_per_second
    faults = [f"goodput is {share:.2f} of the peak"] if share < MIN_GOODPUT else []
    if crowded.refused is None or crowded.refused.p99 > MAX_REFUSAL_MS:
        faults.append(f"refusals take {crowded.refused and crowded.refused.p99} ms at the 99th percentile")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default as for soak.py")
    parser.add_argument("--times", type=float, default=10, help="the peak's requests a second (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of each load (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a request (default %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="sequences at a time (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="judge goodput and refusals too")
    parser.add_argument("--out", type=Path, help="write .json and .svg beside this name")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    most = _QUEUED * arguments.max_num_seqs
    flags = ["--max-num-seqs", str(arguments.max_num_seqs), "--max-queued-requests", str(most), *arguments.flags]
    cores = sorted(os.sched_getaffinity(0))
    with given_or_random(given_or_demo(arguments.model)) as folder:
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[:-1])  # of the service, which inherits them
        service = Service(folder, flags)
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[-1:])
        fields = {"max_tokens": arguments.max_tokens, "stream": True, "ignore_eos": True}
        plan = Plan(
            server=Server.at(service.url),
            fields={**fields, "stream_options": {"include_usage": True}},
            prompt_tokens=32,
            vocab_size=50_000,
            warmup_seconds=_WARMUP_SECONDS,
            seconds=arguments.seconds,
            timeout_seconds=120,
        )
        try:
            asyncio.run(_ready(service))
            with Crowd(plan) as crowd:
                rows, watch, faults = asyncio.run(overload(service, crowd, plan, times=arguments.times))
        finally:
            code = service.end()
    if code:
        faults.append(f"exit code {code} after the drain")
    if (waiting := max(sample.waiting for sample in watch.samples)) > most:
        faults.append(f"{waiting:g} waited, where {most} may")
    peak, *crowded = rows
    if arguments.check:
        faults += [fault for row in crowded for fault in judged(peak, row)]
    print(table(rows))
    shares = [row.tokens_per_second / peak.tokens_per_second for row in crowded]
    print(f"goodput: {', '.join(f'{share:.2f}' for share in shares)} of the peak")
    print("\n".join(growth_table(watch.growths())))
    print("\n".join([*faults, f"{len(faults)} faults"]))
    if arguments.out is not None:
        found = {"faults": faults, "levels": [asdict(row) for row in rows]}
        keep(arguments.out, "bench.overload", watch, found, latencies={})
    return 1 if faults else 0


async def _ready(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        await service.ready(client)


if __name__ == "__main__":
    sys.exit(main())
