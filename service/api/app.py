"""The HTTP application, composed from what serve.py gives it. Importing it loads no torch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import completions, errors, megatron, scoring, tokens
from service.api.access import Access
from service.api.body import BodyLimits, DirectRoute
from service.api.cors import Cors
from service.api.docs import docs_router
from service.api.metrics import Metrics
from service.api.middleware import RequestMiddleware
from service.api.operations import operations_router
from service.api.playground import playground_router
from service.api.served import ServedModel
from service.api.text import Tokenizer
from service.api.tracing import Tracing
from service.engine.client import EngineClient
from service.engine.request import ModelInfo

_DESCRIPTION = "Completions of MegatronGPT2 345M and its GPT-2 relatives, with OpenAI's API."


def create_app(
    *,
    client: EngineClient,
    metrics: Metrics,
    model_names: Sequence[str],
    max_body_bytes: int,
    max_choices: int,
    stream_keep_alive_seconds: float,
    version: str,
    load_tokenizer: Callable[[ModelInfo], Tokenizer],
    access: Access,
    cors_origins: Sequence[str] = (),
    tracing: Tracing | None = None,
) -> ASGIApp:
    """The application over `client`, whose hooks it takes: call this before `client.attach`.

    `model_names` has at least one name, the first is the one in answers. `load_tokenizer` runs in a thread when the
    engine is ready, and readiness waits for it; its CheckpointError fails the client. `max_choices` bounds the
    sequences of one request.
    """
    served = ServedModel(client, names=model_names, version=version, load_tokenizer=load_tokenizer)
    client.on_ready = served.on_ready
    client.on_stats = metrics.take_stats

    app = FastAPI(
        title="megatron-gpt2",
        description=_DESCRIPTION,
        version=version,
        redirect_slashes=False,  # a redirected POST loses its body in many clients
        docs_url=None,  # FastAPI's page loads its script from elsewhere
        redoc_url=None,
    )
    errors.install(app)
    around = partial(
        RequestMiddleware,
        access=access,
        bodies=BodyLimits(max_body_bytes),
        client=client,
        metrics=metrics,
        tracing=tracing,
    )
    app.add_middleware(around)
    completions.add_completions(
        app.router,
        client=client,
        served=served,
        metrics=metrics,
        keep_alive_seconds=stream_keep_alive_seconds,
        max_choices=max_choices,
    )
    app.include_router(tokens.tokens_router(client=client, served=served), tags=["Tokens"])
    app.include_router(
        scoring.scoring_router(client=client, served=served, metrics=metrics, max_items=max_choices), tags=["Scores"]
    )
    app.include_router(
        megatron.megatron_router(client=client, served=served, metrics=metrics, max_choices=max_choices),
        tags=["Megatron-LM"],
    )
    app.include_router(
        operations_router(client=client, served=served, metrics=metrics, version=version), tags=["Operations"]
    )
    app.include_router(docs_router())
    app.include_router(playground_router())
    app.openapi = lambda: _openapi(app, access)  # type: ignore[method-assign]
    dispatch = _Dispatch(app, around)
    return Cors(dispatch, cors_origins) if cors_origins else dispatch


class _Dispatch:
    """Direct routes at once, all else through FastAPI, whose layers are a sixth of what a plain request costs."""

    def __init__(self, app: FastAPI, around: Callable[[ASGIApp], ASGIApp]) -> None:
        self.routes = app.routes
        self._app = app
        self._direct = {
            (method, route.path): around(route.handle)
            for route in app.routes
            if isinstance(route, DirectRoute)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http":
            app = self._direct.get((scope["method"], scope["path"]), app)
        await app(scope, receive, send)


def _openapi(app: FastAPI, access: Access) -> dict[str, Any]:
    """FastAPI's schema, and the request bodies, which the routes read by themselves to bound and thread parsing."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        bodies = (
            *completions.REQUEST_SCHEMAS,
            *tokens.REQUEST_SCHEMAS,
            *scoring.REQUEST_SCHEMAS,
            *megatron.REQUEST_SCHEMAS,
        )
        _, schemas = models_json_schema(
            [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
        )
        app.openapi_schema["components"]["schemas"] |= schemas["$defs"]
        for path, operations in app.openapi_schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; nothing here answers so
                if not access.is_open(path):
                    _ask_for_a_key(operation, envelope="MessageEnvelope" if path == "/api" else "ErrorEnvelope")
        if access.keys_on:
            app.openapi_schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return app.openapi_schema


def _ask_for_a_key(operation: dict[str, Any], *, envelope: str) -> None:
    operation["security"] = [{"key": []}]
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{envelope}"}}}
    for status, documented in errors.documented(401, 429).items():
        operation["responses"].setdefault(str(status), {**documented, "content": content}).pop("model", None)
