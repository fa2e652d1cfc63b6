"""Megatron-core's own files are read, and it loads ours: so the layouts are not only what we think they are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from service.checkpoint.convert import Job, convert

IDS = torch.arange(20)[None] * 97  # as in megatron_core.py


def megatron_core(work: str, folder: Path, rendezvous: Path, num_ranks: int) -> None:
    """Run megatron_core.py once a rank."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.megatron_core", work, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(num_ranks), str(rendezvous)], stderr=subprocess.PIPE)
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert 0 == rank.returncode, errors.decode()[-2000:]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits
    return found


@pytest.mark.parametrize(("work", "num_ranks"), [("write-stacked", 1), ("write-layers", 2)])
def test_its_checkpoints_are_read_and_ours_are_loaded_by_it(work: str, num_ranks: int, tmp_path: Path) -> None:
    """Both of its formats give equal tensors and its own logits; so does ours, loaded strictly."""
    megatron_core(work, tmp_path / "core", tmp_path / "rendezvous", num_ranks)
    for name in ("dist", "ranks"):
        convert(Job(str(tmp_path / "core" / name), str(tmp_path / name)), lambda done, total: None)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dist", "ranks")]
    assert weights[0] == weights[1]
    theirs = torch.load(tmp_path / "core" / "logits.pt")[..., :50257]
    assert (theirs - logits(tmp_path / "dist")).abs().max() < 1e-4

    back = tmp_path / "back"
    job = Job(str(tmp_path / "dist"), str(back), form="megatron-core", tensor_parallel=2)
    convert(job, lambda done, total: None)
    megatron_core("load", back, tmp_path / "rendezvous-2", 2)
    again = torch.load(back / "logits.pt")[..., :50257]
    assert (theirs - again).abs().max() < 1e-4
