"""An engine's other ranks: processes that compute the same batches, each with its part of the model.

The engine process is rank 0. It starts the others, tells them each batch, and ends when one of them ends; they end with
it. None of them schedules: a Batch is complete, and every rank samples the same tokens. Called by loading.py.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pickle
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from service.engine.child import EXIT_UNUSABLE
from service.model.batch import Batch, DeviceLost, Runner, StepOutput
from service.model.parallel import Group

log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds, for the device to finish
_HERE = "127.0.0.1"  # an engine's ranks are on one host


class Ranks:
    """The ranks 1 to N - 1 of an engine. Whatever ends one of them ends this process."""

    def __init__(self, num_ranks: int, target: Callable[[int, int, Connection], None]) -> None:
        """Start them: each is `target` with its rank, the port at which ranks meet, and a connection to `follow`."""
        self.num_ranks = num_ranks
        self._ending, self._closing, self._ended = (threading.Event() for _ in range(3))
        self.store = TCPStore(_HERE, 0, num_ranks, is_master=True, wait_for_workers=False)
        spawn = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for rank in range(1, num_ranks):
            theirs, ours = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=target, args=(rank, self.store.port, theirs), name=f"tensor-parallel rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for work in (self._watch, self._bound):  # at its exit a process may start no more threads
            threading.Thread(target=work, daemon=True).start()
        # However this process ends: at its exit it would wait for its children, which heed no signal to terminate.
        multiprocessing.util.Finalize(None, self.close, exitpriority=0)

    def tell(self, batch: Batch) -> None:
        """Have all of them launch it. Raises OSError."""
        data = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        for connection in self._connections:
            connection.send_bytes(data)

    def close(self) -> None:
        """End them, when the device has done what it waits for them with, and this process if it never does."""
        if self._ending.is_set():
            return
        self._ending.set()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError):  # the device is lost
                torch.cuda.synchronize()
        self._closing.set()
        self._kill()
        for connection in self._connections:
            connection.close()
        if dist.is_initialized():
            dist.destroy_process_group()  # whose threads would otherwise end this process by SIGABRT
        self._ended.set()

    def _bound(self) -> None:
        self._ending.wait()
        if not self._ended.wait(_PATIENCE):
            _end_at_once()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _watch(self) -> None:
        ended = multiprocessing.connection.wait([process.sentinel for process in self._processes])
        if self._closing.is_set():
            return
        process = next(process for process in self._processes if process.sentinel in ended)
        process.join()
        log.critical("%s ended (exit code %s), and the engine with it", process.name, process.exitcode)
        self._kill()
        os._exit(EXIT_UNUSABLE if process.exitcode == EXIT_UNUSABLE else 1)


def _end_at_once() -> None:
    log.critical("what was launched waits for the other ranks, which do not come; the engine ends")
    os._exit(1)


class LeadingRunner:
    """Rank 0's runner, which has the others launch what it launches."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self.num_blocks = runner.num_blocks
        self.depth = runner.depth
        self._runner = runner
        self._ranks = ranks

    def launch(self, batch: Batch) -> None:
        """Raises DeviceLost, whatever went wrong: the ranks are not in one step any more."""
        try:
            self._ranks.tell(batch)
            self._runner.launch(batch)
        except Exception as error:
            raise DeviceLost(f"the ranks are out of step: {error}") from error

    def collect(self) -> StepOutput:
        """Raises DeviceLost, as `launch` does."""
        try:
            return self._runner.collect()
        except Exception as error:
            raise DeviceLost(f"the ranks are out of step: {error}") from error

    def close(self) -> None:
        self._runner.close()
        self._ranks.close()


def follow(runner: Runner, connection: Connection) -> None:
    """Launch whatever rank 0 launches, until it closes its end."""
    num_launched = 0
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        runner.launch(pickle.loads(data))  # noqa: S301 - from the process that started this one
        num_launched += 1
        if num_launched > runner.depth:
            runner.collect()


def meet(store: TCPStore | int, *, rank: int, num_ranks: int, device: torch.device) -> Group:
    """The group of an engine's ranks, when all of them are there. `store` is rank 0's, or its port."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=TCPStore(_HERE, store, num_ranks) if isinstance(store, int) else store,
        rank=rank,
        world_size=num_ranks,
        device_id=device if device.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None
    return Group(group)
