"""A step that has single tokens and prompts: milliseconds in the bare runner, and what a prompt of 128 tokens adds.

python -m bench.mixed [--model FOLDER] [--steps 64@192,248@192] [--out FILE]
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.decode import BLOCK_SIZE, load, machine, median_seconds, parse, step_seconds
from service.model.batch import SAMPLING, Batch
from service.model.memory import block_bytes, make_runner

LENGTH = 128
PROMPTS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Row:
    decodes: int
    context: int
    alone_ms: float
    prompts: int
    step_ms: float


def mixed_batch(num_decodes: int, context: int, num_prompts: int, *, length: int = LENGTH) -> Batch:
    """One step of so many tokens that the step before sampled, and whole prompts; blocks lie apart."""
    lengths = np.asarray([context] * num_decodes + [length] * num_prompts, np.int32)
    counts = np.asarray([1] * num_decodes + [length] * num_prompts, np.int32)
    width = -(-int(lengths.max()) // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(len(lengths) * width).astype(np.int32).reshape(-1, width)
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    positions = np.concatenate([np.arange(end - count, end) for end, count in zip(lengths, counts, strict=True)])
    owners = np.repeat(np.arange(len(lengths)), counts)
    sampling = np.zeros(len(lengths), SAMPLING)
    sampling["top_p"] = 1
    sources = np.full(starts[-1], -1, np.int32)
    sources[:num_decodes] = np.arange(num_decodes)
    return Batch(
        token_ids=np.arange(starts[-1], dtype=np.int32) % 50000,
        token_sources=sources,
        positions=positions.astype(np.int32),
        slots=tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions.astype(np.int32) % BLOCK_SIZE,
        query_starts=starts,
        context_lengths=lengths,
        block_tables=tables,
        num_decodes=num_decodes,
        sample_indices=starts[1:] - 1,
        sample_positions=lengths,
        sampling=sampling,
    )


@torch.inference_mode()
def main() -> None:
    on_gpu = torch.cuda.is_available()
    arguments, weights = parse(__doc__, steps="1@192,64@192,248@192" if on_gpu else "1@192,4@192")
    model = load(arguments, weights)
    most = max(num for num, _ in arguments.steps)
    longest = max(LENGTH, model.config.context_length, *(context for _, context in arguments.steps))
    runner = make_runner(
        model,
        block_size=BLOCK_SIZE,
        max_num_seqs=most + max(PROMPTS),
        max_num_batched_tokens=most + max(PROMPTS) * LENGTH,
        kv_memory=((most + max(PROMPTS)) * -(-longest // BLOCK_SIZE) + 1) * block_bytes(model, BLOCK_SIZE),
        utilization=1.0,
    )
    about = machine(arguments, weights)
    print(about)
    print("single tokens  prompts  step ms  ms a prompt adds")
    rows = []
    for num_decodes, context in arguments.steps:
        alone = 1000 * step_seconds(runner, num_decodes, context, arguments.repeats)
        for num_prompts in PROMPTS:
            batch = mixed_batch(num_decodes, context, num_prompts)
            found = 1000 * median_seconds(runner, batch, batch, arguments.repeats)
            rows.append(Row(num_decodes, context, alone, num_prompts, found))
            each = (found - alone) / num_prompts
            print(f"{num_decodes:9}@{context} {num_prompts:8} {found:8.3f} {each:17.3f}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
