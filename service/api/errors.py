"""The one error envelope, and the table from exceptions to statuses. Every route and middleware answers through it.

    ApiError               carries its status, type, code and parameter
    EngineUnavailable      503 + Retry-After, by the table below
    HTTPException          404 and 405 of the router
    ClientDisconnect       499: nobody reads it, the log and the metrics do
Anything else is a bug: it is logged with its trace and answered with a 500.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.engine.client import EngineDraining, EngineFailed, EngineNotReady, EngineUnavailable

log = logging.getLogger(__name__)

# Seconds. Another replica can take a request of a draining one at once; a failed one needs a new process.
_RETRY_AFTER: Mapping[type[EngineUnavailable], int] = {EngineNotReady: 5, EngineDraining: 1, EngineFailed: 60}
CLIENT_CLOSED_REQUEST = 499
_BASE_MODEL = "This is a base model without a chat template or embeddings; use POST /v1/completions."
_NOT_OFFERED = frozenset(
    {"/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/chat/completions", "/embeddings"}
)


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unavailable(error: EngineUnavailable) -> ApiError:
    return ApiError(
        503,
        f"{error}; try again later",
        type="service_unavailable",
        code="service_unavailable",
        headers={"Retry-After": str(retry_after_seconds(error))},
    )


def retry_after_seconds(error: EngineUnavailable) -> int:
    return _RETRY_AFTER.get(type(error), 5)


def internal_error(message: str = "An error inside the server; its log has the details.") -> ApiError:
    return ApiError(500, message, type="server_error", code="internal_error")


def to_api_error(error: Exception) -> ApiError:
    """The answer for any exception. What nobody expected is logged here, with its trace."""
    match error:
        case ApiError():
            return error
        case EngineUnavailable():
            return unavailable(error)
        case _:
            log.error("unexpected error", exc_info=error)
            return internal_error()


async def _answer(_: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _answer_client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        message = _BASE_MODEL if path.rstrip("/") in _NOT_OFFERED else f"There is no route {path[:200]}."
        answer = ApiError(404, message, code="not_found")
    elif error.status_code == 405:
        answer = ApiError(405, f"{path} does not take {method[:20]}.", code="method_not_allowed", headers=error.headers)
    else:
        answer = ApiError(error.status_code, HTTPStatus(error.status_code).phrase, headers=error.headers)
    return answer.response()


def install(app: FastAPI) -> None:
    """Make every exception that a route raises an answer in the envelope."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(EngineUnavailable, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_client_left)
    app.add_exception_handler(HTTPException, _answer_router)
