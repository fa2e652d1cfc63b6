"""service.checkpoint.hub: what reading a model takes of memory, by the kernel's own count, in a process of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.conftest import MakeModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 2**20
NOISE = 16 * MIB  # of the allocator, and of what torch makes at first calls
SOURCE = """
import re, sys
from pathlib import Path
import torch
from service.checkpoint.hub import read_config, read_state

torch.set_num_threads(1)
def kib(name):
    return int(re.findall(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2], None)
config = read_config(folder)
torch.ones(1000).to(torch.bfloat16).aminmax()  # what a first call makes stays
anon, rss = kib("RssAnon"), kib("VmRSS")
state = read_state(folder, config, dtype=dtype, head_apart=True)
taken = 1024 * (kib("RssAnon") - anon), 1024 * (kib("VmHWM") - rss)
mapped = kib("RssFile")
state.pop("head.weight", None)
print(*taken, 1024 * (mapped - kib("RssFile")))
"""


@dataclass(frozen=True, slots=True)
class Taken:
    anon: int  # bytes that are no file's, once it is read
    peak: int  # bytes of all kinds, files' too
    head: int  # bytes that go with a head of its own, once something else is made of it


@pytest.fixture(scope="module")
def state(make_model: MakeModel) -> dict[str, torch.Tensor]:
    """Of 37 million numbers; 3.1 million are in the largest tensor."""
    model = make_model(n_embd=640, n_layer=7, n_head=2, vocab_size=4900)
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def read(state: dict[str, torch.Tensor], folder: Path, *, stored: torch.dtype, dtype: str) -> Taken:
    config = {"model_type": "gpt2", "n_embd": 640, "n_layer": 7, "n_head": 2, "vocab_size": 4900, "n_positions": 32}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    save_file({name: tensor.to(stored) for name, tensor in state.items()}, folder / "model.safetensors")
    command = [sys.executable, "-c", SOURCE, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert not done.returncode, done.stderr
    return Taken(*map(int, done.stdout.split()))


def sizes(state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all tensors, and of the largest."""
    each = [tensor.numel() * dtype.itemsize for tensor in state.values()]
    return sum(each), max(each)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("float32", "as stored"), ("float16", "as stored")]
)
def test_weights_that_need_no_cast_stay_in_their_file(
    stored: str, dtype: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """They take no memory that is not the file's, and are in memory once: a tied head's go with it, none stay."""
    taken = read(state, tmp_path, stored=getattr(torch, stored), dtype=dtype)
    whole, _ = sizes(state, getattr(torch, stored))
    assert whole > 60 * MIB
    assert taken.anon < NOISE
    assert taken.peak < whole + NOISE
    table = state["transformer.wte.weight"].numel() * getattr(torch, stored).itemsize
    assert 0.95 * table < taken.head < 1.05 * table + MIB


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")],
)
def test_cast_weights_are_in_memory_once(
    stored: str, dtype: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Beside what is served there is at most one tensor, as it is stored and turned."""
    taken = read(state, tmp_path, stored=getattr(torch, stored), dtype=dtype)
    whole, _ = sizes(state, getattr(torch, dtype))
    _, largest = sizes(state, getattr(torch, stored))
    assert whole - NOISE < taken.anon < whole + NOISE
    assert taken.peak < whole + 2 * largest + NOISE
