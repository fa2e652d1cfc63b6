"""What the engine process is told as it is spawned. Made by serve.py and cli.py; imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What serve.py tells the engine; the fields are those of Settings."""

    model: str
    revision: str | None
    offline: bool
    cache_dir: str
    device: str
    dtype: str
    kv_cache_dtype: str
    deterministic: bool
    tensor_parallel_size: int
    engine_number: int  # of the engines behind the port: 0 to data_parallel_size - 1
    data_parallel_size: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    block_size: int
    kv_memory: int | None
    gpu_memory_utilization: float
    cpu_threads: int | None
    speculation: str
    speculation_tokens: int
    max_event_interval_ms: float
    log_level: str
    json_lines: bool


def engine_name(number: int, *, of: int) -> str:
    """What logs call engine `number` of so many: without its number where it is the only one."""
    return f"engine {number}" if of > 1 else "the engine"
