"""A service's memory, descriptors and queue over time. Used by soak.py and overload.py."""

import asyncio
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
import psutil
import torch

from bench.served import Service

MIB = 2**20
BOUND_MIB, BOUND_SHARE, MOST_MIB = 32.0, 0.05, 64.0
IDLE_SECONDS = 60  # for the engine to have nothing left, once every answer has come
_FEWEST = 8  # samples that growth is told from


@dataclass(frozen=True, slots=True)
class Sample:
    at: float  # monotonic seconds
    memory_mib: Mapping[str, float]  # by process; "gpu": in use on all of the GPU
    descriptors: Mapping[str, int]
    running: float
    waiting: float
    queued_tokens: float
    kv_usage: float
    generated_tokens: float  # in all


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


def gpu_mib() -> float | None:
    """In use on the first GPU; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return float(found.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Watch:
    """Samples of the service, while it is loaded and after. While an engine is away they have nothing of it."""

    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self._service = service
        self._client = client
        self._processes = service.processes()
        self._restarted = False  # the engine, once or more
        self.samples: list[Sample] = []

    async def sample(self) -> Sample:
        """Raises httpx.HTTPError, and psutil.NoSuchProcess where the supervisor or the API process has ended."""
        values, _ = await self._service.metrics(self._client)
        memory, descriptors = {}, {}
        for name, process in self._processes.items():
            try:
                memory[name], descriptors[name] = process.memory_info().rss / MIB, process.num_fds()
            except psutil.NoSuchProcess:
                if name != "engine":
                    raise
                self._restarted = True
        if "engine" not in memory:
            self._processes = self._service.processes()
        if torch.cuda.is_available() and (used := await asyncio.to_thread(gpu_mib)) is not None:
            memory["gpu"] = used
        sample = Sample(
            at=time.monotonic(),
            memory_mib=memory,
            descriptors=descriptors,
            running=values["requests_running"],
            waiting=values["requests_waiting"],
            queued_tokens=values["queued_tokens"],
            kv_usage=values["kv_cache_usage_ratio"],
            generated_tokens=values["generated_tokens_total"],
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
        """Of what was there all the time, over the samples so far; none where these are too few."""
        if len(self.samples) < _FEWEST:
            return []
        times = [sample.at for sample in self.samples]
        names = [name for name in self.samples[0].memory_mib if name != "engine" or not self._restarted]
        return [Growth.of(name, times, [each.memory_mib[name] for each in self.samples]) for name in names]


def growth_table(growths: Sequence[Growth]) -> list[str]:
    """Lines of text."""
    return [
        "MiB            first     most     last  a minute  last half  bound",
        *(
            f"{each.name:10} {each.first:9.1f} {each.most:8.1f} {each.last:8.1f} {each.a_minute:9.2f} "
            f"{each.last_half:10.1f} {each.bound:6.1f}"
            for each in growths
        ),
    ]


def growth_faults(growths: Sequence[Growth]) -> list[str]:
    """What has grown beyond its bound, or could not be told."""
    if not growths:
        return ["too few samples to tell growth from"]
    return [
        f"{each.name}: {each.last_half:.1f} MiB more in the last half"
        for each in growths
        if each.last_half > each.bound
    ]
