"""service.checkpoint.download: local folders, and hub ids against a stand-in of the hub.

huggingface_hub reads its environment when it is imported, so each hub case is a process of its own.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from service.checkpoint.download import resolve
from service.checkpoint.errors import CheckpointError

MODEL = "owner/tiny"
REMEDY = "fetch it where the hub can be reached, or give a local folder"
SCRIPT = """
import json, sys
from pathlib import Path
from service.checkpoint.download import resolve
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config
for kwargs in json.loads(sys.argv[1]):
    shares = []
    try:
        folder = resolve(**kwargs, on_progress=shares.append)
        answer = {"folder": str(folder), "layers": read_config(folder).num_layers}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"torch": "torch" in sys.modules, "shares": shares}))
"""


class Start:
    """Starts of the service's first step, all with one cache; each answers with a folder or an error."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.shares: list[float] = []  # the progress that the last start told

    def __call__(self, endpoint: str, *calls: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                SCRIPT,
                json.dumps([{"model": MODEL, **call} for call in calls or ({},)]),
            ],
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "NO_PROXY": "*",
                **settings,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert 0 == done.returncode, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert not any(answer.pop("torch") for answer in answers), "resolve and read_config must not load torch"
        self.shares = [share for answer in answers for share in answer.pop("shares")]
        return answers


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path / "cache")


@pytest.fixture
def folder(write_folder: Callable[..., Path], tensors: dict[str, torch.Tensor]) -> Path:
    """A repository with both formats and files that nobody needs."""
    folder = write_folder(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in (
        "vocab.json",
        "merges.txt",
        "README.md",
        "model.fp32.safetensors",
        "model-00001-of-00001.safetensors",
        "tf_model.h5",
        "onnx/config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'"{name}"')  # equal files would be one blob
    return folder


def test_local_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a config.json is used where it lies, by whatever path it is called."""
    assert folder == resolve(str(folder))
    monkeypatch.chdir(folder.parent)
    assert Path(folder.name) == resolve(folder.name)
    assert Path(f"./{folder.name}") == resolve(f"./{folder.name}")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert folder == resolve(f"~/{folder.name}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("~/nowhere-at-all", "no such file or folder"),
        ("empty", "neither a config.json nor a checkpoint of Megatron-LM"),
        ("a/b/c", "not of a hub id's form"),
        ("", "neither a config.json nor a checkpoint of Megatron-LM"),
    ],
)
def test_local_mistakes_say_what_is_wrong(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks local is never asked of the hub; the error has the name and the reason."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(model)
    assert str(caught.value).startswith(f"{model}:")


def test_local_folder_has_no_revision(folder: Path) -> None:
    """A revision that would be ignored is refused."""
    with pytest.raises(CheckpointError, match=r"no revisions.*v2"):
        resolve(str(folder), revision="v2")


def test_safetensors_preferred_and_second_start_needs_no_hub(hub: Any, start: Start, folder: Path) -> None:
    """Only what is needed is fetched, weights once; later starts work offline, and while the hub is away."""
    commit = hub.push(MODEL, folder)
    (first,) = start(hub.url)
    assert commit == Path(first["folder"]).name
    assert 2 == first["layers"]
    assert {
        "config.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
    } == hub.downloads()
    asked = len(hub.requests)
    assert [first, first] == start(hub.url, {"offline": True}, {"offline": True, "revision": commit})
    assert [first] == start(hub.url, HF_HUB_OFFLINE="1")
    assert asked == len(hub.requests)
    hub.refusal = (500, "")
    assert [first] == start(hub.url)
    assert [first] == start("http://127.0.0.1:9")
    hub.refusal = None
    assert [first] == start(hub.url)
    assert {
        "config.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
    } == hub.downloads()


def test_cache_folder_is_the_callers(hub: Any, start: Start, folder: Path, tmp_path: Path) -> None:
    """With `cache_dir`, huggingface_hub's own cache stays empty."""
    hub.push(MODEL, folder)
    (own,) = start(hub.url, {"cache_dir": str(tmp_path / "own")})
    assert (tmp_path / "own") in Path(own["folder"]).parents
    assert [own] == start(hub.url, {"cache_dir": str(tmp_path / "own"), "offline": True})
    assert "not in the cache" in start(hub.url, {"offline": True})[0]["error"]


def test_pickle_only_where_there_is_nothing_else(
    hub: Any,
    start: Start,
    write_folder: Callable[..., Path],
    tensors: dict[str, torch.Tensor],
) -> None:
    """A repository without safetensors gives its pytorch_model.bin; other .bin files stay there."""
    folder = write_folder(tensors, layout="bin")
    (folder / "training_args.bin").touch()
    hub.push(MODEL, folder)
    (answer,) = start(hub.url)
    assert 2 == answer["layers"]
    assert {"config.json", "pytorch_model.bin"} == hub.downloads()


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_shards_come_with_their_index(
    layout: str,
    hub: Any,
    start: Start,
    write_folder: Callable[..., Path],
    tensors: dict[str, torch.Tensor],
) -> None:
    """All shards and the index are fetched, and a cache that lost one is not passed off as whole."""
    folder = write_folder(tensors, layout=layout)
    hub.push(MODEL, folder)
    (answer,) = start(hub.url)
    assert {path.name for path in folder.iterdir()} == {path.name for path in Path(answer["folder"]).iterdir()}
    lost = next(Path(answer["folder"]).glob("*-00002-of-00002.*"))
    lost.unlink()
    (answer,) = start(hub.url, {"offline": True})
    assert "offline is on" in answer["error"]
    assert lost.name in answer["error"]


def test_revision_is_a_pin(
    hub: Any,
    start: Start,
    write_folder: Callable[..., Path],
    tensors: dict[str, torch.Tensor],
) -> None:
    """A branch, a tag or a commit gives that version, online and from the cache; an unknown one is an error."""
    old = hub.push(MODEL, write_folder(tensors, n_layer=3))
    hub.refs[MODEL]["v1"] = old
    new = hub.push(MODEL, write_folder(tensors))
    calls: list[dict[str, Any]] = [
        {"revision": "v1"},
        {"revision": old},
        {},
        {"revision": "v3"},
    ]
    by_tag, by_commit, latest, unknown = start(hub.url, *calls)
    assert (3, old) == (by_tag["layers"], Path(by_tag["folder"]).name)
    assert by_tag == by_commit
    assert (2, new) == (latest["layers"], Path(latest["folder"]).name)
    assert "owner/tiny: the hub has no revision 'v3'" in unknown["error"]
    assert [by_tag, by_commit, latest] == start(hub.url, *calls[:3], HF_HUB_OFFLINE="1")
    (absent,) = start(hub.url, {"revision": "v3", "offline": True})
    assert f"owner/tiny (revision v3): not in the cache, and offline is on; {REMEDY}" == absent["error"]


def test_hub_errors_have_the_id_and_the_reason(hub: Any, start: Start, folder: Path) -> None:
    """Unknown, gated, unreachable, broken and offline are five different messages."""
    (unknown,) = start(hub.url)
    assert "owner/tiny: no such folder, and no such model on the hub" in unknown["error"]
    hub.push(MODEL, folder)
    hub.refusal = (403, "GatedRepo")
    (gated,) = start(hub.url)
    assert "owner/tiny: gated" in gated["error"]
    hub.refused = "/resolve/"  # the hub lists a gated model's files to everyone
    assert [gated] == start(hub.url)
    hub.refused = "/"
    (away,) = start("http://127.0.0.1:9")
    assert "owner/tiny: not in the cache, and fetching it from the hub failed (ConnectError" in away["error"]
    hub.refusal = (500, "")
    (broken,) = start(hub.url)
    assert "owner/tiny: not in the cache, and fetching it from the hub failed (HfHubHTTPError" in broken["error"]
    offline = start(hub.url, {"offline": True}) + start(hub.url, HF_HUB_OFFLINE="1")
    assert [{"error": f"owner/tiny: not in the cache, and offline is on; {REMEDY}"}] * 2 == offline


def test_broken_download_is_an_error_and_the_next_start_mends_it(hub: Any, start: Start, folder: Path) -> None:
    """A snapshot without its weights is never passed on, offline neither."""
    commit = hub.push(MODEL, folder)
    hub.refusal, hub.refused = (403, ""), "model.safetensors"
    online, offline = start(hub.url) + start(hub.url, {"offline": True})
    assert "owner/tiny: not" in online["error"]
    assert "fetching it from the hub failed (" in online["error"]
    assert "owner/tiny: not" in offline["error"]
    assert "offline is on" in offline["error"]
    hub.refusal = None
    (mended,) = start(hub.url)
    assert commit == Path(mended["folder"]).name


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Any, start: Start, folder: Path) -> None:
    """The pieces that have arrived are not fetched again, the file is whole, and progress counts nothing twice."""
    large = folder / "vocab.json"
    large.write_bytes(random.Random(0).randbytes(5 * DOWNLOAD_CHUNK_SIZE // 2))
    hub.push(MODEL, folder)
    hub.cuts = {large.name: 3 * DOWNLOAD_CHUNK_SIZE // 2}
    (answer,) = start(hub.url)
    assert [f"bytes={DOWNLOAD_CHUNK_SIZE}-"] == hub.ranges
    assert large.read_bytes() == (Path(answer["folder"]) / large.name).read_bytes()
    assert start.shares == sorted(set(start.shares))
    assert 1 == start.shares[-1]


def test_a_start_after_a_broken_one_fetches_only_what_is_missing(hub: Any, start: Start, folder: Path) -> None:
    hub.push(MODEL, folder)
    hub.refusal, hub.refused = (403, ""), "model.safetensors"
    start(hub.url)
    hub.refusal = None
    hub.requests.clear()
    start(hub.url)
    assert {"model.safetensors"} == hub.downloads()


def test_progress_is_the_share_of_bytes(hub: Any, start: Start, folder: Path) -> None:
    """From little to all; a start from the cache has nothing to tell."""
    hub.push(MODEL, folder)
    start(hub.url)
    assert start.shares == sorted(start.shares)
    assert 0 < start.shares[0] < start.shares[-1] == 1
    start(hub.url)
    assert [] == start.shares


def test_repository_without_weights_is_refused_before_any_download(hub: Any, start: Start, folder: Path) -> None:
    """The error names what is missing."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    hub.push(MODEL, folder)
    (answer,) = start(hub.url)
    assert "owner/tiny: the repository on the hub has no weights" in answer["error"]
    (folder / "model.safetensors").touch()
    (folder / "config.json").unlink()
    (answer,) = start(hub.url)
    assert "owner/tiny: the repository on the hub has no config.json" in answer["error"]
    assert set() == hub.downloads()
