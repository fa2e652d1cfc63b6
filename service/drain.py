"""`megatron-gpt2 drain`: asks a running service, through its admin listener, to take no more requests, and waits."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from service.settings import Settings, SettingsError

_LONGEST_SECONDS = 86_400.0
_FIELDS = frozenset({"requests_open", "running", "waiting", "waited_seconds", "unready_seconds"})
_ANSWER_SECONDS = 10.0  # for a service that has nothing to wait for


def drain(settings: Settings, *, seconds: float | None) -> int:
    """Wait `seconds` at most, else drain_seconds, but never less than the service's unready_seconds.

    Prints one line. The exit code: 0 nothing is open, 1 something still is. Raises SettingsError where nobody answers.
    """
    if seconds is None:
        seconds = min(settings.drain_seconds, _LONGEST_SECONDS)
    if not 0 <= seconds <= _LONGEST_SECONDS:
        raise SettingsError(f"--seconds: must be from 0 to {_LONGEST_SECONDS:g} (got {seconds:g})")
    connection, name = _connection(settings)
    state: dict[str, Any] = {}
    try:
        connection.connect()
        state = _ask(connection, "/admin/drain")
        if connection.sock is None:  # it closes its connections
            raise ConnectionError("the service is about to end")
        connection.sock.settimeout(max(seconds, state["unready_seconds"]) + _ANSWER_SECONDS)
        state = _ask(connection, f"/admin/drain?wait_seconds={seconds:g}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if state:
            print("draining, but the service ended meanwhile")
            return 1
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{name}: {' '.join(str(reason).split())}") from error
    finally:
        connection.close()
    waited = f"after {state['waited_seconds']:.1f} s of draining"
    if not state["requests_open"]:
        print(f"nothing is open {waited}")
        return 0
    print(
        f"still open {waited}: {state['requests_open']} requests "
        f"({state['running']} sequences running, {state['waiting']} waiting)"
    )
    return 1


def _connection(settings: Settings) -> tuple[http.client.HTTPConnection, str]:
    """To the admin listener, the socket where there are both; and what it is, for messages."""
    if settings.admin_socket is not None:
        path = settings.admin_socket
        return _UnixConnection(path, timeout=_ANSWER_SECONDS), f"admin_socket: no service answers on {path}"
    if settings.admin_port:
        place = ("127.0.0.1", settings.admin_port)
        connection = http.client.HTTPConnection(*place, timeout=_ANSWER_SECONDS)
        return connection, f"admin_port: no service answers on {place[0]}:{place[1]}"
    raise SettingsError("admin_port, admin_socket: one of them has to say where the service's admin listener is")


def _ask(connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
    """The service's state. Raises OSError, HTTPException, ValueError for all else that may answer."""
    connection.request("POST", path)
    response = connection.getresponse()
    body = response.read()
    state: Any = json.loads(body) if response.status == 200 else None
    if not isinstance(state, dict) or not state.keys() >= _FIELDS:
        raise ValueError(f"POST {path} was answered with a {response.status} that says nothing of a drain")
    return state


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
