"""service.checkpoint.hub: weight files and indexes that are broken, hostile or incomplete."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config, read_state

Tensors = dict[str, torch.Tensor]
WriteFolder = Callable[..., Path]
LAYOUTS = ["safetensors", "sharded safetensors", "bin", "old bin", "sharded bin"]


def read(folder: Path) -> Tensors:
    return read_state(folder, read_config(folder), dtype=torch.float32)


class Bomb:
    """A pickle of it calls os.makedirs when plain pickle reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.mark.parametrize("layout", ["bin", "old bin", "sharded bin"])
def test_hostile_pickle_is_refused_and_not_executed(
    layout: str, tensors: Tensors, write_folder: WriteFolder, tmp_path: Path
) -> None:
    """The file is named, nothing in it runs, neither for the config nor for the tensors."""
    traps: dict[str, Any] = {
        **tensors,
        "a": Bomb(tmp_path / "executed"),
        "z": Bomb(tmp_path / "executed"),
    }
    folder = write_folder(traps, layout=layout)
    config = read_config(folder)
    with pytest.raises(
        CheckpointError,
        match=r"pytorch_model\S*\.bin: names \w+\.makedirs, for which",
    ):
        read_state(folder, config, dtype=torch.float32)
    assert not (tmp_path / "executed").exists()
    torch.load(next(folder.glob("*.bin")), weights_only=False)
    assert (tmp_path / "executed").exists(), "the trap itself must work"


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02N.", b"PK\x03\x04 broken"])
def test_broken_bin_is_named(content: bytes, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Whatever the file holds instead, the error is ours and has its name."""
    folder = write_folder(tensors, layout="bin")
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read(folder)


@pytest.mark.parametrize("value", [[torch.zeros(2)], {1: torch.zeros(2)}, torch.zeros(2)])
def test_bin_without_names_is_refused(value: Any, tensors: Tensors, write_folder: WriteFolder) -> None:
    """A .bin is a table of named tensors."""
    folder = write_folder(tensors, layout="bin")
    torch.save(value, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a table of named tensors"):
        read(folder)


@pytest.mark.parametrize("length", [0, 4, 5000])
def test_broken_safetensors_is_named(length: int, tensors: Tensors, write_folder: WriteFolder) -> None:
    """A download that was cut short is found by both readers."""
    folder = write_folder(tensors)
    config = read_config(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable as safetensors"):
        read_config(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not readable as safetensors"):
        read_state(folder, config, dtype=torch.float32)


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_shard_that_is_not_there_is_named(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Found before anything is read."""
    folder = write_folder(tensors, layout=layout)
    shard = next(folder.glob("*-00002-of-00002.*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: {shard.name} is missing"):
        read(folder)


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_index_and_shards_must_agree(layout: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """A tensor that only the index or only a shard has is an error naming it and the shard."""
    for name, where in (
        ("transformer.h.0.ln_1.bias", "shard"),
        ("transformer.h.7.ln_1.bias", "index"),
    ):
        folder = write_folder(tensors, layout=layout)
        path = next(folder.glob("*.index.json"))
        index = json.loads(path.read_text())
        if where == "shard":
            shard = index["weight_map"].pop(name)
        else:
            shard = index["weight_map"][name] = sorted(index["weight_map"].values())[0]
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=rf"{shard}: {name}: in the {where} only"):
            read(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "a/b.safetensors",
        "/etc/passwd",
        "..",
        ".hidden.safetensors",
        "a\\b.bin",
        5,
        None,
    ],
)
def test_index_cannot_leave_its_folder(shard: Any, tensors: Tensors, write_folder: WriteFolder) -> None:
    """Only plain names of weight files are followed."""
    folder = write_folder(tensors, layout="sharded safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.ln_f.bias"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors\.index\.json: weight_map: .* is not the name",
    ):
        read(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\xff"])
def test_broken_index_is_named(content: str, tensors: Tensors, write_folder: WriteFolder) -> None:
    """The error has the index file's name."""
    folder = write_folder(tensors, layout="sharded safetensors")
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        read(folder)


def test_safetensors_come_before_pickles(tensors: Tensors, write_folder: WriteFolder) -> None:
    """A folder with both is read from the safer one; with neither, the error lists what was looked for."""
    folder = write_folder(tensors)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(tensors["transformer.wpe.weight"], read(folder)["position_embedding.weight"])
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights \(model\.safetensors, .*pytorch_model\.bin"):
        read(folder)
