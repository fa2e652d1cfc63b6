"""From the residual stream to tokens: final norm, head, sampling, log-probabilities. Called by model/graphs.py."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.batch import SAMPLING_WORDS
from service.model.gpt2 import GPT2, whole_tiles
from service.model.kernels import adjusting, norms, peers, products, sampling
from service.model.kernels.cuda.chain import packed
from service.model.kernels.cuda.head import CHUNK, HeadKernel
from service.model.kernels.plan import Product, Vector, power_of_two
from service.model.matrix import Matrix
from service.model.parallel import ParallelGPT2
from service.model.peers import Peers

_CHUNK = 2048  # logits of a row that one program scans
_SENT = 2048  # that one program puts into the other ranks' memory
_BLOCK = 8192  # that one program reads at once of a row that has filters
_FEW_ROWS = 16  # up to which a row's programs get more warps


@dataclass(frozen=True, slots=True)
class AskedTensors:
    """What adjusts the rows that ask for it, on the device: int32 but for `bias_values`. See kernels/adjusting.py."""

    mask_rows: Tensor
    masks: Tensor
    history_starts: Tensor
    history: Tensor
    bias_starts: Tensor
    bias_ids: Tensor
    bias_values: Tensor  # fp32


@dataclass(frozen=True, slots=True)
class RowTensors:
    """What a tail of R rows reads, on the device: int32, at addresses that a graph may keep."""

    indices: Tensor  # [R] which of the step's tokens
    positions: Tensor  # [R]
    records: Tensor  # [R, words of SAMPLING]


class Tail:
    """The head of `model` over buffers for `max_rows` rows; the tokens stay in `sampled`, -1 where there is none."""

    def __init__(
        self,
        model: GPT2,
        *,
        max_rows: int,
        turn: Tensor,
        num_turns: int,
        pdl: bool,
        heads: Mapping[int, HeadKernel] | None = None,
    ) -> None:
        """`turn` [1] counts steps, modulo `num_turns`. `heads` were made for `model`, by how many rows they are for."""
        self._model = model
        self._chain = {"PDL": pdl, "launch_pdl": pdl}
        config, device = model.config, model.device
        assert model.padded_head is not None
        # [V', H]; only on a CPU, where only tests come here, not so already
        head, narrow = whole_tiles(model.padded_head.weight), model.padded_head.narrow
        bias = torch.zeros(len(head), dtype=model.dtype, device=device)
        self._head = Matrix(head, bias, narrow=narrow, activation="relu", norm=model.final_norm)
        self._normed = torch.zeros(max_rows, config.hidden_size, dtype=model.dtype, device=device)
        self._peers = model.peers if isinstance(model, ParallelGPT2) else None
        assert self._peers is None or max_rows <= len(self._peers.logits.own)
        self._own = torch.zeros(max_rows, len(head), dtype=torch.float32, device=device)  # this rank's
        self._logits = self._own if self._peers is None else self._peers.logits.own
        self._adjusted = torch.zeros_like(self._logits)
        self._finite = torch.ones(max_rows, dtype=torch.int32, device=device)
        # In place of whatever product is asked for; they read tiles.
        self._heads = {num: kernel for num, kernel in (heads or {}).items() if num <= max_rows}
        assert self._peers is None or not self._heads
        self._packed = packed(head) if self._heads else head
        # Of each chunk of a row's logits: the largest, its id, what it weighs. A lone row may have small chunks.
        size = max(max_rows * -(-config.vocab_size // _CHUNK), len(head))
        size = max(size, max(self._heads, default=0) * -(-config.vocab_size // CHUNK))
        self._scanned = tuple(
            torch.zeros(size, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32, torch.float32)
        )
        self._turn = turn
        # The same tokens on the host, a row a turn, there when the step is done.
        self.results = torch.zeros(num_turns, max_rows, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def logits(self, x: Tensor, rows: RowTensors, head: Product, *, normed: Tensor | None = None) -> Tensor:
        """fp32 [R, V] of the rows' tokens in the residual stream x, scanned where `_chunk` says so.

        `normed` [T, H] is the final norm of x, where it is there and the rows are the step's tokens in their order:
        then the layers have just made it, and nothing else has been gathered since.
        """
        config, num_rows = self._model.config, len(rows.indices)
        hidden, norm = config.hidden_size, self._model.final_norm
        if num_rows in self._heads:
            if num_rows > 1:
                x = self._norm(x, rows) if normed is None else normed
            self._heads[num_rows](
                x,
                rows.indices,
                norm,
                self._packed,
                self._logits,
                rows.records,
                rows.positions,
                self._scanned,
                end_of_text_id=config.end_of_text_id,
                pdl=self._chain["PDL"],
            )
        elif isinstance(head, Vector) and self._peers is None:
            size = len(self._head.weight)
            products.vector_logits[(size // head.block_n,)](
                x,
                rows.indices,
                *self._head.rows,
                self._head.folded_bias,
                self._head.scaled,
                norm.weight,
                self._logits,
                rows.records,
                rows.positions,
                *self._scanned,
                config.end_of_text_id,
                norm.epsilon,
                K=hidden,
                N=size,
                V=config.vocab_size,
                BLOCK_N=head.block_n,
                WIDTH=power_of_two(hidden),
                num_warps=head.warps,
                **self._chain,
            )
        else:
            follows = normed is not None
            if normed is None:
                normed = self._norm(x, rows)
            self._head.product(head, normed, self._own, num_tokens=num_rows, pdl=self._chain["PDL"])
            if self._peers is not None:
                self._gather(self._peers, num_rows, follows=follows)
        return self._logits[:num_rows, : config.vocab_size]

    def _norm(self, x: Tensor, rows: RowTensors) -> Tensor:
        """The final norm [R, H] of the rows' tokens, in a buffer that may be longer."""
        norm, hidden = self._model.final_norm, self._model.config.hidden_size
        norms.gather_and_norm[(len(rows.indices),)](
            x,
            rows.indices,
            norm.weight,
            norm.bias,
            self._normed,
            norm.epsilon,
            H=hidden,
            WIDTH=power_of_two(hidden),
            **self._chain,
        )
        return self._normed

    def _chunk(self, head: Product, num_rows: int) -> int | None:
        """Ids of which it takes a first look at once as it makes their logits, if it has all of a row's."""
        if num_rows in self._heads:
            return CHUNK
        return head.block_n if isinstance(head, Vector) and self._peers is None else None

    def _gather(self, ranks: Peers, num_rows: int, *, follows: bool) -> None:
        """Put the rows of `_own` into the logits of all ranks, and wait for theirs.

        No rank may put a row where another still reads the one before. One that is past a sum of the layers knows that
        the others have come to that, and have read by then; where no layers have run since, a barrier says so.
        """

        def barrier() -> None:
            peers.barrier[(1,)](
                ranks.arrivals(),
                ranks.arrived.own,
                ranks.count,
                RANKS=ranks.num_ranks,
                STRIDE=ranks.arrived.own.shape[1],
                num_warps=1,
                **self._chain,
            )

        if not follows:
            barrier()
        size = len(self._head.weight)
        peers.put_logits[(-(-size // _SENT), num_rows)](
            self._own, ranks.columns(), N=size, RANKS=ranks.num_ranks, BLOCK=_SENT, **self._chain
        )
        barrier()

    def sample(self, logits: Tensor, rows: RowTensors, *, head: Product | None, adjusted: bool = False) -> None:
        """`sampled` from logits [R, V], which `head` made, or where it is None, something else made of them.

        The rows of `logits` are as far apart as in the buffer; `adjusted`: some are -inf.
        """
        config, num_rows = self._model.config, len(rows.indices)
        scanned = None if head is None else self._chunk(head, num_rows)
        chunk = scanned or _CHUNK
        num_chunks = -(-config.vocab_size // chunk)
        shape = {
            "V": config.vocab_size,
            "STRIDE": logits.stride(0),
            "CHUNKS": num_chunks,
            "CHUNK": chunk,
            "WORDS": SAMPLING_WORDS,
            **self._chain,
        }
        if scanned is None:
            sampling.scan_logits[(num_chunks, num_rows)](
                logits,
                rows.records,
                rows.positions,
                *self._scanned,
                config.end_of_text_id,
                **shape,
                ADJUSTED=adjusted,
            )
        sampling.pick_tokens[(num_rows,)](
            logits,
            rows.records,
            rows.positions,
            *self._scanned,
            self.sampled,
            self.results,
            self._turn,
            config.end_of_text_id,
            **shape,
            MOST_ROWS=self.results.shape[1],
            CHUNKS_WIDTH=power_of_two(num_chunks),
            PIECE=_CHUNK,
            PIECES=power_of_two(-(-config.vocab_size // _CHUNK)),
            BLOCK=_BLOCK,
            num_warps=16 if num_rows <= _FEW_ROWS else 8,
        )

    def adjust(self, logits: Tensor, rows: RowTensors, asked: AskedTensors, resolved: Tensor) -> Tensor:
        """Logits [R, V] with the penalties, biases and masks of `asked`; `resolved` [T] are the step's token ids."""
        config, num_rows = self._model.config, len(rows.indices)
        adjusted = self._adjusted[:num_rows, : config.vocab_size]
        adjusting.adjust_logits[(num_rows,)](
            logits,
            adjusted,
            rows.records,
            rows.positions,
            rows.indices,
            resolved,
            asked.mask_rows,
            asked.masks,
            asked.history_starts,
            asked.history,
            asked.bias_starts,
            asked.bias_ids,
            asked.bias_values,
            self._finite,
            V=config.vocab_size,
            STRIDE=logits.stride(0),
            WORDS=SAMPLING_WORDS,
            BLOCK=_BLOCK // 4,
            HISTORY=power_of_two(config.context_length),
            COMPARED=16,
            BIASES=128,
            num_warps=8,
            **self._chain,
        )
        return adjusted

    def drop_wrong(self, num_rows: int) -> None:
        """No token for a row whose logits were not all finite before `adjust`."""
        adjusting.drop_wrong[(-(-num_rows // 128),)](
            self.sampled,
            self.results,
            self._turn,
            self._finite,
            num_rows,
            MOST_ROWS=self.results.shape[1],
            BLOCK=128,
            **self._chain,
        )
