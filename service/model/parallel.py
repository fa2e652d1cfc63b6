"""Intra-layer model parallelism: one model over several ranks, each a process with a device.

As Megatron-LM does it (Shoeybi et al., arXiv 1909.08053, section 3): the first matrix of a block is split by columns
and the second by rows, so that a block ends in one sum over the ranks; attention by heads; the vocabulary by rows.
Each rank gathers all logits, in order of rank, and so samples the same tokens. Made by
engine/loading.py.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from service.model.config import ModelConfig
from service.model.formats import Format, Linear, Product
from service.model.gpt2 import GPT2
from service.model.peers import Peers, make_peers
from service.model.split import SPLIT_AT, end_of, vocabulary_rows, what_does_not_split

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class ParallelError(ValueError):
    """The model does not split over so many ranks, or not with the other settings."""


def check_split(config: ModelConfig, num_ranks: int) -> None:
    """Raises ParallelError."""
    if (what := what_does_not_split(config, num_ranks)) is not None:
        raise ParallelError(f"tensor_parallel_size: {what}")


def part_of(name: str, tensor: Tensor, config: ModelConfig, *, rank: int, num_ranks: int) -> Tensor:
    """What `rank` has of the canonical tensor `name` (checkpoint/hub.py). A view, but for qkv and the last rows.

    Of qkv it has the queries, keys and values of its heads. What is not split (norms, the biases of what is split by
    rows, positions) each rank has whole. The vocabulary is padded to a multiple of 128 rows a rank, with zeros.
    """
    end = end_of(name)
    if end.startswith("qkv."):
        return tensor.view(3, num_ranks, -1, *tensor.shape[1:])[:, rank].flatten(0, 1)
    if end in ("token_embedding.weight", "head.weight"):
        num_rows = vocabulary_rows(config, num_ranks)
        rows = tensor[rank * num_rows : (rank + 1) * num_rows]
        return F.pad(rows, (0, 0, 0, num_rows - len(rows)))
    return tensor.chunk(num_ranks, SPLIT_AT[end])[rank] if end in SPLIT_AT else tensor


class Group:
    """A model's ranks. All of them call each method at the same time."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = group.rank()
        self.num_ranks = group.size()

    def sum(self, tensor: Tensor) -> None:
        """Make it the sum of all ranks' tensors."""
        dist.all_reduce(tensor, group=self._group)

    def gather(self, part: Tensor) -> Tensor:
        """[ranks, ...] of each rank's part."""
        whole = part.new_empty(self.num_ranks * len(part), *part.shape[1:])
        _gather(whole, part, group=self._group)
        return whole.view(self.num_ranks, *part.shape)

    def peers(self, **sizes: Any) -> Peers | None:
        """As `make_peers` says."""
        return make_peers(self._group, **sizes)

    def least(self, number: int, device: torch.device) -> int:
        """The least of the ranks' numbers."""
        tensor = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)
        return int(tensor)


@dataclass(frozen=True, slots=True)
class Summed:
    """A product split by rows: each rank's is a part of the sum, in fp32."""

    product: Product
    bias: Tensor
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x).float()
        self.group.sum(y)
        return y + self.bias.float()


def plain(product: Product) -> tuple[Linear, Tensor]:
    """The weight, of this rank, and the bias of what is in the format Plain, or Narrowed."""
    inner = product.product if isinstance(product, Summed) else product
    assert isinstance(inner, Linear)
    bias = product.bias if isinstance(product, Summed) else inner.bias
    assert bias is not None
    return inner, bias


class ParallelGPT2(GPT2):
    """One rank's part of a model: takes the same batches and gives the same logits as the others."""

    def __init__(
        self, config: ModelConfig, state: MutableMapping[str, Tensor], group: Group, format: Format | None = None
    ) -> None:
        """`state` has this rank's parts."""
        self.group = group
        super().__init__(config, state, format)
        self.first_id = group.rank * len(self.token_embedding)
        self.peers: Peers | None = None  # see `connect`

    def connect(self, *, most_rows: int, most_logits: int) -> bool:
        """Have `peers`, without which no kernels run, for steps of so many tokens that ask for so many rows of logits.

        All ranks call it at the same time. Whether the devices reach each other's memory.
        """
        columns = vocabulary_rows(self.config, self.group.num_ranks)
        sizes = {"hidden": self.config.hidden_size, "columns": columns}
        self.peers = self.group.peers(**sizes, most_rows=most_rows, most_logits=most_logits, device=self.device)
        return self.peers is not None

    def product(self, name: str, weight: Tensor, bias: Tensor) -> Product:
        """What the layer's matrix of that canonical name does, on all ranks together where it is split by rows."""
        if SPLIT_AT[end_of(f"{name}.weight")] == 1:
            return Summed(self.format.linear(weight, None), bias, self.group)
        return super().product(name, weight, bias)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T, H] in fp32 of token ids [T]: the sum of what the ranks have, of which one has the row."""
        rows = token_ids - self.first_id
        elsewhere = (rows < 0) | (rows >= len(self.token_embedding))
        x = super().embed(rows.masked_fill(elsewhere, 0)).masked_fill(elsewhere[:, None], 0)
        self.group.sum(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] in fp32 for rows [R, H] of the residual stream, the same on every rank."""
        parts = self.group.gather(super().logits(hidden))
        return parts.transpose(0, 1).flatten(1)[:, : self.config.vocab_size]
