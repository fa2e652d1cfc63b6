"""buildah and podman with a store of their own: nothing of this machine's images and containers is read or changed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_STORAGE = """
[storage]
driver = "overlay"
runroot = "{folder}/run"
graphroot = "{folder}/root"
"""
# runc, as crun refuses machines that have both kinds of cgroups; limits that a machine gives everybody.
_CONTAINERS = """
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/tmp"
"""


class Engine:
    """Whatever it has made is gone after `close`."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made, and must have a short name: sockets lie in it."""
        self.folder = folder
        folder.mkdir(parents=True)
        self.environment = dict(os.environ)
        for name, text in (("STORAGE", _STORAGE), ("", _CONTAINERS)):
            file = folder / f"{name or 'containers'}.conf"
            file.write_text(text.format(folder=folder))
            self.environment["_".join(filter(None, ("CONTAINERS", name, "CONF")))] = str(file)

    def begin(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """The command, whose output is read from it."""
        words = [str(word) for word in command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(words, cwd=ROOT, env=self.environment, text=True, **pipes)

    def run(self, *command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """The command's end; `text` is its standard input. Does not raise for its exit code."""
        process = self.begin(*command, stdin=subprocess.PIPE if text else subprocess.DEVNULL)
        output, errors = process.communicate(text)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def output(self, *command: str | Path, text: str | None = None) -> str:
        """What the command says on standard output; an AssertionError with all that it says where it fails."""
        done = self.run(*command, text=text)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr}"
        return done.stdout.strip()

    def inspect(self, name: str, *, kind: str = "container") -> dict[str, Any]:
        (found,) = json.loads(self.output("podman", "inspect", "--type", kind, name))
        assert isinstance(found, dict)
        return found

    def start(self, image: str, *options: str, command: tuple[str, ...] = ()) -> str:
        """The id of a new container, which runs."""
        return self.output("podman", "run", "--detach", "--pull=never", *options, image, *command)

    @contextmanager
    def ready(self, image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[str]:
        """A new container whose service is ready; removed in the end, with what it has written."""
        container = self.start(image, *options, command=command)
        try:
            self.wait_ready(container)
            yield container
        finally:
            self.run("podman", "rm", "--force", "--time", "0", "--volumes", container)

    def ask(self, container: str, *request: str) -> subprocess.Popen[str]:
        """A request from inside the container's network, by a process outside of it; ask.py says what it prints."""
        asking = [sys.executable, str(Path(__file__).with_name("ask.py")), *request]
        within = ["nsenter", f"--net={self.network(container)}"]
        return subprocess.Popen([*within, *asking], stdout=subprocess.PIPE, text=True)

    def network(self, container: str) -> Path:
        """The file that stands for its network, as long as it runs."""
        return Path("/proc", str(self.inspect(container)["State"]["Pid"]), "ns", "net")

    def answer(self, container: str, *request: str) -> tuple[int, str]:
        """The status and the body of the answer to a request."""
        output, _ = self.ask(container, *request).communicate(timeout=100)
        status, _, body = output.partition("\n")
        return int(status), body

    def wait_ready(self, container: str, *, seconds: float = 90) -> None:
        """Return when its service is ready."""
        deadline = time.monotonic() + seconds
        while self.answer(container, "/readyz")[0] != 200:
            logs = self.run("podman", "logs", container)
            assert self.inspect(container)["State"]["Running"], logs.stderr
            assert time.monotonic() < deadline, logs.stderr
            time.sleep(0.1)

    def wait_log(self, container: str, text: str, *, seconds: float = 30) -> None:
        """Return when `text` is in what the container has logged."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.run("podman", "logs", container).stderr):
            assert time.monotonic() < deadline, log
            time.sleep(0.1)

    def logs(self) -> str:
        """Of all containers that are there."""
        return "\n".join(self.run("podman", "logs", each).stderr for each in self._ids("ps"))

    def peak_memory(self, container: str) -> int:
        """Bytes of all that its limit counts, of which pages of files could be given back."""
        files = ("memory/memory.max_usage_in_bytes", "memory.peak")  # of either kind of cgroups
        script = " || ".join(f"cat /sys/fs/cgroup/{file} 2>/dev/null" for file in files)
        return int(self.output("podman", "exec", container, "sh", "-c", script))

    @contextmanager
    def suspended(self, container: str) -> Iterator[None]:
        """The process that computes does nothing in the block: what has begun stays open."""
        pid = self.inspect(container)["State"]["Pid"]
        children = psutil.Process(pid).children(recursive=True)
        spawned = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        _api, computing = sorted(spawned, key=psutil.Process.create_time)
        computing.suspend()
        try:
            yield
        finally:
            computing.resume()

    def close(self) -> None:
        """Containers, images, mounts, files, control groups; only this store's own."""
        ids = [*self._ids("ps"), *self._ids("pod", "ps")]
        self.run("podman", "pod", "rm", "--all", "--force", "--time", "0")
        self.run("podman", "rm", "--all", "--force", "--time", "0", "--volumes")
        self.run("buildah", "rm", "--all")
        self.run("podman", "rmi", "--all", "--force")
        for place in reversed(self._mounts()):
            self.run("umount", place)
        assert [] == self._mounts()  # or what is mounted would be deleted too
        shutil.rmtree(self.folder)
        for parent in Path("/sys/fs/cgroup").glob("**/libpod_parent"):
            for folder, _, _ in os.walk(parent, topdown=False):
                if any(each in folder for each in ids):
                    with suppress(OSError):  # podman has removed it
                        os.rmdir(folder)

    def _ids(self, *listing: str) -> list[str]:
        return self.run("podman", *listing, "--all", "--quiet", "--no-trunc").stdout.split()

    def _mounts(self) -> list[str]:
        """Below the store's folder, in the order in which they were made."""
        places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        return [place for place in places if place.startswith(f"{self.folder}/")]
