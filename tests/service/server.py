"""A served model as a stranger runs it: the console script with its process tree, and a client of it over HTTP."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

COMMAND = Path(sys.executable).with_name("megatron-gpt2")
_POLL_SECONDS = 0.01
_Result = TypeVar("_Result")


async def eventually(condition: Callable[[], Awaitable[_Result]], *, seconds: float = 20) -> _Result:
    """The first true result of `condition`; TimeoutError when there is none within `seconds`."""
    async with asyncio.timeout(seconds):
        while not (result := await condition()):  # noqa: ASYNC110 - it is in other processes, which set no event
            await asyncio.sleep(_POLL_SECONDS)
    return result


def survivors(processes: list[psutil.Process], *, seconds: float) -> list[psutil.Process]:
    """Those of `processes` that have not ended within `seconds`. An orphan that nobody reaps has ended."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if _is_alive(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Server:
    """`megatron-gpt2 serve` on a free port, from its first log line to its end. It leads a process group."""

    def __init__(
        self, *arguments: str, environment: Mapping[str, str] | None = None, verify: ssl.SSLContext | bool = True
    ) -> None:
        """`environment` is added to that of the tests; `verify` is httpx's, for a server with a certificate."""
        self.verify = verify
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MGPT_")}
        self.process = subprocess.Popen(
            [COMMAND, "serve", *arguments, "--port", "0", "--cpu-threads", "1", "--log-format", "json"],
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, **(environment or {})},
            start_new_session=True,
        )
        self.log: list[str] = []
        self._seen: list[psutil.Process] = []
        assert self.process.stderr is not None
        listening = None
        while listening is None:
            line = self.process.stderr.readline()
            assert line, f"ended without listening: {self.log}"
            self.log.append(line)
            message = json.loads(line)["message"]
            if message.startswith("listening on "):
                listening = message.split()[2]
        self.url: str = listening
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._reader.start()

    def wait_ready(self, seconds: float = 90) -> None:
        """Return when /readyz is 200, and every engine is ready."""
        with httpx.Client(base_url=self.url, timeout=seconds, verify=self.verify) as http:
            deadline = time.monotonic() + seconds

            def all_ready() -> bool:
                phases = [line for line in http.get("/metrics").text.splitlines() if "_phase{" in line]
                return all('phase="ready"' in line for line in phases)

            while http.get("/readyz").status_code != 200 or not all_ready():
                assert time.monotonic() < deadline, self.log
                time.sleep(_POLL_SECONDS)

    async def wait_children(self) -> None:
        """Return when the API and the engine process are there, and the standard library's resource tracker."""

        async def all_started() -> bool:
            return len(self.children) == 3

        await eventually(all_started)

    @property
    def children(self) -> list[psutil.Process]:
        """Every process below the supervisor, the oldest first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self._seen += [child for child in children if child not in self._seen]
        return sorted(children, key=psutil.Process.create_time)

    @property
    def api(self) -> psutil.Process:
        return self._spawned()[0]

    @property
    def engine(self) -> psutil.Process:
        """The engine process, which must be there and the only one."""
        engines = self.engines
        assert len(engines) == 1, engines
        return engines[0]

    @property
    def engines(self) -> list[psutil.Process]:
        """The engine processes that are there, the oldest first."""
        return self._spawned()[1:]

    @property
    def ranks(self) -> list[psutil.Process]:
        """The engine's other ranks."""
        return self.ranks_of(self.engine)

    def ranks_of(self, engine: psutil.Process) -> list[psutil.Process]:
        """Those of one of several."""
        return self._spawned(engine.pid)

    def _spawned(self, parent: int | None = None) -> list[psutil.Process]:
        """Children of the supervisor, or of another process, that Python has spawned."""
        parent = self.process.pid if parent is None else parent
        children = [child for child in self.children if child.ppid() == parent]
        return [child for child in children if any("spawn_main" in word for word in child.cmdline())]

    def open_connection(self, *, receive_bytes: int | None = None) -> socket.socket:
        """A connection to its port, for a client that does what none should; it may have little room for answers."""
        url = httpx.URL(self.url)
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((url.host, url.port))
        return connection

    def signal_group(self, number: signal.Signals) -> None:
        """To every process of the tree, as a terminal sends Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit code. Fails when the supervisor, or anyone it ever had below it, is still there after `seconds`."""
        code = self.process.wait(seconds)
        assert not survivors(self._seen, seconds=2)
        self._reader.join(2)  # at the end of the pipe, which every process of the tree holds
        assert not self._reader.is_alive()
        return code

    def kill(self) -> None:
        """End whatever is left, and let go of it."""
        for process in (*self._seen, self.process):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def until_drained(server: Server) -> Iterator[Server]:
    """For a fixture: `server` when it is ready; drained in the end, which must go well."""
    try:
        server.wait_ready()
        assert server.engines  # this also notes who must be gone at the end
        yield server
        server.process.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()


@dataclass
class Streamed:
    """A streamed answer, as a client of server-sent events sees it."""

    pieces: dict[int, list[str]] = field(default_factory=dict)  # by choice
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False

    def text(self, choice: int = 0) -> str:
        return "".join(self.pieces.get(choice, []))

    def take(self, line: str) -> None:
        """One line of the body. Nothing may follow [DONE], nor a choice's finish."""
        if not line or line.startswith(":"):
            return
        assert not self.done
        assert line.startswith("data: ")
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        self.usage = event.get("usage")
        for choice in event["choices"]:
            assert choice["index"] not in self.finish_reasons
            self.pieces.setdefault(choice["index"], []).append(choice["text"])
            if choice["finish_reason"] is not None:
                self.finish_reasons[choice["index"]] = choice["finish_reason"]


class Client:
    """HTTP to one server."""

    def __init__(self, url: str, *, verify: ssl.SSLContext | bool = True) -> None:
        """`verify` is httpx's, for a server with a certificate."""
        limits = httpx.Limits(max_connections=200)
        self.http = httpx.AsyncClient(base_url=url, timeout=100, limits=limits, verify=verify)

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=body)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """A plain answer, which must be a 200."""
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, **body: Any) -> Streamed:
        """A streamed answer, which must begin with a 200, to the end of its body."""
        streamed = Streamed()
        async with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                streamed.take(line)
        return streamed

    async def status(self, path: str) -> int:
        return (await self.http.get(path)).status_code

    async def metric(self, name: str) -> float:
        """The value of the metric megatron_gpt2_`name`, which has no labels; of several engines their sum."""
        return sum(await self.metric_by_engine(name))

    async def metric_by_engine(self, name: str) -> list[float]:
        """The same, of each engine."""
        found = await self.samples(name)
        values = {labels.get("engine"): value for labels, value in found if labels.keys() <= {"engine"}}
        assert values, name
        assert values.keys() == {None} or values.keys() == {str(number) for number in range(len(values))}, values
        return list(values.values())

    async def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample of the metric megatron_gpt2_`name`."""
        families = text_string_to_metric_families((await self.http.get("/metrics")).text)
        samples = [sample for family in families for sample in family.samples]
        return [(sample.labels, sample.value) for sample in samples if sample.name == f"megatron_gpt2_{name}"]

    async def wait_metric(self, name: str, value: float, *, seconds: float = 20) -> None:
        """Return once the metric has this value."""

        async def reached() -> bool:
            return await self.metric(name) == value

        await eventually(reached, seconds=seconds)

    async def wait_status(self, path: str, status: int, *, seconds: float = 60) -> None:
        async def answered() -> bool:
            return await self.status(path) == status

        await eventually(answered, seconds=seconds)


# What the fixtures `start` and `connect` give.
Start = Callable[..., Server]
Connect = Callable[[Server], Client]


def assert_unavailable(response: httpx.Response) -> None:
    """503 + Retry-After, in the envelope."""
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "service_unavailable"
