"""Files that a browser loads from the package itself, and the headers that they go out with. Used by docs.py and
playground.py.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import NotModifiedResponse

FOLDER = Path(__file__).parent / "page"
TYPES: Mapping[str, str] = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_ASK_AGAIN = "no-cache"
_KEEP = "public, max-age=31536000, immutable"


def add_page(router: APIRouter, path: str, file: Path, *, policy: str) -> None:
    """A route for a page, whose browser refuses by itself what `policy`, a Content-Security-Policy, does not name."""
    _add(router, path, file, {"Cache-Control": _ASK_AGAIN, "Content-Security-Policy": policy})


def add_file(router: APIRouter, path: str, file: Path, *, keep: bool = False) -> None:
    """A route for what a page loads; `keep` says that under this path there will never be another file."""
    _add(router, path, file, {"Cache-Control": _KEEP if keep else _ASK_AGAIN})


def _add(router: APIRouter, path: str, file: Path, headers: Mapping[str, str]) -> None:
    headers = {**headers, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    media_type = TYPES[file.suffix]

    @router.api_route(path, methods=["GET", "HEAD"])
    def send_file(request: Request) -> Response:
        response = FileResponse(file, media_type=media_type, headers=headers, stat_result=file.stat())
        known = request.headers.get("If-None-Match", "").split(",")
        if response.headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known):
            return NotModifiedResponse(response.headers)
        return response
