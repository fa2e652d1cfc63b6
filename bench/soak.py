"""A mixed load on the whole service for minutes, with faults: every answer is checked, and its memory is watched.

python -m bench.soak [--model FOLDER] [--seconds 300] [--no-faults] [--out FOLDER/NAME] [-- flags of serve]

The exit status is 1 where an answer was wrong or missing, where one was cut short and no fault was the reason, where
the service was not ready again after a fault, where the log has an error that no fault explains, where blocks or
connections were still held when all was idle, or where the memory of a process or the GPU grew in the last half by more
than 5 %, but at least 32 MiB and at most 64. An engine that is restarted begins anew; --no-faults judges its growth.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from bench.chaos import STALL_SECONDS, Chaos
from bench.mixture import Answer, Ask, Mixture
from bench.random_model import given_or_demo, given_or_random
from bench.served import Service
from bench.timeline import keep
from bench.watch import Growth, Watch, growth_faults, growth_table

SPARE_DESCRIPTORS = 16  # more than before the load, for what a library opens once
_PAUSE_SECONDS = (4.0, 12.0)  # between two faults
_EXPLAINED = ("the engine ended", "the engine has stalled", "the engine has not said a word")
_RETRY_SECONDS = 0.5  # of a client that was told that the engine is away


@dataclass(slots=True)
class Outcome:
    """Of all requests and of the service."""

    counts: Counter[str] = field(default_factory=Counter)  # by kind and status
    faults: list[str] = field(default_factory=list)
    # When each answer ended (monotonic seconds), and the seconds that it took, by its status.
    latencies: dict[str, tuple[list[float], list[float]]] = field(default_factory=lambda: defaultdict(lambda: ([], [])))

    def ended(self, name: str, seconds: float) -> None:
        moments, durations = self.latencies[name]
        moments.append(time.monotonic())
        durations.append(seconds)


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


async def exchange(client: httpx.AsyncClient, ask: Ask, outcome: Outcome, chaos: Chaos) -> None:
    """Ask, and note what came of it."""
    begin = time.monotonic()
    try:
        async with asyncio.timeout(ask.leaves_after):
            answer = await answered(client, ask)
    except TimeoutError:
        outcome.counts[f"{ask.kind}: left"] += 1
        return
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        outcome.faults.append(f"{ask.kind}: no answer: {type(error).__name__} {error}")
        return
    end = time.monotonic()
    outcome.ended(f"status {answer.status}", end - begin)
    if answer.was_cut and chaos.may_cut(begin, end):
        outcome.counts[f"{ask.kind}: told that the engine was away"] += 1
        await asyncio.sleep(_RETRY_SECONDS)
        return
    outcome.counts[f"{ask.kind}: {answer.status}"] += 1
    if (fault := ask.fault(answer)) is not None:
        outcome.faults.append(f"{ask.kind}: {fault}")


async def drive(
    client: httpx.AsyncClient, mixture: Mixture, outcome: Outcome, chaos: Chaos, *, num_rows: int, seconds: float
) -> None:
    """Steady loads, bursts of twice the rows and idle gaps, in random order; returns when all is answered."""
    rng = random.Random(0)  # noqa: S311
    end_at = time.monotonic() + seconds

    async def ask_until(moment: float) -> None:
        while time.monotonic() < moment:
            await exchange(client, mixture.next(), outcome, chaos)

    while (now := time.monotonic()) < end_at:
        match rng.choice(["steady", "steady", "burst", "idle"]):
            case "steady":
                until = min(end_at, now + rng.uniform(5, 15))
                await asyncio.gather(*(ask_until(until) for _ in range(rng.randint(1, num_rows))))
            case "burst":
                await asyncio.gather(*(exchange(client, mixture.next(), outcome, chaos) for _ in range(2 * num_rows)))
            case _:
                await asyncio.sleep(min(rng.uniform(0.5, 3), end_at - now))


async def soak(
    service: Service, *, seconds: float, seed: int, faults: bool
) -> tuple[Outcome, Watch, Chaos, list[Growth]]:
    outcome = Outcome()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as observer:
        await service.ready(observer)
        _, model = await service.metrics(observer)
        context_length, vocab_size = int(model["context_length"]), int(model["vocab_size"])
        mixture = Mixture(seed, context_length=context_length, vocab_size=vocab_size)
        watch = Watch(service, observer)
        chaos = Chaos(service, observer, random.Random(seed))  # noqa: S311
        before = await watch.sample()
        beside = [asyncio.create_task(watch.run(max(0.5, min(5, seconds / 100))))]
        if faults:
            beside.append(asyncio.create_task(chaos.run(_PAUSE_SECONDS)))
        try:
            async with httpx.AsyncClient(base_url=service.url, timeout=600, limits=limits) as client:
                await drive(client, mixture, outcome, chaos, num_rows=int(model["max_num_seqs"]), seconds=seconds)
        finally:
            for task in beside:
                task.cancel()
            ended = await asyncio.gather(*beside, return_exceptions=True)
        outcome.faults += [f"broken off: {error!r}" for error in ended if not isinstance(error, asyncio.CancelledError)]
        outcome.faults += chaos.faults
        growths = watch.growths()
        outcome.faults += growth_faults(growths)
        try:
            await service.ready(observer)  # the last fault may have been a moment ago
            after = await watch.idle()
            values, _ = await service.metrics(observer)
        except (httpx.HTTPError, psutil.Error, RuntimeError) as error:
            outcome.faults.append(f"the service was gone: {error!r}")
            return outcome, watch, chaos, growths
    for name in ("running", "waiting", "queued_tokens", "kv_usage"):
        if value := getattr(after, name):
            outcome.faults.append(f"{name} is {value:g} when all is answered")
    for name, count in after.descriptors.items():
        if count > before.descriptors[name] + SPARE_DESCRIPTORS:
            outcome.faults.append(f"{name}: {count} open descriptors, {before.descriptors[name]} before")
    if values["engine_restarts_total"] != len(chaos.outages):
        outcome.faults.append(
            f"the engine was started again {values['engine_restarts_total']:g} times, for {len(chaos.outages)} faults"
        )
    return outcome, watch, chaos, growths


def is_fault(line: str, *, injected: bool = False) -> bool:
    """Of the log: an error, or what is none of its lines. Faults that were `injected` explain those of engines."""
    try:
        record = json.loads(line)
        explained = injected and record["message"].startswith(_EXPLAINED)
        return record["level"] not in ("INFO", "WARNING") and not explained
    except (ValueError, LookupError, TypeError):
        return bool(line.strip())


def report(outcome: Outcome, watch: Watch, chaos: Chaos, growths: Sequence[Growth]) -> str:
    lines = [f"{count:7} {kind}" for kind, count in sorted(outcome.counts.items())]
    lines.append(f"{sum(outcome.counts.values()):7} requests, {len(watch.samples)} samples")
    lines += [f"{count:7} x {name}" for name, count in Counter(name for _, name in chaos.marks).most_common()]
    lines += growth_table(growths)
    first, last = watch.samples[0].descriptors, watch.samples[-1].descriptors
    lines += [f"{name}: {first[name]} open descriptors before, {count} after" for name, count in last.items()]
    lines += [f"{count} x {fault}" for fault, count in Counter(outcome.faults).most_common(30)]
    lines.append(f"{len(outcome.faults)} faults")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        help="a GPT-2 folder; by default random weights of the 345M's shape on a GPU, the demo model on a CPU",
    )
    parser.add_argument("--seconds", type=float, default=300, help="of load (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and faults")
    parser.add_argument("--faults", action=argparse.BooleanOptionalAction, default=True, help="inject faults")
    parser.add_argument("--out", type=Path, help="write .json and .svg beside this name")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    model = given_or_demo(arguments.model)
    flags = list(arguments.flags)
    if arguments.faults:
        flags += ["--max-restarts", "1000000", "--stall-seconds", str(STALL_SECONDS)]
    with given_or_random(model) as folder:
        service = Service(folder, flags)
        try:
            outcome, watch, chaos, growths = asyncio.run(
                soak(service, seconds=arguments.seconds, seed=arguments.seed, faults=arguments.faults)
            )
        finally:
            code = service.end()
    if code:
        outcome.faults.append(f"exit code {code} after the drain")
    lines = [line.strip() for line in service.log if is_fault(line, injected=arguments.faults)]
    outcome.faults += [f"a log line: {line}" for line in lines]
    print(report(outcome, watch, chaos, growths))
    if arguments.out is not None:
        found = {
            "model": "random 345M" if model is None else model.name,
            "counts": outcome.counts,
            "injected": chaos.marks,
            "faults": outcome.faults,
        }
        latencies = dict(outcome.latencies)
        keep(arguments.out, "bench.soak", watch, found, latencies=latencies, marks=chaos.marks)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
