"""The API process: uvicorn over the supervisor's listening socket, the engines' client, the supervisor's words.

Spawned by serve.py, which passes engines' sockets over the control channel. It ignores SIGINT and SIGTERM, and ends
when told to, or with its parent.
"""

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from service.api.access import Access, AccessConfig
from service.api.admin import create_admin
from service.api.app import create_app
from service.api.drain import Drain
from service.api.metrics import Metrics
from service.api.protocol import HttpLimits, protocol_within
from service.api.text import load_tokenizer
from service.api.tls import TlsConfig
from service.api.tracing import Tracing
from service.engine.backlog import QueueLimits
from service.engine.child import start_child
from service.engine.client import EngineClient
from service.engine.request import ModelInfo

log = logging.getLogger(__name__)

# The supervisor's words, one a datagram. ENGINE and FAILED are followed by an engine's number; ENGINE brings a socket.
ENGINE, DRAIN, STOP, FAILED = b"engine", b"drain", b"stop", b"failed"
# The API's words, followed by an engine's number, and READY by its device too.
STALLED, READY = b"stalled", b"ready"

# Objects made before the young are looked at; Python's 700 are two requests' worth, and nearly all die by themselves.
_GC_YOUNG = 20_000
_CLOSE_SECONDS = 5  # for answers on their way out, once no request is open


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """What serve.py tells the API process; the fields are those of Settings."""

    model_names: tuple[str, ...]
    max_body_bytes: int
    max_choices: int
    queue: QueueLimits
    request_timeout_seconds: float | None
    http: HttpLimits
    access: AccessConfig
    cors_origins: tuple[str, ...]
    tls: TlsConfig
    stream_keep_alive_seconds: float
    http_keep_alive_seconds: int
    drain_seconds: float
    unready_seconds: float
    stall_seconds: float
    data_parallel_size: int
    vllm_metrics: bool
    traces_endpoint: str | None
    version: str
    log_level: str
    json_lines: bool


@dataclass(frozen=True, slots=True)
class Api:
    """The application over an engine's client, with what they report to. Belongs to the event loop's thread."""

    app: ASGIApp
    client: EngineClient
    metrics: Metrics
    tracing: Tracing | None

    async def close(self) -> None:
        """Send what is left of traces, and close the engine's channel, which ends the engine process."""
        if self.tracing is not None:  # first: an engine that ended would be started again while a collector is away
            await asyncio.to_thread(self.tracing.close)
        await self.client.close()


def compose(config: ApiConfig, *, on_stall: Callable[[int], None], on_up: Callable[[int, ModelInfo], None]) -> Api:
    """All that answers HTTP, but for a server and an engine. The arguments are EngineClient's."""
    client = EngineClient(
        api_number=0,
        stall_seconds=config.stall_seconds,
        num_engines=config.data_parallel_size,
        queue=config.queue,
        request_timeout_seconds=config.request_timeout_seconds,
        on_stall=on_stall,
        on_up=on_up,
    )
    access = Access(config.access)
    metrics = Metrics(
        client,
        version=config.version,
        by_client=access.keys_on,
        vllm_model_name=config.model_names[0] if config.vllm_metrics else None,
    )
    tracing: Tracing | None = None
    if config.traces_endpoint is not None:
        tracing = Tracing(config.traces_endpoint, model_name=config.model_names[0], version=config.version)
    app = create_app(
        client=client,
        metrics=metrics,
        model_names=config.model_names,
        max_body_bytes=config.max_body_bytes,
        max_choices=config.max_choices,
        stream_keep_alive_seconds=config.stream_keep_alive_seconds,
        version=config.version,
        load_tokenizer=lambda model: load_tokenizer(Path(model.folder), end_of_text_id=model.end_of_text_id),
        access=access,
        cors_origins=config.cors_origins,
        tracing=tracing,
    )
    return Api(app, client, metrics, tracing)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: signals are the supervisor's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(
    config: ApiConfig, listener: socket.socket, admin_listeners: Sequence[socket.socket], control: socket.socket
) -> None:
    """The process: serve until the supervisor says stop, or drained after it said drain."""
    start_child(level=config.log_level, json_lines=config.json_lines)
    gc.set_threshold(_GC_YOUNG, *gc.get_threshold()[1:])
    loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()  # uvloop's, where there is one
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(config, listener, admin_listeners, control))


async def _serve(
    config: ApiConfig, listener: socket.socket, admin_listeners: Sequence[socket.socket], control: socket.socket
) -> None:
    control.setblocking(False)
    api = compose(
        config,
        on_stall=lambda number: _say(control, said(STALLED, number)),
        on_up=lambda number, model: _up(control, number, model),
    )
    client = api.client
    drain = Drain(client, unready_seconds=config.unready_seconds)
    tls = config.tls
    server = _server(
        api.app,
        config,
        http=protocol_within(config.http, on_refused=api.metrics.refused),
        ssl_certfile=tls.certfile,
        ssl_keyfile=tls.keyfile,
        ssl_keyfile_password=tls.keyfile_password,
    )
    admin = _server(create_admin(drain, client), config, http=protocol_within(config.http))
    draining: set[asyncio.Task[None]] = set()

    def hear() -> None:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        word, *about = message.split()
        if word == ENGINE and not descriptors:
            log.error("no descriptor is left for an engine's channel; the engine ends, and is started again")
        elif word == ENGINE:
            client.attach(socket.socket(fileno=descriptors[0]), int(about[0]))
        elif word == FAILED:
            client.give_up(int(about[0]))
        elif word == DRAIN:
            draining.add(asyncio.ensure_future(_finish(drain, config.drain_seconds, server)))
        elif word == STOP:
            drain.begin()
            client.abandon("the service was stopped")
            server.should_exit = True

    asyncio.get_running_loop().add_reader(control, hear)
    async with asyncio.TaskGroup() as group:
        if admin_listeners:
            group.create_task(admin.serve(sockets=list(admin_listeners)))
        await server.serve(sockets=[listener])
        admin.should_exit = True  # after the public one, so that whoever waits for a drain hears of its end
    asyncio.get_running_loop().remove_reader(control)
    await api.close()


def _server(app: ASGIApp, config: ApiConfig, **options: Any) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            ws="none",
            **options,
            proxy_headers=False,  # a client is its key, or the address it has here: a header could say any other
            access_log=False,  # the app writes a line a request itself
            log_config=None,
            timeout_keep_alive=config.http_keep_alive_seconds,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            server_header=False,
        )
    )


async def _finish(drain: Drain, drain_seconds: float, server: uvicorn.Server) -> None:
    """Answer what is open, then close the listener."""
    await drain.finish(drain_seconds)
    server.should_exit = True


def said(word: bytes, *about: object) -> bytes:
    """A word with what follows it."""
    return b" ".join((word, *(str(each).encode() for each in about)))


def _up(control: socket.socket, number: int, model: ModelInfo) -> None:
    gc.collect()
    gc.freeze()  # the application, the tokenizer, the schemas: nothing of them will ever be garbage
    _say(control, said(READY, number, model.device))


def _say(control: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        control.send(word)
