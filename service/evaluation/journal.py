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
        head = json.dumps(about, sort_keys=True).encode() + b"\n"
        try:
            is_new = not file.exists()
            known = b"" if is_new else file.read_bytes()
            whole = known[: known.rfind(b"\n") + 1] or head
            if not whole.startswith(head) or not (known.startswith(head) or head.startswith(known)):
                raise EvaluationError(
                    f"--out: {file}: is of an evaluation of something else; take it away, or give another --out"
                )
            self.outcomes = _outcomes(file, whole)
            self._stream = file.open("xb" if is_new else "r+b")
            self._stream.write(whole)
            self._stream.truncate()
            self._stream.flush()
        except OSError as error:
            raise EvaluationError(f"--out: {file}: {error.strerror}") from error

    def add(self, number: int, outcome: Outcome) -> None:
        """Raises OSError."""
        self.outcomes[number] = outcome
        self._stream.write(json.dumps([number, outcome.logprob, outcome.is_greedy]).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def remove(self) -> None:
        """The run is over."""
        self.close()
        self.file.unlink(missing_ok=True)


def _outcomes(file: Path, content: bytes) -> dict[int, Outcome]:
    try:
        lines = map(json.loads, content.splitlines()[1:])
        return {number: Outcome(logprob, is_greedy) for number, logprob, is_greedy in lines}
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"--out: {file}: is no journal of an evaluation") from error
