"""HTTP as bytes: what is sent need not be HTTP, and what comes back is read to its last byte."""

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.api.conftest import Service

_SECONDS = 10


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The one error of an answer that is an error in the envelope."""
        content = json.loads(self.body)
        assert {"message", "type", "param", "code"} == set(content["error"])
        error: dict[str, Any] = content["error"]
        return error


class Connection:
    """One connection to a service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> Answer | None:
        """The next answer, an interim one too; None where the connection ends instead."""
        async with asyncio.timeout(_SECONDS):
            try:
                start = await self.reader.read(1)
            except ConnectionError:
                return None
            if not start:
                return None
            head = start + await self.reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
            assert status.startswith("HTTP/1.1 ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = b""
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert b"\r\n" == await self.reader.readexactly(2)
            else:
                body = await self.reader.readexactly(int(headers.get("content-length", 0)))
            return Answer(int(status.split()[1]), headers, body)

    async def answers(self) -> list[Answer]:
        """All answers until the connection ends, which it must."""
        answers = []
        while (answer := await self.answer()) is not None:
            answers.append(answer)
        return answers


def request(body: bytes | Mapping[str, Any], route: str = "POST /v1/completions") -> bytes:
    """A request with a body, which is JSON where it is not bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def reset_on_close(connection: Any) -> None:
    """Its close is a RST, as of a process that dies with data unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def connect(api: Service) -> Connection:
    url = urlsplit(api.url)
    return Connection(*await asyncio.open_connection(url.hostname, url.port))


async def exchange(api: Service, data: bytes) -> list[Answer]:
    """Every answer to `data`, sent at once, until the connection ends."""
    connection = await connect(api)
    try:
        connection.writer.write(data)
        return await connection.answers()
    finally:
        connection.writer.close()
