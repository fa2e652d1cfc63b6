"""The sdist and the wheel: whole, no more than meant, and enough where nothing else is."""

import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.package.notices import FILE, notices

ROOT = Path(__file__).parents[2]
CLEAN = ROOT / ".venv-package" / "bin"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def command(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`megatron-gpt2` of that wheel, in an environment with what it declares and nothing else."""
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run([str(CLEAN / "python"), "-m", "pip", *install], check=True)
    return CLEAN / "megatron-gpt2"


def run(*command: str | Path, folder: Path) -> str:
    """What it prints, in `folder`, without this project's environment."""
    found = subprocess.run([*map(str, command)], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert 0 == found.returncode, found.stderr
    return found.stdout


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder)}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    """Each tracked file of service/ that is not for development, and the licences."""
    (file,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(file).namelist())
    listed = subprocess.run(["git", "ls-files", "service"], cwd=ROOT, check=True, capture_output=True, text=True)
    own = {name for name in names if not name.startswith("megatron_gpt2-")}
    assert set(listed.stdout.splitlines()) == own
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert {"LICENSE", "THIRD_PARTY_NOTICES.md", "service/demo/model/NOTICE"} <= licences


def test_the_sdist_is_the_whole_source(built: Path) -> None:
    """All that is tracked but folders of results of benchmarks."""
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = set(listed.stdout.splitlines())
    assert set() == {name for name in tracked - names if not name.startswith("bench/results/")}
    assert {"PKG-INFO", "setup.cfg"} >= {name for name in names - tracked if ".egg-info/" not in name}


def test_the_version_is_in_one_place(command: Path, tmp_path: Path) -> None:
    """pyproject.toml's is what the command, the service and the package's metadata say."""
    assert PROJECT["version"] == run(command, "--version", folder=tmp_path).strip()
    code = "from importlib.metadata import version; print(version('megatron-gpt2'))"
    assert PROJECT["version"] == run(CLEAN / "python", "-c", code, folder=tmp_path).strip()


def test_what_it_declares_is_enough(command: Path, tmp_path: Path) -> None:
    """pip finds nothing missing; a text is completed, and evaluated."""
    run(CLEAN / "python", "-m", "pip", "check", folder=tmp_path)
    text = run(command, "generate", "The people", "--max-tokens", "4", "--temperature", "0", folder=tmp_path)
    assert text.startswith("The people of the")
    (tmp_path / "text.txt").write_text("My fellow citizens")
    assert "perplexity" in run(command, "eval", "text", "text.txt", folder=tmp_path)
    assert "--concurrency" in run(command, "bench", "--help", folder=tmp_path)


def test_it_serves_the_embedded_model(command: Path, tmp_path: Path) -> None:
    """From an empty folder and home, by one command: a completion, and the pages."""
    serve = [str(command), "serve", "--port", "0", "--log-format", "text"]
    server = subprocess.Popen(serve, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = ""
        for line in server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                url = url or found[0]
            if "ready: " in line:
                break
        with httpx.Client(base_url=url, timeout=60) as client:
            answer = client.post("/v1/completions", json={"prompt": "The people", "temperature": 0, "max_tokens": 4})
            assert answer.json()["choices"][0]["text"].startswith(" of the")
            assert httpx.codes.OK == client.get("/docs").status_code
            assert PROJECT["version"] == client.get("/version").json()["version"]
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert 0 == server.returncode


def test_licences_that_are_named_are_in_the_image_too() -> None:
    """Each file of the root that the package's metadata names is copied, and not ignored."""
    named = [name for name in PROJECT["license-files"] if "/" not in name]
    copied = re.search(r"^COPY (.*LICENSE.*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied is not None
    assert set(named) <= set(copied[1].split())
    assert {f"!{name}" for name in named} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_third_party_notices_are_of_what_is_installed() -> None:
    """`make notices` would write the file as it is; nothing is of an unknown or a strong copyleft licence."""
    found = notices()
    assert found == FILE.read_text()
    rows = found.partition("## Installed with it")[2]
    assert not re.search(r"\b(UNKNOWN|A?GPL(v\d)?|GNU (Affero )?General)\b", rows)
