"""The load programs of bench/, for a short time: all is answered, bounds hold, and nothing grows."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest


async def run(module: str, *arguments: str, out: Path) -> tuple[dict[str, Any], str]:
    """What a program wrote, and said; it must find nothing wrong."""
    command = ["-m", module, *arguments, "--out", str(out), "--", "--cpu-threads", "1"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert 0 == process.returncode, said.decode()
    assert out.with_suffix(".svg").stat().st_size > 10_000
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert [] == found["faults"]
    return found, said.decode()


async def test_ten_times_as_much_as_it_can_do(tmp_path: Path) -> None:
    """Every request has an answer or a 429, no more waits than may, and no process grows."""
    found, _ = await run("bench.overload", "--seconds", "10", "--max-tokens", "16", out=tmp_path / "overload")
    peak, *crowded = found["levels"]
    for level in crowded:
        assert {"429"} == set(level["errors"])
        assert level["errors"]["429"] > level["requests"]
        assert level["level"]["load"] == pytest.approx(10 * peak["requests_per_second"])


async def test_a_mixed_load_with_faults(tmp_path: Path) -> None:
    """Every answer is right, or says that the engine was away when it was; in the end nothing is held."""
    found, said = await run("bench.soak", "--seconds", "45", "--seed", "3", out=tmp_path / "soak")
    assert any("engine" in name for _, name in found["injected"]), said
    assert sum(found["counts"].values()) > 100
