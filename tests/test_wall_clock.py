"""The wall clock is asked for nothing but what is told as a date: the monotonic clock alone decides anything."""

import ast
from pathlib import Path

import pytest

SERVICE = Path(__file__).parent.parent / "service"
FILES = sorted(SERVICE.rglob("*.py"))
# Modules whose functions read it, and those that do. A name that is imported from them is found by itself.
READERS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "_datetime": {"now", "utcnow", "today"},
}
NAMED = {"created", "_created", "date"}  # the field of an answer, the metrics' own, and that of a load report


def readings(tree: ast.AST) -> list[tuple[ast.expr, str | None]]:
    """Each place that names a reader of the wall clock, and the field or variable that its value is for."""
    found: list[tuple[ast.expr, str | None]] = []

    def visit(node: ast.AST, purpose: str | None) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name) | ast.Attribute(attr=name)]):
                purpose = name
            case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name)):
                purpose = name
            case ast.keyword(arg=name):
                purpose = name
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    visit(value, key.value if isinstance(key, ast.Constant) else None)
                return
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name):
                if name in READERS.get(owner, ()):
                    found.append((node, purpose))
            case ast.ImportFrom(module="time", names=names):
                found.extend((ast.Name(name.name), None) for name in names if name.name in READERS["time"])
        for child in ast.iter_child_nodes(node):
            visit(child, purpose)

    visit(tree, None)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SERVICE)))
def test_the_wall_clock_decides_nothing(file: Path) -> None:
    """What it says is called a date."""
    for reading, purpose in readings(ast.parse(file.read_text())):
        assert purpose in NAMED, f"{ast.unparse(reading)} for {purpose}"


def test_readings_are_found() -> None:
    """In every form; else the test above would hold of anything."""
    source = (
        "import time, datetime\nfrom datetime import datetime as d\nfrom time import time_ns\n"
        "late = time.time() > 5\nself.created = int(time.time())\nf(created=time.time())\n"
        "x = {'created': int(time.time()), 'at': datetime.datetime.now()}\nx: float = time.time()\n"
        "clock = time.time\nsoon = time.monotonic()\n"
    )
    purposes = [purpose for _, purpose in readings(ast.parse(source))]
    assert [None, "late", "created", "created", "created", "at", "x", "clock"] == purposes
