"""Conversions there and back, the process they run in, and the cache of what a service has converted."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from service.checkpoint import cache, worker
from service.checkpoint.cache import converted, is_raw
from service.checkpoint.convert import GPT2_TOKENIZER, Job, convert
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import weight_files
from tests.checkpoint import megatron_files as files
from tests.checkpoint.megatron_files import Layout


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_tree(files.random_model(), Layout(tensor_parallel=2), tmp_path_factory.mktemp("tree") / "in")


@pytest.mark.parametrize("form", ["megatron", "megatron-core"])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_there_and_back_is_the_same(
    tree: Path, form: Any, tensor_parallel: int, dtype: str | None, tmp_path: Path
) -> None:
    """Bit by bit; with another dtype, what rounding to it gives."""
    there, back = tmp_path / "there", tmp_path / "back"
    convert(Job(str(tree), str(tmp_path / "direct"), dtype=dtype), silent)
    convert(Job(str(tree), str(there), form=form, tensor_parallel=tensor_parallel, dtype=dtype), silent)
    ranks = sorted(path.name for path in (there / "release").iterdir())
    assert [f"mp_rank_{rank:02d}" for rank in range(tensor_parallel)] == ranks
    convert(Job(str(there), str(back)), silent)
    direct, again = (load_file(folder / "model.safetensors") for folder in (tmp_path / "direct", back))
    assert direct.keys() == again.keys()
    for name, tensor in direct.items():
        assert getattr(torch, dtype or "float32") == tensor.dtype
        assert torch.equal(tensor, again[name]), name


def test_the_folder_is_one_of_transformers(tree: Path, tmp_path: Path) -> None:
    """It loads there, with GPT-2's tokenizer, and from there goes back to Megatron-LM's."""
    convert(Job(str(tree), str(tmp_path / "out")), silent)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.float32 == model.dtype
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "out")
    assert [15496, 995, 50256] == tokenizer("Hello world<|endoftext|>").input_ids
    convert(Job(str(tmp_path / "out"), str(tmp_path / "back"), form="megatron", tensor_parallel=2), silent)
    convert(Job(str(tmp_path / "back"), str(tmp_path / "again")), silent)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_an_untied_head_goes_along_to_transformers_and_not_to_megatron(tmp_path: Path) -> None:
    model = files.random_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach() + 1)
    model.save_pretrained(tmp_path / "in")
    convert(Job(str(tmp_path / "in"), str(tmp_path / "out"), tokenizer=str(GPT2_TOKENIZER)), silent)
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "out/model.safetensors")["lm_head.weight"])
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(Job(str(tmp_path / "out"), str(tmp_path / "no"), form="megatron"), silent)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt")])
def test_a_tokenizer_beside_the_checkpoint_is_taken(names: tuple[str, str], tmp_path: Path) -> None:
    """It cuts the table to its own size; NVIDIA's names for its files are known."""
    file = files.write_rank(files.random_model(), Layout(version=2.0), tmp_path / "in" / "model_optim_rng.pt")
    vocabulary = json.loads((GPT2_TOKENIZER / "vocab.json").read_text())
    small = {token: number for token, number in vocabulary.items() if number < 50200}
    merges = (GPT2_TOKENIZER / "merges.txt").read_text().splitlines()[: 1 + 50200 - 256]
    for name, text in zip(names, (json.dumps(small), "\n".join(merges)), strict=True):
        (file.parent / name).write_text(text)
    for number, source in enumerate((file, file.parent)):
        convert(Job(str(source), str(tmp_path / str(number))), silent)
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert (50200, 50199) == (config["vocab_size"], config["eos_token_id"])
        assert {"vocab.json", "merges.txt"} < {path.name for path in (tmp_path / str(number)).iterdir()}


def test_orig_vocab_size_is_believed_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    """But GPT-2's own tokenizer does not go with another size."""
    layout = Layout(extra_args={"orig_vocab_size": 50000})
    source = files.write_tree(files.random_model(), layout, tmp_path / "in")
    with pytest.raises(CheckpointError, match="a vocabulary of 50000 ids is not GPT-2's: give its --tokenizer"):
        convert(Job(str(source), str(tmp_path / "out")), silent)
    with pytest.raises(CheckpointError, match="orig_vocab_size: is 50000, and the tokenizer has 50257 ids"):
        convert(Job(str(source), str(tmp_path / "out"), tokenizer=str(GPT2_TOKENIZER)), silent)


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ({"target": "in"}, "exists already"),
        ({"source": "nowhere"}, "nowhere: no such file or folder"),
        ({"tokenizer": "in"}, "--tokenizer: has neither tokenizer.json nor"),
        ({"form": "megatron", "tensor_parallel": 8}, "--tensor-parallel: 4 attention heads do not split"),
        ({"num_heads": 8}, "num_attention_heads: is 4, not the 8"),
        ({"target": "file/out"}, "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    tree: Path, job: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "in").symlink_to(tree)
    paths = {name: str(tmp_path / job[name]) for name in ("source", "target", "tokenizer") if name in job}
    with pytest.raises(CheckpointError, match=why):
        convert(Job(**({"source": str(tree), "target": str(tmp_path / "out")} | job | paths)), silent)
    assert {"file", "in"} == {path.name for path in tmp_path.iterdir()}


# --- The process -----------------------------------------------------------------------------------------------------


def test_the_process_tells_progress_and_errors(tree: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    worker.run(Job(str(tree), str(tmp_path / "out")), lambda done, total: told.append((done, total)))
    assert [(done, 52) for done in range(1, 53)] == told
    with pytest.raises(CheckpointError, match="out: exists already"):
        worker.run(Job(str(tree), str(tmp_path / "out")), silent)


def test_the_process_has_bounds_on_time_and_memory(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each is told as what it is, and nothing is left behind in the target's folder but what the cache sweeps."""
    with pytest.raises(CheckpointError, match=r"in: the process that reads it took longer than 0\.2 s"):
        worker.run(Job(str(tree), str(tmp_path / "out")), silent, seconds=0.2)
    monkeypatch.setattr(worker, "_BASE_BYTES", 2**28)
    hungry = tmp_path / "hungry.pt"
    hungry.write_bytes(b"\x80\x02]" + b"(" + b"]q\x00" * 4_000_000 + b"e.")
    with pytest.raises(CheckpointError, match=r"hungry\.pt: .*(GiB|memory|MemoryError)"):
        worker.run(Job(str(hungry), str(tmp_path / "out")), silent)
    assert not (tmp_path / "out").exists()


def test_the_process_ends_with_its_parent(tree: Path, tmp_path: Path) -> None:
    """A service that is killed leaves no reader behind, wherever that is, and no half of a folder."""
    source, target = tree, tmp_path / "target" / "out"
    program = (
        "from service.checkpoint.worker import run\nfrom service.checkpoint.convert import Job\n"
        f"run(Job({str(source)!r}, {str(target)!r}), lambda done, total: None)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_until(lambda: bool(children.read_text()))
        child = Path(f"/proc/{children.read_text().split()[0]}")
        wait_until(lambda: "libtorch" in (child / "maps").read_text())  # it has its job
        parent.kill()
    wait_until(lambda: not child.exists())
    assert {"out"} >= set(os.listdir(target.parent))  # it may have been done just then


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- The cache -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_converted_once(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The second time nothing is read; a copy of it is hashed, and not converted; other content is."""
    shares: list[float] = []
    folder = converted(tree, cache_dir=tmp_path / "cache", on_progress=shares.append)
    assert shares == sorted(shares)
    assert 1 == shares[-1]
    assert not is_raw(folder)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not again")

    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", tree, copy], check=True)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "run", forbidden)
        assert folder == converted(copy, cache_dir=tmp_path / "cache", on_progress=lambda _: None)
        patched.setattr(cache, "_content_key", forbidden)
        assert folder == converted(tree, cache_dir=tmp_path / "cache", on_progress=lambda _: None)
    file = copy / "mp_rank_00" / "model_optim_rng.pt"
    files.write_rank(
        files.random_model("gelu"), Layout(tensor_parallel=2, extra_args={"bias_gelu_fusion": False}), file
    )
    files.write_rank(
        files.random_model("gelu"), Layout(tensor_parallel=2), copy / "mp_rank_01" / "model_optim_rng.pt", 1
    )
    other = converted(copy, cache_dir=tmp_path / "cache", on_progress=lambda _: None)
    assert folder != other
    assert "gelu" == json.loads((other / "config.json").read_text())["activation_function"]


def test_of_several_at_once_one_converts(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The others wait for it."""
    runs, run = [], worker.run
    monkeypatch.setattr(worker, "run", lambda *given: (runs.append(1), run(*given)))
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(converted(tree, cache_dir=tmp_path / "cache", on_progress=lambda _: None))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 3 == len(found)
    assert {found[0]} == set(found)
    assert 1 == len(runs)


def test_a_cache_that_cannot_be_written_is_named(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(CheckpointError, match=r"cache_dir: .*cache"):
        converted(tree, cache_dir=tmp_path / "cache", on_progress=lambda _: None)


def test_a_broken_checkpoint_is_refused_and_nothing_remembered(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"bad\.pt: not readable as a file of torch\.save"):
        converted(bad, cache_dir=tmp_path / "cache", on_progress=lambda _: None)
    assert not list((tmp_path / "cache" / "converted").iterdir())
    assert not list((tmp_path / "cache" / "sources").glob("*.json"))


def test_one_content_under_two_paths_is_converted_once(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also where both start at once."""
    runs, run = [], worker.run
    monkeypatch.setattr(worker, "run", lambda *given: (runs.append(1), run(*given)))
    subprocess.run(["cp", "-r", tree, tmp_path / "copy"], check=True)
    found: list[Path] = []

    def start(source: Path) -> None:
        found.append(converted(source, cache_dir=tmp_path / "cache", on_progress=lambda _: None))

    threads = [threading.Thread(target=start, args=[source]) for source in (tree, tmp_path / "copy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 == len(found)
    assert 1 == len(set(found)) == len(runs)


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its key would be of other content."""
    source = tmp_path / "copy"
    subprocess.run(["cp", "-r", tree, source], check=True)
    run = worker.run

    def run_and_touch(*given: Any) -> None:
        run(*given)
        os.utime(source / "mp_rank_00" / "model_optim_rng.pt", (1, 1))

    monkeypatch.setattr(worker, "run", run_and_touch)
    with pytest.raises(CheckpointError, match="copy: changed while it was read"):
        converted(source, cache_dir=tmp_path / "cache", on_progress=lambda _: None)
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_what_lies_beside_a_target_is_left_alone(tree: Path, tmp_path: Path) -> None:
    """Whatever it is called."""
    for name in (".out-precious", ".out-2-abc", "out-2"):
        (tmp_path / name).mkdir()
    worker.run(Job(str(tree), str(tmp_path / "out")), silent)
    assert {".out-precious", ".out-2-abc", "out-2", "out"} == {path.name for path in tmp_path.iterdir()}


def test_the_folder_it_is_called_in_has_no_say(tree: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Modules that lie there are not imported."""
    for name in ("shutil", "json", "resource", "struct", "service"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    worker.run(Job(str(tree), str(tmp_path / "out")), silent)
    assert not (tmp_path / "trap").exists()


def test_each_tensor_of_a_folder_keeps_its_dtype(tmp_path: Path) -> None:
    """Also where they differ; what was float64 stays so."""
    model = files.random_model().double()
    model.transformer.wte.half()
    model.save_pretrained(tmp_path / "in")
    convert(Job(str(tmp_path / "in"), str(tmp_path / "out"), tokenizer=str(GPT2_TOKENIZER)), silent)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "in" / "model.safetensors").items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])


def test_safetensors_have_no_pickles_in_their_index(tmp_path: Path) -> None:
    """So what is served is never one."""
    files.random_model().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "a.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "a.bin"}}))
    with pytest.raises(CheckpointError, match=r"'a\.bin' is not the name of a \.safetensors file"):
        weight_files(tmp_path)
