"""Logging of every process of the service: text lines or JSON lines on standard error. Called as each one starts."""

import io
import logging
import sys
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

_CHATTY = ("httpx", "httpcore", "huggingface_hub", "asyncio")  # at info they tell nothing of ours


def configure_logging(*, level: str, json_lines: bool) -> None:
    """One handler on the root logger; what a library logs goes through it too."""
    logging.raiseExceptions = False  # a line that is lost would be told of on sys.stderr, and fail its next flush
    handler = logging.StreamHandler(_unbuffered())
    if json_lines:
        fields = ["asctime", "levelname", "name", "message", "process"]
        rename = {"asctime": "time", "levelname": "level", "name": "logger"}
        formatter = JsonFormatter(
            fields,
            rename_fields=rename,
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, with escapes for a terminal
        )
        handler.setFormatter(formatter)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logging.captureWarnings(True)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its warnings are of malformed requests, which anybody could fill a log with.
    logging.getLogger("uvicorn").setLevel(max(logging.ERROR, logging.getLogger().level))
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def _unbuffered() -> TextIO:
    """Standard error without a buffer: a line that a full disk or a closed pipe does not take is lost.

    In a buffer it would stay, and fail the flush that comes before every start of a child.
    """
    try:
        raw = io.FileIO(sys.stderr.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):  # it is replaced by what is no file
        return sys.stderr
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
