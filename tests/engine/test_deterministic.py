"""The engine over the deterministic runner of a real, tiny model: everybody gets the bits that they get alone."""

import functools
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.random_model import CONFIG_345M
from service.engine.core import Core
from service.model.deterministic import DeterministicRunner
from service.model.formats import format_for
from service.model.gpt2 import GPT2
from service.model.runner import TorchRunner
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE
from tests.engine.harness import CONTEXT_LENGTH, PREFIXES, Engine, asks_strategy, engines, greedy
from tests.engine.oracle import Answer, Ask

HIDDEN, INNER = 32, 60  # no vector divides a row of 60


@functools.cache
def model(dtype: str = "float32") -> GPT2:
    """Two layers of random weights, large enough that texts vary."""
    config = replace(
        CONFIG_345M,
        num_layers=2,
        hidden_size=HIDDEN,
        num_heads=2,
        intermediate_size=INNER,
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        end_of_text_id=END_OF_TEXT,
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    norm = {"weight": (HIDDEN,), "bias": (HIDDEN,)}
    parts: Mapping[str, Mapping[str, tuple[int, ...]]] = {
        "attention_norm": norm,
        "qkv": {"weight": (3 * HIDDEN, HIDDEN), "bias": (3 * HIDDEN,)},
        "attention_output": {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)},
        "mlp_norm": norm,
        "up": {"weight": (INNER, HIDDEN), "bias": (INNER,)},
        "down": {"weight": (HIDDEN, INNER), "bias": (HIDDEN,)},
    }
    state = {"token_embedding.weight": normal(VOCAB_SIZE, HIDDEN)}
    state["position_embedding.weight"] = normal(CONTEXT_LENGTH, HIDDEN)
    state |= {f"final_norm.{name}": normal(*shape) for name, shape in norm.items()}
    for number in range(config.num_layers):
        for part, shapes in parts.items():
            state |= {f"layers.{number}.{part}.{name}": normal(*shape) for name, shape in shapes.items()}
    weights = format_for(dtype, torch.device("cpu"))
    if dtype == "bfloat16":
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    return GPT2(config, state, weights)


def with_runner(engine: Engine, runner: TorchRunner) -> Engine:
    runner.depth = engine.depth
    engine.core = Core(engine.scheduler, runner)
    return engine


def deterministic(engine: Engine, dtype: str = "float32") -> Engine:
    return with_runner(
        engine, DeterministicRunner(model(dtype), num_blocks=engine.num_blocks, block_size=engine.block_size)
    )


def alone(ask: Ask, *, block_size: int, dtype: str = "float32") -> list[Answer]:
    """In an engine with room, whole prompts and nobody else."""
    engine = deterministic(
        Engine(num_blocks=5 * CONTEXT_LENGTH, block_size=block_size, budget=5 * CONTEXT_LENGTH), dtype
    )
    engine.add_all([ask])
    engine.run()
    return engine.answers(ask)


@settings(max_examples=15)
@given(asks_strategy(most_requests=8), engines(), st.data())
def test_everybody_gets_what_they_get_alone(asks: list[Ask], engine: Engine, data: st.DataObject) -> None:
    """Tokens and log-probabilities, at any arrival, with any cut of prompts, prefix hits, preemption, and in flight."""
    deterministic(engine)
    for ask in data.draw(st.permutations(asks)):
        engine.add_all([ask])
        for _ in range(data.draw(st.sampled_from([0, 0, 1, 3]))):
            engine.step()
    engine.run()
    for ask in asks:
        assert alone(ask, block_size=engine.block_size) == engine.answers(ask)
    engine.check_finished(asks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_dtype(dtype: str) -> None:
    """A crowd that shares prefixes, twice, in blocks for a few of it: with hits and preemptions, as alone."""
    engine = deterministic(Engine(num_blocks=24, block_size=4, max_num_seqs=8, budget=24), dtype)
    asks = [
        greedy(number, (*PREFIXES[number % 2][: number + 2], number), 30 - number, num_logprobs=4 + number)
        for number in range(16)
    ]
    asks += [Ask(msgspec.structs.replace(ask.request, id=16 + ask.request.id), ask.params) for ask in asks]
    engine.add_all(asks[:16])
    engine.run()
    engine.add_all(asks[16:])
    engine.run()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions
    assert stats.num_prefix_hits
    for ask in asks:
        assert alone(ask, block_size=4, dtype=dtype) == engine.answers(ask)


def test_a_prompt_of_one_more_token_than_what_another_fills_in_the_same_step() -> None:
    """It is a decode, which comes first in the batch, and attends to blocks that the step has yet to fill."""
    first, second = greedy(0, PREFIXES[0][:8], 4, num_logprobs=9), greedy(1, PREFIXES[0][:9], 4, num_logprobs=9)
    engine = deterministic(Engine())
    engine.add_all([first, second])
    engine.run()
    assert engine.scheduler.stats().num_prefix_hits == 8
    assert engine.num_steps == 4
    for ask in (first, second):
        assert alone(ask, block_size=4) == engine.answers(ask)


def test_the_other_runner_is_found_out() -> None:
    """With the runner that has no such mode, some of the same bits differ: these tests can fail."""

    def found(*asks: Ask) -> list[list[Answer]]:
        runner = TorchRunner(model(), num_blocks=400, block_size=4)
        engine = with_runner(Engine(num_blocks=400, max_num_seqs=8, budget=64), runner)
        engine.add_all(list(asks))
        engine.run()
        return [engine.answers(ask) for ask in asks]

    asks = [greedy(number, PREFIXES[number % 2][: 3 + 5 * number], 12, num_logprobs=9) for number in range(8)]
    assert [found(ask)[0] for ask in asks] != found(*asks)
