"""`megatron-gpt2 selftest` of a tiny random model: what holds, what is found out, and what it refuses."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from service.cli import main
from service.engine.request import Delta, Finish, Logprobs
from service.model import memory
from service.model.deterministic import DeterministicRunner
from service.selftest.asks import random_asks
from service.selftest.differences import compare, first_difference
from service.selftest.scenarios import Outcome
from service.serve import DEMO_MODEL

SCENARIOS = [
    "alone",
    "all at once",
    "arriving, another order",
    "twice, prefixes found",
    "blocks for one context",
    "21 tokens a step",
    "with drafts",
]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command sets up its process's logging."""
    root = logging.getLogger()
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights and 64 positions, with GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def run(folder: Path, *more: str, requests: int = 16) -> int:
    flags = ("--model", str(folder), "--requests", str(requests), "--kv-memory", "4MiB", "--cpu-threads", "1")
    return main(["selftest", *flags, *more])


def test_everybody_gets_the_same_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each scenario, with prefixes found and sequences preempted where these are what it is for."""
    assert 0 == run(folder)
    about, head, *rows, verdict = capsys.readouterr().out.splitlines()
    assert "dtype float32, device cpu, deterministic True, requests 16, seed 0" in about
    assert ["scenario", "answers", "differing"] == head.split()[:3]
    assert SCENARIOS == [row[:26].strip() for row in rows]
    assert "verdict: the same to the bit" == verdict
    found = {row[:26].strip(): row[26:].split() for row in rows}
    assert {"0"} == {row[1] for row in found.values()}
    assert int(found["all at once"][2]) == 16
    assert int(found["twice, prefixes found"][3]) > 0
    assert int(found["blocks for one context"][4]) > 0


@pytest.mark.parametrize(
    "flags",
    [
        *(("--max-num-seqs", str(number), "--requests", "12") for number in (1, 2, 5)),
        *(("--block-size", str(size), "--requests", "12") for size in (1, 32, 64)),
        *(("--requests", "3", "--seed", str(seed)) for seed in range(3)),
        ("--requests", "2"),
    ],
    ids=" ".join,
)
def test_what_cannot_happen_is_not_asked_for(
    folder: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The verdict is good with any of the service's settings, also where nobody can be preempted, or found."""
    assert 0 == run(folder, *flags), capsys.readouterr().out


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One document, and nothing else on standard output."""
    assert 0 == run(folder, "--json", "--dtype", "int8", "--seed", "3", requests=8)
    found = json.loads(capsys.readouterr().out)
    assert (True, "int8", 3, 8) == (found["same"], found["dtype"], found["seed"], found["requests"])
    assert SCENARIOS == [scenario["scenario"] for scenario in found["scenarios"]]
    assert all(scenario["compared"] >= 8 and scenario["first"] is None for scenario in found["scenarios"])


class _Leaning(DeterministicRunner):
    """Its logits lean by the last bit or two on how many rows the step has: most tokens stay, no bits do."""

    def _logits(self, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return super()._logits(hidden, indices) * (1 + 2.0**-20 * (len(indices) > 1))


def test_a_runner_that_looks_at_company_is_found_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, the scenarios in which it showed, and the first difference of each."""
    monkeypatch.setattr(memory, "DeterministicRunner", _Leaning)
    assert 1 == run(folder)
    out = capsys.readouterr().out
    lines = out.splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("all at once"))
    assert int(lines[number].split()[4]) > 8
    assert lines[number + 1].startswith("  request ")
    assert " alone, " in lines[number + 1]
    assert lines[number + 1].endswith(" here")
    assert "verdict: not the same, or not put to the test" == lines[-1]


def test_the_other_runner_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the setting; what it gives in company are other bits."""
    assert 1 == run(folder, "--no-deterministic", "--json")
    found = json.loads(capsys.readouterr().out)
    assert not found["deterministic"]
    assert any(scenario["differing"] for scenario in found["scenarios"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--requests", "1"), "--requests: must be from 2 to 4096 (got 1)"),
        (("--requests", "4097"), "--requests: must be from 2 to 4096 (got 4097)"),
        (("--seed", "-1"), "--seed: must not be negative (got -1)"),
        (("--tensor-parallel-size", "2"), "deterministic, tensor_parallel_size: "),
        (("--model", "./none"), "./none: no such file or folder"),
        (("--kv-memory", "1K"), "kv_memory: 1024 bytes hold"),
    ],
)
def test_what_cannot_be_used(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends with 2 and a line that names it."""
    assert 2 == main(["selftest", *flags])
    output = capsys.readouterr()
    assert "" == output.out
    assert output.err.splitlines()[-1].startswith(f"megatron-gpt2: {message}")


def test_the_mix_has_every_kind() -> None:
    """The same for a seed; within the context; of all kinds at the default size; growing ones outgrow a context."""
    asks = random_asks(256, seed=0, context_length=1024, block_size=16, vocab_size=50257, max_num_seqs=256)
    assert asks == random_asks(256, seed=0, context_length=1024, block_size=16, vocab_size=50257, max_num_seqs=256)
    assert asks != random_asks(256, seed=1, context_length=1024, block_size=16, vocab_size=50257, max_num_seqs=256)
    assert list(range(256)) == [ask.request.id for ask in asks]
    for ask in asks:
        assert 0 < len(ask.request.prompt) + ask.params.max_tokens <= 1024
    assert max(len(ask.request.prompt) for ask in asks) > 200
    for what in (
        lambda ask: ask.params.temperature == 0,
        lambda ask: ask.params.top_k,
        lambda ask: ask.params.top_p < 1,
        lambda ask: ask.params.min_p,
        lambda ask: ask.params.repetition_penalty != 1,
        lambda ask: ask.params.logit_bias,
        lambda ask: ask.params.banned_token_ids,
        lambda ask: ask.params.num_logprobs is None,
        lambda ask: ask.params.max_tokens == 0,
        lambda ask: ask.request.score_from is not None and ask.params.max_tokens,
        lambda ask: ask.request.n == 2,
    ):
        assert 5 < sum(bool(what(ask)) for ask in asks) < 250
    for count in (2, 3, 7, 16, 256):
        for context_length in (64, 1024):
            asks = random_asks(
                count, seed=0, context_length=context_length, block_size=16, vocab_size=97, max_num_seqs=count
            )
            growing = [ask.params.max_tokens for ask in asks if ask.growing]
            assert len(growing) >= 2
            assert context_length < sum(growing)
            assert all(len(ask.request.prompt) + ask.params.max_tokens <= context_length for ask in asks)


def answer(*tokens: int, value: float = -1.5, finish: Finish = Finish.LENGTH) -> Delta:
    chosen = np.full(len(tokens), value, np.float32).tobytes()
    top = np.asarray([[value, value - 1]] * len(tokens), np.float32).tobytes()
    ids = np.asarray([[token, 9] for token in tokens], np.int32).tobytes()
    return Delta(0, 0, tokens, finish, logprobs=Logprobs(chosen, ids, top))


def test_differences_are_told_with_all_digits() -> None:
    """The first place, of tokens, of a last bit of a log-probability, of ends and of errors."""
    assert first_difference(answer(1, 2, 3), answer(1, 2, 3)) is None
    last_bit = float(np.nextafter(np.float32(-1.5), np.float32(0)))
    told = first_difference(answer(1, 2), answer(1, 2, value=last_bit))
    assert "token 0: id 1 -1.5 (best: id 1, -1.5) alone, id 1 -1.49999988 (best: id 1, -1.49999988) here" == told
    assert (first_difference(answer(1, 2, 3), answer(1, 2, 4)) or "").startswith("token 2: id 3 ")
    assert (first_difference(answer(1, 2), answer(1)) or "").endswith("alone, nothing here")
    assert "end: length alone, stop here" == first_difference(answer(1), answer(1, finish=Finish.STOP))
    failed = Delta(0, 0, (), Finish.ERROR, "a step failed")
    assert "end: error: a step failed" == first_difference(failed, failed)
    scored = msgspec.structs.replace(answer(1), prompt_logprobs=answer(1, 2).logprobs)
    other = msgspec.structs.replace(answer(1), prompt_logprobs=answer(1, 5).logprobs)
    assert (first_difference(scored, other) or "").startswith("scored prompt token 1: -1.5 (best: id 2, -1.5) alone")


@pytest.mark.parametrize("needs", ["hits", "preemptions"])
def test_a_scenario_that_did_not_happen_shows_nothing(needs: str) -> None:
    """That is told as a fault; where it did, answers alone decide."""
    expected = {(0, 0): answer(1)}
    for count in (0, 3):
        outcome = Outcome("x", list(expected.items()), 1.0, 1, count, count, needs)
        assert (f"there were no {needs}, so that nothing is shown" if not count else None) == compare(
            expected, outcome
        ).first


def test_an_answer_that_never_came_is_a_difference() -> None:
    """Each request of those that were asked alone must be answered in company."""
    expected = {(0, 0): answer(1), (1, 0): answer(2)}
    found = compare(expected, Outcome("x", [((1, 0), answer(2))], 1.0, 1, 0, 0, ""))
    assert (1, "request 0, choice 0, no answer") == (found.differing, found.first)
