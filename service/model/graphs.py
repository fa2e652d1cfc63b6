"""The runner of an NVIDIA GPU: every step is a captured body of layers and a captured tail of sampling.

Bodies are captured by how many tokens they have room for, once for steps in which every sequence has one token that
the step before sampled, once for any mix; which token is whose, they read on the device. Called by the engine.
"""

import bisect
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver

from service.model.batch import NUM_TOP, Batch, StepOutput
from service.model.formats import Narrowed
from service.model.fused import FusedGPT2
from service.model.gpt2 import GPT2
from service.model.inputs import NUM_TURNS, AskedInputs, Shape, StepInputs
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Plan, Product
from service.model.kernels.plans import CHAINS, WIDES, head_for, plan_for
from service.model.logprobs import logprob_words, unpack_logprobs
from service.model.parallel import ParallelGPT2
from service.model.runner import to_host, translate
from service.model.tail import Tail

log = logging.getLogger(__name__)

_DECODE_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_MIXED_TOKENS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
_PLAIN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
_ASKED_ROWS = (8, 64, 256)  # few: they cost more anyway
_MOST_SCORED = 256  # prompt tokens whose logits stand in memory at once (200 KB each)
_WORDS = 1 + 2 * NUM_TOP

Replay = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _TailKind:
    """What a tail does beside sampling."""

    adjusted: bool
    logprobs: bool


_PLAIN = _TailKind(adjusted=False, logprobs=False)


@dataclass(frozen=True, slots=True)
class _Launched:
    tokens: np.ndarray  # all are filled once `wait` has returned
    logprobs: np.ndarray | None
    scores: np.ndarray | None
    wait: Callable[[], None]


def most_rows(max_num_seqs: int) -> int:
    """Whose logits stand in memory at once."""
    return max(max_num_seqs, _MOST_SCORED)


def _sizes(ladder: tuple[int, ...], most: int) -> list[int]:
    """The steps of a ladder below `most`, and `most`."""
    below = [size for size in ladder if size < most]
    top = ladder[-1]
    return [*below, *range(2 * top, most, top), most]


def decode_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[int]:
    """How many single tokens the bodies of steps without prompts are for.

    The most are rounded up to a size that CUDA kernels may be had for, which are for whole sizes.
    """
    assert max_num_seqs <= max_num_batched_tokens
    *below, most = _sizes(_DECODE_TOKENS, max_num_seqs)
    top = next((size for size in (*CHAINS, *WIDES) if size >= most), most)
    return [*below, top if top <= max_num_batched_tokens else most]


class GraphRunner:
    """Computes batches of at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens."""

    def __init__(
        self,
        model: GPT2,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        cuda: CudaKernels | None = None,
    ) -> None:
        """Steps can be launched once `capture` has been called. `cuda` as in FusedGPT2, and for heads."""
        config, device = model.config, model.device
        self.num_blocks = num_blocks
        self.depth = 1
        self.model = model
        self._split = isinstance(model, ParallelGPT2)
        self._device = device
        self._block_size = block_size
        self._shared_memory = 2**20
        if device.type == "cuda":
            self._shared_memory = driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
        pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        cache = model.new_cache(num_blocks=num_blocks + 1, block_size=block_size)  # the last for what fills buckets up
        max_tokens, max_rows = max_num_batched_tokens, most_rows(max_num_seqs)
        decodes = [Shape(size, size) for size in decode_sizes(max_num_seqs, max_num_batched_tokens)]
        self._fused = FusedGPT2(model, cache, max_tokens=max_tokens, block_size=block_size, pdl=pdl, cuda=cuda)
        mixed = [
            Shape(size, min(size, max_num_seqs), self._plan(size).prefill.block_t)
            for size in _sizes(_MIXED_TOKENS, max_num_batched_tokens)
        ]
        self._inputs = StepInputs(
            [*decodes, *mixed],
            max_rows=max_rows,
            table_width=-(-config.context_length // block_size),
            no_slot=num_blocks * block_size,
            device=device,
        )
        heads = None if cuda is None else cuda.heads
        self._tail = Tail(model, max_rows=max_rows, turn=self._inputs.turn, num_turns=NUM_TURNS, pdl=pdl, heads=heads)
        self._turn = 0  # of the next step, as `turn` on the device
        self._asked = AskedInputs(
            max_rows=max_num_seqs, vocab_size=config.vocab_size, context_length=config.context_length, device=device
        )
        self._scored = torch.zeros(2, max_tokens, dtype=torch.int64, device=device)  # indices, targets
        self._slice = torch.zeros(2, _MOST_SCORED, dtype=torch.int64, device=device)
        self._words = torch.zeros(max_rows, _WORDS, dtype=torch.int32, device=device)
        self._score_words = torch.zeros(max_tokens, _WORDS, dtype=torch.int32, device=device)
        self._results = self._tail.results.numpy()
        self._launched: deque[_Launched] = deque()
        self._decodes, self._mixed = decodes, mixed
        self._rows = {
            kind: _sizes(_ASKED_ROWS if kind.adjusted or kind.logprobs else _PLAIN_ROWS, max_num_seqs)
            for kind in (_TailKind(adjusted, logprobs) for adjusted in (False, True) for logprobs in (False, True))
        }
        self._bodies: dict[Shape, Replay] = {}
        self._tails: dict[tuple[_TailKind, int], Replay] = {}
        self._steps: dict[Shape, Replay] = {}  # body and plain tail in one: what nearly every step is

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Start computing `batch`."""
        try:
            self._launched.append(self._launch(batch))
        except RuntimeError as error:
            raise translate(error) from error

    def collect(self) -> StepOutput:
        """The results of the oldest launched batch; if that raises, everything launched is gone."""
        launched = self._launched.popleft()
        try:
            launched.wait()
        except RuntimeError as error:
            self._launched.clear()
            raise translate(error) from error
        return StepOutput(
            launched.tokens.copy(),
            logprobs=None if launched.logprobs is None else unpack_logprobs(launched.logprobs),
            scores=None if launched.scores is None else unpack_logprobs(launched.scores),
        )

    def close(self) -> None:
        vars(self).clear()  # graphs and buffers are all there is

    # A step

    def _launch(self, batch: Batch) -> _Launched:
        num_tokens, num_rows = len(batch.token_ids), len(batch.sampling)
        single = self._single_tokens(batch)
        shapes = self._decodes if single else self._mixed
        shape = shapes[bisect.bisect_left(shapes, num_tokens, key=lambda shape: shape.num_tokens)]
        adjusted = batch.masks is not None or batch.biases is not None or batch.histories is not None
        kind = _TailKind(adjusted, batch.logprobs)
        rows = 0
        if num_rows:
            sizes = self._rows[kind]
            rows = sizes[bisect.bisect_left(sizes, num_rows)]
        whole = single and kind == _PLAIN and num_rows == num_tokens and batch.scored is None
        rows = shape.num_tokens if whole else rows
        self._inputs.stage(batch, shape, num_rows=rows, turn=self._turn)
        turn = self._turn
        if whole:
            self._steps[shape]()
        else:
            self._bodies[shape]()
        self._turn = (turn + 1) % NUM_TURNS  # as the device counts, also where what follows raises
        scores = words = None
        if batch.scored is not None:
            scores = self._score(batch.scored.indices, batch.scored.targets)
        if num_rows and not whole:
            if adjusted:
                self._asked.upload(batch, num_rows=rows, turn=turn)
            self._tails[kind, rows]()
            if batch.logprobs:
                words = to_host(self._words[:num_rows]).numpy()
        return _Launched(self._results[self._turn, :num_rows], words, scores, self._queued())

    def _single_tokens(self, batch: Batch) -> bool:
        """Whether each sequence has one token, and none attends to another's: bodies of such steps read keys early."""
        if batch.num_decodes < len(batch.token_ids):
            return False
        # Shared are full blocks of tokens that the host knows. Tables are filled up by 0: that errs to the safe side.
        size = self._block_size
        known = batch.slots[batch.token_sources < 0]
        shared = known[known % size == size - 1] // size
        return not len(shared) or np.isin(batch.block_tables, shared).sum() == len(shared)  # each in its own table

    def _queued(self) -> Callable[[], None]:
        """Returns once what is queued so far is done."""
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def _score(self, indices: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Words of model/logprobs.py for the targets, in slices."""
        count = len(indices)
        both = torch.from_numpy(np.stack((indices, targets)).astype(np.int64))
        both = both.pin_memory() if self._device.type == "cuda" else both
        self._scored[:, :count].copy_(both, non_blocking=True)
        for start in range(0, count, _MOST_SCORED):
            size = min(_MOST_SCORED, count - start)
            self._slice[:, :size] = self._scored[:, start : start + size]
            self._scorer()
            self._score_words[start : start + size] = self._words[:size]
        return to_host(self._score_words[:count]).numpy()

    # What is captured

    def _plan(self, num_tokens: int, *, decodes_only: bool = False) -> Plan:
        return plan_for(
            num_tokens,
            dtype=self.model.dtype,
            narrow=isinstance(self.model.format, Narrowed),
            decodes_only=decodes_only,
            split=self._split,
            head_size=self.model.config.head_size,
            shared_memory=self._shared_memory,
        )

    def _head(self, num_rows: int) -> Product:
        return head_for(
            num_rows,
            dtype=self.model.dtype,
            narrow=isinstance(self.model.format, Narrowed),
            shared_memory=self._shared_memory,
        )

    def _body(self, shape: Shape) -> None:
        plan = self._plan(shape.num_tokens, decodes_only=not shape.tile)
        self._inputs.fetch(shape)
        self._fused.body(self._inputs.step(shape), self._tail.sampled, plan)

    def _sample(self, kind: _TailKind, num_rows: int, *, normed: Tensor | None = None) -> None:
        rows = self._inputs.rows(num_rows)
        head = self._head(num_rows)
        logits = self._tail.logits(self._fused.x, rows, head, normed=normed)
        if kind.adjusted:
            adjusted = self._tail.adjust(logits, rows, self._asked.tensors(), self._fused.resolved)
            self._tail.sample(adjusted, rows, head=None, adjusted=True)
            self._tail.drop_wrong(num_rows)
        else:
            self._tail.sample(logits, rows, head=head)
        if kind.logprobs:
            self._words[:num_rows] = logprob_words(logits, self._tail.sampled[:num_rows].long())

    def _step(self, shape: Shape) -> None:
        """Every token is sampled from, so that its row of the last norm is what the head wants."""
        self._body(shape)
        self._sample(_PLAIN, shape.num_tokens, normed=self._fused.normed)

    def _score_slice(self) -> None:
        head = self._head(_MOST_SCORED)
        rows = replace(self._inputs.rows(_MOST_SCORED), indices=self._slice[0].int())
        logits = self._tail.logits(self._fused.x, rows, head)
        self._words[:_MOST_SCORED] = logprob_words(logits, self._slice[1])

    @torch.inference_mode()
    def run_largest(self) -> None:
        """What takes the most memory, uncaptured."""
        self._body(self._mixed[-1])
        for kind, sizes in self._rows.items():
            self._sample(kind, sizes[-1])
        self._score_slice()
        self._queued()()

    @torch.inference_mode()
    def capture(self, on_capture: Callable[[float], None] = lambda _: None) -> None:
        """Capture all graphs; `on_capture` hears how many of them are, from 0 to 1. Raises what the device raises.

        The largest first: what the smaller need then lies in the memory of these.
        """
        tails = [(kind, size) for kind, sizes in self._rows.items() for size in reversed(sizes)]
        shapes = [*reversed(self._mixed), *reversed(self._decodes)]
        total, done = len(shapes) + len(tails) + len(self._decodes) + 1, 0
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

        def captured(work: Replay) -> Replay:
            nonlocal done
            done += 1
            on_capture(done / total)
            return work if pool is None else _captured(work, pool)

        for shape in shapes:
            self._bodies[shape] = captured(partial(self._body, shape))
        for kind, size in tails:
            self._tails[kind, size] = captured(partial(self._sample, kind, size))
        for shape in reversed(self._decodes):
            self._steps[shape] = captured(partial(self._step, shape))
        self._scorer = captured(self._score_slice)
        self._inputs.turn.fill_(self._turn)
        log.info("captured %d graphs", total)


def _captured(work: Replay, pool: Any) -> Replay:
    work()  # kernels are compiled and loaded by their first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay
