"""Counts numpy's work: functions, methods, operators and indexing of arrays that a module made with its `np`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

_METHODS = (
    "all",
    "any",
    "argsort",
    "astype",
    "copy",
    "cumsum",
    "fill",
    "max",
    "min",
    "nonzero",
    "ravel",
    "repeat",
    "reshape",
    "sum",
    "take",
    "tobytes",
    "tolist",
    "view",
)


class ArrayCalls:
    """Stands for `np` in the modules that are watched; `calls` tells what was called while `counting`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.counting = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *args, **kwargs: self.count(name, found, args, kwargs)

    def count(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call `function`, of which the arrays are the plain ones, and watch its result."""
        self.calls[name] += self.counting
        return self.watch(function(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()}))

    def watch(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self.watch, value))
        if not isinstance(value, np.ndarray):
            return value
        watched = np.ndarray.view(value, _Watched)
        watched.owner = self
        return watched


class _Watched(np.ndarray[Any, Any]):
    owner: ArrayCalls

    def __array_finalize__(self, made_from: Any) -> None:
        if isinstance(made_from, _Watched):
            self.owner = made_from.owner

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return self.owner.count(ufunc.__name__, getattr(ufunc, method), inputs, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self.owner.count("getitem", np.ndarray.__getitem__, (self, key), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.owner.count("setitem", np.ndarray.__setitem__, (self, key, value), {})


def _method(name: str) -> Callable[..., Any]:
    def method(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        return self.owner.count(name, getattr(np.ndarray, name), (self, *args), kwargs)

    return method


for _name in _METHODS:
    setattr(_Watched, _name, _method(_name))


def _plain(value: Any) -> Any:
    if isinstance(value, _Watched):
        return np.ndarray.view(value, np.ndarray)
    return type(value)(map(_plain, value)) if isinstance(value, (tuple, list)) else value
