"""compose.yaml's profile `cpu` with the image that was built: docker-compose over podman's socket.

podman runs in a network and a mount namespace of its own: its bridges, firewall rules and published ports are there,
and end with it. What it cannot run as it is written is rewritten, and nothing else:

    name       on the command line, as docker-compose 1.29 does not know the word
    ulimits    no more open files than this machine allows; and a number of processes, as podman would ask for a million
    threads    one to compute, as those of a busy machine wait for each other and a stream would outlast the drain

Not seen here: health checks on their timer, for which podman asks systemd, and whose words its API splits at blanks
(a test runs them as they are written); the names of services, which Debian's podman does not resolve; a GPU; a build;
and the profiles whose images come from registries: tests/deploy runs nginx and Prometheus as Debian has them, and
Grafana runs nowhere.
"""

import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.image.engine import ROOT, Engine
from tests.image.stream import check, request

FILE = ROOT / "docker" / "compose.yaml"
# What podman and its plug-ins keep outside of the engine's folder stays in here.
SERVICE = """
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && ip link set lo up &&
exec podman --network-config-dir "$1" system service --time 0 "unix://$2"
"""


class Inside(Engine):
    """An engine in the namespaces of a process, with that engine's store; docker-compose finds its podman."""

    def __init__(self, engine: Engine, pid: int, api: Path) -> None:
        self.folder = engine.folder
        self._pid = pid
        ours = set(re.findall(r"\$\{(\w+)", FILE.read_text()))  # as where the caller sets nothing
        kept = {
            name: value
            for name, value in engine.environment.items()
            if name not in ours and not name.startswith(("COMPOSE_", "DOCKER_"))
        }
        self.environment = kept | {"DOCKER_HOST": f"unix://{api}"}

    def begin(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        return super().begin("nsenter", f"--target={self._pid}", "--net", "--mount", *command, **options)


@dataclass(frozen=True, slots=True)
class Project:
    """The service, ready; as it was written, and as docker-compose was told."""

    engine: Inside
    command: tuple[str | Path, ...]
    container: str
    written: dict[str, Any]
    given: dict[str, Any]

    def ask(self, *asked: str) -> subprocess.Popen[str]:
        """A request through the published port; ask.py says what it prints."""
        return self.engine.begin(sys.executable, Path(__file__).with_name("ask.py"), *asked)


@pytest.fixture(scope="module")
def inside(engine: Engine) -> Iterator[Inside]:
    api = engine.folder / "podman.sock"
    log = engine.folder / "podman.log"
    with log.open("w") as file:
        words = ("unshare", "--net", "--mount", "sh", "-c", SERVICE, "sh", engine.folder / "networks", api)
        podman = engine.begin(*words, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 30
        with socket.socket(socket.AF_UNIX) as probe:
            while probe.connect_ex(str(api)):
                assert podman.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield Inside(engine, podman.pid, api)
    finally:
        podman.terminate()
        podman.wait(30)


@pytest.fixture(scope="module")
def project(inside: Inside, image: str, figures: list[str]) -> Iterator[Project]:
    file = yaml.safe_load(FILE.read_text())
    name = file.pop("name")
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for service in file["services"].values():
        if "ulimits" in service:
            service["ulimits"] |= {"nofile": min(service["ulimits"]["nofile"], allowed), "nproc": 4096}
    given = file["services"]["cpu"]
    given["environment"]["MGPT_CPU_THREADS"] = "1"
    inside.output("podman", "tag", image, given["image"])
    rewritten = inside.folder / FILE.name
    rewritten.write_text(yaml.safe_dump(file))
    where = ("--project-name", name, "--file", rewritten, "--project-directory", FILE.parent)
    compose = ("docker-compose", *where, "--profile", "cpu")
    began = time.monotonic()
    try:
        inside.output(*compose, "up", "--detach", "--no-build")
        container = inside.output(*compose, "ps", "--quiet")
        inside.wait_ready(container)
        figures.append(f"ready {time.monotonic() - began:.1f} s after docker-compose up")
        written = yaml.safe_load(FILE.read_text())["services"]["cpu"]
        yield Project(inside, compose, container, written, given)
    finally:
        inside.run(*compose, "down", "--timeout", "0", "--volumes")


def test_a_streamed_completion(project: Project, image: str) -> None:
    """Through the port that compose publishes on this machine alone; nothing was built for it."""
    built = project.engine.inspect(image, kind="image")["Id"]
    assert built == project.engine.inspect(project.container)["Image"]
    assert "127.0.0.1:8000" == project.engine.output(*project.command, "port", "cpu", "8000")
    output, _ = project.ask(*request(20)).communicate(timeout=100)
    status, _, body = output.partition("\n")
    assert "200" == status
    check(body, 20)


def test_its_health_check(project: Project) -> None:
    """It finds that the service is ready, and finds out that it is not there."""
    kind, *words = project.written["healthcheck"]["test"]
    assert "CMD" == kind
    project.engine.output("podman", "exec", project.container, *words)
    elsewhere = [word.replace("8000", "8009") for word in words]
    assert project.engine.run("podman", "exec", project.container, *elsewhere).returncode


def test_it_is_as_written(project: Project) -> None:
    """No capabilities, no new privileges, a read-only root, its volumes, open files, settings, end and restart."""

    def seen(*command: str) -> str:
        return project.engine.output("podman", "exec", project.container, *command)

    status = dict(line.split(":\t", 1) for line in seen("cat", "/proc/1/status").splitlines())
    assert (["ALL"], 0) == (project.written["cap_drop"], int(status["CapBnd"], 16) | int(status["CapEff"], 16))
    assert (["no-new-privileges:true"], "1") == (project.written["security_opt"], status["NoNewPrivs"])
    assert project.written["read_only"]
    for place in ("/opt", "/models"):
        denied = project.engine.run("podman", "exec", project.container, "touch", f"{place}/new")
        assert "Read-only file system" in denied.stderr, place
    seen("touch", "/cache/new")
    (files,) = re.findall(r"^Max open files +(\d+)", seen("cat", "/proc/1/limits"), re.MULTILINE)
    assert project.given["ulimits"]["nofile"] == int(files)

    about = project.engine.inspect(project.container)
    volumes = {mount["Destination"]: (mount["Name"], mount["RW"]) for mount in about["Mounts"]}
    assert {"/cache": ("megatron-gpt2_cache", True), "/models": ("megatron-gpt2_models", False)} == volumes
    ours = dict(line.split("=", 1) for line in about["Config"]["Env"] if line.startswith("MGPT_"))
    of_the_image = {"MGPT_HOST": "0.0.0.0"}
    assert project.given["environment"] | {"MGPT_MODEL": ""} | of_the_image == ours
    assert project.written["stop_grace_period"] == f"{about['Config']['StopTimeout']}s"
    assert project.written["restart"] == about["HostConfig"]["RestartPolicy"]["Name"]
    (network,) = about["NetworkSettings"]["Networks"].values()
    assert {"megatron-gpt2", "cpu"} < set(network["Aliases"])


def test_it_stops_when_its_streams_have_ended(project: Project) -> None:
    """As Ctrl-C of `up` stops it: a stream is finished, and the exit code is 0. Then `down` leaves nothing."""
    stream = project.ask(*request(300))
    assert stream.stdout is not None
    assert "200" == stream.stdout.readline().strip()
    assert stream.stdout.readline().startswith("data: ")
    with project.engine.suspended(project.container):
        stop = project.engine.begin(*project.command, "stop")
        project.engine.wait_log(project.container, "draining: 1 requests are open")
    check(stream.communicate(timeout=100)[0], 300)  # read as it comes: what is unread is lost with the bridge
    output, errors = stop.communicate(timeout=100)
    assert 0 == stop.returncode, output + errors
    state = project.engine.inspect(project.container)["State"]
    assert (0, False) == (state["ExitCode"], state["OOMKilled"])

    def there() -> list[str]:
        chosen = ("--quiet", "--filter", "label=com.docker.compose.project=megatron-gpt2")
        return [project.engine.output("podman", *kind, *chosen) for kind in (("ps", "--all"), ("volume", "ls"))]

    assert all(there())
    project.engine.output(*project.command, "down", "--volumes")
    assert not any(there())
