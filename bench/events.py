"""What an event and a request cost the API process: processor microseconds, over an engine process that only publishes.

python -m bench.events [--streams 256] [--interval-ms 20] [--tokens-per-event 4] [--log-level info] [--out FILE]
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

import service.api.process as api
from service.api.text import load_tokenizer
from service.engine.channel import Channel, ChannelClosed
from service.engine.request import Delta, Finish, ModelInfo, Publish, Ready, Submit, ToEngine
from service.load.crowd import Crowd
from service.load.figures import Figures, figures_of
from service.load.plan import Level, Plan, Server
from service.serve import DEMO_MODEL, api_config
from service.settings import Settings

TEXT = "Plants create energy through a process known as photosynthesis, which turns light, water and air into sugar. "
SHORT, LONG = 128, 896  # tokens of an answer: as the targets have it, and one of events alone
MODEL = ModelInfo(
    folder=str(DEMO_MODEL),
    context_length=1024,
    vocab_size=50257,
    end_of_text_id=50256,
    num_blocks=100_000,
    block_size=16,
    max_num_seqs=256,
    dtype="bfloat16",
    device="cpu",
    num_layers=24,
    hidden_size=1024,
    num_heads=16,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a request, in processor microseconds; `load` is the share of a core that was in use."""

    user: float
    system: float
    load: float

    def of_event(self, fewer: "Cost", num_events: float) -> dict[str, float]:
        """What this costs more than `fewer`, by the events that it has more."""
        user, system = (self.user - fewer.user) / num_events, (self.system - fewer.system) / num_events
        return {"user": round(user, 2), "system": round(system, 2), "all": round(user + system, 2)}

    def without(self, event: dict[str, float], num_events: float) -> dict[str, float]:
        user, system = self.user - num_events * event["user"], self.system - num_events * event["system"]
        return {"user": round(user, 1), "system": round(system, 1), "all": round(user + system, 1)}


class Engine:
    """Answers every request with the same text: a token at once, then some for every sequence at each interval.

    A patient one, as the service's engine has it, is told of at its end alone after that.
    """

    def __init__(self, sock: socket.socket, text: tuple[int, ...], *, interval: float, tokens_per_event: int) -> None:
        self._channel = Channel(sock, ToEngine)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._text = text
        self._interval = interval
        self._tokens_per_event = tokens_per_event
        self._open: dict[int, tuple[int, int]] = {}  # request id -> tokens made and wanted
        self._untold: dict[int, int] = {}  # request id, of patient ones -> tokens that no Delta has told

    def run(self) -> None:
        """Until the API process closes the channel."""
        due_at = 0.0
        try:
            self._channel.send(Ready(MODEL))
            while True:
                wait = 1000 * max(0.0, due_at - time.monotonic())
                self._poll.poll(math.ceil(wait) if self._open else None)
                begun = [message for message in self._channel.receive() if isinstance(message, Submit)]
                for submit in begun:
                    ids = tuple(request.id for request in submit.requests)
                    self._open |= dict.fromkeys(ids, (0, submit.params.max_tokens))
                    self._channel.send(Publish(started=ids, deltas=self._next(ids, 1)))
                    if submit.patient:
                        self._untold |= dict.fromkeys(ids, 0)
                if (now := time.monotonic()) >= due_at and self._open:
                    due_at = max(due_at + self._interval, now)
                    if deltas := self._next([*self._open], self._tokens_per_event):
                        self._channel.send(Publish(deltas=deltas))
        except ChannelClosed:
            return

    def _next(self, ids: Sequence[int], count: int) -> tuple[Delta, ...]:
        """What there is to tell when each of `ids` has so many tokens more."""
        deltas = []
        for each in ids:
            made, wanted = self._open[each]
            end = min(made + count, wanted)
            self._open[each] = end, wanted
            start = made - self._untold.get(each, 0)
            if end == wanted:
                del self._open[each]
                self._untold.pop(each, None)
            elif each in self._untold:
                self._untold[each] = end - start
                continue
            deltas.append(Delta(each, 0, self._text[start:end], Finish.LENGTH if end == wanted else None))
        return tuple(deltas)


def run_engine(sock: socket.socket, text: tuple[int, ...], interval: float, tokens_per_event: int) -> None:
    Engine(sock, text, interval=interval, tokens_per_event=tokens_per_event).run()


def run_api(config: api.ApiConfig, listener: socket.socket, control: socket.socket) -> None:
    """The service's own API process, whose log lines are written to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    api.main(config, listener, [], control)


def start(arguments: argparse.Namespace) -> tuple[BaseProcess, socket.socket, Server]:
    """The API process when it is ready, the socket that it hears its supervisor on, and where it listens."""
    spawn = multiprocessing.get_context("spawn")
    tokenizer = load_tokenizer(DEMO_MODEL, end_of_text_id=MODEL.end_of_text_id)
    (ids,) = tokenizer.encode([TEXT * 100])
    control, api_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Not read from the environment: a key or a bound there would be measured too.
    settings = Settings.model_construct(served_model_name=("demo",), log_level=arguments.log_level)
    config = api_config(settings, json_lines=True)
    process = spawn.Process(target=run_api, args=(config, listener, api_control), daemon=True)
    process.start()
    ours, theirs = socket.socketpair()
    interval = arguments.interval_ms / 1000
    engine = spawn.Process(
        target=run_engine, args=(theirs, tuple(ids[:1024]), interval, arguments.tokens_per_event), daemon=True
    )
    engine.start()
    socket.send_fds(control, [api.said(api.ENGINE, 0)], [ours.fileno()])
    ours.close()
    theirs.close()
    while not control.recv(64).startswith(api.READY):
        pass
    return process, control, Server.at(f"http://127.0.0.1:{listener.getsockname()[1]}")


def measure(process: BaseProcess, plan: Plan, *, streams: int, requests: int, **fields: Any) -> tuple[Figures, Cost]:
    """The client's figures of so many requests, and what each cost the API process."""
    plan = replace(plan, fields=dict(plan.fields) | fields, requests=requests)
    level = Level("closed", streams)
    with Crowd(replace(plan, requests=streams)) as crowd:  # connections, caches
        crowd.measure(level)
    with Crowd(plan) as crowd:
        before, began = psutil.Process(process.pid).cpu_times(), time.monotonic()
        tallies, _ = crowd.measure(level)
        after, elapsed = psutil.Process(process.pid).cpu_times(), time.monotonic() - began
    figures = figures_of(level, plan, tallies, interrupted=False)
    assert figures.requests == requests, figures.errors
    user, system = after.user - before.user, after.system - before.system
    return figures, Cost(1e6 * user / requests, 1e6 * system / requests, (user + system) / elapsed)


def costs(process: BaseProcess, server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(
        server=server,
        fields={"model": "demo", "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}},
        requests=1,
        processes=arguments.processes,
    )
    streams, requests = arguments.streams, arguments.requests
    long, of_long = measure(process, plan, streams=streams, requests=requests // 2, max_tokens=LONG)
    short, of_short = measure(process, plan, streams=streams, requests=requests, max_tokens=SHORT)
    _, of_whole = measure(process, plan, streams=streams, requests=requests, max_tokens=SHORT, stream=False)
    assert long.tokens_per_event
    assert short.tokens_per_event
    events = LONG / long.tokens_per_event, SHORT / short.tokens_per_event
    of_event = of_long.of_event(of_short, events[0] - events[1])
    return {
        "about": vars(arguments) | {"out": None, "python": platform.python_version(), "date": time.strftime("%F")},
        "event_us": of_event,
        "streamed_request_us": of_short.without(of_event, events[1]),
        "plain_request_us": of_whole.without(of_event, 0),
        "events_a_request": [round(count, 1) for count in events],
        "events_per_second": long.events_per_second,
        "api_load": round(of_long.load, 3),
        "client_us_per_event": long.client_microseconds_per_event,
        "gap_p99_ms": long.gap.p99 if long.gap else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--interval-ms", type=float, default=20)
    parser.add_argument("--tokens-per-event", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    process, control, server = start(arguments)
    try:
        text = json.dumps(costs(process, server, arguments), indent=1)
    finally:
        control.send(api.STOP)
        process.join(5)
        process.kill()
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
