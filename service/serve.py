"""Composition root and supervisor: opens the socket, starts the API process and the engines, restarts engines.

The first SIGINT or SIGTERM drains, the second stops at once. Children are spawned, never forked; they ignore signals
and end when their channel closes, so also when this process is killed.
"""

import asyncio
import contextlib
import ipaddress
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import service.api.process as api
from service.api.access import Access, AccessConfig
from service.api.cors import check_origins
from service.api.keys import AccessError, named_keys
from service.api.protocol import HttpLimits
from service.api.tls import TlsConfig, check_tls
from service.api.tracing import TracingError, traces_endpoint
from service.engine.backlog import QueueLimits
from service.engine.child import EXIT_UNUSABLE
from service.engine.config import EngineConfig, engine_name
from service.engine.cores import available_cores
from service.listening import ListenError, connections_within, open_admin, open_listener, removed_in_the_end
from service.logs import configure_logging
from service.settings import Settings
from service.supervised import SIGNALS, SupervisedEngine, exit_code, start_process
from service.version import VERSION

log = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
DEMO_NAME = "megatron-gpt2-demo"

_END_SECONDS = 5.0  # for a child to end by itself, before it is killed
_STOP_SECONDS = 0.5  # the same, after a second signal
_DRAINED_SECONDS = 1.0  # from the end of an engine to that of the API process, which ends it when all is answered


class Supervisor:
    """Owns the listening sockets and the children; its exit code is 0 after a drain."""

    def __init__(
        self, settings: Settings, listener: socket.socket, admin_listeners: Sequence[socket.socket] = ()
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._admin_listeners = tuple(admin_listeners)
        self._json_lines = wants_json(settings)
        self._control, self._api_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._api: BaseProcess | None = None
        self._engines = [self._supervised(number) for number in range(settings.data_parallel_size)]
        self._device: str | None = None  # of the first engine that was ready; those after it are on no other kind
        self._stopping = False
        self._exit_code = 0
        self._end_seconds = _END_SECONDS
        self._ended = asyncio.Event()

    async def run(self) -> int:
        """Serve until drained or stopped; the process's exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        loop.add_reader(self._control, self._on_word)
        try:
            self._start_api()
            for each in self._engines:
                each.start()
            await self._ended.wait()
        finally:
            await self._end_children()
        return self._exit_code

    def _start_api(self) -> None:
        config = api_config(self._settings, json_lines=self._json_lines)
        self._api = multiprocessing.get_context("spawn").Process(
            target=api.main,
            args=(config, self._listener, self._admin_listeners, self._api_control),
            name="the API",
            daemon=True,
        )
        start_process(self._api)
        for given in (self._api_control, self._listener, *self._admin_listeners):
            given.close()
        asyncio.get_running_loop().add_reader(self._api.sentinel, self._on_api_end)

    def _supervised(self, number: int) -> SupervisedEngine:
        return SupervisedEngine(
            number,
            name=engine_name(number, of=self._settings.data_parallel_size),
            config=self._engine_config,
            max_restarts=self._settings.max_restarts,
            restart_window_seconds=self._settings.restart_window_seconds,
            on_start=self._pass_on,
            on_end=self._on_engine_end,
        )

    def _engine_config(self, number: int) -> EngineConfig:
        of = self._settings.data_parallel_size
        return engine_config(self._settings, number=number, of=of, device=self._device, json_lines=self._json_lines)

    def _pass_on(self, number: int, sock: socket.socket) -> None:
        socket.send_fds(self._control, [api.said(api.ENGINE, number)], [sock.fileno()])

    def _on_signal(self) -> None:
        if self._stopping:
            log.warning("second signal: stopping at once")
            self._exit_code = 1
            self._end_seconds = _STOP_SECONDS
            self._say(api.STOP)
            self._ended.set()
            return
        self._stopping = True
        log.info(
            "draining: running requests get up to %g s; a second signal stops at once", self._settings.drain_seconds
        )
        self._say(api.DRAIN)

    def _on_word(self) -> None:
        word, *about = self._control.recv(64).split() or (b"",)
        if word == api.READY:
            self._device = about[1].decode()
        elif word == api.STALLED:
            self._engines[int(about[0])].kill()

    def _on_api_end(self) -> None:
        assert self._api is not None
        asyncio.get_running_loop().remove_reader(self._api.sentinel)
        code = exit_code(self._api)
        if not self._stopping or code:
            log.critical("the API process ended by itself (exit code %s)", code)
            self._exit_code = 1
        self._ended.set()

    def _on_engine_end(self, ended: SupervisedEngine, code: int | None) -> None:
        if self._ended.is_set():
            return
        if self._stopping and code == 0:  # its channel was closed: at the end of the drain, but for a broken message
            self._start_again(ended, _DRAINED_SECONDS)
        elif code == EXIT_UNUSABLE and self._device is None:
            self._exit_code = 2
            self._say(api.STOP)
            self._ended.set()
        elif (delay := ended.next_delay(code)) is not None:
            self._start_again(ended, delay)
        else:
            num_left = sum(not each.given_up for each in self._engines)
            if num_left:
                log.critical("the service goes on with %d of %d engines", num_left, len(self._engines))
            self._say(api.said(api.FAILED, ended.number))

    def _start_again(self, ended: SupervisedEngine, delay: float) -> None:
        def start() -> None:
            if not self._ended.is_set():
                ended.start()

        asyncio.get_running_loop().call_later(delay, start)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # the API process is gone, which is heard from its sentinel
            self._control.send(word)

    async def _end_children(self) -> None:
        """The API closes the engines' channels as it ends; whoever has not ended in time is killed."""
        await self._end(self._api)
        await asyncio.gather(*(self._end(each.process) for each in self._engines))
        self._control.close()

    async def _end(self, process: BaseProcess | None) -> None:
        if process is None:
            return
        asyncio.get_running_loop().remove_reader(process.sentinel)
        await asyncio.to_thread(process.join, self._end_seconds)
        if process.is_alive():
            log.warning("the process of %s did not end in %g s; killing it", process.name, self._end_seconds)
            process.kill()
            await asyncio.to_thread(process.join)


def wants_json(settings: Settings) -> bool:
    """Whether log lines are JSON: `auto` is text on a terminal."""
    return settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())


def log_quietly(settings: Settings) -> None:
    """Logging of a command whose output is for reading: from warnings on, unless it is told otherwise."""
    level = settings.log_level if "log_level" in settings.model_fields_set else "warning"
    configure_logging(level=level, json_lines=wants_json(settings))


def cache_folder(settings: Settings) -> Path:
    """Where converted checkpoints are kept."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return settings.cache_dir or caches / "megatron-gpt2"


def engine_config(
    settings: Settings, *, json_lines: bool, number: int = 0, of: int = 1, device: str | None = None
) -> EngineConfig:
    """What of the settings engine `number` of so many is told; without a model, the demo model.

    Where any device will do, it is to be of the same kind as `device`, if given. Of several the CPUs are shared.
    """
    cpu_threads, num_ranks = settings.cpu_threads, of * settings.tensor_parallel_size
    if cpu_threads is None and num_ranks > 1:
        cpu_threads = max(1, available_cores() // num_ranks)
    kind = device.partition(":")[0] if device is not None and settings.device == "auto" else settings.device
    return EngineConfig(
        model=settings.model or str(DEMO_MODEL),
        revision=settings.revision,
        offline=settings.offline,
        cache_dir=str(cache_folder(settings)),
        device=kind,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        deterministic=settings.deterministic,
        tensor_parallel_size=settings.tensor_parallel_size,
        engine_number=number,
        data_parallel_size=of,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        kv_memory=settings.kv_memory,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cpu_threads=cpu_threads,
        speculation=settings.speculation,
        speculation_tokens=settings.speculation_tokens,
        max_event_interval_ms=settings.max_event_interval_ms,
        log_level=settings.log_level,
        json_lines=json_lines,
    )


def api_config(settings: Settings, *, json_lines: bool) -> api.ApiConfig:
    """What of the settings the API process is told. Raises AccessError, TracingError."""
    return api.ApiConfig(
        model_names=settings.served_model_name or (settings.model or DEMO_NAME,),
        max_body_bytes=settings.max_body_bytes,
        max_choices=settings.max_choices,
        queue=QueueLimits(
            max_requests=settings.max_queued_requests,
            max_tokens=settings.max_queued_tokens,
            timeout_seconds=settings.queue_timeout_seconds,
        ),
        request_timeout_seconds=settings.request_timeout_seconds,
        http=HttpLimits(
            max_url_bytes=settings.max_url_bytes,
            max_header_bytes=settings.max_header_bytes,
            max_connections=settings.max_connections,
            header_seconds=settings.header_seconds,
            body_seconds=settings.body_seconds,
            send_seconds=settings.send_seconds,
        ),
        access=access_config(settings),
        cors_origins=settings.cors_origins,
        tls=tls_config(settings),
        stream_keep_alive_seconds=settings.stream_keep_alive_seconds,
        http_keep_alive_seconds=settings.http_keep_alive_seconds,
        drain_seconds=settings.drain_seconds,
        unready_seconds=settings.unready_seconds,
        stall_seconds=settings.stall_seconds,
        data_parallel_size=settings.data_parallel_size,
        vllm_metrics=settings.vllm_metrics,
        traces_endpoint=traces_endpoint(settings.otlp_traces_endpoint, os.environ),
        version=VERSION,
        log_level=settings.log_level,
        json_lines=json_lines,
    )


def access_config(settings: Settings) -> AccessConfig:
    """Who may ask. Raises AccessError."""
    return AccessConfig(
        keys=named_keys([key.get_secret_value() for key in settings.api_key]),
        key_file=settings.api_key_file,
        open_routes=frozenset(settings.open_routes),
        share_prefixes=settings.share_prefixes,
    )


def tls_config(settings: Settings) -> TlsConfig:
    password = settings.ssl_keyfile_password
    return TlsConfig(
        certfile=settings.ssl_certfile,
        keyfile=settings.ssl_keyfile,
        keyfile_password=None if password is None else password.get_secret_value(),
    )


def serve(settings: Settings) -> int:
    """Run the service; the exit code: 0 drained, 1 stopped or broken, 2 a setting or the model cannot be used."""
    configure_logging(level=settings.log_level, json_lines=wants_json(settings))
    settings = settings.model_copy(update={"max_connections": connections_within(settings.max_connections)})
    os.environ["PYTHONSAFEPATH"] = "1"  # children must not import from a folder that the service is started in
    try:
        keys_on = Access(access_config(settings)).keys_on
        check_origins(settings.cors_origins)
        check_tls(tls_config(settings))
        traces_endpoint(settings.otlp_traces_endpoint, {})
    except (AccessError, TracingError) as error:
        log.error("%s", error)
        return 2
    try:
        listener = open_listener(settings.host, settings.port, send_seconds=settings.send_seconds)
        admin_listeners = open_admin(settings.admin_port, settings.admin_socket)
    except ListenError as error:
        log.error("%s", error)
        return 2
    host, port = listener.getsockname()[:2]
    if settings.model is None:
        log.info(
            "no model given: serving the embedded demo model; `megatron-gpt2 serve MODEL` serves a folder or a hub id"
        )
    scheme = "http" if settings.ssl_certfile is None else "https"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    log.info("listening on %s (model loading; /readyz turns 200 when it is ready)", url)
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        if keys_on:
            log.info("%s can be reached from other machines, and asks for keys", url)
        else:
            log.warning("%s can be reached from other machines, and nobody is asked for a key", url)
    with removed_in_the_end(settings.admin_socket):
        return asyncio.run(Supervisor(settings, listener, admin_listeners).run())
