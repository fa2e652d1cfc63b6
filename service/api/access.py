"""Who may ask: keys, what each may do, and which routes need none. The middleware asks it of every request."""

import hmac
import ipaddress
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from starlette.types import Scope

from service.api.keys import AccessError, Key, Keys, hash_key
from service.api.quota import Quota

_OPEN = frozenset({"/", "/livez", "/readyz", "/health", "/ping"})
_MAY_BE_OPEN = ("/metrics", "/version", "/docs", "/openapi.json")
_FREE = nullcontext()


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """What serve.py tells of keys; without keys and a file everybody may ask."""

    keys: tuple[Key, ...] = ()
    key_file: Path | None = None
    open_routes: frozenset[str] = frozenset()
    share_prefixes: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a request: a key by its name, or whoever needs none by its address."""

    name: str
    quota: Quota | None = None  # of a key
    priority_floor: int = 0
    salt: str | None = None  # None shares prefixes with everybody

    def priority(self, asked: int) -> int:
        """The priority number that a request gets; lower is sooner. Nobody jumps the queue who is not meant to."""
        return max(asked, self.priority_floor)

    def cache_salt(self, asked: str) -> str:
        """The salt of a request that asks for `asked`; no other key can have the same, whatever it asks for."""
        return asked if self.salt is None else f"{self.salt}\n{asked}"  # a name has no end of line

    def held(self) -> AbstractContextManager[None]:
        """Within it the request is one of its client's open ones. Raises ApiError (429)."""
        return _FREE if self.quota is None else self.quota.held()


class Access:
    """The door. `keys_on` says whether keys are asked for at all; that does not change."""

    def __init__(self, config: AccessConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises AccessError."""
        for route in sorted(config.open_routes - set(_MAY_BE_OPEN)):
            raise AccessError(f"open_routes: {route} is none of {', '.join(_MAY_BE_OPEN)}")
        self.keys_on = bool(config.keys) or config.key_file is not None
        self._open = _OPEN | config.open_routes
        self._salted = not config.share_prefixes
        self._clock = clock
        try:
            self._keys = Keys(config.keys, config.key_file, clock=clock)
        except AccessError as error:
            raise AccessError(f"api_key_file: {error}") from error
        self._known: tuple[Key, ...] = ()
        self._callers: list[tuple[str, Caller]] = []  # with the SHA-256 of the key

    def is_open(self, path: str) -> bool:
        """Whether a path needs no key. What is not named here needs one, also where no route is."""
        if not self.keys_on or path in self._open:
            return True
        return path.startswith("/playground/") or (path.startswith("/docs/") and "/docs" in self._open)

    def caller_of(self, scope: Scope, authorization: bytes) -> Caller | None:
        """Whose request `scope` is; None without a key that is known, where one is needed."""
        if self.is_open(scope["path"]):
            return Caller(_address(scope))
        scheme, _, key = authorization.partition(b" ")
        digest = hash_key(key.strip())
        found = None
        for known, caller in self._current():  # all of them: how long it takes tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found if scheme.lower() == b"bearer" else None

    def _current(self) -> list[tuple[str, Caller]]:
        """The callers of the keys in force. Those whose key stays, by its name, keep what they have used of it."""
        keys = self._keys.current()
        if keys is not self._known:
            quotas = {caller.name: caller.quota for _, caller in self._callers}
            self._known = keys
            self._callers = [(key.sha256, self._caller(key, quotas.get(key.name))) for key in keys]
        return self._callers

    def _caller(self, key: Key, quota: Quota | None) -> Caller:
        quota = quota or Quota(key, clock=self._clock)
        quota.key = key
        return Caller(key.name, quota, key.priority_floor or 0, key.name if self._salted else None)


def _address(scope: Scope) -> str:
    """Where a request comes from. Of IPv6 the first 64 bits: whoever has one such address has all that begin so."""
    host = str(client[0]) if (client := scope.get("client")) else "local"
    return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False)) if ":" in host else host
