"""What is fuzzed: each target takes any bytes, and fails where they lead to anything but an answer or a refusal.

It returns whether they were taken, that is, whether nothing refused them.

The tests beside this file call them with bytes that are nearly right; atheris_targets.py, with `make fuzz`, with bytes
that reach code which none before did.
"""

import asyncio
import json
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

import service.demo
from service.api import megatron, scoring, tokens
from service.api.admission import Admitted, admit
from service.api.body import parse_body
from service.api.errors import ApiError
from service.api.schemas import CompletionRequest
from service.api.served import ServedModel
from service.api.text import StopStrings, TextStream, load_tokenizer
from service.checkpoint import archive, hub, pickles
from service.checkpoint.errors import CheckpointError
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.channel import Channel, MalformedMessage, frame
from service.engine.client import EngineClient
from service.engine.request import Ready, Request, SamplingParams, Submit, ToApi, ToEngine
from service.model.config import ModelConfig
from tests.api.fake_engine import MODEL
from tests.api.test_text import naive

DEMO = Path(service.demo.__file__).parent / "model"
MAX_CHOICES = 64
SCHEMAS = (*tokens.REQUEST_SCHEMAS, *scoring.REQUEST_SCHEMAS, *megatron.REQUEST_SCHEMAS)


@cache
def served() -> ServedModel:
    client = EngineClient(api_number=0, stall_seconds=60, on_stall=lambda _: None)
    tokenizer = load_tokenizer(DEMO, end_of_text_id=50256)
    model = ServedModel(client, names=("demo",), version="0", load_tokenizer=lambda _: tokenizer)
    asyncio.run(model.on_ready(MODEL))
    return model


# --- Requests ---------------------------------------------------------------------------------------------------------


def completion(body: bytes) -> bool:
    """A body is refused with a 400, or a 404 for its model, or admitted."""
    try:
        admitted = admit(parse_body(body, CompletionRequest), served(), MODEL, max_choices=MAX_CHOICES)
    except ApiError as error:
        check_refused(error, 400, 404)
        return False
    check_admitted(admitted)
    return True


def request(body: bytes) -> bool:
    """A body is refused with a 400 by the schema of each other route, or read."""
    taken = False
    for schema in SCHEMAS:
        try:
            parse_body(body, schema)
            taken = True
        except ApiError as error:
            check_refused(error, 400)
    return taken


def check_refused(error: ApiError, *statuses: int) -> None:
    assert error.status in statuses


def check_admitted(admitted: Admitted) -> None:
    """What the engine trusts: request.py says it."""
    params = admitted.params
    assert 1 <= len(admitted.prompts) * admitted.ask.num_samples <= MAX_CHOICES
    for prompt in admitted.prompts:
        assert 1 <= len(prompt) <= len(prompt) + params.max_tokens <= MODEL.context_length
        assert all(0 <= token_id < MODEL.vocab_size for token_id in prompt)
    assert 0 <= params.max_tokens
    assert 0 <= params.min_tokens <= max(1, params.max_tokens)
    assert 0 <= params.temperature <= 2
    assert 0 <= params.top_k
    assert 0 <= params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert 0 < params.repetition_penalty < float("inf")
    assert -2 <= params.presence_penalty <= 2
    assert -2 <= params.frequency_penalty <= 2
    assert -(2**63) <= params.seed < 2**63
    ids = [*params.stop_token_ids, *params.banned_token_ids, *(params.allowed_token_ids or ())]
    ids += [*dict(params.logit_bias), *chain(*params.bad_words)]
    assert all(0 <= token_id < MODEL.vocab_size for token_id in ids)
    assert len(params.logit_bias) == len(dict(params.logit_bias))
    assert all(2 <= len(word) for word in params.bad_words)
    assert params.num_logprobs is None or 0 <= params.num_logprobs <= 20
    submit = Submit(tuple(Request(1, prompt) for prompt in admitted.prompts), params, admitted.completing_ids)
    assert submit == msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=ToEngine)


# --- Text -------------------------------------------------------------------------------------------------------------


def text(data: bytes) -> bool:
    """Any ids behind any stop strings, a line each: the same text, stop and count as by a naive search."""
    tokenizer = served().tokenizer
    head, _, rest = data.partition(b"\0")
    stops = [stop[:8].decode("utf-8", "replace") for stop in head.split(b"\n")[:4] if stop]
    ids = [int.from_bytes(rest[start : start + 2], "big") % 50257 for start in range(0, min(len(rest), 80), 2)]
    stream = TextStream(tokenizer, StopStrings(stops))
    streamed = ""
    for token_id in ids:
        streamed += stream.push([token_id])
        if stream.stop is not None:
            break
    streamed += stream.finish()
    assert naive(tokenizer, ids, stops, 0) == (streamed, stream.stop, stream.num_tokens)
    return True


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def read(data: bytes, file: str, reading: Callable[[Path], object]) -> bool:
    """What `reading` makes of a small model's folder where `file` is `data`; nothing but CheckpointError is raised."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for path, content in small_model().items():
            (folder / path).write_bytes(content)
        (folder / file).write_bytes(data)
        try:
            reading(folder)
        except CheckpointError:
            return False
        return True


def safetensors(data: bytes) -> bool:
    def reading(folder: Path) -> None:
        state = hub.read_state(folder, hub.read_config(folder), dtype=torch.float32)
        assert (257, 4) == state["token_embedding.weight"].shape

    return read(data, "model.safetensors", reading)


def config(data: bytes) -> bool:
    def reading(folder: Path) -> None:
        assert isinstance(hub.read_config(folder), ModelConfig)

    return read(data, "config.json", reading)


def index(data: bytes) -> bool:
    def reading(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        assert [folder / "model-1.safetensors"] == list(hub.weight_files(folder))

    return read(data, "model.safetensors.index.json", reading)


def vocabulary(data: bytes) -> bool:
    return read(data, "vocab.json", read_tokenizer)


def merges(data: bytes) -> bool:
    return read(data, "merges.txt", read_tokenizer)


def tokenizer_json(data: bytes) -> bool:
    return read(data, "tokenizer.json", read_tokenizer)


def pickled(data: bytes) -> bool:
    return read(data, "file.pt", lambda folder: pickles.load(folder / "file.pt"))


def release(data: bytes) -> bool:
    def reading(folder: Path) -> None:
        if not archive.is_release(folder / "file.zip"):
            raise CheckpointError("another kind of file")
        archive.unpack(folder / "file.zip", folder / "unpacked")

    return read(data, "file.zip", reading)


@cache
def small_model() -> dict[str, bytes]:
    """A folder's files: one layer, and a tokenizer of the bytes and a merge."""
    sizes = {"vocab_size": 257, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2, "eos_token_id": 0}
    alphabet = read_tokenizer(DEMO).backend.get_vocab()
    letters = sorted(token for token in alphabet if len(token) == 1)
    content = {
        "config.json": json.dumps({"model_type": "gpt2", **sizes}).encode(),
        "vocab.json": json.dumps({token: i for i, token in enumerate([*letters, "ab"])}).encode(),
        "merges.txt": b"#version: 0.2\na b\n",
    }
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for path, data in content.items():
            (folder / path).write_bytes(data)
        names = hub.layout(hub.read_config(folder))
        tensors = {
            theirs: torch.ones(shape[::-1] if transposed else shape)
            for theirs, (_, shape, transposed) in names.items()
            if theirs != "lm_head.weight"
        }
        save_file(tensors, folder / "model.safetensors")
        content["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    return content


# --- Between the processes --------------------------------------------------------------------------------------------


def to_engine(data: bytes) -> bool:
    """The engine's end of the channel: messages, or MalformedMessage."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, ToEngine)
        theirs.sendall(data[:100_000])
        try:
            messages = list(channel.receive())
        except MalformedMessage:
            return False
    assert all(isinstance(message, ToEngine) for message in messages)
    return bool(messages)


def to_api(data: bytes) -> bool:
    """The API's end: open requests end with the channel, whatever came over it, and a new engine is listened to."""
    return asyncio.run(_to_api(data))


async def _to_api(data: bytes) -> bool:
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    client = EngineClient(api_number=0, stall_seconds=60, on_stall=lambda _: None)
    engine, taken = client.engines[0], []
    take = engine._take

    def keep(message: ToApi) -> None:
        take(message)
        taken.append(message)

    engine._take = keep  # type: ignore[method-assign]
    encoder = msgspec.msgpack.Encoder()
    ours, theirs = socket.socketpair()
    with theirs:
        client.attach(ours)
        theirs.sendall(frame(Ready(MODEL), encoder))
        while not client.ready:  # noqa: ASYNC110 - nothing else happens in this loop
            await asyncio.sleep(0)
        stream = client.submit([Request(1, (1, 2))], SamplingParams(4))
        theirs.sendall(data[:100_000])
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            assert engine._serving is not None
            await asyncio.wait([engine._serving])
        assert engine._serving.exception() is None
        stream.close()
        assert not client.ready
        await client.close()
    assert [] == faults
    return len(taken) > 1


TARGETS: dict[str, Callable[[bytes], bool]] = {
    target.__name__: target
    for target in (
        *(completion, request, text, to_engine, to_api),
        *(safetensors, config, index, vocabulary, merges, tokenizer_json, pickled, release),
    )
}
