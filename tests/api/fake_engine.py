"""An engine at the other end of a real socket pair: speaks the records of request.py and makes tokens by a script.

The script is a pure function of (request, choice), so a request gets the same tokens in any company. Everything the
API sends is kept (`submitted` with `params`, `aborted`), and tests wait for it on `changed` instead of sleeping.
"""

import asyncio
import hashlib
import socket
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from service.engine.channel import HEADER_BYTES, frame
from service.engine.request import (
    Abort,
    Delta,
    EngineStats,
    Finish,
    Logprobs,
    ModelInfo,
    Publish,
    Ready,
    Request,
    SamplingParams,
    Status,
    Submit,
    ToApi,
    ToEngine,
)

MODEL = ModelInfo(
    folder="demo",
    context_length=1024,
    vocab_size=50257,
    end_of_text_id=50256,
    num_blocks=100,
    block_size=16,
    max_num_seqs=64,
    dtype="float32",
    device="cpu",
    num_layers=6,
    hidden_size=192,
    num_heads=6,
)
Script = Callable[[Request, SamplingParams, int], Sequence[int]]


def random_tokens(request: Request, params: SamplingParams, choice: int) -> list[int]:
    """As many ids as were asked for, drawn from what a draw may depend on: prompt, seed, choice and position."""
    drawn = 0 if params.temperature == 0 else params.seed
    digest = hashlib.shake_128(repr((request.prompt, drawn, choice if drawn else 0)).encode())
    data = digest.digest(2 * params.max_tokens)
    return [int.from_bytes(data[i : i + 2], "big") % 50256 for i in range(0, len(data), 2)]


def logprob_entries(token_ids: Sequence[int], num_top: int) -> list[tuple[float, dict[int, float]]]:
    """For each token its log-probability and the best ones: a pure function of the id. Each third is the best."""
    entries = []
    for token_id in token_ids:
        best = {(token_id + token_id % 3 + 7 * rank) % MODEL.vocab_size: -0.1 * (rank + 1) for rank in range(num_top)}
        rounded = {other: float(np.float32(value)) for other, value in best.items()}
        entries.append((rounded.get(token_id, float(np.float32(-9.3 - token_id % 5))), rounded))
    return entries


def logprobs_of(token_ids: Sequence[int], num_top: int) -> Logprobs:
    """The same as the engine's record."""
    entries = logprob_entries(token_ids, num_top)
    return Logprobs(
        np.array([chosen for chosen, _ in entries], np.float32).tobytes(),
        np.array([list(best) for _, best in entries], np.int32).tobytes(),
        np.array([list(best.values()) for _, best in entries], np.float32).tobytes(),
    )


class FakeEngine:
    """One engine process. Call `start`, hand `api_end` to EngineClient.attach, then `ready`."""

    def __init__(self, script: Script = random_tokens) -> None:
        self.script = script
        self.tokens_per_delta = 1
        self.cached_tokens = 0
        self.seconds_per_delta = 0.0
        self.gate = asyncio.Event()  # sequences stand still while it is clear, after `tokens_before_gate` tokens
        self.gate.set()
        self.tokens_before_gate = 0
        self.announce_started = True
        self.submitted: list[Request] = []
        self.submits: list[Submit] = []
        self.aborted: list[Abort] = []
        self.changed = asyncio.Condition()
        self._open: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self.api_end, self._engine_end = socket.socketpair()

    async def start(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self._engine_end)
        self._serving = asyncio.ensure_future(self._serve())

    def send(self, message: ToApi) -> None:
        self._writer.write(frame(message, self._encoder))

    def ready(self, model: ModelInfo = MODEL) -> None:
        self.send(Ready(model))

    def progress(self, phase: str, progress: float) -> None:
        self.send(Status(phase, progress))

    def publish_stats(self, stats: EngineStats) -> None:
        self.send(Publish(stats=stats))

    def fail(self, request: Request, error: str) -> None:
        """End every open sequence of `request` with an error, as after a step that raised."""
        self.end(request, Finish.ERROR, error)

    def end(self, request: Request, finish: Finish, error: str | None = None) -> None:
        """End every open sequence of `request`."""
        for key in [key for key in self._open if key[0] == request.id]:
            self._open.pop(key).cancel()
            self.send(Publish(deltas=(Delta(*key, (), finish, error),)))

    async def die(self) -> None:
        """Close the channel in the middle of whatever goes on, as SIGKILL does."""
        self._serving.cancel()
        for task in self._open.values():
            task.cancel()
        await asyncio.gather(self._serving, *self._open.values(), return_exceptions=True)
        self._writer.close()

    async def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Return once `predicate` holds; it is asked again after every message from the API."""
        async with self.changed, asyncio.timeout(5):
            await self.changed.wait_for(predicate)

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def _serve(self) -> None:
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "big")
                match decoder.decode(await self._reader.readexactly(size)):
                    case Submit(requests, params) as submit:
                        self.submits.append(submit)
                        self.submitted += requests
                        for request in requests:
                            for choice in range(request.n):
                                task = asyncio.ensure_future(self._generate(request, params, choice))
                                self._open[request.id, choice] = task
                    case Abort() as abort:
                        self.aborted.append(abort)
                        for key in [k for k in self._open if k[0] == abort.request_id]:
                            if abort.choice in (None, key[1]):
                                self._open.pop(key).cancel()
                async with self.changed:
                    self.changed.notify_all()
        except asyncio.IncompleteReadError:
            pass

    async def _generate(self, request: Request, params: SamplingParams, choice: int) -> None:
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {MODEL.end_of_text_id})
        tokens = list(self.script(request, params, choice))[: params.max_tokens]
        end = next((i + 1 for i, t in enumerate(tokens) if t in stops and i + 1 > params.min_tokens), None)
        finish = Finish.LENGTH if end is None else Finish.STOP
        tokens = tokens[:end]
        if choice == 0 and self.announce_started:
            self.send(Publish(started=(request.id,)))
        num_top = params.num_logprobs or 0
        scores = None
        if request.score_from is not None and choice == 0:
            scores = logprobs_of(request.prompt[request.score_from :], num_top)
        for start in range(0, max(1, len(tokens)), self.tokens_per_delta):
            if start >= self.tokens_before_gate:
                await self.gate.wait()
            await asyncio.sleep(self.seconds_per_delta)
            piece = tuple(tokens[start : start + self.tokens_per_delta])
            delta = Delta(
                request.id,
                choice,
                piece,
                finish if start + len(piece) == len(tokens) else None,
                cached_tokens=0 if start else self.cached_tokens,
                logprobs=None if params.num_logprobs is None else logprobs_of(piece, num_top),
                prompt_logprobs=None if start else scores,
            )
            self.send(Publish(deltas=(delta,)))
        self._open.pop((request.id, choice), None)
        async with self.changed:
            self.changed.notify_all()
