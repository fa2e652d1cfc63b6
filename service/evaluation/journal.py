"""The outcomes that a run has so far, in a file beside its report, so that the same command can go on with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.evaluation.errors import EvaluationError
from service.evaluation.items import Outcome


class Journal:
    """A line of JSON for what is evaluated, then one an outcome. A last line that is not whole is dropped."""

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        """Open or make `file`. Raises EvaluationError where it is of another evaluation, or cannot be written."""
        self.file = file
        self.outcomes: dict[int, Outcome] = {}
        head = json.dumps(about, sort_keys=True).encode() + b"\n"
        try:
            self._stream = file.open("a+b")
            self._stream.seek(0)
            lines = self._stream.readlines()
            whole = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
            if whole and whole[0] != head:
                self._stream.close()
                raise EvaluationError(
                    f"--out: {file}: is of an evaluation of something else; take it away, or give another --out"
                )
            if not whole:
                whole = [head]
                self._stream.truncate(0)
                self._write(head)
            self._stream.truncate(sum(map(len, whole)))
            for line in whole[1:]:
                number, logprob, is_greedy = json.loads(line)
                self.outcomes[number] = Outcome(logprob, is_greedy)
        except (OSError, ValueError) as error:
            if isinstance(error, EvaluationError):
                raise
            reason = error.strerror if isinstance(error, OSError) else "is no journal of an evaluation"
            raise EvaluationError(f"--out: {file}: {reason}") from error

    def add(self, number: int, outcome: Outcome) -> None:
        """Raises OSError."""
        self.outcomes[number] = outcome
        self._write(json.dumps([number, outcome.logprob, outcome.is_greedy]).encode() + b"\n")

    def close(self) -> None:
        self._stream.close()

    def remove(self) -> None:
        """The run is over."""
        self.close()
        self.file.unlink(missing_ok=True)

    def _write(self, line: bytes) -> None:
        self._stream.write(line)
        self._stream.flush()
