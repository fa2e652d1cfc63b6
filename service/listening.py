"""The public port: its socket, what the kernel watches on every connection to it, and the descriptors for them.

A peer that is gone without a word sends nothing that could be heard, and one that reads nothing fills no event loop:
the kernel alone tells both in time. What is set on the listening socket, accepted ones inherit.
"""

import logging
import math
import resource
import socket

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_PROBES = 4
_LONGEST_IDLE_SECONDS = 32767  # that Linux takes
_RESERVED_DESCRIPTORS = 128  # for all but connections: the event loop, logs, channels, a model's files


def open_listener(host: str, port: int, *, send_seconds: float) -> socket.socket:
    """A listening TCP socket; raises OSError.

    A connection over it is cut when its peer takes nothing of what is sent, or is not there, for `send_seconds`. Where
    the platform has no such option, only the system's own, later, time-outs cut it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
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
