"""GET /docs: the schema of /openapi.json, shown and to try out, by files of the package alone. Used by app.py.

page/swagger-ui holds files of npm's swagger-ui-dist, unchanged, with their licences; page/docs.* are our own.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

_PAGE = Path(__file__).parent / "page"
# Path in the page, file, media type. The version in the path lets a browser keep what stands under it.
_VENDORED = "swagger-ui-5.35.0"
_FILES = (
    ("docs.js", "docs.js", "text/javascript"),
    (f"{_VENDORED}/swagger-ui-bundle.js", "swagger-ui/swagger-ui-bundle.js", "text/javascript"),
    (
        f"{_VENDORED}/swagger-ui-bundle.js.LICENSE.txt",  # the bundle's first line refers to it
        "swagger-ui/swagger-ui-bundle.js.LICENSE.txt",
        "text/plain",
    ),
    (f"{_VENDORED}/swagger-ui.css", "swagger-ui/swagger-ui.css", "text/css"),
    (f"{_VENDORED}/favicon-32x32.png", "swagger-ui/favicon-32x32.png", "image/png"),
)
_ASK_AGAIN: Mapping[str, str] = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
_KEEP: Mapping[str, str] = {**_ASK_AGAIN, "Cache-Control": "public, max-age=31536000, immutable"}
# The browser itself refuses whatever is not of this service. Swagger UI sets styles in elements.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


def docs_router() -> APIRouter:
    """Routes of /docs and of each file that it loads, all out of the schema.

    They need no engine. The page names its files and the schema relative to itself, so any prefix before /docs holds.
    """
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs() -> FileResponse:
        headers = {**_ASK_AGAIN, "Content-Security-Policy": _POLICY}
        return FileResponse(_PAGE / "docs.html", media_type="text/html", headers=headers)

    for path, name, media_type in _FILES:
        _add_file(router, path, name=name, media_type=media_type)
    return router


def _add_file(router: APIRouter, path: str, *, name: str, media_type: str) -> None:
    headers = _KEEP if path.startswith(f"{_VENDORED}/") else _ASK_AGAIN

    @router.get(f"/docs/{path}")
    async def docs_file() -> FileResponse:
        return FileResponse(_PAGE / name, media_type=media_type, headers=headers)
