"""A file that is evaluated on: read once, before a model is loaded, and what is wrong with it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from service.evaluation.errors import EvaluationError

_MOST_BYTES = 2**25  # of a file: as one stream, its tokens take some fifty times that


@dataclass(frozen=True, slots=True)
class Data:
    """Some bytes that are not all white space, at most 32 MiB."""

    flag: str  # that named the file
    file: Path
    content: bytes

    @classmethod
    def read(cls, file: Path, flag: str) -> Self:
        """Raises EvaluationError."""
        try:
            size = file.stat().st_size
            if size > _MOST_BYTES:
                raise cls(flag, file, b"").error(f"its {size:,} bytes are more than {_MOST_BYTES:,}; cut it in pieces")
            data = cls(flag, file, file.read_bytes())
        except OSError as error:
            raise EvaluationError(f"{flag}: {file}: {error.strerror}") from error
        if not data.content.strip():
            raise data.error("is empty")
        return data

    @property
    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        digest = hashlib.sha256(self.content).hexdigest()
        return {"file": self.file.name, "bytes": len(self.content), "sha256": digest}

    def text(self) -> str:
        """Raises EvaluationError, which names the line."""
        content = self.content
        if content.startswith(b"\xef\xbb\xbf"):
            raise self.error("line 1: begins with a byte order mark")
        if (place := content.find(b"\0")) >= 0:  # as in UTF-16
            raise self.error(f"line {_line(content, place)}: has a byte of zeros (byte {place}), which no text has")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"line {_line(content, error.start)}: is not UTF-8 (byte {error.start})") from error

    def error(self, message: str) -> EvaluationError:
        """To be raised: the flag, the file and what is wrong."""
        return EvaluationError(f"{self.flag}: {self.file}: {message}")


def _line(content: bytes, place: int) -> int:
    """The number of the line, from 1 on, in which a byte stands."""
    return content[:place].count(b"\n") + 1
