"""The page at / and its files as they are served. What it does in a browser, tests/browser tests."""

import re
import shutil
from pathlib import Path

import pytest

import service.api
from tests.api.conftest import Service, Start
from tests.api.test_access import keyed

FOLDER = Path(service.api.__file__).parent / "page" / "playground"
TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


async def test_the_page_loads_files_of_the_service_alone(start: Start) -> None:
    """Each that page and scripts name is there, with its type and by a relative path; while loading, without a key."""
    api: Service = await start(access=keyed(), ready=False)
    page = await api.http.get("/")
    assert (200, "text/html; charset=utf-8") == (page.status_code, page.headers["content-type"])
    named = {reference for reference in re.findall(r'(?:src|href)="([^"]+)"', page.text) if reference != "docs"}
    found = {}
    for reference in named:
        response = await api.http.get(f"/{reference}")
        assert (200, TYPES[Path(reference).suffix]) == (response.status_code, response.headers["content-type"])
        assert "nosniff" == response.headers["x-content-type-options"]
        found[Path(reference).name] = response.text
    waiting = ["playground.js"]
    while waiting:
        for imported in re.findall(r'from "\./(\w+\.js)"', found[waiting.pop()]):
            if imported not in found:
                response = await api.http.get(f"/playground/{imported}")
                assert (200, TYPES[".js"]) == (response.status_code, response.headers["content-type"])
                found[imported] = response.text
                waiting.append(imported)
    assert found.keys() == {file.name for file in FOLDER.iterdir()}
    for name, text in found.items():
        foreign = re.findall(r"""["'(]\s*(?:https?:)?//[^"')]*""", text)
        assert [] == [place for place in foreign if place != '"http://www.w3.org/2000/svg'], name


async def test_the_browser_is_told_to_run_nothing_else(api: Service) -> None:
    """Nothing inline, nothing made of a string, no other host, no frame around it, no referrer told."""
    page = await api.http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert "'none'" == policy.pop("default-src")
    ours = {"script-src", "style-src", "img-src", "connect-src"}
    assert dict.fromkeys(ours, "'self'") == {name: policy.pop(name) for name in ours}
    closed = {"base-uri", "form-action", "frame-ancestors", "trusted-types"}
    assert dict.fromkeys(closed, "'none'") | {"require-trusted-types-for": "'script'"} == policy
    assert "no-referrer" == page.headers["referrer-policy"]
    assert not re.search(r"<script(?![^>]*src)|<style|\sstyle=|\son\w+=", page.text)


@pytest.mark.parametrize("path", ["/", "/playground/playground.js", "/docs", "/docs/docs.js"])
async def test_a_file_that_a_browser_has_is_not_sent_again(api: Service, path: str) -> None:
    """HEAD tells what GET does without the body; with the tag of what is there the answer is 304, else the file."""
    whole = await api.http.get(path)
    head = await api.http.head(path)
    assert (200, b"") == (head.status_code, head.content)
    same = ("content-type", "content-length", "etag", "cache-control", "x-content-type-options")
    assert [whole.headers[name] for name in same] == [head.headers[name] for name in same]
    tag = whole.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = await api.http.get(path, headers={"If-None-Match": known})
        assert (304, b"", tag) == (again.status_code, again.content, again.headers["etag"])
    other = await api.http.get(path, headers={"If-None-Match": '"other"'})
    assert (200, whole.content) == (other.status_code, other.content)


async def test_what_an_editor_leaves_is_not_served(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it keep the service from starting."""
    shutil.copytree(FOLDER.parent, tmp_path / "page")
    for name in ("pane.js~", ".DS_Store", "pane.js.swp"):
        (tmp_path / "page" / "playground" / name).write_text("left")
    monkeypatch.setattr("service.api.playground.FOLDER", tmp_path / "page")
    api = await start()
    assert 404 == (await api.http.get("/playground/pane.js~")).status_code
    assert 200 == (await api.http.get("/playground/pane.js")).status_code


async def test_other_files_are_not_served(api: Service) -> None:
    """Not by a path out of the folder, nor the page under another name."""
    for path in ("/playground", "/playground/", "/playground/..%2fdocs.js", "/playground/x.js", "/playground.html"):
        response = await api.http.get(path)
        assert (404, "not_found") == (response.status_code, response.json()["error"]["code"])
