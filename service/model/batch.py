"""What the engine asks of a runner in one step, and what it gets back: flat integer arrays, no torch.

The scheduler makes a Batch; a Runner (model/runner.py, or the tests' fake) computes it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

# Best tokens whose log-probabilities a step gives, where it gives any: as many as one of 32 beams needs (api/beams.py).
NUM_TOP = 34

# One entry a sampled row. `seed` and `choice` and the row's position are all that its random number depends on.
SAMPLING = np.dtype(
    [
        ("temperature", np.float32),  # 0 is greedy
        ("top_k", np.int32),  # 0 is off
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.int64),
        ("choice", np.int32),
        ("min_length", np.int32),  # a row at a position before this may not sample end of text
        ("num_prompt", np.int32),  # these four are read only in a batch with masks, biases or histories
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("repetition_penalty", np.float32),
    ]
)
SAMPLING_WORDS = SAMPLING.itemsize // 4
# Where each field of a record lies, in words of 32 bits.
SAMPLING_WORD = {name: offset // 4 for name, (_, offset, *_) in SAMPLING.fields.items()}  # type: ignore[union-attr]
NOT_FINITE = -1  # StepOutput's token id for a row whose logits held a NaN or an infinity


class OutOfMemory(Exception):
    """The device had no room for a step; nothing of it was computed, and a smaller one may fit."""


class DeviceLost(Exception):
    """The device's context is lost; the process that holds it must end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: T tokens of S sequences, in order of sequence; R of the sequences get a token sampled.

    The first `num_decodes` sequences have one token each, and come in order of their lengths. Keys and values of
    every token are written to its slot before any token attends, so a sequence may read blocks that another fills in
    the same step. So may one that stands among the first several times, a token longer each time: with its drafts.
    """

    token_ids: Int32  # [T]
    token_sources: Int32  # [T] row of the previous launch whose sample this token is; -1: token_ids has it
    positions: Int32  # [T]
    slots: Int32  # [T] block * block_size + offset
    query_starts: Int32  # [S + 1]
    context_lengths: Int32  # [S] tokens of the sequence up to and including this step's
    block_tables: Int32  # [S, width]; entries past a sequence's blocks are 0
    num_decodes: int
    sample_indices: Int32  # [R] which of the T tokens gives row r its logits
    sample_positions: Int32  # [R] the position of the token to be sampled
    sampling: npt.NDArray[np.void]  # [R] of SAMPLING
    # Only where a row asks for it: a step without these computes nothing for them.
    masks: Int32 | None = None  # [R, ceil(V / 32)] bit i % 32 of word i // 32: token i may be sampled
    biases: "Biases | None" = None
    # [R, width], width >= 1: a row's tokens before its last (which the device has), then -1; all -1 without penalties.
    histories: Int32 | None = None
    logprobs: bool = False  # give those of the sampled tokens
    scored: "Scored | None" = None


@dataclass(frozen=True, slots=True)
class Biases:
    """What is added to some logits, in order of their rows; no (row, id) twice."""

    rows: Int32  # [E]
    token_ids: Int32  # [E]
    values: Float32  # [E]


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of prompts whose log-probabilities are wanted."""

    indices: Int32  # [P] which of the T tokens comes before
    targets: Int32  # [P] token ids


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Natural logs of the raw distribution: before temperature, filters, bias, penalties and masks.

    `chosen` is a NaN where logits held a NaN or an infinity; elsewhere all are finite, and `chosen` equals the entry
    of `top` for the same token.
    """

    chosen: Float32  # [N], of the sampled token or the target
    top_ids: Int32  # [N, NUM_TOP], best first
    top: Float32  # [N, NUM_TOP]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The sampled tokens of a step."""

    token_ids: Int32  # [R]; NOT_FINITE where a row could not be sampled
    logprobs: TopLogprobs | None = None  # [R], where the batch asked for them
    scores: TopLogprobs | None = None  # [P], where the batch had `scored`


class Runner(Protocol):
    """Computes batches in the order they are launched.

    launch and collect raise OutOfMemory, DeviceLost, or anything else a failing step raises.
    """

    num_blocks: int
    depth: int  # steps that may be launched before the oldest is collected: 1 where the device works by itself, else 0

    def launch(self, batch: Batch) -> None:
        """Start computing `batch`."""

    def collect(self) -> StepOutput:
        """Wait for the oldest launched batch that was not collected."""

    def close(self) -> None:
        """Give the device's memory back."""
