"""An engine over two GPUs beside one over one, at the 345M's shape: run with `pytest -m gpu` where there are two."""

import faulthandler
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.random_model import write_random_model
from service.engine.core import Core
from service.engine.loading import Reporter, load
from service.engine.request import Request, SamplingParams
from tests.engine.test_loading import CONFIG

pytestmark = pytest.mark.gpu

PROMPTS = [1 + 13 * number for number in range(16)] + [900, 1000]  # tokens: steps of a few, and of thousands


def tokens_of(folder: Path, num_ranks: int, dtype: str) -> list[list[int]]:
    """24 greedy tokens of each prompt, by an engine in a process of its own, as engines are.

    For torch counts a process's meetings over shared memory, and ranks with other counts never meet.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, folder, num_ranks, dtype).result()


def run(folder: Path, num_ranks: int, dtype: str) -> list[list[int]]:
    faulthandler.dump_traceback_later(90, exit=True)  # a wait in the driver heeds no other limit
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "kv_memory": 2**32}
    config = replace(CONFIG, model=str(folder), cache_dir=str(folder.parent), device="cuda", dtype=dtype, **limits)
    config = replace(config, tensor_parallel_size=num_ranks)
    with Reporter(lambda *_: None) as reporter:
        loaded = load(config, reporter)
    random = np.random.default_rng(2)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for number, size in enumerate(PROMPTS):
        prompt = tuple(random.integers(0, 50000, size).tolist())
        loaded.scheduler.add(Request(number, prompt), SamplingParams(24, temperature=0.0, ignore_eos=True))
    core = Core(loaded.scheduler, loaded.runner)
    while not core.idle:
        for delta in (*core.step(), *loaded.scheduler.take_held()):
            tokens[delta.request_id] += delta.token_ids
    loaded.runner.close()
    return tokens


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_give_what_one_does(tmp_path: Path) -> None:
    """In fp32 every token; in bf16 random weights give near ties, so that a prompt in six may differ."""
    folder = write_random_model(tmp_path)
    assert tokens_of(folder, 1, "float32") == tokens_of(folder, 2, "float32")
    pairs = zip(tokens_of(folder, 1, "bfloat16"), tokens_of(folder, 2, "bfloat16"), strict=True)
    assert sum(one == two for one, two in pairs) >= len(PROMPTS) * 5 // 6
