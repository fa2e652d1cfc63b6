"""Compiles every kernel of the GPU path as the real code launches it, for a GPU that need not be there.

Run by test_compiling.py in a process of its own, where Triton's interpreter is off: `compiling.py 90 bfloat16 232448`
(bytes of shared memory that a program may have); `int8` and `fp8` are weights in that, the latter with keys and values
in fp8 too.
Prints a line for each compiled kernel: its name and the bytes of shared memory that a program takes.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.formats import Format, format_for
from service.model.gpt2 import GPT2
from service.model.graphs import GraphRunner
from service.model.parallel import ParallelGPT2, part_of
from service.model.peers import NUM_BUFFERS, PeerMemory, Peers
from service.model.split import vocabulary_rows

OTHER_HEADS = (128, 8, 4, 1)  # of 8, 128, 256 and 1024 each


class FakeDriver:
    """What a launch asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class FakeGroup:
    """What a rank's model knows of the others."""

    rank = 1

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def sum(self, tensor: torch.Tensor) -> None:
        """Nothing to compile."""


def part_345m(make: Callable[[str, tuple[int, ...]], torch.Tensor], num_ranks: int, weights: Format) -> ParallelGPT2:
    """A rank's part of one layer."""
    config = replace(CONFIG_345M, num_layers=1)
    state = {}

    def note(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        state[name] = part_of(name, make(name, shape), config, rank=1, num_ranks=num_ranks).contiguous()
        return make(name, shape)

    gpt2_345m(note, num_layers=1)
    model = ParallelGPT2(config, state, FakeGroup(num_ranks), weights)

    def memory(*shape: int, dtype: torch.dtype) -> PeerMemory:
        own = torch.empty(shape, dtype=dtype, device="meta")
        return PeerMemory(own, [own] * num_ranks)

    model.peers = Peers(
        1,
        num_ranks,
        memory(NUM_BUFFERS, num_ranks, 2048, config.hidden_size, dtype=torch.int32),
        memory(256, num_ranks * vocabulary_rows(config, num_ranks), dtype=torch.float32),
        memory(num_ranks, 4, dtype=torch.int32),
        torch.empty(1, dtype=torch.int32, device="meta"),
    )
    return model


def main() -> None:
    capability, name = int(sys.argv[1]), sys.argv[2]
    weights = format_for(name, torch.device("cuda"), kv_cache="fp8" if name == "fp8" else "auto")
    driver.set_active(FakeDriver(capability))
    launch = JITFunction.run
    compiled = set()

    wanted: set[str] = set()  # all, while it is empty

    def compile_only(self: JITFunction[Any], *args: object, **kwargs: Any) -> None:
        if wanted and self.__name__ not in wanted:
            return
        kernel = launch(self, *args, **kwargs | {"warmup": True})
        if kernel.hash not in compiled:
            compiled.add(kernel.hash)
            print(kernel.name, kernel.metadata.shared, flush=True)

    JITFunction.run = compile_only

    def make(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        """No numbers."""
        return torch.empty(shape, dtype=weights.dtype, device="meta")

    def make_runner(model: GPT2) -> GraphRunner:
        runner = GraphRunner(model, num_blocks=64, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048)
        runner._shared_memory = int(sys.argv[3])
        if capability >= 90:
            runner._fused._pdl = True
            runner._tail._chain = {"PDL": True, "launch_pdl": True}
        return runner

    def run_all(runner: GraphRunner) -> None:
        for shape in (*runner._decodes, *runner._mixed):
            runner._body(shape)
        for kind, sizes in runner._rows.items():
            for size in sizes:
                runner._sample(kind, size)
        runner._score_slice()

    run_all(make_runner(gpt2_345m(make, num_layers=1, weights=weights)))
    wanted = {"vector_product", "sum_and_norm", "put_logits", "barrier"}  # which alone know of ranks
    for num_ranks in (2, 8):
        run_all(make_runner(part_345m(make, num_ranks, weights)))
    wanted = {"decode_attention", "prefill_attention"}  # which alone know of heads
    for num_heads in OTHER_HEADS:
        runner = make_runner(gpt2_345m(make, num_layers=1, num_heads=num_heads, weights=weights))
        for shape in (runner._decodes[0], runner._decodes[-1], runner._mixed[0], runner._mixed[-1]):
            runner._body(shape)


if __name__ == "__main__":
    main()
