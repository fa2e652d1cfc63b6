"""The engine process: load a model, then loop. Spawned by serve.py; speaks to the API process.

It ignores SIGINT and SIGTERM, and ends when its channel closes or its parent is gone. Imports little: the supervisor,
which names `main`, needs no more, and the process reads its weights from the disk while it imports the rest.
"""

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
from pathlib import Path

from service.engine.channel import Channel, ChannelClosed
from service.engine.child import EXIT_UNUSABLE, start_child
from service.engine.config import EngineConfig
from service.engine.request import Ready, Status, ToEngine

log = logging.getLogger(__name__)


def main(config: EngineConfig, sock: socket.socket) -> None:
    """The process: load, say Ready, run."""
    start_child(level=config.log_level, json_lines=config.json_lines)
    channel = Channel(sock, ToEngine)
    try:
        channel.send(Status("load", 0.0))
        threading.Thread(target=read_ahead, args=(Path(config.model),), daemon=True).start()
        _run(config, channel)
    except ChannelClosed:
        return


def _run(config: EngineConfig, channel: Channel) -> None:
    from service.engine import loading  # torch takes a second, and only this process may import it
    from service.engine.loop import Loop
    from service.model.batch import DeviceLost

    try:
        try:
            with loading.Reporter(lambda phase, progress: channel.send(Status(phase, progress))) as reporter:
                loaded = loading.load(config, reporter)
        except loading.Unusable as error:
            log.error("%s", error)
            sys.exit(EXIT_UNUSABLE)
        gc.freeze()  # what is loaded stays
        channel.send(Ready(loaded.model))
        Loop(
            channel,
            loaded.scheduler,
            loaded.runner,
            loaded.compile_grammar,
            max_event_interval=config.max_event_interval_ms / 1000,
        ).run()
        loaded.runner.close()
    except DeviceLost as error:
        log.critical("the device is lost: %s", error)
        sys.exit(1)


def read_ahead(folder: Path) -> None:
    """Have the kernel read a local folder's weights into its cache; what is wrong with them, the loading will say."""
    from service.checkpoint.errors import CheckpointError
    from service.checkpoint.hub import weight_files

    with contextlib.suppress(OSError, AttributeError, CheckpointError):  # no such call, as on macOS, or no such folder
        for file in weight_files(folder):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
