"""The service as an application of Ray Serve: an engine a replica, over the cluster's GPUs, behind Serve's proxies.

`serve run service.ray_serve:build model=... max_replicas=4`; docs/ray.md. Needs the extra `ray`. A replica is the API
process and its engine's supervisor in one, and lives as long as its engine: Ray starts another.
"""

import asyncio
import logging
import math
import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from starlette.types import ASGIApp

from service.api.process import Api, compose
from service.engine.request import ModelInfo
from service.logs import configure_logging
from service.serve import api_config, engine_config, wants_json
from service.settings import Settings, SettingsError, load
from service.supervised import start_engine

log = logging.getLogger(__name__)

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

# Serve's proxies speak HTTP, and Ray restarts what ends: these settings would be of no effect.
_OTHERS = frozenset(
    {
        "host",
        "port",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_keyfile_password",
        "admin_port",
        "admin_socket",
        "max_url_bytes",
        "max_header_bytes",
        "max_connections",
        "header_seconds",
        "body_seconds",
        "send_seconds",
        "http_keep_alive_seconds",
        "unready_seconds",
        "max_restarts",
        "restart_window_seconds",
        "data_parallel_size",
    }
)
_BUSY = 0.8  # the share of their rows that replicas may have in use and one be spared
_MAX_ONGOING = 4096  # requests of a replica: the engine has a queue, with bounds and turns, and Serve's has neither
_HEALTH_CHECK_SECONDS = 2.0
_END_SECONDS = 5.0  # for an engine to end by itself, before it is killed
_MAX_STARTS = 3  # of a replica that cannot start: most often another try would not mend it


class Placement(BaseModel):
    """How many replicas there are, and what each takes of the cluster. All else that `build` is given is a setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_queued: float = Field(5, gt=0)  # sequences that wait, a replica; k8s/ has the same number
    upscale_delay_seconds: NonNegativeFloat = 30
    downscale_delay_seconds: NonNegativeFloat = 600
    look_back_seconds: float = Field(30, gt=0)  # that the queue is averaged over
    gpus: NonNegativeFloat | None = None  # a replica, by default one a rank; replicas share a share
    cpus: NonNegativeFloat = 1  # a replica on a GPU; one on a CPU takes cpu_threads


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application: `arguments` are Placement's fields and settings. Raises SettingsError."""
    given = dict(arguments)
    own = {name: given.pop(name) for name in Placement.model_fields if name in given}
    for name in given:
        if name not in Settings.model_fields:
            raise SettingsError(f"{name}: neither a setting nor one of {', '.join(Placement.model_fields)}")
    try:
        placement = Placement(**own)
    except ValidationError as error:
        reasons = (f"{item['loc'][0]}: {item['msg']} (got {item['input']!r})" for item in error.errors())
        raise SettingsError("; ".join(reasons)) from error
    settings = load(given)
    for name in sorted(_OTHERS & settings.model_fields_set):
        raise SettingsError(f"{name}: has no effect under Ray Serve; see docs/ray.md")
    if settings.api_key:  # it would lie in Serve's own state, and in its files of configuration
        raise SettingsError("api_key: cannot be kept secret under Ray Serve; use api_key_file")
    if settings.device.startswith("cuda:"):
        raise SettingsError(f"device: Ray chooses the card; give cuda (got {settings.device})")
    if settings.device == "cpu":
        cpu_threads = settings.cpu_threads or 1
        settings = settings.model_copy(update={"cpu_threads": cpu_threads})
        resources = {"num_cpus": float(cpu_threads), "num_gpus": 0.0}
    else:
        settings = settings.model_copy(update={"device": "cuda"})
        gpus = settings.tensor_parallel_size if placement.gpus is None else placement.gpus
        resources = {"num_cpus": placement.cpus, "num_gpus": float(gpus)}
    try:
        autoscaling = AutoscalingConfig(
            min_replicas=placement.min_replicas,
            max_replicas=placement.max_replicas,
            upscale_delay_s=placement.upscale_delay_seconds,
            downscale_delay_s=placement.downscale_delay_seconds,
            look_back_period_s=placement.look_back_seconds,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:{ByQueue.__name__}",
                policy_kwargs={"target_queued": placement.target_queued},
            ),
        )
    except ValidationError as error:
        raise SettingsError(f"min_replicas, max_replicas: {error.errors()[0]['msg']}") from error
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="megatron-gpt2",
        ray_actor_options=resources,
        autoscaling_config=autoscaling,
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}:{LeastLoaded.__name__}"),
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=settings.max_queued_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=_HEALTH_CHECK_SECONDS,
        max_constructor_retry_count=_MAX_STARTS,
    )
    application: serve.Application = deployment.bind(settings)
    return application


class ByQueue:
    """As many replicas as the queue asks for; without one, as many as what runs needs. Serve bounds and delays it.

    Not by ongoing requests: a batching engine has hundreds at a time, and needs help only where some wait.
    """

    def __init__(self, target_queued: float) -> None:
        """`target_queued`: sequences that may wait, a replica."""
        self._target_queued = target_queued

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and no state."""
        metrics = context.aggregated_metrics or {}
        num_queued = sum(metrics.get("queued", {}).values()) + context.total_queued_requests
        now = context.target_num_replicas
        if num_queued >= 1:
            return max(now, math.ceil(num_queued / self._target_queued)), {}
        return min(now, math.ceil(sum(metrics.get("busy", {}).values()) / _BUSY)), {}


class LeastLoaded(FIFOMixin, RequestRouter):  # type: ignore[misc] # Ray is not there when types are checked
    """To the replica with the fewest requests. Serve's own router would fill those of its proxy's node first."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All, of which Serve takes the one with the fewest."""
        return [candidate_replicas]


class Replica:
    """One engine and the application over it. All methods belong to one event loop, which Ray Serve gives it."""

    def __init__(self, settings: Settings) -> None:
        """Start the engine. Must be called within the event loop."""
        json_lines = wants_json(settings)
        configure_logging(level=settings.log_level, json_lines=json_lines)
        if PROXY_CALLBACK not in os.environ:
            log.warning("%s is not set: requests that are lost with a replica are not tried again", PROXY_CALLBACK)
        self._up: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self._api: Api = compose(
            api_config(settings, json_lines=json_lines),
            on_stall=lambda _: self._on_stall(),
            on_up=lambda _, model: self._up.set_result(model),
        )
        client = self._api.client
        self._engine: BaseProcess
        self._engine, channel = start_engine(engine_config(settings, json_lines=json_lines))
        asyncio.get_running_loop().add_reader(self._engine.sentinel, self._on_engine_end)
        self._read_tokenizer, client.on_ready = client.on_ready, self._on_ready
        client.attach(channel)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, when it can answer. Raises RuntimeError if it never will. Asked for by Ray Serve."""
        await self._up
        return self._api.app

    async def check_health(self) -> None:
        """Asked for by Ray Serve; a replica for which it raises is replaced."""
        self._api.client.check_ready()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked for by Ray Serve, for ByQueue: sequences that wait, and the share of rows in use."""
        client = self._api.client
        model = client.check_ready()
        return {"queued": client.backlog.num_requests, "busy": client.stats.num_running / model.max_num_seqs}

    async def __del__(self) -> None:
        """Asked for by Ray Serve when all is answered, or drain_seconds are over."""
        asyncio.get_running_loop().remove_reader(self._engine.sentinel)
        await self._api.close()
        await asyncio.to_thread(self._engine.join, _END_SECONDS)
        if self._engine.is_alive():
            log.warning("the engine process did not end in %g s; killing it", _END_SECONDS)
            self._engine.kill()

    async def _on_ready(self, model: ModelInfo) -> None:
        assert self._read_tokenizer is not None
        await self._read_tokenizer(model)
        if self._api.client.phase == "failed":
            self._up.set_exception(RuntimeError("the tokenizer cannot be used; see the log"))

    def _on_stall(self) -> None:
        log.error("the engine has stalled; killing it")
        self._engine.kill()

    def _on_engine_end(self) -> None:
        """At once: nothing is left to answer with, and what was open is asked elsewhere, or ended, by the proxies."""
        asyncio.get_running_loop().remove_reader(self._engine.sentinel)
        self._engine.join()
        if not self._up.done():
            self._up.set_exception(RuntimeError(f"the engine ended (exit code {self._engine.exitcode}); see its log"))
            return
        log.critical("the engine ended (exit code %s); so does its replica", self._engine.exitcode)
        os._exit(1)
