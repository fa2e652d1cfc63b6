"""The `llm` command: a completion model of extra-openai-models.yaml, plain and streamed, with its options."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, Server, text

_LLM = Path(sys.executable).with_name("llm")


@pytest.fixture
def folder(server: Server, tmp_path: Path) -> Path:
    """llm's own folder, with the served model in its list."""
    entry = {"model_id": "served", "model_name": MODEL, "api_base": f"{server.url}/v1", "completion": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    return tmp_path


def llm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    return subprocess.run(
        [_LLM, *arguments], capture_output=True, text=True, env=environment, timeout=100, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt(server: Server, folder: Path, stream: bool) -> None:
    """What it prints is the plain answer; its usage, which a stream's last chunk has, is in its log."""
    options = ["-o", "max_tokens", "24", "-o", "temperature", "0", "-o", "stop", ";"]
    done = llm(folder, "-m", "served", *options, *([] if stream else ["--no-stream"]), "My fellow citizens")
    assert 0 == done.returncode, done.stderr
    expected = text(server, prompt="My fellow citizens", max_tokens=24, temperature=0, stop=";")
    assert expected.strip() == done.stdout.strip()
    with sqlite3.connect(folder / "logs.db") as database:
        ((logged,),) = database.execute("select response_json from turns").fetchall()
    assert {"prompt_tokens": 3, "total_tokens": 27} == {
        name: json.loads(logged)["usage"][name] for name in ("prompt_tokens", "total_tokens")
    }


def test_other_options_are_taken(server: Server, folder: Path) -> None:
    """Penalties, seed and logprobs as the package sends them."""
    options = {"max_tokens": 8, "seed": 4, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": 2}
    arguments = [part for name, value in options.items() for part in ("-o", name, str(value))]
    done = llm(folder, "-m", "served", *arguments, "The king")
    assert 0 == done.returncode, done.stderr
    assert text(server, prompt="The king", **options).strip() == done.stdout.strip()


def test_an_error_is_told(folder: Path) -> None:
    """The command ends with an error that has the service's words."""
    done = llm(folder, "-m", "served", "-o", "max_tokens", "5000", "The king")
    assert 0 != done.returncode
    assert "maximum context length is 1024 tokens" in done.stderr
