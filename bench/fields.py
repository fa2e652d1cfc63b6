"""What a request's fields cost a decode step: milliseconds with each beside a plain greedy step of the same run.

python -m bench.fields [--model FOLDER] [--device cpu|cuda] [--dtype float32] [--steps 1@256,8@256] [--out FILE]
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from bench.decode import load, machine, parse, runner_for, step_seconds
from service.model.batch import Batch, Biases

Ask = Callable[[Batch], Batch]


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    context: int
    field: str
    step_ms: float
    ratio: float  # to the plain step


def sampled(batch: Batch, **values: float) -> Batch:
    sampling = batch.sampling.copy()
    for name, value in values.items():
        sampling[name] = value
    return replace(batch, sampling=sampling)


def penalised(batch: Batch) -> Batch:
    count = len(batch.sample_indices)
    histories = np.random.default_rng(0).integers(0, 50000, (count, int(batch.context_lengths.max()) - 1), np.int32)
    asked = sampled(batch, num_prompt=8, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2)
    return replace(asked, histories=histories)


def biased(batch: Batch) -> Batch:
    rows = np.repeat(np.arange(len(batch.sample_indices), dtype=np.int32), 100)
    ids = np.tile(np.arange(100, dtype=np.int32), len(batch.sample_indices))
    return replace(batch, biases=Biases(rows, ids, np.ones(len(rows), np.float32)))


def masked(batch: Batch) -> Batch:
    words = -(-50257 // 32)
    return replace(batch, masks=np.full((len(batch.sample_indices), words), 0x55555555, np.int32))


ASKED: Mapping[str, Ask] = {
    "drawn": lambda batch: sampled(batch, temperature=1),
    "drawn, top_p": lambda batch: sampled(batch, temperature=1, top_p=0.9),
    "penalties": penalised,
    "logit_bias of 100 ids": biased,
    "mask": masked,
    "logprobs": lambda batch: replace(batch, logprobs=True),
}


def main() -> None:
    arguments, weights = parse(__doc__, steps="1@256,8@256")
    runner = runner_for(load(arguments, weights), arguments.steps)
    rows = []
    for size, context in arguments.steps:
        # Before and after: these machines are noisy.
        plain = [step_seconds(runner, size, context, arguments.repeats)]
        asked = {name: step_seconds(runner, size, context, arguments.repeats, ask=ask) for name, ask in ASKED.items()}
        plain.append(step_seconds(runner, size, context, arguments.repeats))
        least = min(plain)
        rows += [Row(size, context, "plain", 1000 * seconds, seconds / least) for seconds in plain]
        rows += [Row(size, context, name, 1000 * seconds, seconds / least) for name, seconds in asked.items()]
    about = machine(arguments, weights)
    print(about)
    for row in rows:
        print(f"{row.batch:4}@{row.context}  {row.field:24} {row.step_ms:8.3f} ms  {row.ratio:5.2f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
