"""Weights that stay in their file (checkpoint/hub.py), and what becomes of that file under a running service."""

import os
import shutil
from pathlib import Path

import httpx
from safetensors.torch import load_file, save_file

from tests.service.conftest import DEMO
from tests.service.server import Start, eventually

ASK = {"prompt": "The people of the United States", "max_tokens": 8, "temperature": 0}


async def test_a_file_that_is_cut_off_costs_the_engine_at_most(start: Start, tmp_path: Path) -> None:
    """What was mapped past the new end is gone (SIGBUS); with the file put back, the service is as before."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, weights)
    shutil.copy(weights, tmp_path / "whole")
    server = start(str(folder), "--kv-memory", "12MiB")
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        expected = (await client.post("/v1/completions", json=ASK)).json()["choices"]
        os.truncate(weights, 4096)
        assert (await client.post("/v1/completions", json=ASK)).status_code >= 500
        os.replace(tmp_path / "whole", weights)

        async def answers_as_before() -> bool:
            answer = await client.post("/v1/completions", json=ASK)
            return answer.status_code == 200 and answer.json()["choices"] == expected

        await eventually(answers_as_before, seconds=60)
        assert (await client.get("/livez")).status_code == 200
    assert any("exit code -7" in line for line in server.log)
