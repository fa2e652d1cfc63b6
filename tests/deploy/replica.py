"""A replica that keeps its port when it is started anew, as a container keeps its address. Used by test_nginx.py."""

import os
import signal
import subprocess
from pathlib import Path

import httpx

from tests.deploy.nginx import free_port
from tests.service.server import COMMAND, eventually


class Replica:
    """The demo model on a port of its own; `log` is where its lines go, of all its starts."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MGPT_")}
        given = ("--port", str(self.port), "--cpu-threads", "1", "--kv-memory", "64MiB", "--log-format", "json")
        with self.log.open("a") as log:
            command = [COMMAND, "serve", *given]
            self._process = subprocess.Popen(command, stderr=log, env=inherited, start_new_session=True)
        return self._process

    async def start(self) -> None:
        """Return when it is ready."""
        process = self._spawn()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as http:

            async def ready() -> bool:
                assert process.poll() is None, self.log.read_text()
                try:
                    return (await http.get("/readyz")).status_code == 200
                except httpx.ConnectError:
                    return False

            await eventually(ready, seconds=90)

    async def stop(self) -> None:
        """SIGTERM, and its drain, which must go well."""
        process = self._process
        assert process is not None
        process.terminate()

        async def ended() -> bool:
            return process.poll() is not None

        await eventually(ended, seconds=90)
        assert 0 == process.returncode, self.log.read_text()
        self._process = None

    def kill(self) -> None:
        """Every process of it, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
