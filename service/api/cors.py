"""Pages of other origins: off, unless a setting names them. Around the whole app, so that errors can be read too."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from service.api.errors import ApiError
from service.api.keys import AccessError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:\d{1,5})?")


def check_origins(origins: Sequence[str]) -> None:
    """Raises AccessError for what no browser sends as an Origin: it is compared as it is written."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise AccessError(f"cors_origins: {origin} is no scheme://host or scheme://host:port in lower case, nor *")


class Cors(CORSMiddleware):
    """Starlette's, which answers preflights by itself, before a key is asked for: a browser sends none with them."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "PUT"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After", "Server-Timing"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refusal = ApiError(response.status_code, f"{bytes(response.body).decode()}.", code="cors_refused").response({})
        refusal.headers.update({name: value for name, value in response.headers.items() if "content-" not in name})
        return refusal
