"""A server of /v1/completions in a thread, with known timing: real HTTP, tokens that mean nothing, faults by number."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Fault = Callable[[int, dict[str, Any]], str | None]  # of the number of a request and its body


@dataclass
class FakeServer:
    """A context manager. A fault is a status such as "429", "drop" (in the middle), "error event" or "no usage"."""

    first_seconds: float = 0.03  # to the first event
    gap_seconds: float = 0.01  # between events
    tokens_per_event: int = 4
    fault: Fault = lambda _number, _body: None
    newline: str = "\n"
    piece_bytes: int = 1_000_000  # a body is written in chunks of this size
    most_at_once: int = 1000  # answers; others wait
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    pages: dict[str, str] = field(default_factory=dict)  # what other paths answer
    url: str = ""

    def __enter__(self) -> "FakeServer":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._room = asyncio.Semaphore(self.most_at_once)
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await self._ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                length = next((int(h.split(":")[1]) for h in head.split("\r\n") if h.startswith("Content-Length")), 0)
                body = await reader.readexactly(length)
                async with self._room:
                    await self._answer(writer, head.split()[1], body)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, path: str, sent: bytes) -> None:
        if path == "/v1/models":
            return self._whole(writer, "200", {"data": [{"id": "fake"}]})
        if path in self.pages:
            return self._whole(writer, "200", self.pages[path])
        if path != "/v1/completions":
            return self._whole(writer, "404", {"error": {"message": "no such route"}})
        body = json.loads(sent)
        self.bodies.append(body)
        fault = self.fault(len(self.bodies), body)
        if fault is not None and fault.isdigit():
            return self._whole(writer, fault, {"error": {"message": f"fault {fault}"}})
        count = body["max_tokens"]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        if fault == "no usage":
            usage = {}
        choice = {"index": 0, "text": "word "}
        if not body["stream"]:
            await asyncio.sleep(self.first_seconds)
            return self._whole(writer, "200", {"choices": [choice], **({"usage": usage} if usage else {})})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._chunks(writer, ": a comment\n\n")
        await asyncio.sleep(self.first_seconds)
        for place in range(0, count, self.tokens_per_event):
            if place:
                await asyncio.sleep(self.gap_seconds)
            if fault == "drop" and place:
                writer.close()
                return None
            self._chunks(writer, f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n")
        if fault == "error event":
            self._chunks(writer, f"data: {json.dumps({'error': {'code': 'broken'}})}\n\n")
        elif usage:
            self._chunks(writer, f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n")
        self._chunks(writer, "data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return None

    def _chunks(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = text.replace("\n", self.newline).encode()
        for start in range(0, len(data), self.piece_bytes):
            piece = data[start : start + self.piece_bytes]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _whole(self, writer: asyncio.StreamWriter, status: str, answer: dict[str, Any] | str) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        writer.write(f"HTTP/1.1 {status} Some\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
