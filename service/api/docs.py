"""GET /docs: the schema of /openapi.json, shown and to try out, by files of the package alone. Used by app.py.

page/swagger-ui holds files of npm's swagger-ui-dist, unchanged, with their licences; page/docs.* are our own.
"""

from fastapi import APIRouter

from service.api.pages import FOLDER, add_file, add_page

# The version in the path lets a browser keep what stands under it.
_VENDORED = "/docs/swagger-ui-5.35.0"
_FILES = (
    "swagger-ui-bundle.js",
    "swagger-ui-bundle.js.LICENSE.txt",  # the bundle's first line refers to it
    "swagger-ui.css",
    "favicon-32x32.png",
)
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
    add_page(router, "/docs", FOLDER / "docs.html", policy=_POLICY)
    add_file(router, "/docs/docs.js", FOLDER / "docs.js")
    for name in _FILES:
        add_file(router, f"{_VENDORED}/{name}", FOLDER / "swagger-ui" / name, keep=True)
    return router
