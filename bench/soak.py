"""A mixed load on the whole service for minutes: every answer is checked, and the memory of each process is watched.

python -m bench.soak [--model FOLDER] [--seconds 480] [--out FOLDER/NAME] [-- flags of serve]

The exit status is 1 where an answer was wrong or missing, where blocks or connections were still held when all was
idle, or where the memory of a process or the GPU grew in the last half by more than 5 %, but at least 32 MiB and at
most 64.
"""

import argparse
import asyncio
import json
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from bench.mixture import Answer, Ask, Mixture
from bench.random_model import given_or_random
from bench.served import Service
from service.version import VERSION

MIB = 2**20
BOUND_MIB, BOUND_SHARE, MOST_MIB = 32.0, 0.05, 64.0
SPARE_DESCRIPTORS = 16  # more than before the load, for what a library opens once
IDLE_SECONDS = 60  # for the engine to have nothing left, once every answer has come


@dataclass(frozen=True, slots=True)
class Sample:
    at: float  # seconds from the begin
    memory_mib: Mapping[str, float]  # by process; "gpu": in use on all of the GPU
    descriptors: Mapping[str, int]
    running: float
    waiting: float
    kv_usage: float


@dataclass(frozen=True, slots=True)
class Growth:
    """The memory of one process, in MiB."""

    name: str
    first: float
    most: float
    last: float
    a_minute: float  # least squares over the last two thirds of the time
    last_half: float  # what the least squares over the last half come to in that half
    bound: float  # of the last half

    @classmethod
    def of(cls, name: str, times: Sequence[float], values: Sequence[float]) -> "Growth":
        """There must be eight samples at least."""
        at, mib = np.array(times), np.array(values)

        def slope(begin: float) -> float:
            late = at >= at[0] + begin * (at[-1] - at[0])
            return float(np.polyfit(at[late], mib[late], 1)[0])

        return cls(
            name=name,
            first=values[0],
            most=max(values),
            last=values[-1],
            a_minute=60 * slope(1 / 3),
            last_half=slope(1 / 2) * (times[-1] - times[0]) / 2,
            bound=min(max(BOUND_MIB, BOUND_SHARE * values[-1]), MOST_MIB),
        )


@dataclass(slots=True)
class Outcome:
    """Of all requests and of the service."""

    counts: Counter[str] = field(default_factory=Counter)  # by kind and status
    faults: list[str] = field(default_factory=list)


async def answered(client: httpx.AsyncClient, ask: Ask) -> Answer:
    content = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", "/v1/completions", content=content, headers=headers) as response:
        answer = Answer(response.status_code)
        if not ask.stream or response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            return answer
        answer.done = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done = True
            elif line.startswith("data: "):
                answer.take(json.loads(line.removeprefix("data: ")))
    return answer


async def exchange(client: httpx.AsyncClient, ask: Ask, outcome: Outcome) -> None:
    """Ask, and note what came of it."""
    try:
        async with asyncio.timeout(ask.leaves_after):
            answer = await answered(client, ask)
    except TimeoutError:
        outcome.counts[f"{ask.kind}: left"] += 1
        return
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        outcome.faults.append(f"{ask.kind}: no answer: {type(error).__name__} {error}")
        return
    outcome.counts[f"{ask.kind}: {answer.status}"] += 1
    if (fault := ask.fault(answer)) is not None:
        outcome.faults.append(f"{ask.kind}: {fault}")


async def drive(
    client: httpx.AsyncClient, mixture: Mixture, outcome: Outcome, *, num_rows: int, seconds: float
) -> None:
    """Steady loads, bursts of twice the rows and idle gaps, in random order; returns when all is answered."""
    rng = random.Random(0)  # noqa: S311
    end_at = time.monotonic() + seconds

    async def ask_until(moment: float) -> None:
        while time.monotonic() < moment:
            await exchange(client, mixture.next(), outcome)

    while (now := time.monotonic()) < end_at:
        match rng.choice(["steady", "steady", "burst", "idle"]):
            case "steady":
                until = min(end_at, now + rng.uniform(5, 15))
                await asyncio.gather(*(ask_until(until) for _ in range(rng.randint(1, num_rows))))
            case "burst":
                await asyncio.gather(*(exchange(client, mixture.next(), outcome) for _ in range(2 * num_rows)))
            case _:
                await asyncio.sleep(min(rng.uniform(0.5, 3), end_at - now))


def gpu_mib() -> float | None:
    """In use on the first GPU; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return float(found.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Watch:
    """Samples of the service, while it is loaded and after."""

    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self._service = service
        self._client = client
        self._processes = service.processes()
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    async def sample(self) -> Sample:
        """Raises psutil.NoSuchProcess where one has ended."""
        values, _ = await self._service.metrics(self._client)
        memory = {name: process.memory_info().rss / MIB for name, process in self._processes.items()}
        if torch.cuda.is_available() and (used := await asyncio.to_thread(gpu_mib)) is not None:
            memory["gpu"] = used
        sample = Sample(
            at=time.monotonic() - self._began,
            memory_mib=memory,
            descriptors={name: process.num_fds() for name, process in self._processes.items()},
            running=values["requests_running"],
            waiting=values["requests_waiting"],
            kv_usage=values["kv_cache_usage_ratio"],
        )
        self.samples.append(sample)
        return sample

    async def run(self, seconds: float) -> None:
        """A sample each so many seconds, until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(seconds)

    async def idle(self) -> Sample:
        """The first sample without work, or the last that there was time for."""
        end_at = time.monotonic() + IDLE_SECONDS
        while True:
            sample = await self.sample()
            if not (sample.running or sample.waiting or sample.kv_usage) or time.monotonic() > end_at:
                return sample
            await asyncio.sleep(0.5)

    def growths(self) -> list[Growth]:
        """Over the samples so far; none where these are too few."""
        if len(self.samples) < 8:
            return []
        times = [sample.at for sample in self.samples]
        return [
            Growth.of(name, times, [s.memory_mib[name] for s in self.samples]) for name in self.samples[0].memory_mib
        ]


async def soak(service: Service, *, seconds: float, seed: int) -> tuple[Outcome, Watch, list[Growth]]:
    outcome = Outcome()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as observer:
        await service.ready(observer)
        _, model = await service.metrics(observer)
        context_length, vocab_size = int(model["context_length"]), int(model["vocab_size"])
        mixture = Mixture(seed, context_length=context_length, vocab_size=vocab_size)
        watch = Watch(service, observer)
        before = await watch.sample()
        watching = asyncio.create_task(watch.run(max(0.5, min(5, seconds / 100))))
        try:
            async with httpx.AsyncClient(base_url=service.url, timeout=600, limits=limits) as client:
                await drive(client, mixture, outcome, num_rows=int(model["max_num_seqs"]), seconds=seconds)
        finally:
            watching.cancel()
            (ended,) = await asyncio.gather(watching, return_exceptions=True)
        if not isinstance(ended, asyncio.CancelledError):
            outcome.faults.append(f"the service could not be watched to the end: {ended!r}")
        growths = watch.growths()
        if not growths:
            outcome.faults.append("too few samples to tell growth from")
        try:
            after = await watch.idle()
            values, _ = await service.metrics(observer)
        except (httpx.HTTPError, psutil.Error) as error:
            outcome.faults.append(f"the service was gone: {error!r}")
            return outcome, watch, growths
    for name in ("running", "waiting", "kv_usage"):
        if value := getattr(after, name):
            outcome.faults.append(f"{name} is {value:g} when all is answered")
    for name, count in after.descriptors.items():
        if count > before.descriptors[name] + SPARE_DESCRIPTORS:
            outcome.faults.append(f"{name}: {count} open descriptors, {before.descriptors[name]} before")
    if values["engine_restarts_total"]:
        outcome.faults.append(f"the engine was started again {values['engine_restarts_total']:g} times")
    outcome.faults += [
        f"{each.name}: {each.last_half:.1f} MiB more in the last half"
        for each in growths
        if each.last_half > each.bound
    ]
    return outcome, watch, growths


def is_fault(line: str) -> bool:
    """Of the log: an error, or what is none of its lines."""
    try:
        return json.loads(line)["level"] not in ("INFO", "WARNING")
    except (ValueError, LookupError, TypeError):
        return bool(line.strip())


def report(outcome: Outcome, watch: Watch, growths: Sequence[Growth]) -> str:
    lines = [f"{count:7} {kind}" for kind, count in sorted(outcome.counts.items())]
    lines.append(f"{sum(outcome.counts.values()):7} requests, {len(watch.samples)} samples")
    lines.append("MiB            first     most     last  a minute  last half  bound")
    lines += [
        f"{each.name:10} {each.first:9.1f} {each.most:8.1f} {each.last:8.1f} {each.a_minute:9.2f} "
        f"{each.last_half:10.1f} {each.bound:6.1f}"
        for each in growths
    ]
    first, last = watch.samples[0].descriptors, watch.samples[-1].descriptors
    lines += [f"{name}: {first[name]} open descriptors before, {last[name]} after" for name in first]
    lines += [f"{count} x {fault}" for fault, count in Counter(outcome.faults).most_common(30)]
    lines.append(f"{len(outcome.faults)} faults")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--seconds", type=float, default=480, help="of load (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--out", type=Path, help="write .json beside this name")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    with given_or_random(arguments.model) as folder:
        service = Service(folder, arguments.flags)
        try:
            outcome, watch, growths = asyncio.run(soak(service, seconds=arguments.seconds, seed=arguments.seed))
        finally:
            code = service.end()
    if code:
        outcome.faults.append(f"exit code {code} after the drain")
    outcome.faults += [f"a log line: {line.strip()}" for line in service.log if is_fault(line)]
    print(report(outcome, watch, growths))
    if arguments.out is not None:
        about: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "version": VERSION,
            "date": time.strftime("%Y-%m-%d"),
            "model": "random 345M" if arguments.model is None else arguments.model.name,
            "command": shlex.join(["python", "-m", "bench.soak", *sys.argv[1:]]),
            "counts": outcome.counts,
            "faults": outcome.faults,
            "growth": [asdict(each) for each in growths],
            "samples": [asdict(each) for each in watch.samples],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
