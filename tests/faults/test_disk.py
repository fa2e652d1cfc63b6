"""A disk that is full: for what is cached, and for the log, whose reader may also be gone."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.checkpoint import megatron_files as files
from tests.checkpoint.conftest import Hub, hub
from tests.checkpoint.megatron_files import Layout
from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.faults.watch import Watch
from tests.service.conftest import DEMO
from tests.service.scripted_model import ScriptedModel
from tests.service.server import COMMAND, Connect, Server, Start

__all__ = ["hub"]

_DISK_BYTES = 2**20  # a sixth of what the checkpoint is converted to


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw checkpoint of Megatron-LM, which is converted before it is served."""
    folder = tmp_path_factory.mktemp("raw")
    return files.write_rank(files.random_model(), Layout(version=1.0), folder / "model_optim_rng.pt")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a mebibyte; where none may be mounted, a folder (then a bound on files must do)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def serve_in_vain(model: str | Path, cache: Path, environment: dict[str, str], *, bounded: bool) -> str:
    """What the service logs before it ends with exit code 2, since `cache` has no room."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MGPT_", "HF_"))}
    done = subprocess.run(
        [COMMAND, "serve", model, "--port", "0", "--cache-dir", cache],
        capture_output=True,
        text=True,
        timeout=100,
        env=inherited | environment,
    )
    assert 2 == done.returncode, done.stderr
    assert ("File too large" if bounded else "No space left on device") in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


bounds = pytest.mark.parametrize("bounded", [False, True], ids=["full disk", "bound on files"])


@bounds
def test_a_conversion_that_the_disk_does_not_hold(
    raw: Path, small_disk: Path, triggers: Triggers, bounded: bool
) -> None:
    """The service ends with exit code 2, the log says where there is no room, and nothing half-made is left."""
    bounded = bounded or not os.path.ismount(small_disk)
    more = {"FAULTS_FILE_BYTES": str(_DISK_BYTES)} if bounded else {}
    cache = small_disk.parent / "cache" if bounded else small_disk
    assert str(cache) in serve_in_vain(raw, cache, triggers.environment(**more), bounded=bounded)
    assert [] == list((cache / "converted").iterdir())


@bounds
def test_a_download_that_the_disk_does_not_hold(
    hub: Hub, start: Start, small_disk: Path, triggers: Triggers, tmp_path: Path, bounded: bool
) -> None:
    """The same, and no half of a model is served later: with room, the next start fetches what is missing."""
    bounded = bounded or not os.path.ismount(small_disk)
    folder = tmp_path / "pushed"
    files.random_model().save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / name, folder)
    hub.push("owner/tiny", folder)
    cache = small_disk.parent / "hub" if bounded else small_disk
    asking = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
    more = {"FAULTS_FILE_BYTES": str(_DISK_BYTES)} if bounded else {}
    log = serve_in_vain("owner/tiny", tmp_path / "cache", triggers.environment(**asking, **more), bounded=bounded)
    assert "owner/tiny: not" in log
    if not bounded:
        subprocess.run(["mount", "-o", f"remount,size={64 * _DISK_BYTES}", str(small_disk)], check=True)
    server = start("owner/tiny", "--cache-dir", str(tmp_path / "cache"), environment=asking)
    assert 200 == httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code


@pytest.fixture
def filled_cache(raw: Path, tmp_path: Path) -> Path:
    """Where the checkpoint was converted before."""
    command = [COMMAND, "verify", raw, "--cache-dir", tmp_path / "cache"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return tmp_path / "cache"


async def test_what_was_converted_before_needs_no_room(
    raw: Path, filled_cache: Path, start: Start, connect: Connect, triggers: Triggers
) -> None:
    """A service that finds its checkpoint converted starts where nothing can be written, and restarts its engine."""
    environment = triggers.environment(FAULTS_FILE_BYTES="0")
    server = start(str(raw), "--cache-dir", str(filled_cache), environment=environment)
    client = connect(server)
    before = await client.complete(prompt="a", max_tokens=9, temperature=0)
    server.engine.kill()
    await client.wait_metric("engine_restarts_total", 1)
    await client.wait_status("/readyz", 200)
    after = await client.complete(prompt="a", max_tokens=9, temperature=0)
    assert before["choices"] == after["choices"]


async def log_much(server: Server, watch: Watch) -> None:
    """Lines of requests in every process, and of an engine that is killed and started again."""
    for _ in range(50):
        await watch.ask(max_tokens=1)
    load = await watch.load()
    server.engine.kill()
    await load.running_failed()
    await watch.restarted(since=0)


async def test_a_log_that_takes_nothing(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching
) -> None:
    """Written to a full disk, it is lost, in every process; the service goes on, and drains to exit code 0."""
    environment = triggers.environment(FAULTS_LOG="/dev/full")
    server = start(str(scripted_model.folder), "--max-num-seqs", "4", environment=environment)
    async with watching(server) as watch:
        await log_much(server, watch)
    assert not any("request_id" in line for line in server.log), "nothing came after the first lines"
    server.process.terminate()
    assert server.wait(20) == 0


async def test_a_log_whose_reader_is_gone(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """Written to a closed pipe, it is lost; the service goes on, and drains to exit code 0."""
    server = start(str(scripted_model.folder), "--max-num-seqs", "4")
    assert server.process.stderr is not None
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, server.process.stderr.fileno())  # the next line that is read is the last
    os.close(nothing)
    async with watching(server) as watch:
        await log_much(server, watch)
    server.process.terminate()
    assert server.wait(20) == 0
