"""What children have in common."""

import subprocess
import sys

import pytest

SOURCE = """
import re
from pathlib import Path
from service.engine.child import give_back_memory

def anon():
    return int(re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024

pieces = [b"x" * 100_000 for _ in range(1000)]  # below the size that is mapped by itself
last = b"x" * 100_000  # above them: malloc gives back by itself only what lies at its end
full = anon()
del pieces
freed = anon()
give_back_memory()
print(full - freed < 10, freed - anon() > 80)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    """Of 95 MiB in pieces, which malloc had kept."""
    done = subprocess.run([sys.executable, "-c", SOURCE], capture_output=True, text=True, timeout=60)
    assert ("True True\n", 0) == (done.stdout, done.returncode), done.stderr
