"""Memory of each of a model's ranks that the kernels of all of them store into. Made by parallel.py for its models."""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

EMPTY = -(2**31)  # the bits of -0.0 in fp32: no number has come yet
NUM_BUFFERS = 3
EMBEDDING = 2  # the buffer of the embeddings' sum; those of a layer are 0 and 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """A tensor of the same shape on every rank's device."""

    own: Tensor  # this rank's
    all: Sequence[Tensor]  # in order of rank, as this rank's kernels reach them
    kept: Any = None  # what maps the others' into this process


@dataclass(frozen=True, slots=True)
class Peers:
    """What kernels/peers.py needs to sum rows of `hidden` numbers over ranks, and to gather logits."""

    rank: int
    num_ranks: int
    received: PeerMemory  # int32 [NUM_BUFFERS, ranks, most_rows, hidden]: bits of fp32, EMPTY but during a sum
    logits: PeerMemory  # fp32 [most_logits, ranks * columns]
    arrived: PeerMemory  # int32 [ranks, 4]: how many barriers each rank has come to, modulo 2**32, in its first word
    count: Tensor  # int32 [1]: how many barriers are behind this rank

    @property
    def most_rows(self) -> int:
        """Of one sum."""
        return self.received.own.shape[2]

    def places(self, buffer: int) -> tuple[Tensor, ...]:
        """Of each rank's memory the part [most_rows, hidden] into which this rank puts its rows."""
        return tuple(received[buffer, self.rank] for received in self.received.all)

    def columns(self) -> tuple[Tensor, ...]:
        """Of each rank's memory the part [most_logits, columns] into which this rank puts its logits."""
        return tuple(logits.view(len(logits), self.num_ranks, -1)[:, self.rank] for logits in self.logits.all)

    def arrivals(self) -> tuple[Tensor, ...]:
        """Of each rank's memory where this rank says that it has come to a barrier."""
        return tuple(arrived[self.rank] for arrived in self.arrived.all)


def make_peers(
    group: dist.ProcessGroup, *, hidden: int, columns: int, most_rows: int, most_logits: int, device: torch.device
) -> Peers | None:
    """Called by all ranks of `group` at the same time, each with its device.

    For sums of `most_rows` rows of `hidden` numbers, and `most_logits` rows of logits, of which a rank has `columns`
    each. None, on all of them, where the devices do not reach each other's memory. Without GPUs, as in tests, ranks are
    processes of one host.
    """
    rank, num_ranks = group.rank(), group.size()
    if device.type == "cuda":
        others = [other for other in _told(group, device.index) if other != device.index]
        near = all(torch.cuda.can_device_access_peer(device, other) for other in others)
        if not all(_told(group, near)):
            log.warning("the GPUs do not reach each other's memory")
            return None
    shapes = {
        "received": ((NUM_BUFFERS, num_ranks, most_rows, hidden), torch.int32),
        "logits": ((most_logits, num_ranks * columns), torch.float32),
        "arrived": ((num_ranks, 4), torch.int32),
    }
    found: dict[str, PeerMemory] = {}
    for name, (shape, dtype) in shapes.items():
        own, lack = None, None
        try:
            own = _allocated(*shape, dtype=dtype, device=device, num_ranks=num_ranks)
        except torch.OutOfMemoryError:
            raise  # this rank's end is the others'
        except RuntimeError as error:
            lack = str(error) or repr(error)
        if any(lacks := _told(group, lack)):
            log.warning("the GPUs' memory is not shared: %s", next(filter(None, lacks)).splitlines()[0])
            return None
        found[name] = _shared(group, own, *shape, dtype=dtype)
    received, logits, arrived = found["received"], found["logits"], found["arrived"]
    received.own.fill_(EMPTY)
    logits.own.zero_()
    arrived.own.zero_()
    count = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _told(group, None)  # nobody sends before all are EMPTY
    return Peers(rank, num_ranks, received, logits, arrived, count)


def _told(group: dist.ProcessGroup, value: T) -> list[T]:
    """What each rank says, in order of rank; all come here before one goes on."""
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, value, group)
    return said


def _allocated(*shape: int, dtype: torch.dtype, device: torch.device, num_ranks: int) -> Tensor | None:
    """This rank's, on a GPU."""
    if device.type != "cuda":
        return None
    if num_ranks == 1:
        return torch.empty(shape, dtype=dtype, device=device)
    # Nothing here goes through the switch's multicast, and setting that up fails on hosts whose fabric is shared.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric  # CUDA's alone

    return symmetric.empty(*shape, dtype=dtype, device=device)


def _shared(group: dist.ProcessGroup, own: Tensor | None, *shape: int, dtype: torch.dtype) -> PeerMemory:
    rank, num_ranks = group.rank(), group.size()
    if own is None:
        tensors = _mapped(group, *shape, dtype=dtype)
        return PeerMemory(tensors[rank], tensors)
    if num_ranks == 1:
        return PeerMemory(own, [own])
    import torch.distributed._symmetric_memory as symmetric

    met = symmetric.rendezvous(own, group)
    tensors = [own if other == rank else met.get_buffer(other, shape, dtype) for other in range(num_ranks)]
    return PeerMemory(own, tensors, met)


def _mapped(group: dist.ProcessGroup, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Each rank's file, in all processes; the files have no names any more when this returns."""
    size = torch.Size(shape).numel()
    with tempfile.TemporaryDirectory() as folder:
        names = _told(group, str(Path(folder, "memory")))
        own = torch.from_file(names[group.rank()], shared=True, size=size, dtype=dtype)
        _told(group, None)
        tensors = [
            own if rank == group.rank() else torch.from_file(name, shared=True, size=size, dtype=dtype)
            for rank, name in enumerate(names)
        ]
        _told(group, None)
    return [tensor.view(shape) for tensor in tensors]
