"""A served model, as a process tree of its own. Used by end_to_end.py, inside.py, overload.py and soak.py."""

import asyncio
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "megatron_gpt2_"


class Service:
    """A served model, as a process tree of its own."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        self.began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "service.cli",
            "serve",
            str(model),
            "--port",
            "0",
            "--log-format",
            "json",
            *flags,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own command
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1]
                self.listening_seconds = time.perf_counter() - self.began
                break
        else:
            raise RuntimeError("the service ended before it listened")
        self.log: list[str] = []
        self.log_seconds: list[float] = []  # from the command to each line
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self.log_seconds.append(time.perf_counter() - self.began)
            self.log.append(line)

    def said(self, words: str) -> float:
        """Seconds from the command to the first line of the log that has these words. Raises LookupError."""
        for line, seconds in zip(self.log, self.log_seconds, strict=False):
            if words in line:
                return seconds
        raise LookupError(words)

    async def ready(self, client: httpx.AsyncClient, *, look_seconds: float = 0.05) -> float:
        """Seconds until /readyz is 200."""
        began = time.perf_counter()
        while (await client.get("/readyz")).status_code != 200:
            if self.process.poll() is not None:
                raise RuntimeError("the service ended:\n" + "".join(self.log))
            await asyncio.sleep(look_seconds)
        return time.perf_counter() - began

    def processes(self) -> dict[str, psutil.Process]:
        """By name: the supervisor and what it has spawned, first the API process, then the engine, if it is there."""
        supervisor = psutil.Process(self.process.pid)
        children = sorted(supervisor.children(), key=psutil.Process.create_time)
        spawned = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        return dict(zip(("supervisor", "api", "engine"), (supervisor, *spawned), strict=False))

    async def metrics(self, client: httpx.AsyncClient) -> tuple[dict[str, float], dict[str, str]]:
        """The values that have no labels, by their names without the prefix; and what the engine has loaded."""
        families = text_string_to_metric_families((await client.get("/metrics")).text)
        samples = [sample for family in families for sample in family.samples]
        values = {each.name.removeprefix(_PREFIX): each.value for each in samples if not each.labels}
        (model,) = (each.labels for each in samples if each.name == f"{_PREFIX}model_info")
        return values, model

    def end(self) -> int:
        """Drain it; the exit code. Whatever has not ended then is killed, and the code is not 0."""
        self.process.terminate()
        try:
            self.process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reader.join(10)
        return self.process.wait()
