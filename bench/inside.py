"""The decode step inside the service beside the bare runner: milliseconds while so many streams decode and none begins.

python -m bench.inside [--model FOLDER] [--streams 1,64,256] [--context 192] [--out FOLDER/NAME] [-- flags of serve]

All streams begin at once, and each step gives each a token. Measured is while all of them decode, and their mean
context is within 64 tokens of the one asked for, by when a client reads events and how many tokens they bring.
"""

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import torch
import uvloop

from bench.decode import load, machine, runner_for, step_seconds
from bench.random_model import given_or_random
from bench.served import Service
from service.checkpoint.hub import read_config
from service.load.connection import Connection
from service.load.plan import Server
from service.model.formats import format_for
from service.model.gpt2 import GPT2
from service.version import VERSION

HALF_WINDOW = 64  # tokens on each side of the context, of the streams' mean
Marks = Sequence[tuple[float, int]]  # of one stream: when an event was read, and the context of its last token's step


@dataclass(frozen=True, slots=True)
class Row:
    streams: int
    context: int
    inside_ms: float  # median over the windows
    inside_least_ms: float
    inside_most_ms: float
    window_steps: int  # of the shortest window
    bare_ms: float
    ratio: float


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Event(msgspec.Struct):
    usage: Usage


class Reader(Connection):
    """Keeps the events of its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[float, bytes]] = []

    def on_event(self, event: bytes, read_at: float) -> None:
        super().on_event(event, read_at)
        self.events.append((read_at, event))

    def marks(self) -> Marks:
        decoder = msgspec.json.Decoder(Event)
        usages = [(read_at, decoder.decode(event.removeprefix(b"data:")).usage) for read_at, event in self.events]
        return [(read_at, usage.prompt_tokens + usage.completion_tokens - 1) for read_at, usage in usages]


def window(streams: Sequence[Marks], low: int, high: int) -> tuple[float, int]:
    """Seconds a step while all streams decode, and their mean context, which says what a step costs, is in [low, high].

    And how many steps each stream had at least. Raises ValueError where two events of a stream are not in that time.
    """
    times = np.unique([at for marks in streams for at, _ in marks])
    times = times[(times >= max(marks[0][0] for marks in streams)) & (times <= min(marks[-1][0] for marks in streams))]
    contexts = np.mean([np.interp(times, *np.transpose(marks)) for marks in streams], axis=0)
    times = times[(contexts >= low) & (contexts <= high)]
    within = [[mark for mark in marks if len(times) and times[0] <= mark[0] <= times[-1]] for marks in streams]
    if any(len(marks) < 2 for marks in within):
        raise ValueError(f"{len(streams)} streams never decoded together at {low} to {high} tokens for two events")
    steps = [marks[-1][1] - marks[0][1] for marks in within]
    return sum(marks[-1][0] - marks[0][0] for marks in within) / sum(steps), min(steps)


async def together(server: Server, num_streams: int, context: int, *, most: int, seed: int) -> list[Marks]:
    """Streams of random prompts, greedy as the bare step is, all asked for at once, each to `most` tokens."""
    rng = random.Random(seed)  # noqa: S311
    num_prompt = max(1, context // 4)
    fields = {
        "max_tokens": most - num_prompt,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    bodies = [{"prompt": rng.choices(range(50256), k=num_prompt), **fields} for _ in range(num_streams)]
    requests = [server.request("/v1/completions", msgspec.json.encode(body)) for body in bodies]
    readers = [await Reader.open(server) for _ in requests]
    answers = await asyncio.gather(
        *(
            reader.ask(request, stream=True, begun_at=0, timeout_seconds=600)
            for reader, request in zip(readers, requests, strict=True)
        )
    )
    for reader in readers:
        reader.abort()
    if errors := {answer.error for answer in answers if answer.error is not None}:
        raise RuntimeError(f"{num_streams} streams: {', '.join(sorted(errors))}")
    return [reader.marks() for reader in readers]


async def inside(
    service: Service, stream_counts: Sequence[int], context: int, repeats: int
) -> tuple[dict[int, list[tuple[float, int]]], dict[str, str]]:
    """The windows of each number of streams, and what the engine has loaded."""
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        await service.ready(client)
        _, model = await service.metrics(client)
    most = min(int(model["context_length"]), 2 * (context + HALF_WINDOW))  # the first stream may be far ahead
    if context + HALF_WINDOW > most:
        raise ValueError(f"--context: must leave {HALF_WINDOW} of {model['context_length']} tokens")
    windows = {}
    server = Server.at(service.url)
    for count in stream_counts:
        rounds = []
        for number in range(repeats + 1):
            marks = await together(server, count, context, most=most, seed=1000 * count + number)
            rounds.append(window(marks, max(1, context - HALF_WINDOW), context + HALF_WINDOW))
        windows[count] = rounds[1:]  # without the one that warms up
        print(f"{count} streams: {[round(1000 * each, 3) for each, _ in windows[count]]} ms", file=sys.stderr)
    return windows, model


@torch.inference_mode()
def bare(model: GPT2, steps: Sequence[tuple[int, int]], repeats: int) -> list[float]:
    """Seconds of each step in the bare runner."""
    runner = runner_for(model, steps)
    try:
        return [step_seconds(runner, *step, repeats) for step in steps]
    finally:
        runner.close()


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Row]]:
    service = Service(folder, arguments.flags)
    try:
        windows, model = uvloop.run(inside(service, arguments.streams, arguments.context, arguments.repeats))
    finally:
        service.end()
    name, _, cache = model["dtype"].partition(" ")
    stored, kv_cache = read_config(folder).dtype, "fp8" if cache else "auto"
    weights = format_for(name, torch.device(model["device"]), stored=stored, kv_cache=kv_cache)
    steps = [(count, arguments.context) for count in arguments.streams]
    loaded = argparse.Namespace(model=folder, device=model["device"])
    alone = bare(load(loaded, weights), steps, arguments.bare_steps)
    rows = []
    for (count, context), seconds in zip(steps, alone, strict=True):
        times = [1000 * each for each, _ in windows[count]]
        middle = statistics.median(times)
        rows.append(
            Row(
                streams=count,
                context=context,
                inside_ms=middle,
                inside_least_ms=min(times),
                inside_most_ms=max(times),
                window_steps=min(num_steps for _, num_steps in windows[count]),
                bare_ms=1000 * seconds,
                ratio=middle / (1000 * seconds),
            )
        )
    return machine(loaded, weights), rows


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; by default random weights of the 345M's shape")
    parser.add_argument("--streams", default="1,64,256" if on_gpu else "1,8", help="default %(default)s")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=7 if on_gpu else 3, help="windows, of which the median counts")
    parser.add_argument("--bare-steps", type=int, default=100 if on_gpu else 16)
    parser.add_argument("--out", type=Path, help="write .json beside this name")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    arguments.streams = [int(count) for count in arguments.streams.split(",")]
    with given_or_random(arguments.model) as folder:
        about, rows = measure(arguments, folder)
    about |= {"model": "random 345M" if arguments.model is None else arguments.model.name, "version": VERSION}
    about["command"] = shlex.join(["python", "-m", "bench.inside", *sys.argv[1:]])
    print(about)
    print("streams context  inside ms (least, most)  bare ms  ratio")
    for row in rows:
        spread = f"({row.inside_least_ms:.3f}, {row.inside_most_ms:.3f})"
        print(f"{row.streams:7} {row.context:7} {row.inside_ms:10.3f} {spread:>16} {row.bare_ms:8.3f} {row.ratio:6.2f}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        arguments.out.with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
