"""The processor cores that this process really has. Imports nothing heavy: the supervisor asks too."""

import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Cores that the process may run on, but no more than its control groups give it time for, and at least one.

    Two hyperthreads are one core: products keep a core's units busy with one. A container's limit is no fewer cores
    but a share of their time, and more threads than that share stop each other at every turn.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core_of(number, root) for number in allowed}
    return max(1, min([len(cores), *(int(share) for share in _shares(root))]))


def _core_of(number: int, root: Path) -> str:
    """Equal for the hyperthreads of one core."""
    file = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    return (_read(file) or str(number)).strip()


def _shares(root: Path) -> Iterator[float]:
    """How many cores' time each of the process's control groups, of either version, may take."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _upwards(root / "sys/fs/cgroup", path):
                quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
                if quota.strip() != "max":
                    yield int(quota) / int(period)
        elif "cpu" in controllers.split(","):
            for mount in {"cpu", controllers}:
                for folder in _upwards(root / "sys/fs/cgroup" / mount, path):
                    quota = (_read(folder / "cpu.cfs_quota_us") or "-1").strip()
                    if int(quota) > 0:
                        yield int(quota) / int(_read(folder / "cpu.cfs_period_us") or 100_000)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it, each of which may have a limit; a container sees its own as the mount."""
    folder = mount / path.strip("/")
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
