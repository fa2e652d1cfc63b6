"""How processes of the service begin, and how they end with their parent."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading

from service.logs import configure_logging

_PR_SET_PDEATHSIG = 1  # of prctl(2)

EXIT_UNUSABLE = 3  # the model, the device or a setting cannot be used: another try would not mend it


def start_child(*, level: str, json_lines: bool) -> None:
    """What every child process does first: leave signals to the parent, end with it, and log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    configure_logging(level=level, json_lines=json_lines)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, also while it is stopped; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def give_back_memory() -> None:
    """Return what has been freed to the system: glibc keeps pieces as large as weights are, hundreds of MB of them."""
    with contextlib.suppress(AttributeError):  # another C library's
        ctypes.CDLL(None).malloc_trim(0)
