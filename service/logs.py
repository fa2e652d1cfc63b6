"""Logging of every process of the service: text lines or JSON lines on standard error. Called as each one starts."""

import logging
import sys

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

_CHATTY = ("httpx", "httpcore", "huggingface_hub", "asyncio")  # at info they tell nothing of ours


def configure_logging(*, level: str, json_lines: bool) -> None:
    """One handler on the root logger; what a library logs goes through it too."""
    handler = logging.StreamHandler(sys.stderr)
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
