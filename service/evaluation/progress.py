"""How far a run is, on standard error: a bar on a terminal, elsewhere a line each tenth."""

import sys
import time
from types import TracebackType
from typing import Never, Self

from tqdm import tqdm


class Progress:
    """Over `total` items, `done` of which were scored before."""

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._found_before = total, done, done
        self._began_at = time.monotonic()
        self._bar: tqdm[Never] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc="eval", unit=" items", smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more is scored."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        tenth = self._done * 10 // self._total
        if tenth > (self._done - 1) * 10 // self._total:
            left = self._total - self._done
            seconds = (time.monotonic() - self._began_at) / (self._done - self._found_before) * left
            print(f"eval: {tenth * 10} % of {self._total}, about {seconds:.0f} s left", file=sys.stderr, flush=True)
