"""Each alert fires in a real Prometheus over a real service to which the thing happens; and is in the runbook.

The rules are the shipped ones with shorter times (`scaled`); expressions and thresholds are as they are.
"""

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deploy.prometheus import Prometheus, shipped_rules
from tests.deploy.tools import ROOT
from tests.service.conftest import one_thread, scripted_model, start, tokenizer
from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import COMMAND, Server, Start

__all__ = ["one_thread", "scripted_model", "start", "tokenizer"]
OF_A_CROWD = ("MegatronGpt2QueueHigh", "MegatronGpt2FirstTokenSlow", "MegatronGpt2KvCacheFull")
OF_RESTARTS = ("MegatronGpt2RestartLoop", "MegatronGpt2Errors")
OF_AN_ENGINE = LOST, AWAY = ("MegatronGpt2EngineLost", "MegatronGpt2EngineNotReady")
OF_A_LIFE = NOT_READY, SLOW, DRAINING, DOWN = (
    "MegatronGpt2NotReady",
    "MegatronGpt2TokensSlow",
    "MegatronGpt2DrainSlow",
    "MegatronGpt2Down",
)
STREAM = {**LONGEST, "stream": True}
SCRAPE_SECONDS = 30.0  # far longer than any takes, on a machine that does much else
Watch = Callable[[Server], Prometheus]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """A Prometheus of one service, which scrapes it."""
    started: list[Prometheus] = []

    def start_prometheus(server: Server) -> Prometheus:
        started.append(Prometheus(tmp_path, [server.url]))
        prometheus = started[-1]
        prometheus.wait(lambda: prometheus.query("up == 1"), seconds=SCRAPE_SECONDS, what="the target to be up")
        return prometheus

    yield start_prometheus
    for prometheus in started:
        prometheus.close()


@contextmanager
def in_thread(work: Callable[[], None], stopping: threading.Event) -> Iterator[None]:
    """Beside the block, at whose end `work` is told to stop, and has stopped."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@contextmanager
def asking(url: str, bodies: Sequence[dict[str, Any]]) -> Iterator[None]:
    """A client for each body, which asks for it again and again, whatever it is answered."""
    stopping = threading.Event()

    async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        while not stopping.is_set():
            try:
                response = await http.post("/v1/completions", json=body)
            except httpx.TransportError:
                return  # the service has ended
            if response.status_code != 200:
                await asyncio.sleep(0.05)

    async def ask_all() -> None:
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            tasks = [asyncio.create_task(ask(http, body)) for body in bodies]
            await asyncio.to_thread(stopping.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with in_thread(lambda: asyncio.run(ask_all()), stopping):
        yield


@contextmanager
def throttled(process: psutil.Process) -> Iterator[None]:
    """A process that gets its turn for a moment every second, as under a limit of CPU time."""
    stopping = threading.Event()

    def throttle() -> None:
        while not stopping.is_set():
            process.suspend()
            stopping.wait(0.9)
            process.resume()
            stopping.wait(0.05)

    with in_thread(throttle, stopping):
        yield


def test_a_crowd(start: Start, watch: Watch, scripted_model: ScriptedModel) -> None:
    """More than it can do: the queue is high, first tokens are slow, and blocks are used up. Nothing else is wrong."""
    server = start(str(scripted_model.folder), "--max-num-seqs", "2", "--kv-memory", "12MiB")  # of one full context
    prometheus = watch(server)
    with asking(server.url, 100 * [{"prompt": [100] * 1000, "max_tokens": 23, "ignore_eos": True}]):
        prometheus.wait_firing(*OF_A_CROWD, seconds=150)
        assert set() == {DOWN, NOT_READY, *OF_RESTARTS} & prometheus.alerts("firing")


def test_an_engine_that_dies_again_and_again(start: Start, watch: Watch, scripted_model: ScriptedModel) -> None:
    """It restarts too often, and what it worked on ends in errors."""
    missing = set(OF_RESTARTS)
    server = start(str(scripted_model.folder), "--max-restarts", "100", "--restart-window-seconds", "0.1")
    prometheus = watch(server)
    with asking(server.url, 4 * [STREAM]), httpx.Client(base_url=server.url, timeout=60) as http:
        for number in range(100):
            wait_working(http, num_restarts=number)
            server.engine.kill()
            missing -= prometheus.alerts("firing")
            if not missing:
                return
    pytest.fail(f"never fired: {missing}")


def test_an_engine_of_two_that_is_given_up(start: Start, watch: Watch, scripted_model: ScriptedModel) -> None:
    """The service goes on with the other, and says so until it is started again."""
    server = start(str(scripted_model.folder), "--data-parallel-size", "2", "--max-restarts", "0")
    prometheus = watch(server)
    server.engines[1].kill()
    prometheus.wait_firing(LOST, seconds=SCRAPE_SECONDS)
    assert set() == {DOWN, NOT_READY} & prometheus.alerts("firing")


def test_an_engine_of_two_that_does_not_start(start: Start, watch: Watch, scripted_model: ScriptedModel) -> None:
    """The service goes on with the other; this one has done nothing that could be found stalled."""
    server = start(str(scripted_model.folder), "--data-parallel-size", "2", ready=False)
    _, engine = wait_engines(server, number=2)
    engine.suspend()
    prometheus = watch(server)
    prometheus.wait_firing(AWAY, seconds=90)
    assert set() == {DOWN, NOT_READY, LOST} & prometheus.alerts("firing")
    engine.resume()
    prometheus.wait(lambda: not prometheus.alerts("firing"), seconds=SCRAPE_SECONDS, what="nothing to fire")


def wait_working(http: httpx.Client, *, num_restarts: int) -> None:
    """Return when the engine that was started after so many others has requests to work on."""
    deadline = time.monotonic() + 60
    wanted = {f"megatron_gpt2_engine_restarts_total {num_restarts:.1f}", "megatron_gpt2_ready 1.0"}
    while (
        not wanted <= (lines := set(http.get("/metrics").text.splitlines()))
        or "megatron_gpt2_requests_running 0.0" in lines
    ):
        assert time.monotonic() < deadline, sorted(lines)
        time.sleep(0.05)


def test_a_life(start: Start, watch: Watch, scripted_model: ScriptedModel) -> None:
    """It does not get ready; then it is well; then slow; then a drain does not end; then it is away."""
    server = start(str(scripted_model.folder), "--stall-seconds", "600", "--drain-seconds", "60", ready=False)
    (engine,) = wait_engines(server, number=1)
    engine.suspend()
    prometheus = watch(server)
    prometheus.wait_firing(NOT_READY, seconds=90)
    engine.resume()
    server.wait_ready()
    prometheus.wait(lambda: not prometheus.alerts("firing"), seconds=SCRAPE_SECONDS, what="nothing to fire")

    with asking(server.url, [STREAM]):
        with throttled(engine):
            prometheus.wait_firing(SLOW, seconds=90)
            server.process.terminate()
            prometheus.wait_firing(DRAINING, seconds=SCRAPE_SECONDS)
        assert 0 == server.wait(60)
    prometheus.wait_firing(DOWN, seconds=SCRAPE_SECONDS)


def wait_engines(server: Server, *, number: int) -> list[psutil.Process]:
    """The processes of all engines, as soon as they run their own program."""
    deadline = time.monotonic() + 60
    while sum("spawn_main" in " ".join(child.cmdline()) for child in server.children) < 1 + number:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.01)
    return server.engines


def test_a_service_that_starts_again_and_again(tmp_path: Path, scripted_model: ScriptedModel) -> None:
    """The same address, a new process each time, as a container that is restarted."""
    process, url = serve_on(scripted_model.folder, port=0)
    with ExitStack() as stack:
        stack.callback(lambda: end(process))
        prometheus = stack.enter_context(closing(Prometheus(tmp_path, [url])))
        for number in range(3):
            query = f"changes(process_start_time_seconds[1m]) == {number}"
            prometheus.wait(lambda query=query: prometheus.query(query), seconds=SCRAPE_SECONDS, what=query)  # type: ignore[misc]
            end(process)
            process, _ = serve_on(scripted_model.folder, port=httpx.URL(url).port or 0)
        prometheus.wait_firing(OF_RESTARTS[0], seconds=SCRAPE_SECONDS)


def serve_on(folder: Path, *, port: int) -> tuple[subprocess.Popen[str], str]:
    """A service on a port, which it listens on, and its URL."""
    process = subprocess.Popen(
        [COMMAND, "serve", folder, "--port", str(port), "--log-format", "text", "--cpu-threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    url = next(match[1] for line in process.stderr if (match := re.search(r"listening on (http://\S+)", line)))
    return process, url


def end(process: subprocess.Popen[str]) -> None:
    """At once, with all its processes."""
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_every_alert_is_caused_here() -> None:
    """No alert is shipped that no test waits for."""
    assert {rule["alert"] for rule in shipped_rules()} == {*OF_A_CROWD, *OF_RESTARTS, *OF_AN_ENGINE, *OF_A_LIFE}


def test_the_runbook_has_a_line_an_alert() -> None:
    """docs/operations.md, Alerts: every alert, no other, with its severity."""
    text = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    lines = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert {rule["alert"]: rule["labels"]["severity"] for rule in shipped_rules()} == lines
    assert {"docs/operations.md#alerts"} == {rule["annotations"]["runbook"] for rule in shipped_rules()}
