"""The HTTP application, composed from what serve.py gives it. Importing it loads no torch."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.api import errors
from service.api.completions import completions_router
from service.api.metrics import Metrics
from service.api.middleware import RequestMiddleware
from service.api.operations import operations_router
from service.api.schemas import CompletionRequest
from service.api.served import ServedModel
from service.api.text import Tokenizer
from service.engine.client import EngineClient
from service.engine.request import ModelInfo

_DESCRIPTION = "Completions of MegatronGPT2 345M and its GPT-2 relatives, with OpenAI's API."


def create_app(
    *,
    client: EngineClient,
    model_names: Sequence[str],
    max_body_bytes: int,
    stream_keep_alive_seconds: float,
    version: str,
    load_tokenizer: Callable[[ModelInfo], Tokenizer],
) -> FastAPI:
    """The application over `client`, whose hooks it takes: call this before `client.attach`.

    `model_names` has at least one name, the first is the one in answers. `load_tokenizer` runs in a thread when the
    engine is ready, and readiness waits for it; its CheckpointError fails the client.
    """
    metrics = Metrics(client, version=version)
    served = ServedModel(client, names=model_names, version=version, load_tokenizer=load_tokenizer)
    client.on_ready = served.on_ready
    client.on_stats = metrics.take_stats

    app = FastAPI(
        title="megatron-gpt2",
        description=_DESCRIPTION,
        version=version,
        redirect_slashes=False,  # a redirected POST loses its body in many clients
        responses={"default": {"model": errors.ErrorEnvelope, "description": "Every error"}},
    )
    errors.install(app)
    app.add_middleware(RequestMiddleware, metrics=metrics, max_body_bytes=max_body_bytes)
    app.include_router(
        completions_router(client=client, served=served, metrics=metrics, keep_alive_seconds=stream_keep_alive_seconds)
    )
    app.include_router(operations_router(client=client, served=served, metrics=metrics, version=version))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, and the request body, which the route reads by itself to bound and thread its parsing."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, request = models_json_schema(
            [(CompletionRequest, "validation")], ref_template="#/components/schemas/{model}"
        )
        app.openapi_schema["components"]["schemas"] |= request["$defs"]
    return app.openapi_schema
