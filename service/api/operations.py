"""Routes for those who run the service, and the list of models: health, version, metrics."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from service.api.errors import retry_after_seconds
from service.api.metrics import Metrics
from service.api.schemas import Model, ModelList
from service.api.served import ServedModel
from service.engine.client import EngineClient, EngineUnavailable


def operations_router(*, client: EngineClient, served: ServedModel, metrics: Metrics, version: str) -> APIRouter:
    router = APIRouter()

    def models() -> list[Model]:
        # A restarting or draining service still knows its model; one that has never loaded does not.
        model = client.model or client.check_ready()
        return [
            Model(id=name, created=served.created, owned_by="megatron-gpt2", max_model_len=model.context_length)
            for name in served.names
        ]

    @router.get("/v1/models", summary="The served names")
    async def list_models() -> ModelList:
        return ModelList(data=models())

    @router.get("/v1/models/{model_id:path}", summary="One served name")
    async def get_model(model_id: str) -> Model:
        available = models()
        served.check_name(model_id)
        return next(model for model in available if model.id == model_id)

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", summary="503 when only a new process can help")
    async def livez() -> Response:
        failed = client.phase == "failed"
        return JSONResponse({"status": "failed" if failed else "ok", "phase": client.phase}, 503 if failed else 200)

    @router.head("/readyz", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.head("/ping", include_in_schema=False)
    @router.get("/readyz", summary="200 while requests are taken")
    @router.get("/health", summary="As /readyz")
    @router.get("/ping", summary="As /readyz")
    async def readyz() -> Response:
        body = {"status": "ok", "phase": client.phase, "progress": client.status.progress}
        try:
            client.check_ready()
        except EngineUnavailable as error:
            headers = {"Retry-After": str(retry_after_seconds(error))}
            return JSONResponse(body | {"status": "unavailable"}, 503, headers)
        return JSONResponse(body)

    @router.get("/version", summary="The service's version")
    async def get_version() -> dict[str, str]:
        return {"version": version}

    @router.get("/metrics", summary="Prometheus metrics", responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
