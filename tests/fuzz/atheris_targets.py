"""Fuzz one target: `python -m tests.fuzz.atheris_targets TARGET SECONDS`. New code reached is kept in memory alone.

atheris is for Python 3.11 only, and so in no environment but the one of `make fuzz`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "zipfile", "pickle", "pickletools", "json"]):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import TARGETS


def main() -> None:
    _, target, seconds = sys.argv

    def run(data: bytes) -> None:  # libFuzzer would take what a target returns for an order
        TARGETS[target](data)

    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        for number, seed in enumerate(seeds()[target]):
            (Path(folder) / str(number)).write_bytes(seed)
        arguments = [f"-max_total_time={seconds}", "-max_len=16384", "-rss_limit_mb=4096", "-timeout=20", folder]
        atheris.Setup([sys.argv[0], *arguments], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
