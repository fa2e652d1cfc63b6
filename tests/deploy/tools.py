"""The validators of .venv-deploy and of the system, run as commands."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command's end, from the repository's root; `text` is its standard input. Does not raise for its exit code."""
    path = f"{ROOT / '.venv-deploy' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def output(*command: str | Path, text: str | None = None) -> str:
    """What the command says on standard output; an AssertionError with all that it says where it fails."""
    done = run(*command, text=text)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
