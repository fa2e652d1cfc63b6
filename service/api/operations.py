"""Routes for those who run the service, and the list of models: health, version, metrics."""

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.api import errors
from service.api.answers import Model, ModelList
from service.api.errors import retry_after_seconds
from service.api.metrics import Metrics
from service.api.served import ServedModel
from service.engine.client import EngineClient, EngineUnavailable


class Liveness(BaseModel):
    status: Literal["ok", "failed"]
    phase: str


class Readiness(BaseModel):
    status: Literal["ok", "unavailable"]
    phase: str = Field(description="start, download, convert, load, warmup, ready, restart, drain or failed.")
    progress: float = Field(description="Of the phase, from 0 to 1.")


class Version(BaseModel):
    version: str


_READINESS: dict[int | str, dict[str, Any]] = {
    200: {"model": Readiness},
    503: {"model": Readiness, "description": "Not now; Retry-After says when to ask again."},
}


def operations_router(*, client: EngineClient, served: ServedModel, metrics: Metrics, version: str) -> APIRouter:
    router = APIRouter()

    def models() -> list[Model]:
        # A restarting or draining service still knows its model; one that has never loaded does not.
        model = client.model or client.check_ready()
        return [
            Model(
                id=name,
                created=served.created,
                owned_by="megatron-gpt2",
                max_model_len=model.context_length,
                num_layers=model.num_layers,
                hidden_size=model.hidden_size,
                num_heads=model.num_heads,
                vocab_size=model.vocab_size,
            )
            for name in served.names
        ]

    @router.get("/v1/models", summary="The served names", responses=errors.documented(503))
    async def list_models() -> ModelList:
        return ModelList(data=models())

    @router.get("/v1/models/{model_id:path}", summary="One served name", responses=errors.documented(404, 503))
    async def get_model(model_id: str) -> Model:
        available = models()
        served.check_name(model_id)
        return next(model for model in available if model.id == model_id)

    @router.head("/livez", include_in_schema=False)
    @router.get(
        "/livez",
        summary="503 when only a new process can help",
        responses={200: {"model": Liveness}, 503: {"model": Liveness, "description": "Given up."}},
    )
    async def livez() -> Response:
        failed = client.phase == "failed"
        return JSONResponse({"status": "failed" if failed else "ok", "phase": client.phase}, 503 if failed else 200)

    @router.head("/readyz", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.head("/ping", include_in_schema=False)
    @router.get("/readyz", summary="200 while requests are taken", responses=_READINESS)
    @router.get("/health", summary="As /readyz", responses=_READINESS)
    @router.get("/ping", summary="As /readyz", responses=_READINESS)
    async def readyz() -> Response:
        body = {"status": "ok", "phase": client.phase, "progress": client.status.progress}
        try:
            client.check_ready()
        except EngineUnavailable as error:
            headers = {"Retry-After": str(retry_after_seconds(error))}
            return JSONResponse(body | {"status": "unavailable"}, 503, headers)
        return JSONResponse(body)

    @router.get("/version", summary="The service's version")
    async def get_version() -> Version:
        return Version(version=version)

    @router.get("/metrics", summary="Prometheus metrics", responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
