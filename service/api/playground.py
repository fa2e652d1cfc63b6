"""GET /: the playground, a page on which completions are tried out. Used by app.py; `make browser` tests it.

page/playground.html loads the files of page/playground, our own, and no others. It learns the fields of a request and
their limits from /openapi.json, so nothing of them is written down there.
"""

from fastapi import APIRouter

from service.api.pages import FOLDER, TYPES, add_file, add_page

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def playground_router() -> APIRouter:
    """Routes of / and of each file that it loads, all out of the schema, which need neither engine nor key.

    The page names its files and the routes that it asks relative to itself, so any prefix before / holds.
    """
    router = APIRouter(include_in_schema=False)
    add_page(router, "/", FOLDER / "playground.html", policy=_POLICY)
    for file in sorted((FOLDER / "playground").iterdir()):
        if file.suffix in TYPES:  # not what an editor or a file system leaves there
            add_file(router, f"/playground/{file.name}", file)
    return router
