"""/docs: everything that the page loads comes from the service itself."""

import hashlib
import re
from pathlib import Path

import pytest

import service.api
from tests.api.conftest import Service, Start

# Of the files in npm's swagger-ui-dist 5.35.0.
SHA256 = {
    "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "NOTICE": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "favicon-32x32.png": "3ed612f41e050ca5e7000cad6f1cbe7e7da39f65fca99c02e99e6591056e5837",
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui-bundle.js.LICENSE.txt": "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}


async def test_the_page_loads_files_of_the_service_alone(start: Start) -> None:
    """Each file that it names is there, with its type; it works under a prefix, and while the model loads."""
    api: Service = await start(ready=False)
    page = await api.http.get("/docs")
    assert (200, "text/html; charset=utf-8") == (page.status_code, page.headers["content-type"])
    references = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(references) == 4
    types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "png": "image/png"}
    for reference in references:
        assert not re.match(r"[a-z]+:|/", reference)
        response = await api.http.get(f"/{reference}")
        assert (200, types[reference.rsplit(".", 1)[1]]) == (response.status_code, response.headers["content-type"])
        assert ("immutable" in response.headers["cache-control"]) == ("swagger-ui" in reference)
        assert len(response.content) > 100
    script = (await api.http.get(f"/{references[-1]}")).text
    assert 'url: "openapi.json"' in script
    assert "validatorUrl: null" in script
    assert 200 == (await api.http.get("/openapi.json")).status_code


async def test_the_browser_is_told_to_load_nothing_else(api: Service) -> None:
    """By the page's policy; and no stylesheet or script names another host for a font, an import or a source map."""
    page = await api.http.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for reference in re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', page.text):
        text = (await api.http.get(f"/{reference}")).text
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//|sourceMappingURL=\w+:", text)


async def test_other_files_are_not_served(api: Service) -> None:
    """Not by their name, and not by a path out of the folder."""
    for name in ("NOTICE", "..%2f..%2fapp.py", "%2e%2e/docs.py", ""):
        response = await api.http.get(f"/docs/swagger-ui-5.35.0/{name}")
        assert (404, "not_found") == (response.status_code, response.json()["error"]["code"])


def test_files_of_swagger_ui_are_unchanged() -> None:
    """Those of the release, and no others: what a browser keeps for a year must not change under one path."""
    folder = Path(service.api.__file__).parent / "page" / "swagger-ui"
    assert SHA256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css"])
async def test_files_come_whole(api: Service, name: str) -> None:
    """The bytes that came over HTTP are the release's; the licences that the script's first line names are there."""
    response = await api.http.get(f"/docs/swagger-ui-5.35.0/{name}")
    assert (200, SHA256[name]) == (response.status_code, hashlib.sha256(response.content).hexdigest())
