"""Seconds and peak memory of a conversion, measured from outside the process that does it.

`python -m bench.convert IN [IN ...]`: each is converted into a temporary folder. Memory is the process's own (anonymous
pages, which a file's mapping has none of) and its resident set with the mapped files, sampled every 10 ms.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from service.checkpoint.convert import Job


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process: anonymous, and all that is resident."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss") or "VmRSS" in line
    }
    return values.get("RssAnon", 0), values.get("VmRSS", 0)


def measure(source: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "service.checkpoint.worker", *["3600", str(2**36), str(2**36)]]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
        assert process.stdin is not None
        (Path(folder) / "work").mkdir()
        told = {"job": asdict(Job(str(source), f"{folder}/out")), "work": f"{folder}/work"}
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()
        anonymous = whole = 0
        while process.poll() is None:
            now = resident(process.pid)
            anonymous, whole = max(anonymous, now[0]), max(whole, now[1])
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        assert process.stdout is not None
        answer = json.loads(process.stdout.read().splitlines()[-1])
        if answer:
            raise SystemExit(answer["error"])
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "source": source.name,
        "seconds": round(seconds, 2),
        "anonymous_MiB": anonymous // 2**20,
        "resident_MiB": whole // 2**20,
        "written_MiB": written // 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path)
    for source in parser.parse_args().sources:
        print(json.dumps(measure(source)), flush=True)


if __name__ == "__main__":
    main()
