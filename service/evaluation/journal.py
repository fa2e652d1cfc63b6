"""The outcomes that a run has so far, in a file beside its report, so that the same command can go on with them."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from service.evaluation.errors import EvaluationError
from service.evaluation.items import Outcome


class Journal:
    """A line of JSON for what is evaluated, then one an outcome. A last line that is not whole is dropped."""

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        """Open or make `file`, for this run alone.

        Raises EvaluationError where it is of another evaluation, in use by another run, or cannot be written.
        """
        self.file = file
        head = json.dumps(about, sort_keys=True).encode() + b"\n"
        try:
            self._stream = _locked(file)
            try:
                known = self._stream.read()
                whole = known[: known.rfind(b"\n") + 1] or head
                if not whole.startswith(head) or not (known.startswith(head) or head.startswith(known)):
                    raise EvaluationError(
                        f"--out: {file}: is of an evaluation of something else; take it away, or give another --out"
                    )
                self.outcomes = _outcomes(file, whole)
                self._stream.seek(0)
                self._stream.write(whole)
                self._stream.truncate()
                self._stream.flush()
            except BaseException:
                self._stream.close()
                raise
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
        self.file.unlink(missing_ok=True)  # while it is locked: it is still ours
        self.close()


def _locked(file: Path) -> BinaryIO:
    """The file, made where it is not there; no other run can have it so before it is closed.

    Raises OSError, and EvaluationError where another run has it.
    """
    while True:
        stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
                return stream
        except BlockingIOError:
            stream.close()
            message = "another run writes it now; wait for its end, or give another --out"
            raise EvaluationError(f"--out: {file}: {message}") from None
        except FileNotFoundError:
            pass
        except OSError:
            stream.close()
            raise
        stream.close()  # a run that has ended meanwhile took it away


def _outcomes(file: Path, content: bytes) -> dict[int, Outcome]:
    try:
        lines = map(json.loads, content.splitlines()[1:])
        return {number: Outcome(logprob, is_greedy) for number, logprob, is_greedy in lines}
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"--out: {file}: is no journal of an evaluation") from error
