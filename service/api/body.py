"""Request bodies: JSON read strictly, null as the default of every optional field, errors that name the field."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import ApiError

_Schema = TypeVar("_Schema", bound=BaseModel)
_Result = TypeVar("_Result")
_LONG_BODY_BYTES = 8192  # from here on a body is read in a thread, so that the event loop goes on
_MAX_PROBLEMS = 10  # told in one message
_OPEN_BODIES = 32  # of the largest size, of requests that are not answered yet
_SMALL_BODY = 1 / 128  # of the largest size counts for nothing: connections bound it, and large ones do not keep it out
_ABOUT = frozenset({"anyOf", "title", "description", "default", "examples"})  # of a field, not of its form


class Body(BaseModel):
    """What a body, or an object within one, is made of: strict types, unknown fields ignored, null as the default."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema says so too: what is optional may be null."""
        schema = handler(core_schema)
        resolved = handler.resolve_ref_schema(schema)
        for name, field in resolved.get("properties", {}).items():
            if name not in resolved.get("required", ()):
                _allow_null(field)
        return schema


def _allow_null(field: dict[str, Any]) -> None:
    forms = field.setdefault("anyOf", [])
    if not forms:
        moved = {key: field.pop(key) for key in list(field) if key not in _ABOUT}
        forms.append(moved)
    if {"type": "null"} not in forms:
        forms.append({"type": "null"})


class BodyLimits:
    """Bounds of a body, and of those of all open requests together: what came of a body stays until its answer."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_bytes = max_body_bytes
        self.small_bytes = int(_SMALL_BODY * max_body_bytes)
        self.max_open_bytes = _OPEN_BODIES * max_body_bytes
        self.num_open_bytes = 0


class BoundedBody:
    """`receive` of one request, within the limits."""

    def __init__(self, limits: BodyLimits, receive: Receive, content_length: bytes | None) -> None:
        self._limits = limits
        self._receive = receive
        self._content_length = int(content_length or 0)
        self._num_bytes = 0
        self._num_open_bytes = 0

    async def receive(self) -> Message:
        """Raises ApiError: 413 at the first byte too many, or at once where the length is declared; 503."""
        limits = self._limits
        if self._content_length > limits.max_bytes:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            num_bytes = len(message.get("body", b""))
            self._num_bytes += num_bytes
            if self._num_bytes > limits.max_bytes:
                raise self._too_large()
            counted = max(0, self._num_bytes - limits.small_bytes) - self._num_open_bytes
            self._num_open_bytes += counted
            limits.num_open_bytes += counted
            if counted and limits.num_open_bytes > limits.max_open_bytes:
                raise ApiError(
                    503,
                    "Too many requests with large bodies are open; try again later",
                    type="service_unavailable",
                    code="too_many_bodies",
                    headers={"Retry-After": "1"},
                )
        return message

    def release(self) -> None:
        """The request has been answered."""
        self._limits.num_open_bytes -= self._num_open_bytes
        self._num_open_bytes = 0

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limits.max_bytes} bytes.", code="request_too_large")


async def read_body(request: Request) -> bytes:
    """The whole body, without the async generator that Starlette reads it by. Raises ClientDisconnect."""
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def parse_body(body: bytes, schema: type[_Schema]) -> _Schema:
    """The request in a body of JSON. Raises ApiError (400), naming the parameter."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:  # also invalid UTF-8 and too deep a nesting
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = [(_param(item["loc"], value), item["msg"]) for item in error.errors(include_url=False)]
        message = "; ".join(f"{param}: {problem}" for param, problem in problems[:_MAX_PROBLEMS])
        raise ApiError(400, message, param=problems[0][0]) from None


def _param(location: tuple[int | str, ...], value: object) -> str:
    """Where an error is, in the client's terms: without the names that pydantic gives to the forms of a union."""
    parts = []
    for part in location:
        match value:
            case dict() if part in value or part == location[-1]:  # or missing
                value = value.get(part)
            case list() if isinstance(part, int):
                value = value[part]
            case _:
                continue
        parts.append(str(part))
    return ".".join(parts)


async def work_on(body: bytes, work: Callable[[bytes], _Result], *, slow: bool = False) -> _Result:
    """`work(body)`, in a thread where that may take long: for a long body, or when the caller knows it is `slow`."""
    if slow or len(body) >= _LONG_BODY_BYTES:
        return await asyncio.to_thread(work, body)
    return work(body)


class DirectRoute(APIRoute):
    """A route whose function takes a Request and gives a Response, and needs nothing of FastAPI's own for it."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods is None or scope["method"] not in self.methods:
            await super().handle(scope, receive, send)  # which says so
            return
        scope["route"] = self
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def documented_body(schema: type[Body], **example: object) -> dict[str, Any]:
    """The request body in the OpenAPI schema of a route that reads it by itself."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    if example:
        content["application/json"]["example"] = example
    return {"requestBody": {"content": content, "required": True}}
