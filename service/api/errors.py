"""The one error envelope, and the table from exceptions to statuses. Every route and middleware answers through it.

    ApiError               carries its status, type, code and parameter; 401 and a key's 429 are such
    EngineUnavailable      503 + Retry-After, by the table below
    Overloaded             429 + Retry-After, which it has from the backlog
    DeadlineExceeded       504
    HTTPException          404 and 405 of the router
    ClientDisconnect       499: nobody reads it, the log and the metrics do
Anything else is a bug: it is logged with its trace and answered with a 500.
"""

import logging
import math
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from service.engine.client import (
    DeadlineExceeded,
    EngineDraining,
    EngineFailed,
    EngineNotReady,
    EngineUnavailable,
    Overloaded,
    QueueFull,
)
from service.engine.request import Delta, Finish

log = logging.getLogger(__name__)

# Seconds. Another replica can take a request of a draining one at once; a failed one needs a new process.
_RETRY_AFTER: Mapping[type[EngineUnavailable], int] = {EngineNotReady: 5, EngineDraining: 1, EngineFailed: 60}
CLIENT_CLOSED_REQUEST = 499
# Routes of other servers that clients try, without their /v1, and what to use here.
_COMPLETE = "It completes text: use POST /v1/completions."
_CHAT = f"This is a base model without a chat template. {_COMPLETE}"
# Their clients read a `message` beside the envelope, so every error of theirs has both.
_MESSAGE_ROUTES = frozenset({"/api"})
_NOT_OFFERED: Mapping[str, str] = {
    "/chat/completions": _CHAT,
    "/responses": _CHAT,
    "/messages": _CHAT,
    "/embeddings": f"This model gives no embeddings. {_COMPLETE}",
    "/generate": f"{_COMPLETE} Megatron-LM's API is PUT /api.",
    "/rerank": "This model does not rank texts; POST /v1/score gives log-probabilities of continuations.",
    "/score": "The route is POST /v1/score.",
    "/moderations": f"This model does not classify texts. {_COMPLETE}",
    "/audio/speech": _COMPLETE,
    "/audio/transcriptions": _COMPLETE,
    "/images/generations": _COMPLETE,
}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class MessageEnvelope(ErrorEnvelope):
    """The same with the message once more, where Megatron-LM's clients look for it."""

    message: str


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

    def response(self, scope: Scope) -> JSONResponse:
        """The answer to the request of `scope`, whose path decides the form."""
        body: dict[str, Any] = self.body
        if scope.get("path", "").rstrip("/") in _MESSAGE_ROUTES:
            body = {"message": str(self), **body}
        return JSONResponse(body, self.status, self.headers)


def invalid(param: str, message: str, *, code: str | None = None) -> ApiError:
    """A 400 that names the parameter, in its field and at the head of its message."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def check_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raises ApiError (400) if one of the ids is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = str(next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size))
        raise invalid(param, f"ids must be 0..{vocab_size - 1}, and {wrong[:40]} is not")


_DESCRIPTIONS: Mapping[int, str] = {
    400: "A field, or the body, that cannot be used; `param` names it.",
    401: "No key, or one that is not known here.",
    404: "A model or a route that is not here.",
    413: "The body is over the limit.",
    429: "The queue is full, not begun in time, or over a key's quota; Retry-After says when to try again.",
    500: "A fault of the server; the request has ended.",
    503: "Loading, restarting, shutting down, or too much is open; Retry-After says when to try again.",
    504: "Not finished within timeout_seconds, or within the service's own limit.",
}


def documented(*statuses: int, model: type[ErrorEnvelope] = ErrorEnvelope) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route, for the schema."""
    return {status: {"model": model, "description": _DESCRIPTIONS[status]} for status in statuses}


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "This service asks for a key, and was sent none that it knows: Authorization: Bearer KEY.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def over_quota(code: str, message: str, *, seconds: float) -> ApiError:
    """A 429 to try again after so many seconds; clients are told a whole number of them, within a minute."""
    headers = {"Retry-After": str(min(60, max(1, math.ceil(seconds))))}
    return ApiError(429, message, type="rate_limit_error", code=code, headers=headers)


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


def check_delta(delta: Delta) -> None:
    """Raises ApiError for a sequence that did not end by itself."""
    if delta.finish is Finish.GRAMMAR:
        raise ApiError(400, delta.error or "the grammar cannot be used", code="grammar_error")
    if delta.finish is Finish.ERROR:
        raise internal_error(delta.error or "the engine failed on this request")
    if delta.finish is Finish.ABORT:  # not by us: we leave the stream when we abort
        raise unavailable(EngineDraining("the service is shutting down"))


def to_api_error(error: Exception) -> ApiError:
    """The answer for any exception. What nobody expected is logged here, with its trace."""
    match error:
        case ApiError():
            return error
        case EngineUnavailable():
            return unavailable(error)
        case Overloaded():
            code = "queue_full" if isinstance(error, QueueFull) else "queue_timeout"
            headers = {"Retry-After": str(math.ceil(error.retry_after_seconds))}
            return ApiError(429, str(error), type="overloaded_error", code=code, headers=headers)
        case DeadlineExceeded():
            return ApiError(504, str(error), type="timeout_error", code="deadline_exceeded")
        case _:
            log.error("unexpected error", exc_info=error)
            return internal_error()


def response_to(error: Exception, scope: Scope) -> Response:
    """What the request of `scope` is answered when its route raises `error`."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return to_api_error(error).response(scope)


async def _answer(request: Request, error: Exception) -> Response:
    return response_to(error, request.scope)


async def _answer_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        message = f"There is no route {path[:200]}."
        if hint := _NOT_OFFERED.get(path.rstrip("/").removeprefix("/v1")):
            message += f" {hint}"
        elif path.rstrip("/").endswith(("/completions", "/models")):
            message += " Routes are /v1/completions and /v1/models: a client's base URL ends in /v1, once."
        answer = ApiError(404, message, code="not_found")
    elif error.status_code == 405:
        answer = ApiError(405, f"{path} does not take {method[:20]}.", code="method_not_allowed", headers=error.headers)
    else:
        answer = ApiError(error.status_code, HTTPStatus(error.status_code).phrase, headers=error.headers)
    return answer.response(request.scope)


def install(app: FastAPI) -> None:
    """Make every exception that a route raises an answer in the envelope."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(EngineUnavailable, _answer)
    app.add_exception_handler(Overloaded, _answer)
    app.add_exception_handler(DeadlineExceeded, _answer)
    app.add_exception_handler(ClientDisconnect, _answer)
    app.add_exception_handler(HTTPException, _answer_router)
