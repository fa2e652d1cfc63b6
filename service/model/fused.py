"""GPT-2 as chains of kernels over static buffers, to be captured in CUDA graphs. Called by model/graphs.py."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.model.attention import KVCache, LayerCache
from service.model.chained import Buffers, ChainedLayers, chained_layers
from service.model.formats import Product
from service.model.gpt2 import GPT2, LayerNorm
from service.model.kernels import attention, norms, peers
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Library, Plan, power_of_two, whole_tile
from service.model.kernels.products import ACTIVATE, MERGE, NORM, PARTIAL, RESIDUAL, SCATTER
from service.model.matrix import Matrix
from service.model.parallel import ParallelGPT2, plain
from service.model.peers import EMBEDDING

_MOST_PARTS = 2048  # rows of split sums: tokens times splits
_PREFILL_PROGRAMS = 528  # four for each of an H100's multiprocessors


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What one body of T tokens reads, on the device: int32, at addresses that a graph may keep."""

    token_ids: Tensor  # [T]
    sources: Tensor  # [T] row of `sampled`, or -1
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    tables: Tensor  # [S, width]
    lengths: Tensor  # [S]
    num_decodes: Tensor  # [1]
    turn: Tensor  # [1]: the body counts it on, modulo `num_turns`
    num_turns: int
    query_starts: Tensor | None = None  # [S + 1]; None where every sequence has one token
    tile_sequences: Tensor | None = None  # [tiles]
    tile_starts: Tensor | None = None
    num_tiles: Tensor | None = None  # [1]


class FusedGPT2:
    """The layers of `model` over buffers for `max_tokens` tokens.

    The residual stream stays in `x`; unless the plan is fused, its final norm in `normed`.
    """

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        *,
        max_tokens: int,
        block_size: int,
        pdl: bool,
        cuda: CudaKernels | None = None,
    ) -> None:
        """`pdl`: launch by programmatic dependent launch, which the device must know (sm_90).

        `cuda`, made for this model and `block_size`, is for plans that have a chain, or attention in CUDA.
        """
        config = model.config
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._pdl = pdl
        self._width = power_of_two(config.hidden_size)
        self._dim = whole_tile(config.head_size)
        self._peers = model.peers if isinstance(model, ParallelGPT2) else None
        if isinstance(model, ParallelGPT2):
            assert model.peers is not None, "`connect` comes first"
            assert max_tokens <= model.peers.most_rows
        self._sum_programs = peers.MOST_PROGRAMS
        if self._peers is not None and model.device.type == "cuda":  # one each has room, whatever else is there
            found = torch.cuda.get_device_properties(model.device).multi_processor_count
            self._sum_programs = min(self._sum_programs, found)

        def matrix(product: Product, norm: LayerNorm | None = None) -> Matrix:
            linear, bias = plain(product)
            return Matrix(linear.weight, bias, narrow=linear.narrow, activation=config.activation, norm=norm)

        self._layers = [
            (
                matrix(layer.qkv, layer.attention_norm),
                matrix(layer.attention_output),
                matrix(layer.up, layer.mlp_norm),
                matrix(layer.down),
            )
            for layer in model.layers
        ]
        hidden, attention = config.hidden_size, model.attention_width
        served: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        single: dict[str, Any] = {"dtype": torch.float32, "device": model.device}
        self.x = torch.zeros(max_tokens, hidden, **single)
        self.resolved = torch.zeros(max_tokens, dtype=torch.int32, device=model.device)  # token ids of the step
        self.normed = torch.zeros(max_tokens, hidden, **served)
        self._q = torch.zeros(max_tokens, attention, **served)
        self._qkv = torch.zeros(max_tokens, 3 * attention, **served)
        self._mixed = torch.zeros(max_tokens, attention, **served)
        self._inner = torch.zeros(max_tokens, len(plain(model.layers[0].up)[1]), **served)
        # Of split contexts and split products; a step that splits is a small one.
        self._most_parts = max(max_tokens, _MOST_PARTS)
        self._parts = torch.zeros(self._most_parts * hidden, **single)
        self._stats = torch.zeros(_MOST_PARTS * 2 * hidden, **single)
        buffers = Buffers(self.x, self._q, self._mixed, self._inner, self.normed, self._parts)
        cuda = cuda or CudaKernels()
        self._chained = chained_layers(model, cache, self._layers, cuda.chains, buffers)
        self._decode = cuda.decode
        self._arrived = torch.zeros(max_tokens, attention // config.head_size, dtype=torch.int32, device=model.device)

    def body(self, step: StepTensors, sampled: Tensor, plan: Plan) -> None:
        """The layers, from `step` to `x` [T, H]; fills the cache. `sampled` [R] has the samples of the step before."""
        model, config = self._model, self._model.config
        num_tokens = len(step.token_ids)
        chained = None if plan.chain is None else self._chained.get(num_tokens)
        if plan.chain is not None and chained is not None:
            plan = replace(plan, pdl=plan.chain.pdl)
        chain = self._chain(plan)
        splits = (
            plan.out.splits,
            plan.down.splits,
            plan.decode.splits,
            plan.decode.cuda.splits if plan.decode.cuda else 1,
        )
        assert num_tokens * max(*splits, chained.left[0] if chained is not None else 0) <= self._most_parts
        norms.embed[(num_tokens,)](
            step.token_ids,
            step.sources,
            sampled,
            step.positions,
            model.token_embedding,
            model.position_embedding,
            model.first_id,
            step.turn,
            self.resolved,
            self.x,
            ROWS=len(model.token_embedding),
            PLACED=model.first_id == 0,  # by one of several ranks
            H=config.hidden_size,
            WIDTH=self._width,
            TURNS=step.num_turns,
            PDL=chain["PDL"],  # but launched when what wrote `step` is done: kernels to come read it early
        )
        if chained is not None:
            self._run_chain(chained, step, plan)
            return
        if not plan.fused:
            self._add_and_norm(num_tokens, 0, None, model.layers[0].attention_norm, chain, buffer=EMBEDDING)
        for number in range(config.num_layers):
            layer = self._cache.layer(number)
            scale = model.attention_scale(number)
            if plan.fused:
                self._fused_layer(number, layer, scale, step, plan)
            else:
                self._split_layer(number, layer, scale, step, plan)

    def _run_chain(self, chained: ChainedLayers, step: StepTensors, plan: Plan) -> None:
        chain = self._chain(plan)
        chained.run(**self._chain_inputs(step, plan), pdl=chain["PDL"])
        if not plan.fused:
            self._add_and_norm(len(step.token_ids), *chained.left, self._model.final_norm, chain, buffer=0)

    def _chain_inputs(self, step: StepTensors, plan: Plan) -> dict[str, Any]:
        def attend(number: int) -> None:
            self._attend(self._cache.layer(number), self._model.attention_scale(number), step, plan, whole=False)

        def norm(splits: int, bias: Tensor | None, of: LayerNorm) -> None:
            self._add_and_norm(len(step.token_ids), splits, bias, of, self._chain(plan), buffer=0)

        return {
            "slots": step.slots,
            "tables": step.tables,
            "lengths": step.lengths,
            "num": step.num_decodes,
            "attend": attend,
            "norm": norm,
        }

    def _chain(self, plan: Plan) -> dict[str, bool]:
        pdl = self._pdl and plan.pdl
        return {"PDL": pdl, "launch_pdl": pdl}

    def _fused_layer(self, number: int, cache: LayerCache, scale: float, step: StepTensors, plan: Plan) -> None:
        qkv, out, up, down = self._layers[number]
        size: dict[str, Any] = {"num_tokens": len(step.token_ids), "pdl": self._pdl and plan.pdl}
        norm, residual = NORM.value, RESIDUAL.value
        qkv.product(plan.qkv, self.x, self._q, read=norm, put=SCATTER.value, cache=cache, slots=step.slots, **size)
        self._attend(cache, scale, step, plan, whole=False)
        if plan.decode.merged or plan.decode.splits == 1:
            out.product(plan.out, self._mixed, self.x, put=residual, **size)
        else:
            merge: dict[str, Any] = {"splits": plan.decode.splits, "stats": self._stats}
            out.product(plan.out, self._parts, self.x, read=MERGE.value, put=residual, **merge, **size)
        up.product(plan.up, self.x, self._inner, read=norm, put=ACTIVATE.value, **size)
        down.product(plan.down, self._inner, self.x, put=residual, **size)

    def _split_layer(self, number: int, cache: LayerCache, scale: float, step: StepTensors, plan: Plan) -> None:
        qkv, out, up, down = self._layers[number]
        num_tokens = len(step.token_ids)
        size: dict[str, Any] = {"num_tokens": num_tokens, "pdl": self._pdl and plan.pdl}
        chain = self._chain(plan)
        layers = self._model.layers
        whole = isinstance(plan.qkv, Library) and step.query_starts is None
        if isinstance(plan.qkv, Library):
            qkv.product(plan.qkv, self.normed, self._qkv, **size)
            if not whole:
                norms.write_kv[(num_tokens,)](
                    self._qkv,
                    self._q,
                    cache.keys,
                    cache.values,
                    step.slots,
                    H=self._model.attention_width,
                    WIDTH=power_of_two(self._model.attention_width),
                    **chain,
                )
        else:
            qkv.product(plan.qkv, self.normed, self._q, put=SCATTER.value, cache=cache, slots=step.slots, **size)
        self._attend(cache, scale, step, plan, whole=whole)
        out.product(plan.out, self._mixed, self._parts, put=PARTIAL.value, **size)
        self._add_and_norm(num_tokens, plan.out.splits, out.bias, layers[number].mlp_norm, chain, buffer=0)
        up.product(plan.up, self.normed, self._inner, put=ACTIVATE.value, **size)
        down.product(plan.down, self._inner, self._parts, put=PARTIAL.value, **size)
        following = layers[number + 1].attention_norm if number + 1 < len(layers) else self._model.final_norm
        self._add_and_norm(num_tokens, plan.down.splits, down.bias, following, chain, buffer=1)

    def _add_and_norm(
        self,
        num_tokens: int,
        splits: int,
        bias: Tensor | None,
        norm: LayerNorm,
        chain: dict[str, bool],
        *,
        buffer: int,
    ) -> None:
        """Add the parts of a product, or nothing, to `x`, which is summed over the ranks if there are several."""
        hidden = self._model.config.hidden_size
        summed = (norm.bias if bias is None else bias, norm.weight, norm.bias, self.normed, num_tokens, norm.epsilon)
        shape: dict[str, Any] = {"H": hidden, "WIDTH": self._width, "SPLITS": splits, **chain}
        if self._peers is not None:
            received, num_ranks = self._peers.received.own[buffer], self._peers.num_ranks
            peers.sum_and_norm[(min(num_tokens, self._sum_programs),)](
                self.x,
                self._parts,
                self._peers.places(buffer),
                received,
                *summed,
                **shape,
                RANKS=num_ranks,
                MOST_ROWS=received.shape[1],
            )
            return
        norms.add_and_norm[(num_tokens,)](self.x, self._parts, *summed, **shape, num_warps=8)

    def _attend(self, cache: LayerCache, scale: float, step: StepTensors, plan: Plan, *, whole: bool) -> None:
        """From `_q` to `_mixed`; `whole`: from `_qkv`, whose keys and values it puts into the cache."""
        config, width = self._model.config, self._model.attention_width
        num_heads = width // config.head_size
        shape = {
            "H": width,
            "HEAD": config.head_size,
            "DIM": self._dim,
            "TABLE": step.tables.shape[1],
            "BLOCK_SIZE": self._block_size,
            **self._chain(plan),
        }
        if step.query_starts is not None:
            assert plan.decode.merged, "prompts have no splits to merge"
            prefill = plan.prefill
            attention.prefill_attention[(min(_PREFILL_PROGRAMS, len(step.token_ids) * num_heads),)](
                self._q,
                cache.keys,
                cache.values,
                step.tables,
                step.lengths,
                step.query_starts,
                step.tile_sequences,
                step.tile_starts,
                step.num_tiles,
                self._mixed,
                scale,
                **shape,
                BLOCK_T=prefill.block_t,
                BLOCK=prefill.block,
                num_warps=prefill.warps,
                num_stages=prefill.stages,
            )
        splits = plan.decode.splits
        num_rows = min(len(step.token_ids), len(step.lengths))
        together = step.query_starts is not None
        stride = (3 if whole else 1) * width
        if self._decode is not None and plan.decode.cuda is not None:
            self._decode(
                plan.decode.cuda,
                (self._qkv if whole else self._q)[:num_rows],
                cache,
                step.tables,
                step.lengths,
                step.num_decodes,
                self._mixed,
                (self._parts, self._stats, self._arrived),
                scale=scale,
                stride=stride,
                together=together,
                pdl=self._pdl and plan.pdl,
            )
            return
        attention.decode_attention[(num_heads, num_rows, splits)](
            self._qkv if whole else self._q,
            cache.keys,
            cache.values,
            step.tables,
            step.lengths,
            step.num_decodes,
            self._mixed,
            self._parts,
            self._stats,
            self._arrived,
            scale,
            **shape,
            STRIDE=stride,
            BLOCK=plan.decode.block,
            SPLITS=splits,
            MERGED=plan.decode.merged,
            BESIDE=together,
            num_warps=plan.decode.warps,
        )
