"""A raw checkpoint of Megatron-LM, served, verified and converted by the installed command."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from service.checkpoint.convert import GPT2_TOKENIZER
from service.checkpoint.errors import CheckpointError
from service.checkpoint.export import copy_tokenizer
from service.verify import ORACLE_IDS, findings
from tests.checkpoint import megatron_files as files
from tests.checkpoint.megatron_files import Layout
from tests.service.server import COMMAND, Client, Server


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    return files.write_rank(files.random_model(), Layout(version=1.0, old_pickle=True), folder / "model_optim_rng.pt")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=100)


async def test_a_raw_checkpoint_is_served(raw: Path, connect: Callable[[Server], Client], tmp_path: Path) -> None:
    """Greedy ids are transformers'; a second start finds the folder and reads the raw file no more."""
    ids = [262, 318, 257, 11, 290]
    with torch.no_grad():
        expected = files.random_model().generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=50256
        )[0, len(ids) :]
    log: list[str] = []
    for _ in range(2):
        server = Server(str(raw), "--cache-dir", str(tmp_path / "cache"))
        try:
            server.wait_ready()
            answer = await connect(server).complete(prompt=ids, max_tokens=12, temperature=0, return_token_ids=True)
            assert expected.tolist() == answer["choices"][0]["token_ids"]
            log = server.log
        finally:
            server.kill()
    assert any("converted before, in" in line for line in log)
    assert 1 == len(list((tmp_path / "cache" / "converted").iterdir()))


def test_a_raw_checkpoint_that_cannot_be_used_ends_the_service(tmp_path: Path) -> None:
    """With exit code 2 and the reason."""
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"no checkpoint")
    done = run("serve", bad, "--port", "0", "--cache-dir", tmp_path / "cache")
    assert 2 == done.returncode
    assert "bad.pt: not readable as a file of torch.save" in done.stderr


def test_convert_and_verify(raw: Path, tmp_path: Path) -> None:
    """There, back with two ranks, and a verdict on each."""
    done = run("convert", raw, tmp_path / "there", "--dtype", "float16")
    assert (0, f"{tmp_path / 'there'}: written\n") == (done.returncode, done.stdout), done.stderr
    assert torch.float16 == GPT2LMHeadModel.from_pretrained(tmp_path / "there", dtype="auto").dtype
    done = run("convert", tmp_path / "there", tmp_path / "back", "--to", "megatron", "--tensor-parallel", "2")
    assert 0 == done.returncode, done.stderr
    for model in (raw, tmp_path / "there", tmp_path / "back"):
        done = run("verify", model, "--cache-dir", tmp_path / "cache")
        assert 0 == done.returncode, done.stderr
        assert "tokenizer  50257 ids, the same as GPT-2's" in done.stdout
        assert "head       the token embedding" in done.stdout
        assert done.stdout.endswith("verdict    can be served\n")
    done = run("convert", raw, tmp_path / "there")
    assert (2, "exists already; name a new folder" in done.stderr) == (done.returncode, True)


def test_verify_says_what_is_wrong(tmp_path: Path) -> None:
    """And ends with 1."""
    model = files.random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = torch.nan
    source = files.write_tree(model, Layout(), tmp_path / "in")
    done = run("verify", source, "--cache-dir", tmp_path / "cache")
    assert 1 == done.returncode
    assert "verdict    cannot be served: " in done.stdout
    assert "h.1.mlp.c_fc.bias: holds NaN or infinity" in done.stdout


def test_the_release_is_known_by_its_logits(tmp_path: Path) -> None:
    """Of a model of its shape, the 19 logits are compared; those of another shape are not."""
    config = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(files.GPT2Config(**config)).eval()
    model.save_pretrained(tmp_path)
    copy_tokenizer(GPT2_TOKENIZER, tmp_path, context_length=1024)
    with torch.no_grad():
        logits = model(torch.tensor([ORACLE_IDS])).logits[0]
    own = [logits[8 * i // 17, 2792 * i].item() for i in range(19)]
    assert "logits     those of NVIDIA's 345M: all 19 known ones" in findings(tmp_path, oracle=own)[-1]
    assert "logits     not those of NVIDIA's 345M: " in findings(tmp_path)[-1]


def test_what_lacks_a_tokenizer_is_no_model(tmp_path: Path) -> None:
    files.random_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json"):
        findings(tmp_path)
    copy_tokenizer(GPT2_TOKENIZER, tmp_path, context_length=64)
    assert "not compared" in findings(tmp_path)[-1]
