"""Where the fields of a row's record lie, in words: SAMPLING of model/batch.py. Read by the kernels of a tail."""

import triton.language as tl

from service.model.batch import SAMPLING_WORD

TEMPERATURE = tl.constexpr(SAMPLING_WORD["temperature"])
TOP_K = tl.constexpr(SAMPLING_WORD["top_k"])
TOP_P = tl.constexpr(SAMPLING_WORD["top_p"])
MIN_P = tl.constexpr(SAMPLING_WORD["min_p"])
SEED = tl.constexpr(SAMPLING_WORD["seed"])  # two words
CHOICE = tl.constexpr(SAMPLING_WORD["choice"])
MIN_LENGTH = tl.constexpr(SAMPLING_WORD["min_length"])
NUM_PROMPT = tl.constexpr(SAMPLING_WORD["num_prompt"])
PRESENCE_PENALTY = tl.constexpr(SAMPLING_WORD["presence_penalty"])
FREQUENCY_PENALTY = tl.constexpr(SAMPLING_WORD["frequency_penalty"])
REPETITION_PENALTY = tl.constexpr(SAMPLING_WORD["repetition_penalty"])
