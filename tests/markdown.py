"""The repository's pages: their blocks of code, the code in their prose, their headings and links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "docker/**/*.md", "k8s/**/*.md", "bench/**/*.md", "service/**/*.md")
    for file in ROOT.glob(pattern)
)
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """Fenced code."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What is typed in a console, a line each; the others are what it prints."""
        lines = self.text.splitlines() if self.language == "console" else []
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks(page: str) -> list[Block]:
    return [Block(page, match[2], match[3]) for match in _BLOCK.finditer((ROOT / page).read_text())]


def spans(page: str) -> list[str]:
    """Code in prose, each once, in order."""
    return list(dict.fromkeys(" ".join(span.split()) for span in _SPAN.findall(prose(page))))


def links(page: str) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: str) -> set[str]:
    """Of the headings, as hosts of repositories make them; of two alike the second has a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(next(name for name in _numbered(slug) if name not in found))
    return found


def _numbered(slug: str) -> Iterator[str]:
    yield slug
    number = 1
    while True:
        yield f"{slug}-{number}"
        number += 1


def prose(page: str) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", (ROOT / page).read_text())
