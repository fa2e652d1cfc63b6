"""Inputs of each target to begin from: right ones, and some that are wrong in a way which chance seldom finds."""

import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path

import msgspec
import torch

from service.checkpoint.tokenizer import read_tokenizer
from service.engine.channel import frame
from service.engine.request import Abort, Delta, Finish, Publish, Ready, Request, SamplingParams, Status, Submit
from tests.fuzz.targets import MODEL, small_model

_FIELDS = {
    "model": "demo",
    "prompt": ["a", "b<|endoftext|>"],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "n": 2,
    "best_of": 3,
    "logprobs": 2,
    "echo": True,
    "stop": ["a", "\n"],
    "logit_bias": {"5": -100, "50256": 2.5},
    "seed": -1,
    "min_tokens": 1,
    "stop_token_ids": [5],
    "bad_words": ["two words"],
    "allowed_token_ids": [1, 2],
    "truncate_prompt_tokens": 3,
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "priority": -1,
    "timeout_seconds": 5,
    "repetition_stop": {"max_pattern_tokens": 3},
}


def _torch_file(*, old: bool) -> bytes:
    file = io.BytesIO()
    value = {"a": torch.ones(2, 3), "b": [1, 2.5, "text", None], "c": torch.arange(3)}
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def _release() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("release/a.txt", "text" * 100)
        zipped.writestr("release/b/model.pt", b"weights")
    return file.getvalue()


def right() -> dict[str, list[bytes]]:
    """Those that are taken."""
    encoder = msgspec.msgpack.Encoder()
    files = small_model()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).write_bytes(content)
        read_tokenizer(folder).backend.save(str(folder / "tokenizer.json"))
        tokenizer_json = (folder / "tokenizer.json").read_bytes()
    asks = [{name: value, "prompt": "a"} for name, value in _FIELDS.items()]
    asks += [_FIELDS, {"guided_regex": "a+|b{2}"}, {"guided_choice": ["a", "b"]}, {"guided_json": {"type": "string"}}]
    asks += [{"prompt": [[1], [2, 3]]}]
    others = [{"prompts": ["a"], "tokens_to_generate": 3, "top_k": 2}, {"tokens": [1, 2]}, {"prompt": "a"}]
    others += [{"items": [{"context": "a", "continuation": "b"}, {"context": [1], "continuation": [2]}]}]
    params = SamplingParams(5, stop_token_ids=(7,), logit_bias=((7, -1.5),), bad_words=((1, 2),), grammar="g")
    messages = [Submit((Request(1, (1, 2), 2),), params, b"\x01"), Abort(1, 0)]
    ended = Delta(1, 0, (5, 6), Finish.LENGTH)
    answers = [Status("load", 0.5), Publish(started=(1,), deltas=(Delta(1, 0, (5,)), ended)), Ready(MODEL)]
    return {
        "completion": [json.dumps(ask).encode() for ask in asks],
        "request": [json.dumps(body).encode() for body in others],
        "text": [b"a\nb c\0" + bytes(range(60)), b"\0\x00\xdf\x00\x1b"],
        "to_engine": [frame(message, encoder) for message in messages],
        "to_api": [frame(message, encoder) for message in answers],
        "safetensors": [files["model.safetensors"]],
        "config": [files["config.json"]],
        "index": [json.dumps({"weight_map": {"wte.weight": "model-1.safetensors"}}).encode()],
        "vocabulary": [files["vocab.json"]],
        "merges": [files["merges.txt"]],
        "tokenizer_json": [tokenizer_json],
        "pickled": [_torch_file(old=False), _torch_file(old=True)],
        "release": [_release()],
    }


def _repacked(zipped: bytes) -> bytes:
    """Its last member is said to be packed by bzip2, whose reader fails in a way of its own."""
    place = zipped.rindex(b"PK\1\2") + 10
    return zipped[:place] + zipfile.ZIP_BZIP2.to_bytes(2, "little") + zipped[place + 2 :]


def wrong() -> dict[str, list[bytes]]:
    """Those that are refused: nested deeply, or with a head that is gone or changed."""
    nested = b"[" * 2000
    return {
        "completion": [b'{"guided_json": ' + nested],
        "request": [b'{"prompts": ' + nested],
        "to_engine": [b"\0\0\x27\x19\x94\xa5abort\x01\xc0" + b"\x91" * 10_000],
        "to_api": [b"\0\0\x27\x10" + b"\x91" * 10_000],
        "config": [b'{"model_type": ' + nested],
        "index": [nested],
        "vocabulary": [nested],
        "tokenizer_json": [nested],
        "release": [
            _release()[1:],
            _release().replace(b"release/", b"\0elease/"),
            _repacked(_release()),
            _release().replace(b"PK\5\6", b"PK\6\7" + struct.pack("<LQL", 1, 0, 2) + b"PK\5\6"),  # on several disks
        ],
    }


def seeds() -> dict[str, list[bytes]]:
    more = wrong()
    return {target: found + more.get(target, []) for target, found in right().items()}
