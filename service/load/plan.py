"""What is asked of a server, of how many clients, and for how long. Made by command.py, read by all of load."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    tls: bool
    prefix: str  # of every path
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def at(cls, url: str, headers: tuple[tuple[str, str], ...] = ()) -> "Server":
        """The server of a base URL, with or without the /v1 that clients' base URLs end in. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a URL such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, prefix, headers)

    def request(self, path: str, body: bytes = b"") -> bytes:
        """A request as it goes over the wire: a POST if it has a body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{'POST' if body else 'GET'} {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class Level:
    """One load: so many clients, each with one request open at a time, or so many requests a second."""

    loop: Literal["closed", "open"]
    load: float  # clients, or requests a second that arrive at random (Poisson)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All but the load. Exactly one of `seconds` and `requests` is set."""

    server: Server
    fields: Mapping[str, Any]  # of the body, but for the prompt
    texts: tuple[str, ...] = ()  # the prompts in turn; empty: random ids
    prompt_tokens: int = 128  # of a random prompt
    vocab_size: int = 50256  # random ids are below it
    warmup_seconds: float = 0
    seconds: float | None = None  # measured, after the warm-up
    requests: int | None = None  # begun after the warm-up, in all
    timeout_seconds: float = 60  # of a request
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        assert (self.seconds is None) != (self.requests is None)

    @property
    def stream(self) -> bool:
        return bool(self.fields.get("stream"))

    def bodies(self, number: int) -> Iterator[bytes]:
        """Endless: what client process `number` sends. No two send the same ids, or begin at the same text."""
        if self.texts:
            place = number * len(self.texts) // self.processes
            while True:
                yield _encode({"prompt": self.texts[place % len(self.texts)], **self.fields})
                place += 1
        generator = random.Random(f"{self.seed} {number}")  # noqa: S311 - no secret
        while True:
            prompt = generator.choices(range(self.vocab_size), k=self.prompt_tokens)
            yield _encode({"prompt": prompt, **self.fields})


def share(count: int, number: int, processes: int) -> int:
    """How many of `count` fall to process `number`, when they are divided evenly."""
    return count // processes + (number < count % processes)
