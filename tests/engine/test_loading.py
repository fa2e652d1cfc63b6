"""What loading hands to the engine's loop, of the demo model that the package carries."""

from pathlib import Path

import numpy as np

import service.demo
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.config import EngineConfig
from service.engine.loading import Reporter, load

FOLDER = Path(service.demo.__file__).parent / "model"


def test_grammars_are_compiled_for_the_loaded_models_own_tokens() -> None:
    """The first mask of a grammar allows exactly the tokens that can begin a match."""
    config = EngineConfig(
        model=str(FOLDER),
        revision=None,
        offline=True,
        cache_dir="unused",
        device="cpu",
        dtype="auto",
        max_num_seqs=2,
        max_num_batched_tokens=16,
        block_size=16,
        kv_memory=None,
        gpu_memory_utilization=0.9,
        cpu_threads=1,
        tensor_parallel_size=1,
        max_event_interval_ms=16,
        log_level="warning",
        json_lines=False,
    )
    with Reporter(lambda phase, progress: None) as reporter:
        loaded = load(config, reporter)
    words = np.zeros(-(-loaded.model.vocab_size // 32), np.int32)
    loaded.compile_grammar("start: /[01]+;/").fill(words)
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    tokens = [read_tokenizer(FOLDER).token_bytes[token_id] for token_id in allowed]
    assert {b"0", b"1"} <= set(tokens)
    assert all(data.strip(b"01") in (b"", b";") and data[:1] in (b"0", b"1") for data in tokens)
    loaded.runner.close()
