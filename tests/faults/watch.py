"""What holds around every fault, whichever it is. A test does harm within a Watch, which looks on and then checks."""

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.service.scripted_model import ScriptedModel
from tests.service.server import Client, Server, Streamed, eventually

LONG = 500  # tokens: seconds of work, and all of them known

_ENVELOPE = {"message", "type", "param", "code"}
_PROBE_SECONDS = 0.05
_HONEST_SECONDS = 1.0  # in which readiness must have followed what requests are told
_ANSWER_SECONDS = 60.0
_GROWTH_BYTES = 12 * 2**20  # that an allocator may keep (3 MiB are usual); tests repeat what costs little
_SPARE_DESCRIPTORS = 2  # what a process opens when something happens to it for the first time


@dataclass
class Answer:
    """What the client of one request got."""

    num_tokens: int  # that were asked for
    num_prompt_tokens: int = 1
    status: int | None = None  # None: no status line came
    at: float = 0.0  # when it came, in monotonic seconds
    body: Any = None
    streamed: Streamed | None = None
    broken: bool = False  # the connection ended before the answer did

    @property
    def error(self) -> dict[str, Any] | None:
        if self.streamed is not None:
            return self.streamed.error
        error: dict[str, Any] | None = (self.body or {}).get("error")
        return error

    @property
    def texts(self) -> list[str]:
        if self.streamed is not None:
            return [self.streamed.text(choice) for choice in sorted(self.streamed.pieces)]
        return [choice["text"] for choice in (self.body or {}).get("choices", ())]

    @property
    def whole(self) -> bool:
        """It ended by itself, as it should."""
        if self.streamed is not None:
            return self.streamed.done and self.streamed.error is None
        return self.status == 200 and not self.broken

    def check(self, model: ScriptedModel, *, may_break: bool) -> None:
        """An answer, or an error that says what it is; its text is right as far as it goes."""
        if self.broken:
            assert may_break, f"no answer, and the API process lived: {self}"
        elif not self.whole:
            assert self.error is not None, self
            assert _ENVELOPE == set(self.error), self
            if self.streamed is not None:
                assert self.streamed.done, self
                assert not self.streamed.finish_reasons or len(self.streamed.pieces) > 1, self
        for text in self.texts:
            if self.whole:
                assert model.text(self.num_tokens, num_prompt_tokens=self.num_prompt_tokens) == text
            else:
                assert model.text(LONG).startswith(text)


@dataclass(frozen=True, slots=True)
class Load:
    """All that a server of four sequences at a time can do, and more."""

    running: list[asyncio.Task[Answer]]
    waiting: list[asyncio.Task[Answer]]

    async def running_failed(self, status: int = 500) -> None:
        """What ran ended with an error, which for a stream under way is an event; what waited was answered whole."""
        for task in self.running:
            answer = await task
            assert answer.error is not None, answer
            assert answer.status == (status if answer.streamed is None else 200), answer
        for task in self.waiting:
            assert (answer := await task).whole, answer


@dataclass
class _Footprint:
    """What a process holds."""

    process: psutil.Process
    memory: int = field(init=False)
    descriptors: int = field(init=False)

    def __post_init__(self) -> None:
        self.memory, self.descriptors = self.process.memory_info().rss, self.process.num_fds()


class Watch:
    """While it is entered: requests, each of which must be answered, and readiness, which must be honest.

    At its end, of a service that goes on: liveness never fell, blocks are back, nothing runs or waits, memory and
    descriptors are about what they were, and the next request is answered right. `ends` says that the service is to
    end, `gives_up` that it is to fail for good, `may_break` that the process which answers is to die. `cache_bytes` are
    those of a KV cache that may still be new, whose memory is taken as it is first written.
    """

    def __init__(
        self,
        server: Server,
        model: ScriptedModel,
        *,
        ends: bool = False,
        gives_up: bool = False,
        may_break: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.client = Client(server.url)
        self.answers: list[asyncio.Task[Answer]] = []
        self._server = server
        self._model = model
        self._ends, self._gives_up, self._may_break = ends, gives_up, may_break
        self._most_growth = _GROWTH_BYTES + cache_bytes
        self._before: list[_Footprint] = []
        self._probed_at = 0.0  # the last time, in monotonic seconds
        self.refusals: list[float] = []  # when readiness was false, in monotonic seconds
        self._dishonest: list[str] = []
        self._prober: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._before = [_Footprint(process) for process in self._processes()]
        self._prober = asyncio.create_task(self._probe())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._prober is not None
        try:
            if error is None:
                await self._check()
        finally:
            for task in (self._prober, *self.answers):
                task.cancel()
            await asyncio.gather(self._prober, *self.answers, return_exceptions=True)
            await self.client.http.aclose()

    # What a test does

    def ask(
        self, *, max_tokens: int = LONG, stream: bool = False, prompt: str | list[list[int]] = "", **more: Any
    ) -> asyncio.Task[Answer]:
        """A request of one or more choices, after prompts of one length, so that its text is known."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream, **more}
        answer = Answer(max_tokens, len(prompt[0]) if prompt else 1)
        task = asyncio.create_task(self._fetch(answer, body))
        self.answers.append(task)
        return task

    async def load(self) -> Load:
        """Return when streams and plain requests run, and others wait."""
        running = [self.ask(stream=True), self.ask(stream=True, n=2), self.ask()]
        await self.client.wait_metric("requests_running", 4)
        waiting = [self.ask(max_tokens=20), self.ask(max_tokens=30, stream=True, n=2)]
        await self.client.wait_metric("requests_waiting", 3)
        assert not any(task.done() for task in running)
        return Load(running, waiting)

    async def restarted(self, *, since: float) -> None:
        """Return once one engine more than `since` has been started, and is ready."""
        await self.client.wait_metric("engine_restarts_total", since + 1, seconds=60)
        await self.client.wait_status("/readyz", 200)

    async def wait_phases(self, *phases: str) -> None:
        """Return once the engines, by their numbers, are at these."""

        async def reached() -> bool:
            found = await self.client.samples("phase")
            return {(str(number), phase) for number, phase in enumerate(phases)} == {
                (labels["engine"], labels["phase"]) for labels, _ in found
            }

        await eventually(reached, seconds=60)

    # What it does itself

    async def _fetch(self, answer: Answer, body: dict[str, Any]) -> Answer:
        try:
            async with self.client.http.stream("POST", "/v1/completions", json=body) as response:
                answer.status, answer.at = response.status_code, time.monotonic()
                if answer.status == 200 and body["stream"]:
                    answer.streamed = Streamed()
                    async for line in response.aiter_lines():
                        answer.streamed.take(line)
                    answer.broken = not answer.streamed.done
                else:
                    await response.aread()
                    answer.body = response.json()
        except httpx.TransportError:
            answer.broken = True
        return answer

    async def _probe(self) -> None:
        """Ask whether it is ready, and whether a request is taken: one that is refused a moment later for its body."""
        disagreed_at: float | None = None
        async with httpx.AsyncClient(base_url=self._server.url, timeout=_ANSWER_SECONDS) as http:
            while True:
                try:
                    ready = (await http.get("/readyz")).status_code
                    now = time.monotonic()
                    taken = (await http.post("/v1/completions", content=b"[]")).status_code
                    live = (await http.get("/livez")).status_code
                except httpx.TransportError as error:
                    if not self._ends:
                        self._dishonest.append(f"no answer: {error!r}")
                    return
                self._probed_at = now
                if ready not in (200, 503) or taken not in (400, 503):
                    self._dishonest.append(f"/readyz said {ready}, and a request was told {taken}")
                if ready == 503:
                    self.refusals.append(now)
                if live != 200 and not self._gives_up:
                    self._dishonest.append("liveness fell")
                if (ready == 503) == (taken == 503):
                    disagreed_at = None
                    await asyncio.sleep(_PROBE_SECONDS)
                    continue
                disagreed_at = disagreed_at or now
                if time.monotonic() - disagreed_at > _HONEST_SECONDS:
                    self._dishonest.append(f"/readyz said {ready} while requests were told {taken}")

    async def _check(self) -> None:
        if self.answers:
            _, pending = await asyncio.wait(self.answers, timeout=_ANSWER_SECONDS)
            assert not pending, f"{len(pending)} of {len(self.answers)} requests are not answered"
        for answer in (task.result() for task in self.answers):
            answer.check(self._model, may_break=self._may_break)
            if answer.status == 503 and answer.at < self._probed_at:  # what ends may not be asked again
                assert any(abs(answer.at - at) < _HONEST_SECONDS + _PROBE_SECONDS for at in self.refusals), (
                    "a request was refused while readiness was true"
                )
        if not (self._ends or self._gives_up):
            await self._check_recovered()
        assert not self._dishonest, self._dishonest
        assert self._probed_at, "nobody asked whether it is ready"

    async def _check_recovered(self) -> None:
        client = self.client
        await client.wait_status("/readyz", 200)
        for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
            await client.wait_metric(name, 0)
        answer = await client.complete(prompt="", max_tokens=30)
        assert self._model.text(30) == answer["choices"][0]["text"]
        assert self._prober is not None
        self._prober.cancel()
        await asyncio.wait([self._prober])
        await client.http.aclose()
        now = {process.pid: process for process in self._processes()}
        for before in self._before:
            process = now.get(before.process.pid)
            if process is None:  # an engine that was replaced
                continue

            async def are_closed(process: psutil.Process = process, most: int = before.descriptors) -> bool:
                return process.num_fds() <= most + _SPARE_DESCRIPTORS

            await eventually(are_closed)
            grown = process.memory_info().rss - before.memory
            assert grown < self._most_growth, f"{process} has grown by {grown} bytes"

    def _processes(self) -> list[psutil.Process]:
        supervisor = psutil.Process(self._server.process.pid)
        return [supervisor, *(child for child in self._server.children if "spawn_main" in " ".join(child.cmdline()))]
