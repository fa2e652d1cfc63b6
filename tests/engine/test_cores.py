"""How many cores a process has, read from a tree of files such as the kernel shows."""

import os
from pathlib import Path

import pytest

from service.engine.cores import available_cores


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_without_limits_and_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    """As where the system shows no such files."""
    assert 8 == available_cores(tmp_path)


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    """Of 0 to 7, n and n + 4 belong together; with one of each pair allowed there are as many cores."""
    siblings = {
        f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{number % 4},{number % 4 + 4}\n"
        for number in range(8)
    }
    assert 4 == available_cores(write(tmp_path, siblings))


def test_allowed_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the process may run on (taskset, a cpuset) count, not all there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6}, raising=False)
    assert 3 == available_cores(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"sys/fs/cgroup/pod/app/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/cpu.max": "50000 10000\n"}, 5),
        ({"sys/fs/cgroup/pod/app/cpu.max": "20000 10000\n", "sys/fs/cgroup/pod/cpu.max": "50000 10000\n"}, 2),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Of version 2: the process's own group's or one above it, whichever is least; parts of a core are left."""
    assert expected == available_cores(write(tmp_path, {"proc/self/cgroup": "0::/pod/app\n"} | files))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "-1\n"}, 8),
        (
            {
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "350000\n",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "50000\n",
            },
            7,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_limits_of_older_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Of version 1, whose mount has the controllers' names or a link of one, and which a container sees from inside."""
    groups = {"proc/self/cgroup": "5:cpu,cpuacct:/pod\n3:memory:/pod\n0::/\n"}
    assert expected == available_cores(write(tmp_path, groups | files))
