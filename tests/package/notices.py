"""THIRD_PARTY_NOTICES.md: what the wheel holds of others, and what it installs. `make notices` writes it."""

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "THIRD_PARTY_NOTICES.md"
_PYTHON = ROOT / ".venv-package" / "bin" / "python"
_LICENSES = ROOT / ".venv" / "bin" / "pip-licenses"
_OWN = {"megatron-gpt2", "pip", "setuptools"}
_OF_GPUS = ("nvidia-", "cuda-", "triton")
_HEAD = """\
# Third-party notices

Written by `make notices`.

## In the package

| what | licence | where it is told |
| --- | --- | --- |
| Swagger UI, and what its bundle holds | Apache-2.0, MIT, BSD-3-Clause | files in `service/api/page/swagger-ui` |
| GPT-2's tokenizer files, by OpenAI and the package they come from | MIT | `service/demo/model/NOTICE` |
| texts that the demo model was trained on | public domain | `service/demo/model/NOTICE` |

## Installed with it

The packages that its dependencies bring, at the pins of `requirements.lock`, without extras, by what they say of
themselves, with torch for CPUs; torch for NVIDIA GPUs brings NVIDIA's libraries, under licences of their own, and
Triton (MIT). None of their files is in the package; the image has them.

| package | licence | home |
| --- | --- | --- |
"""


def installed() -> list[dict[str, Any]]:
    """Name, License and URL of each package that the wheel brings."""
    command = [str(_LICENSES), f"--python={_PYTHON}", "--from=mixed", "--format=json", "--with-urls"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    packages: list[dict[str, Any]] = json.loads(found)
    return sorted(
        (
            package
            for package in packages
            if package["Name"].lower() not in _OWN and not package["Name"].lower().startswith(_OF_GPUS)
        ),
        key=lambda one: one["Name"].lower(),
    )


def notices() -> str:
    """The file, as it must be."""
    rows = (f"| {one['Name']} | {_line(one['License'])} | {_home(one['URL'])} |\n" for one in installed())
    return _HEAD + "".join(rows)


def _line(text: str) -> str:
    """A licence may be given as its whole text: then its first line."""
    return text.strip().splitlines()[0].replace("|", "/") if text.strip() else "UNKNOWN"


def _home(text: str) -> str:
    return "" if text == "UNKNOWN" else _line(text)


if __name__ == "__main__":
    FILE.write_text(notices())
