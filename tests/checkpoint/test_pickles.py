"""Files of torch.save are read as torch reads them, and hostile ones are refused without running anything."""

import io
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.checkpoint import pickles
from service.checkpoint.archive import is_release, unpack
from service.checkpoint.convert import Job, convert
from service.checkpoint.errors import CheckpointError
from tests.checkpoint import megatron_files as files
from tests.checkpoint.megatron_files import Layout

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def tensors_of(value: Any) -> Any:
    """The same value with tensors read."""
    if isinstance(value, pickles.StoredTensor):
        return value.read().clone()
    if isinstance(value, dict):
        return {name: tensors_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [tensors_of(item) for item in value]
    return value


@pytest.mark.parametrize("old", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_torch_saves_is_read(old: bool, data: st.DataObject, tmp_path: Path) -> None:
    """Any dtype, shape, stride and view, shared storages, parameters, and plain values between them."""
    names = [f"layer.{number}" for number in range(data.draw(st.integers(1, 5)))]
    value: dict[str, Any] = OrderedDict(
        version=3.0, nested={"list": [1, "two", None, b"three"], "size": torch.Size([2])}
    )
    shared = torch.arange(60).reshape(6, 10)
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        tensor = torch.randint(0, 2, shape).to(data.draw(st.sampled_from(DTYPES)))
        view = data.draw(st.sampled_from(["whole", "transposed", "shared", "parameter"]))
        if view == "transposed" and tensor.ndim > 1:
            tensor = tensor.transpose(0, 1)
        elif view == "shared":
            tensor = shared[data.draw(st.integers(0, 5)) :, 1::3]
        elif view == "parameter" and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor)
        value[name] = tensor
    file = tmp_path / "file.pt"
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    found = tensors_of(pickles.load(file))
    for name in names:
        assert value[name].dtype == found[name].dtype
        assert torch.equal(value[name].detach(), found[name])
    assert 3.0 == found["version"]
    assert [1, "two", None] == found["nested"]["list"][:3]


# --- Hostile pickles -------------------------------------------------------------------------------------------------


class Reduced:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def calls(trap: Path) -> dict[str, tuple[Any, str]]:
    """What a hostile file may hold, each of which makes `trap` when it is run, and the name that is refused."""
    program = f"import pathlib; pathlib.Path({str(trap)!r}).touch()"
    return {
        "system": (Reduced(os.system, f"touch {trap}"), r"posix\.system"),
        "eval": (Reduced(eval, f"__import__('pathlib').Path({str(trap)!r}).touch()"), r"(builtins|__builtin__)\.eval"),
        "exec": (Reduced(exec, program), r"(builtins|__builtin__)\.exec"),
        "getattr": (Reduced(getattr, Reduced(__import__, "os"), "system"), r"(builtins|__builtin__)\.__import__"),
        "popen": (Reduced(subprocess.Popen, ["touch", str(trap)]), r"(subprocess|commands)\.Popen"),
        "open": (Reduced(open, str(trap), "w"), r"_?io\.open"),
        "partial": (Reduced(__import__("functools").partial, os.system, f"touch {trap}"), r"functools\.partial"),
        "torch": (Reduced(torch.load, str(trap)), r"torch\.serialization\.load"),
        "numpy": (Reduced(np.save, str(trap), 1), r""),  # of an inert package: read as nothing, so the model is missed
    }


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", list(calls(Path("x"))))
def test_a_hostile_pickle_is_refused_by_name(name: str, old: bool, tmp_path: Path) -> None:
    """In either format, alone, beside the weights or in the args; nothing of it runs, and one sentence says why."""
    trap = tmp_path / "trap"
    bomb, refused = calls(trap)[name]
    value = files.rank_value(files.random_model(), Layout(), 0, 0)
    placed = [bomb, {**value, "extra": bomb}]
    value["args"].__dict__["extra"] = bomb
    for number, hostile in enumerate([*placed, value]):
        file = tmp_path / f"{number}.pt"
        torch.save(hostile, file, _use_new_zipfile_serialization=not old)
        if refused:
            with pytest.raises(CheckpointError, match=rf"{number}\.pt: names [^;]*{refused}\b[^;]*, for which"):
                convert(Job(str(file), str(tmp_path / "out")), lambda done, total: None)
        else:
            pickles.load(file)
    assert not trap.exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_member_of_an_enum_may_be_written_as_an_attribute(old: bool, tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 do; of anything else, getattr is refused."""
    file = tmp_path / "file.pt"
    enum = files.arguments(Layout()).attention_backend
    torch.save({"a": Reduced(getattr, type(enum), enum.name)}, file, _use_new_zipfile_serialization=not old)
    assert isinstance(pickles.load(file)["a"], pickles.Record)
    for owner in ({}, "text", torch.ones(2)):
        torch.save({"a": Reduced(getattr, owner, "pop")}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match="getattr of something that is no enum"):
            pickles.load(file)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch trap'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch trap\x85R.",
        b"(S'touch trap'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch trap'\no.",
        b"ctorch\nFloatStorage\n)R.",
        b"cnumpy\nndarray\n)\x81}S'x'\nK\x01sb.",
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n.",
        b"\x82\x01.",
        b"Pxyz\n.",
        b"\x80\x02(lp0\ng0\na.",
        b"]q\x00" + b"h\x00a" * 100 + b".",
        b"\x80\x02]r\xf0\xff\xff\x7f.",
        b"]p99999999999\n.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02cargparse\nNamespace\n)\x81(K\x01K\x02K\x03tb.",
        b"",
        b".",
        b"\xff" * 50,
    ],
)
def test_hand_made_opcodes_do_nothing(opcodes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a zip, in the old format and as the metadata of torch_dist: an error of ours, or a value without effect."""
    monkeypatch.chdir(tmp_path)
    zipped = tmp_path / "zipped.pt"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", opcodes)
        archive.writestr("archive/version", "3\n")
    old = tmp_path / "old.pt"
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    old.write_bytes(head + opcodes + pickle.dumps([], 2))
    (tmp_path / ".metadata").write_bytes(opcodes)
    for source in (zipped, old, tmp_path):
        with pytest.raises(CheckpointError):
            convert(Job(str(source), str(tmp_path / "out")), lambda done, total: None)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_tensor_cannot_reach_past_its_storage(old: bool, tmp_path: Path) -> None:
    """Neither by its shape, its strides nor its offset, nor by a storage that says it is larger than its file."""
    file = tmp_path / "file.pt"
    torch.save({"a": torch.arange(7.0)}, file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    seven = b"K\x07"
    start = whole.index(b"X\x01\x00\x00\x00a")  # of the tensor, in the pickle
    places = [place for place in range(start, start + 150) if whole.startswith(seven, place)]
    assert 2 == len(places)
    for place in places:
        file.write_bytes(whole[:place] + b"K\xff" + whole[place + 2 :])
        with pytest.raises(
            CheckpointError, match=r"file\.pt: .*(goes past|larger than its storage|cut off|has 28 bytes)"
        ):
            tensors_of(pickles.load(file))


# --- Broken and hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_is_cut_off_is_refused(old: bool, tmp_path: Path) -> None:
    """At any place."""
    file = tmp_path / "file.pt"
    torch.save({"model": {"a": torch.arange(100.0)}, "b": "text"}, file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    for end in [*range(0, len(whole), 61), len(whole) - 1]:
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"file\.pt: "):
            tensors_of(pickles.load(file))


@pytest.mark.parametrize("old", [False, True])
def test_broken_bytes_give_our_error_or_the_value(old: bool, tmp_path: Path) -> None:
    """A bounded fuzz: bytes changed, left out and doubled, in a real file of a training run."""
    file = tmp_path / "file.pt"
    value = files.rank_value(files.random_model(), Layout(), 0, 0)
    value["model"] = {"small": torch.arange(50.0)}
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    numbers = random.Random(7)
    errors = []
    for _ in range(1500):
        broken = bytearray(whole)
        for _ in range(numbers.choice([1, 1, 2, 8])):
            place = numbers.randrange(len(broken))
            match numbers.randrange(3):
                case 0:
                    broken[place] = numbers.randrange(256)
                case 1:
                    del broken[place : place + numbers.randrange(1, 9)]
                case _:
                    broken[place:place] = broken[place : place + numbers.randrange(1, 9)]
        file.write_bytes(broken)
        try:
            tensors_of(pickles.load(file))
        except CheckpointError as error:
            errors.append(str(error))
    assert len(errors) > 500
    assert all("file.pt" in error and len(error) < 600 for error in errors)


def zip_with(file: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../escaped.pt", "leads out of the folder"),
        ("a/../../escaped.pt", "leads out of the folder"),
        ("/tmp/escaped.pt", "leads out of the folder"),
        ("c:\\escaped.pt", "leads out of the folder"),
        ("release/inner.zip", "an archive within the archive"),
    ],
)
def test_a_member_that_leads_elsewhere_is_refused(name: str, why: str, tmp_path: Path) -> None:
    """Before anything is written."""
    file = zip_with(tmp_path / "in.zip", **{"release/mp_rank_00/model_optim_rng.pt": b"x", name: b"y"})
    with pytest.raises(CheckpointError, match=rf"in\.zip: .*{why}"):
        convert(Job(str(file), str(tmp_path / "out")), lambda done, total: None)
    assert ["in.zip"] == [path.name for path in tmp_path.iterdir()]


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("release/mp_rank_00/model_optim_rng.pt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CheckpointError, match="a link"):
        convert(Job(str(tmp_path / "in.zip"), str(tmp_path / "out")), lambda done, total: None)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 1, 9, 93, 99])
def test_other_packing_is_refused(method: int, tmp_path: Path) -> None:
    """Before anything is written: also what the library could read, by code that fails in ways of its own."""
    file = zip_with(tmp_path / "in.zip", **{"release/a.txt": b"a", "release/mp_rank_00/model_optim_rng.pt": b"x"})
    data = bytearray(file.read_bytes())
    struct.pack_into("<H", data, data.rindex(b"PK\1\2") + 10, method)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"in\.zip: .*model_optim_rng\.pt': packed by a method"):
        convert(Job(str(file), str(tmp_path / "out")), lambda done, total: None)
    assert ["in.zip"] == [path.name for path in tmp_path.iterdir()]


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """By the ratio that a member claims, and by what comes out where the claim is a lie."""
    bomb = zip_with(tmp_path / "bomb.zip", **{"release/mp_rank_00/model_optim_rng.pt": bytes(50 * 2**20)})
    with pytest.raises(CheckpointError, match="unpacks to 52428800 bytes, too many for its size"):
        convert(Job(str(bomb), str(tmp_path / "out")), lambda done, total: None)
    data = bytearray(bomb.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):  # the sizes that the headers claim
        place = data.rindex(signature)
        struct.pack_into("<I", data, place + offset, 1000)
    bomb.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bomb\.zip: "):
        convert(Job(str(bomb), str(tmp_path / "out")), lambda done, total: None)
    many = zip_with(tmp_path / "many.zip", **{f"{number}.txt": b"" for number in range(5000)})
    with pytest.raises(CheckpointError, match="5000 members"):
        convert(Job(str(many), str(tmp_path / "out")), lambda done, total: None)
    assert {"bomb.zip", "many.zip"} == {path.name for path in tmp_path.iterdir()}


def test_an_archive_within_a_member_is_refused(tmp_path: Path) -> None:
    """A release within a release, under the name of a checkpoint."""
    inner = zip_with(tmp_path / "inner.zip", **{"release/mp_rank_00/model_optim_rng.pt": b"x"})
    outer = zip_with(tmp_path / "outer.zip", **{"release/mp_rank_00/model_optim_rng.pt": inner.read_bytes()})
    with pytest.raises(CheckpointError, match="an archive within the archive"):
        convert(Job(str(outer), str(tmp_path / "out")), lambda done, total: None)


def test_torch_saves_own_zip_is_no_release(tmp_path: Path) -> None:
    """And a release is unpacked with nothing but a checkpoint's files."""
    torch.save({}, tmp_path / "a.pt")
    assert not is_release(tmp_path / "a.pt")
    release = zip_with(tmp_path / "in.zip", **{"release/x.pt": b"x", "release/run.sh": b"y"})
    assert is_release(release)
    (tmp_path / "out").mkdir()
    unpack(release, tmp_path / "out")
    assert ["x.pt"] == [path.name for path in (tmp_path / "out").rglob("*.*")]


def test_compressed_members_of_torch_are_refused(tmp_path: Path) -> None:
    """Which torch never writes: so a small file cannot become a large one."""
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, saved)
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        pickles.load(zip_with(tmp_path / "a.pt", **members))
