"""The ports: the public one, what the kernel watches on its connections, descriptors for them, and the admin ones.

A peer that is gone without a word sends nothing that could be heard, and one that reads nothing fills no event loop:
the kernel alone tells both in time. What is set on the listening socket, accepted ones inherit.
"""

import contextlib
import logging
import math
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_PROBES = 4
_LONGEST_IDLE_SECONDS = 32767  # that Linux takes
_RESERVED_DESCRIPTORS = 128  # for all but connections: the event loop, logs, channels, a model's files


class ListenError(Exception):
    """Where nobody can listen; the message names the setting."""


def open_listener(host: str, port: int, *, send_seconds: float) -> socket.socket:
    """A listening TCP socket. Raises ListenError.

    A connection over it is cut when its peer takes nothing of what is sent, or is not there, for `send_seconds`. Where
    the platform has no such option, only the system's own, later, time-outs cut it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ListenError(f"host, port: cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio's own loop sets none here
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle_seconds = min(math.ceil(send_seconds / 2), _LONGEST_IDLE_SECONDS)
    options = {
        "TCP_KEEPIDLE": idle_seconds,
        "TCP_KEEPINTVL": math.ceil(idle_seconds / _KEEP_ALIVE_PROBES),
        "TCP_KEEPCNT": _KEEP_ALIVE_PROBES,
        "TCP_USER_TIMEOUT": math.ceil(1000 * min(send_seconds, 2 * _LONGEST_IDLE_SECONDS)),  # milliseconds
    }
    for name, value in options.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return listener


def connections_within(max_connections: int) -> int:
    """How many of `max_connections` this process and its children have descriptors for, whose limit is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # some systems have a lower bound of their own
            log.debug("the limit of open files stays at %d: %s", soft, error)
    if soft == resource.RLIM_INFINITY or soft >= max_connections + _RESERVED_DESCRIPTORS:
        return max_connections
    possible = max(1, soft - _RESERVED_DESCRIPTORS)
    log.warning("max_connections: %d instead of %d, as %d files may be open", possible, max_connections, soft)
    return possible


def open_admin(port: int | None, path: Path | None) -> list[socket.socket]:
    """What the admin routes are asked on: a port of 127.0.0.1, a unix socket, both or nothing. Raises ListenError."""
    listeners: list[socket.socket] = []
    if port is not None:
        try:
            listeners.append(socket.create_server(("127.0.0.1", port)))
        except OSError as error:
            raise ListenError(f"admin_port: cannot listen on 127.0.0.1:{port}: {error.strerror}") from error
        log.info("admin routes are on http://127.0.0.1:%d", listeners[0].getsockname()[1])
    if path is not None:
        listener = socket.socket(socket.AF_UNIX)
        listeners.append(listener)
        umask = os.umask(0o177)  # its owner's alone from the first moment
        try:
            _remove_stale(path)
            listener.bind(str(path))
            listener.listen()
        except OSError as error:
            raise ListenError(f"admin_socket: cannot listen on {path}: {error.strerror or error}") from error
        finally:
            os.umask(umask)
        log.info("admin routes are on the unix socket %s", path)
    return listeners


@contextlib.contextmanager
def removed_in_the_end(path: Path | None) -> Iterator[None]:
    """Remove this unix socket afterwards, but not one that another service has put in its place meanwhile."""
    ours = None if path is None else path.stat().st_ino
    try:
        yield
    finally:
        if path is not None and path.exists() and path.stat().st_ino == ours:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on, as a killed service leaves one. `bind` refuses whatever else is there."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
