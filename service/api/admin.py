"""The application of the admin listener, for those who run the service: POST /admin/drain, and nothing else.

It asks for no key, so it is reached on a port of 127.0.0.1 or a unix socket of its own, never on the public port.
"""

import time
from typing import Annotated, Literal

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.api import errors
from service.api.connection import while_connected
from service.api.drain import Drain
from service.engine.client import EngineClient


class Draining(BaseModel):
    """What is still there after the wait."""

    status: Literal["draining"] = "draining"
    phase: str
    requests_open: int
    running: int  # sequences
    waiting: int  # sequences
    waited_seconds: float
    unready_seconds: float  # how much longer the public port has to stay open


def create_admin(drain: Drain, client: EngineClient) -> FastAPI:
    """The application, over the drain of the API process that it runs in."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    errors.install(app)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(Exception, _answer)

    @app.post("/admin/drain")
    async def post_drain(
        request: Request, wait_seconds: Annotated[float | None, Query(ge=0, le=86_400, allow_inf_nan=False)] = None
    ) -> Draining:
        """Begin to drain, or go on. With wait_seconds, wait as Drain does; a client that leaves takes nothing back."""
        if "origin" in request.headers:
            raise errors.ApiError(403, "Pages of a browser may not ask for this.", code="forbidden")
        drain.begin()
        asked_at = time.monotonic()
        if wait_seconds is not None:
            await while_connected(request.scope, drain.wait(wait_seconds))
        return Draining(
            phase=client.phase,
            requests_open=client.num_open,
            running=client.stats.num_running,
            waiting=client.stats.num_waiting,
            waited_seconds=round(time.monotonic() - asked_at, 3),
            unready_seconds=round(drain.unready_seconds_left, 3),
        )

    return app


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):  # there is but one thing to get wrong
        error = errors.invalid("wait_seconds", error.errors()[0]["msg"])
    return errors.response_to(error, request.scope)
