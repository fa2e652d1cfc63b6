"""What every child process of the service does first: it leaves signals to its parent, ends with it, and logs."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from service.logs import configure_logging

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
