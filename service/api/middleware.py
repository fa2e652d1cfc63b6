"""Around every request: who asks, its id, bounds on its body, one log line, its counts, an answer to any exception."""

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import Access, Caller
from service.api.body import BodyLimits, BoundedBody
from service.api.errors import response_to, unauthorized
from service.api.keys import UNKNOWN
from service.api.metrics import Metrics
from service.api.tracing import Tracing
from service.engine.client import EngineClient, EngineDraining

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")
# Asked for every few seconds by machines: logged at debug.
_QUIET_ROUTES = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics"})


class RequestMiddleware:
    """Pure ASGI. Nothing comes past it without a key where one is needed: that is the 401 of any path, known or not.

    Routes find the Caller in `request.state.caller`, and may add figures for the log line to `request.state.summary`
    and tell `request.state.trace`, which is None without `tracing`, more of their span; no text of a request does.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        bodies: BodyLimits,
        client: EngineClient,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._access = access
        self._client = client
        self._metrics = metrics
        self._bodies = bodies
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").strip()
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        summary: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["summary"] = summary
        state["trace"] = trace = None if self._tracing is None else self._tracing.begin(headers)
        caller: Caller | None = None
        status = 0
        body = BoundedBody(self._bodies, receive, headers.get(b"content-length"))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
                if self._client.draining:  # the next request has to find another replica
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            state["caller"] = caller = self._access.caller_of(scope, headers.get(b"authorization", b""))
            if caller is None:
                raise unauthorized()
            with caller.held():
                await self._app(scope, body.receive, send_with_id)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if status or not self._client.draining or task is None:
                raise
            task.uncancel()  # the server gives up what no drain waits for: a body on its way, a text that is encoded
            draining = EngineDraining("the service is shutting down")
            if trace is not None:
                trace.fail(draining)
            await response_to(draining, scope)(scope, receive, send_with_id)
        except Exception as error:
            if trace is not None:
                trace.fail(error)
            answer = response_to(error, scope)
            if status:  # too late for an answer; the server breaks the connection off
                raise
            await answer(scope, receive, send_with_id)
        finally:
            body.release()
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.http_response(method=scope["method"], route=route, status=status)
            client = UNKNOWN if caller is None else caller.name
            if caller is None or caller.quota is not None:
                self._metrics.client_request(client=client, status=status)
            if trace is not None:
                summary["trace_id"] = trace.end(
                    method=scope["method"], route=route, status=status, request_id=request_id.decode(), figures=summary
                )
            level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
            if log.isEnabledFor(level):
                figures = {
                    "request_id": request_id.decode(),
                    "client": client,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "milliseconds": round(1000 * (time.monotonic() - started_at), 1),
                    **summary,
                }
                line = " ".join(f"{name}={value!r}" for name, value in figures.items())
                log.log(level, "request %s", line, extra={"figures": figures})
