"""Compiles every kernel of the GPU path as the real code launches it, for a GPU that need not be there.

Run by test_compiling.py in a process of its own, where Triton's interpreter is off: `compiling.py 90 bfloat16 232448`
(bytes of shared memory that a program may have).
Prints a line for each compiled kernel: its name and the bytes of shared memory that a program takes.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.random_model import gpt2_345m
from service.model.graphs import GraphRunner

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


def main() -> None:
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
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

    def make_runner(num_heads: int) -> GraphRunner:
        """Shapes without numbers, in one layer."""
        model = gpt2_345m(
            lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), num_layers=1, num_heads=num_heads
        )
        runner = GraphRunner(model, num_blocks=64, block_size=16, max_num_seqs=256, max_num_batched_tokens=2048)
        runner._shared_memory = int(sys.argv[3])
        if capability >= 90:
            runner._fused._pdl = True
            runner._tail._chain = {"PDL": True, "launch_pdl": True}
        return runner

    runner = make_runner(16)
    for shape in (*runner._decodes, *runner._mixed):
        runner._body(shape)
    for kind, sizes in runner._rows.items():
        for size in sizes:
            runner._sample(kind, size)
    runner._score_slice()
    wanted = {"decode_attention", "prefill_attention"}  # which alone know of heads
    for num_heads in OTHER_HEADS:
        runner = make_runner(num_heads)
        for shape in (runner._decodes[0], runner._decodes[-1], runner._mixed[0], runner._mixed[-1]):
            runner._body(shape)


if __name__ == "__main__":
    main()
