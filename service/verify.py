"""`megatron-gpt2 verify`: whether a model can be served, and whether it is NVIDIA's 345M, in plain words."""

from collections.abc import Sequence
from pathlib import Path

import torch

from service.checkpoint.convert import GPT2_TOKENIZER
from service.checkpoint.errors import CheckpointError
from service.checkpoint.hub import read_config, read_state
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.loading import served_folder
from service.model.config import ModelConfig
from service.model.gpt2 import GPT2, logits_of
from service.serve import engine_config, log_quietly, wants_json
from service.settings import Settings, SettingsError

# transformers' own test of NVIDIA's release (tests/models/megatron_gpt2): nine ids, and 19 of their logits in fp16, of
# row 8 i // 17 and column 2792 i for each i.
ORACLE_IDS = (101, 7110, 1005, 1056, 2023, 11333, 17413, 1029, 102)
ORACLE_LOGITS = (
    *(4.9414, -0.2920, -1.2148, -4.0273, -0.5161, -5.2109, -1.2412, -1.8301, -1.7734, -4.7148),
    *(-0.2317, -1.0811, -2.1777, 0.4141, -3.7969, -4.0586, -2.5332, -3.3809, 4.3867),
)
_TOLERANCE = 0.05  # they are of fp16 throughout, ours of fp32; those of other weights are whole numbers apart


def verify(settings: Settings) -> int:
    """Print what was looked at, and the verdict; the exit code: 0 can be served, 1 cannot. Raises SettingsError."""
    log_quietly(settings)
    config = engine_config(settings, json_lines=wants_json(settings))
    try:
        folder = served_folder(config, lambda *_: None)
    except CheckpointError as error:
        raise SettingsError(str(error)) from error
    try:
        lines = findings(folder)
        for line in lines:
            print(line)
    except CheckpointError as error:
        print(f"verdict    cannot be served: {error}")
        return 1
    print("verdict    can be served")
    return 0


def findings(folder: Path, *, oracle: Sequence[float] = ORACLE_LOGITS) -> list[str]:
    """What is found in a folder of transformers, a line each. Raises CheckpointError at the first fault."""
    tokenizer = read_tokenizer(folder)
    is_gpt2 = tokenizer.token_bytes == read_tokenizer(GPT2_TOKENIZER).token_bytes
    config = read_config(folder, vocab_size=len(tokenizer.token_bytes))
    state = read_state(folder, config, dtype=torch.float32)
    num_parameters = sum(tensor.numel() for tensor in state.values())
    lines = [
        f"tokenizer  {len(tokenizer.token_bytes)} ids, {'the same as GPT-2' if is_gpt2 else 'other than GPT-2'}'s",
        f"config     {config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads, "
        f"{config.context_length} positions, {config.activation}, {config.dtype}",
        f"weights    {len(state)} tensors, {num_parameters} parameters, all finite, of the shapes of the config",
        f"head       {'the token embedding' if config.tie_word_embeddings else 'a table of its own'}",
    ]
    return [*lines, f"logits     {_identity(GPT2(config, state), config, oracle)}"]


def _identity(model: GPT2, config: ModelConfig, oracle: Sequence[float]) -> str:
    """Whether the model is NVIDIA's release, by its logits."""
    if not config.is_345m:
        return "not compared: the known ones are of NVIDIA's 345M, which has another shape"
    logits = logits_of(model, ORACLE_IDS)
    found = [logits[8 * i // 17, 2792 * i].item() for i in range(len(oracle))]
    num_equal = sum(abs(ours - theirs) <= _TOLERANCE for ours, theirs in zip(found, oracle, strict=True))
    if num_equal == len(oracle):
        return f"those of NVIDIA's 345M: all {num_equal} known ones, within {_TOLERANCE}"
    return (
        f"not those of NVIDIA's 345M: {num_equal} of {len(oracle)} known ones; trained otherwise, or converted wrongly"
    )
