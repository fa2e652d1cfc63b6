"""A real nginx with docker/nginx.conf, in front of replicas on ports of this machine. Used by test_nginx.py."""

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.deploy.tools import ROOT

CONFIG = ROOT / "docker" / "nginx.conf"
_STREAMING = "proxy_buffering off;\n            gzip off;"
_HOSTILE = "proxy_buffering on; gzip on; gzip_types *; gzip_min_length 0; gzip_proxied any;"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Nginx:
    url: str
    log: Path  # of its requests and of its errors

    def lines(self, text: str) -> list[str]:
        """Those of its log that have `text`."""
        return [line for line in self.log.read_text().splitlines() if text in line]


def render(folder: Path, port: int, replicas: Sequence[int], *, hostile: bool = False, deaf: bool = False) -> str:
    """docker/nginx.conf for this machine: its port, its replicas' ports, its folder; nothing else is changed.

    `hostile` buffers and packs whatever it can; `deaf` does not hear what an answer says against that.
    """
    servers = " ".join(f"server 127.0.0.1:{replica} max_fails=0;" for replica in replicas)
    changes = [
        ("listen 8080;", f"listen 127.0.0.1:{port};"),
        ("server megatron-gpt2:8000 max_fails=0;", servers),
        ("/tmp/", f"{folder}/"),
    ]
    if hostile:
        changes.append((_STREAMING, _HOSTILE + (" proxy_ignore_headers X-Accel-Buffering;" if deaf else "")))
    text = CONFIG.read_text()
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    return text


@contextmanager
def running(folder: Path, replicas: Sequence[int], *, hostile: bool = False, deaf: bool = False) -> Iterator[Nginx]:
    """nginx until the end of the block; it ends by SIGQUIT, as compose has it, and with 0."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(render(folder, port, replicas, hostile=hostile, deaf=deaf))
    log = folder / "nginx.log"
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    # As root its workers would be another user, who cannot enter the folder.
    command = [program, "-p", str(folder), "-c", str(config), "-e", "stderr", "-g", "daemon off; user root;"]
    with log.open("a") as output:  # which nginx opens once more, for the requests
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(port, process, log)
        yield Nginx(f"http://127.0.0.1:{port}", log)
        process.send_signal(3)
        assert 0 == process.wait(30)
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its workers too, which a SIGKILL would leave behind
            process.wait(10)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when it listens: its own refusal of /metrics is an answer that asks no replica."""
    transport = httpx.HTTPTransport(retries=6)  # of refused connections, the pause between them growing
    with httpx.Client(transport=transport) as client:
        assert 404 == client.get(f"http://127.0.0.1:{port}/metrics").status_code, log.read_text()
    assert process.poll() is None, log.read_text()
