"""The Dockerfile's image, built once by buildah from a Debian of debootstrap. Run by `make image-test`, as root.

No registry is asked for the base: its stand-in has Debian's Python 3.11. So what is tested is every step of the
Dockerfile and what its image does, and not the published base.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from bench.random_model import write_random_model
from tests.image.engine import ROOT, Engine

SUITE = "bookworm"
PACKAGES = "python3-minimal,python3-venv,ca-certificates"
PYTHON = "3.11"  # of that suite
BASE = "localhost/python-stand-in"
IMAGE = "localhost/megatron-gpt2"
REVISION = "0123456789abcdef"
LOCKED = (
    *("--network", "none", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges"),
)
FIGURES = pytest.StashKey[list[str]]()


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds the repository's Dockerfile, for CPUs unless told otherwise."""

    engine: Engine
    options: tuple[str, ...]

    def build(self, tag: str, **arguments: str) -> subprocess.CompletedProcess[str]:
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        # Docker's format, as the other has no HEALTHCHECK.
        how = ("--isolation", "chroot", "--pull-never", "--format", "docker", "--layers", *self.options)
        return self.engine.run("buildah", "bud", *how, *given, "--tag", tag, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for figure in config.stash[FIGURES]:
        terminalreporter.write_line(figure)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print at the end."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    assert os.geteuid() == 0, "mounts and namespaces are made here: run it as root"
    engine = Engine(Path(tempfile.mkdtemp(prefix="mgpt-")) / "store")
    try:
        yield engine
    finally:
        engine.close()
        engine.folder.parent.rmdir()


@pytest.fixture(scope="session")
def base(engine: Engine, figures: list[str]) -> str:
    """The stand-in, from a tarball that is made once and kept in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-gpt2-tests"
    tarball = cache / f"{SUITE}-{PACKAGES.replace(',', '-')}.tar"
    if not tarball.exists():
        began = time.monotonic()
        cache.mkdir(parents=True, exist_ok=True)
        root = engine.folder / "rootfs"
        engine.output("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root)
        for folder in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / folder)
        being_written = tarball.with_suffix(".part")
        engine.output("tar", "-C", root, "-cf", being_written, ".")
        being_written.rename(tarball)
        shutil.rmtree(root)
        figures.append(f"base made in {time.monotonic() - began:.0f} s")
    engine.output("podman", "import", tarball, BASE)
    return BASE


@pytest.fixture(scope="session")
def builder(engine: Engine, base: str) -> Builder:
    """With torch's wheel from wherever this machine's pip has it, and this machine's certificates."""
    pins = (ROOT / "requirements.lock").read_text().splitlines()
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    wheels = engine.folder / "wheels"
    wanted = ("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--dest", wheels, torch)
    engine.output(sys.executable, "-m", "pip", "download", *wanted)
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    options = [
        f"--build-arg=PYTHON_IMAGE={base}",
        "--build-arg=PIP_FIND_LINKS=/wheels",
        f"--volume={wheels}:/wheels:ro",
        f"--volume={certificates}:{certificates}:ro",
    ]
    if any("+cpu" in wheel.name for wheel in wheels.iterdir()):
        options.append("--build-arg=TORCH_CPU_INDEX=")
    return Builder(engine, tuple(options))


@pytest.fixture(scope="session")
def image(engine: Engine, builder: Builder, figures: list[str]) -> str:
    """The name of the built image."""
    began = time.monotonic()
    done = builder.build(IMAGE, REVISION=REVISION)
    assert 0 == done.returncode, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    size = engine.inspect(IMAGE, kind="image")["Size"] - engine.inspect(BASE, kind="image")["Size"]
    figures.append(f"image built in {time.monotonic() - began:.0f} s: {size / 1e6:.0f} MB on top of its base")
    return IMAGE


@pytest.fixture(scope="session")
def user() -> int:
    """Without a name, as on clusters that draw one for each project."""
    return random.randrange(1_000_000, 2**31)


@pytest.fixture(scope="session")
def folder_345m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the 345M's shape, in fp16 as it is published, with random weights."""
    folder = write_random_model(tmp_path_factory.mktemp("models") / "345m", dtype=torch.float16)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def compose() -> dict[str, dict[str, object]]:
    """The services of compose.yaml."""
    services: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    return services
