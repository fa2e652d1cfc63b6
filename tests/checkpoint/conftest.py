"""Tiny GPT-2 folders made with transformers, and a stand-in of the hub on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

MakeModel = Callable[..., Any]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """A random GPT-2 of two layers; every parameter differs from its neighbours, biases and norms included."""

    def make(**fields: Any) -> Any:
        sizes = {
            "vocab_size": 300,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
        }
        config = GPT2Config(**{**sizes, "bos_token_id": 299, "eos_token_id": 299, **fields})
        model: Any = GPT2LMHeadModel(config)
        model.eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return make


@pytest.fixture
def tensors(make_model: MakeModel) -> dict[str, torch.Tensor]:
    """What such a model's file holds: `transformer.`-prefixed, the tied head left out."""
    state = make_model().state_dict()
    del state["lm_head.weight"]
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes config.json and model.safetensors, or another layout of the same tensors, into a fresh folder."""

    def write(tensors: dict[str, Any], *, layout: str = "safetensors", **fields: Any) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        sizes = {
            "vocab_size": 300,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "eos_token_id": 299,
        }
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes, **fields}))
        names = sorted(tensors)
        halves = {"00001": names[: len(names) // 2], "00002": names[len(names) // 2 :]}
        if layout == "safetensors":
            save_file(tensors, folder / "model.safetensors")
        elif layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        elif layout == "old bin":
            torch.save(
                tensors,
                folder / "pytorch_model.bin",
                _use_new_zipfile_serialization=False,
            )
        else:
            stem, suffix = ("model", "safetensors") if layout == "sharded safetensors" else ("pytorch_model", "bin")
            weight_map: dict[str, str] = {}
            for number, part in halves.items():
                file = f"{stem}-{number}-of-00002.{suffix}"
                (save_file if suffix == "safetensors" else torch.save)({n: tensors[n] for n in part}, folder / file)
                weight_map |= dict.fromkeys(part, file)
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return folder

    return write


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that snapshot_download uses. Keeps (method, path) of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, Path]] = {}  # model -> commit -> folder
        self.refs: dict[str, dict[str, str]] = {}  # model -> branch or tag -> commit
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code ...
        self.refused = "/"  # ... for each path with this in it
        self.cuts: dict[str, int] = {}  # file -> how much of it the next answer has before its connection breaks
        self.ranges: list[str] = []  # what was asked for by parts
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, model: str, folder: Path, *, branch: str = "main") -> str:
        """Publishes a folder as a new commit and moves the branch to it."""
        commit = hashlib.sha1(str((model, folder)).encode()).hexdigest()
        self.commits.setdefault(model, {})[commit] = folder
        self.refs.setdefault(model, {})[branch] = commit
        return commit

    def downloads(self) -> set[str]:
        """Names of the files that were fetched whole so far."""
        return {path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the hub's `requests` is the log."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if self.server.refusal is not None and self.server.refused in path:
            return self._send(self.server.refusal[0], headers={"X-Error-Code": self.server.refusal[1]})
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            model, kind, revision, file = (
                "/".join(parts[2:4]),
                *(parts[4:6] or ["revision", "main"]),
                "",
            )
        else:
            model, kind, revision, file = (
                "/".join(parts[:2]),
                parts[2],
                parts[3],
                "/".join(parts[4:]),
            )
        if model not in self.server.commits:
            return self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        commit = self.server.refs[model].get(revision, revision)
        folder = self.server.commits[model].get(commit)
        if folder is None:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if kind == "revision":
            siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
            return self._send(
                200,
                {"id": model, "modelId": model, "sha": commit, "siblings": siblings},
            )
        if kind == "tree":
            return self._send(200, [self._entry(folder / name, name) for name in names])
        if file not in names:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        etag = self._entry(folder / file, file)["oid"]
        data, status = (folder / file).read_bytes(), 200
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            first = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        most = self.server.cuts.pop(file, None) if self.command == "GET" else None
        return self._send(status, data, headers, most=most)

    def _entry(self, path: Path, name: str) -> dict[str, Any]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def _send(
        self, status: int, body: Any = b"", headers: dict[str, str] | None = None, *, most: int | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:most])
        if most is not None:
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in of the hub, empty."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
