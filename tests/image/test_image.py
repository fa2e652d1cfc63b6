"""The image as its users run it: locked down as far as it goes, offline, under a user that nobody has heard of."""

import json
import time
import tomllib
from collections.abc import Iterator

import pytest

from tests.image.conftest import BASE, LOCKED, REVISION, Builder
from tests.image.engine import ROOT, Engine
from tests.image.stream import check, request

MEMORY = 2 * 2**30
LIMITED = (*LOCKED, "--memory", str(MEMORY))
# What Docker may put into every container: whoever asks the service itself must not go there.
PROXY = ("--env", "HTTP_PROXY=http://127.0.0.1:9", "--env", "http_proxy=http://127.0.0.1:9")


@pytest.fixture(scope="module")
def container(engine: Engine, image: str, user: int, figures: list[str]) -> Iterator[str]:
    """One that is ready."""
    began = time.monotonic()
    with engine.ready(image, *LIMITED, *PROXY, "--user", f"{user}:0") as container:
        figures.append(f"container ready in {time.monotonic() - began:.1f} s")
        yield container


def inside(engine: Engine, container: str, *command: str) -> str:
    return engine.output("podman", "exec", container, *command)


def test_what_the_image_says_of_itself(engine: Engine, image: str) -> None:
    """Labels that are true, and what a runtime reads: user, port, health check, volume."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config = engine.inspect(image, kind="image")["Config"]
    named = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert project["version"] == named["version"]
    assert (project["name"], project["license"]) == (named["title"], named["licenses"])
    assert (REVISION, BASE) == (named["revision"], named["base.name"])
    assert ("10001:0", ["8000/tcp"], ["/cache"]) == (
        config["User"],
        list(config["ExposedPorts"]),
        list(config["Volumes"]),
    )
    assert engine.inspect(image, kind="image")["Healthcheck"]


def test_the_service_is_a_small_layer(engine: Engine, image: str) -> None:
    """So a new version of it is downloaded without torch, which lies below."""
    history = json.loads(engine.output("podman", "history", "--format", "json", image))
    service, dependencies = [layer["size"] for layer in history if "COPY" in layer["CreatedBy"]]
    assert dependencies > 10 * service > 0
    assert service < 50e6


def test_nothing_is_in_it_that_serving_does_not_need(engine: Engine, image: str) -> None:
    """No pip, no compiler, no torch for CUDA; no build leftovers, and no file that anybody may change."""
    script = (
        "import importlib.util, shutil, torch; "
        "print(torch.version.cuda, importlib.util.find_spec('pip'), shutil.which('pip'), shutil.which('gcc'))"
    )
    offline = ("--rm", "--network", "none", "--no-healthcheck", "--pull=never", "--entrypoint", "python3")
    assert "None None None None" == engine.output("podman", "run", *offline, image, "-c", script)
    search = ("--rm", "--network", "none", "--no-healthcheck", "--pull=never", "--user", "0", "--entrypoint", "find")
    loose = engine.output("podman", "run", *search, image, "/opt", "-perm", "-o+w", "-not", "-type", "l")
    assert not loose


def test_a_streamed_completion(engine: Engine, container: str) -> None:
    """Of the demo model, offline, with nothing given."""
    status, body = engine.answer(container, *request(20))
    assert 200 == status
    check(body, 20)


def test_locked_down(engine: Engine, container: str, user: int) -> None:
    """A random user of group 0, no capabilities, no way to more, no network, its memory bounded."""
    status = dict(line.split(":\t", 1) for line in inside(engine, container, "cat", "/proc/1/status").splitlines())
    assert {str(user)} == set(status["Uid"].split())
    assert {"0"} == set(status["Gid"].split())
    capabilities = {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")}
    assert {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0} == capabilities
    assert "1" == status["NoNewPrivs"]
    assert "lo" == inside(engine, container, "ls", "/sys/class/net")
    files = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")  # of either kind of cgroups
    limit = inside(engine, container, "sh", "-c", f"cat {files[0]} 2>/dev/null || cat {files[1]}")
    assert MEMORY == int(limit)


def test_it_writes_to_its_cache_alone(engine: Engine, container: str) -> None:
    """The root is read-only, and every cache lies below /cache, which a random user may write to."""
    for place in ("/opt", "/models", "/tmp", "/var/tmp", "/"):
        assert "Read-only file system" in engine.run("podman", "exec", container, "touch", f"{place}/new").stderr, place
    script = (
        "import os, pathlib, tempfile; "
        "import torch._inductor.runtime.cache_dir_utils as inductor, huggingface_hub.constants as hub; "
        "places = [pathlib.Path.home(), tempfile.gettempdir(), inductor.cache_dir(), hub.HF_HUB_CACHE]; "
        "places += [os.environ[name] for name in ('TRITON_CACHE_DIR', 'XDG_CACHE_HOME')]; "
        "[pathlib.Path(place).mkdir(parents=True, exist_ok=True) for place in places]; "
        "[tempfile.TemporaryFile(dir=place) for place in places]; "
        "print(*places)"
    )
    places = inside(engine, container, "python3", "-c", script).split()
    assert 6 == len(places)
    assert all(f"{place}/".startswith("/cache/") for place in places)


def test_health_check(engine: Engine, container: str) -> None:
    """It finds the service, past any proxy of the environment; and finds out that it is not there."""
    engine.output("podman", "healthcheck", "run", container)
    check = engine.inspect(container)["Config"]["Healthcheck"]["Test"]
    assert "CMD" == check[0]
    engine.output("podman", "exec", container, *check[1:])
    elsewhere = [word.replace("8000", "8009") for word in check[1:]]
    assert engine.run("podman", "exec", container, *elsewhere).returncode


def test_it_stops_when_its_streams_have_ended(engine: Engine, image: str, compose: dict[str, dict[str, str]]) -> None:
    """SIGTERM in the middle of a stream: the stream is finished, and the exit code is 0 within the grace period."""
    container = engine.start(image, *LIMITED, "--no-healthcheck", "--env", "MGPT_CPU_THREADS=1")
    engine.wait_ready(container)
    stream = engine.ask(container, *request(900))
    assert stream.stdout is not None
    assert "200" == stream.stdout.readline().strip()
    assert stream.stdout.readline().startswith("data: ")
    grace = compose["cpu"]["stop_grace_period"].removesuffix("s")
    with engine.suspended(container):
        stop = engine.begin("podman", "stop", "--time", grace, container)
        engine.wait_log(container, "draining: 1 requests are open")
    output, errors = stop.communicate(timeout=100)
    assert 0 == stop.returncode, output + errors
    body, _ = stream.communicate(timeout=20)
    check(body, 900)
    state = engine.inspect(container)["State"]
    assert (0, False) == (state["ExitCode"], state["OOMKilled"])
    engine.output("podman", "rm", "--volumes", container)


def test_an_unknown_device_is_refused(builder: Builder, image: str) -> None:
    """By name, before anything is installed."""
    done = builder.build("localhost/never", DEVICE="tpu")
    assert done.returncode
    assert "DEVICE: cpu or gpu, not 'tpu'" in done.stdout + done.stderr
