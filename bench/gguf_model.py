"""The same weights for llama.cpp, through the packages gguf and llama-cpp-python. Called by bench/cpu.py.

Neither is needed for anything else, so neither is among the project's: `pip install gguf llama-cpp-python`, of which
the second compiles llama.cpp for this processor.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

from service.checkpoint.hub import read_config, read_state

VERSION: str = llama_cpp.__version__
_NAMES = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "final_norm": "output_norm",
    "attention_norm": "attn_norm",
    "qkv": "attn_qkv",
    "attention_output": "attn_output",
    "mlp_norm": "ffn_norm",
    "up": "ffn_up",
    "down": "ffn_down",
}


def write_gguf(folder: Path, file: Path, kind: str) -> Path:
    """Write a folder's weights as llama.cpp reads them, the matrices in `kind` (F16, Q8_0); without a tokenizer."""
    config = read_config(folder)
    writer = gguf.GGUFWriter(file, "gpt2", use_temp_file=True)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    matrices = gguf.GGMLQuantizationType[kind]
    for name, tensor in read_state(folder, config, dtype=torch.float32).items():
        *layer, stem, part = name.removeprefix("layers.").split(".")
        theirs = ".".join([*(f"blk.{number}" for number in layer), _NAMES[stem], part])
        whole = tensor.ndim == 2 and stem != "position_embedding"
        type_ = matrices if whole else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


class LlamaCpp:
    """llama.cpp over one file: greedy tokens for a batch of prompts of one length."""

    def __init__(self, file: Path, *, threads: int, most_prompts: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {file}"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = most_prompts
        params.n_ctx = most_prompts * context
        params.n_batch = max(512, most_prompts * 32)
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        entries = [
            (token, place, number, place == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        found: list[list[int]] = [[] for _ in prompts]
        for step in range(num_tokens):
            rows = self._decode(entries)
            for tokens, row in zip(found, rows, strict=True):
                tokens.append(int(row.argmax()))
            length = len(prompts[0]) + step
            entries = [(tokens[-1], length, number, True) for number, tokens in enumerate(found)]
        return found

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[Any]:
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, place, number, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = wanted
        assert llama_cpp.llama_decode(self._context, batch) == 0
        return [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (self._vocab_size,))
            for index, (*_, wanted) in enumerate(entries)
            if wanted
        ]
