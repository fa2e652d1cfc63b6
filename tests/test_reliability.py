"""docs/reliability.md names tests that are there, and leaves none of tests/faults out."""

import re

from tests.test_api_docs import TESTS
from tests.test_readme import ROOT

PAGE = (ROOT / "docs/reliability.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    """Each row of a table names one or more."""
    tables, _, _ = PAGE.partition("## Figures")
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    for row in (row for row in rows if not row.startswith("| what ")):
        named = TESTS.findall(row)
        assert named, row
        for path, name in named:
            assert re.search(rf"def {name}\(", (ROOT / path).read_text()), f"no {name} in {path}"


def test_every_fault_is_told() -> None:
    """What `make faults` runs has its row."""
    tests = {
        (str(file.relative_to(ROOT)), name)
        for file in (ROOT / "tests/faults").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text())
    }
    assert set() == tests - set(TESTS.findall(PAGE))
