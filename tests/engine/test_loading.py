"""What loading hands to the engine's loop, of the demo model that the package carries."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import service.demo
from service.checkpoint.tokenizer import read_tokenizer
from service.engine.config import EngineConfig
from service.engine.core import Core
from service.engine.loading import DeviceError, Reporter, _device, load
from service.engine.request import Delta, EngineStats, Request, SamplingParams
from service.model.batch import Float32
from service.model.deterministic import DeterministicRunner
from service.model.parallel import ParallelError

FOLDER = Path(service.demo.__file__).parent / "model"
CONFIG = EngineConfig(
    model=str(FOLDER),
    revision=None,
    offline=True,
    cache_dir="unused",
    device="cpu",
    dtype="auto",
    kv_cache_dtype="auto",
    deterministic=False,
    max_num_seqs=2,
    max_num_batched_tokens=16,
    block_size=16,
    kv_memory=None,
    gpu_memory_utilization=0.9,
    cpu_threads=1,
    speculation="off",
    speculation_tokens=8,
    tensor_parallel_size=1,
    engine_number=0,
    data_parallel_size=1,
    max_event_interval_ms=16,
    log_level="warning",
    json_lines=False,
)

# What takes long to import, or much memory, and has no part in serving a local model; torch's compiler is among it.
NOT_FOR_SERVING = (
    "fastapi",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "pydantic",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
    "uvicorn",
)


def in_a_process_of_its_own(source: str) -> str:
    """What the source prints; `config` is CONFIG, and `modules()` are those of NOT_FOR_SERVING that are there."""
    begin = (
        "import pickle, sys\n"
        f"config = pickle.loads({pickle.dumps(CONFIG)!r})\n"
        f"modules = lambda: [name for name in {NOT_FOR_SERVING!r} if name in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", begin + source], capture_output=True, text=True, timeout=100)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_a_local_model_is_loaded_without_what_only_others_need() -> None:
    """Nor do the steps of the warm-up import it."""
    source = (
        "from service.engine import loading, loop\n"
        "with loading.Reporter(lambda *_: None) as reporter: loading.load(config, reporter)\n"
        "print('torch' in sys.modules, modules())\n"
    )
    assert "True []" == in_a_process_of_its_own(source)


def test_what_the_supervisor_needs_of_the_engine_is_little() -> None:
    """The process's own imports begin when it has been started: neither torch nor numpy."""
    source = "import service.supervised\nprint('torch' in sys.modules, 'numpy' in sys.modules, modules())\n"
    assert "False False []" == in_a_process_of_its_own(source)


def test_grammars_are_compiled_for_the_loaded_models_own_tokens() -> None:
    """The first mask of a grammar allows exactly the tokens that can begin a match."""
    with Reporter(lambda phase, progress: None) as reporter:
        loaded = load(CONFIG, reporter)
    words = np.zeros(-(-loaded.model.vocab_size // 32), np.int32)
    loaded.compile_grammar("start: /[01]+;/").fill(words)
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    tokens = [read_tokenizer(FOLDER).token_bytes[token_id] for token_id in allowed]
    assert {b"0", b"1"} <= set(tokens)
    assert all(data.strip(b"01") in (b"", b";") and data[:1] in (b"0", b"1") for data in tokens)
    loaded.runner.close()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_text_is_the_same_alone_and_in_company(dtype: str) -> None:
    """Of the demo model, beside eight others, which come and go meanwhile. (bf16 rounds otherwise in other shapes.)"""
    config = dataclasses.replace(CONFIG, dtype=dtype, max_num_seqs=9, max_num_batched_tokens=64)
    backend = read_tokenizer(FOLDER).backend
    prompt = tuple(backend.encode("It was a truth that she had never").ids)
    others = [tuple(backend.encode(text).ids) for text in ("The Congress of the United States", "And Jesus said")] * 4

    def text(*company: tuple[int, ...]) -> list[int]:
        with Reporter(lambda phase, progress: None) as reporter:
            loaded = load(config, reporter)
        assert dtype == loaded.model.dtype
        loaded.scheduler.add(Request(0, prompt), SamplingParams(48, temperature=0.0, ignore_eos=True))
        for number, tokens in enumerate(company, 1):
            loaded.scheduler.add(Request(number, tokens), SamplingParams(4 * number, seed=number, ignore_eos=True))
        core = Core(loaded.scheduler, loaded.runner)
        found: list[int] = []
        while not core.idle:
            found += [token for delta in core.step() if delta.request_id == 0 for token in delta.token_ids]
        loaded.runner.close()
        return found

    alone = text()
    assert 48 == len(alone)
    assert alone == text(*others)


REPEATING = "one two three, one two three, one two three, one two"
ORDINARY = "The Congress of the United States shall"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_text_is_the_same_with_drafts(dtype: str) -> None:
    """Of the demo model: greedy and drawn, with log-probabilities, penalties and a text that ends within drafts; all at
    once, so that a step has drafts of several. The log-probabilities may differ by rounding.
    """
    backend = read_tokenizer(FOLDER).backend
    kinds = [
        SamplingParams(60, temperature=0.0, ignore_eos=True),
        SamplingParams(60, temperature=0.7, top_p=0.9, seed=3, ignore_eos=True, num_logprobs=2),
        SamplingParams(60, temperature=0.0, repetition_penalty=1.05, num_logprobs=0),
        SamplingParams(61, temperature=0.0, stop_token_ids=tuple(backend.encode(" three").ids), min_tokens=7),
    ]
    asks = [(tuple(backend.encode(text).ids), params) for text in (REPEATING, ORDINARY) for params in kinds]

    def texts(speculation: str) -> tuple[dict[int, Delta], EngineStats]:
        config = dataclasses.replace(
            CONFIG, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=128, speculation=speculation
        )
        with Reporter(lambda phase, progress: None) as reporter:
            loaded = load(config, reporter)
        for number, (prompt, params) in enumerate(asks):
            loaded.scheduler.add(Request(number, prompt), params)
        core = Core(loaded.scheduler, loaded.runner)
        found: dict[int, Delta] = {}
        while not core.idle:
            for delta in (*core.step(), *loaded.scheduler.take_held()):
                before = found.get(delta.request_id)
                found[delta.request_id] = delta if before is None else before.then(delta)
        loaded.runner.close()
        return found, loaded.scheduler.stats()

    expected, without = texts("off")
    got, stats = texts("ngram")
    assert (0, 0) == (without.num_draft_tokens, without.num_accepted_tokens)
    # How many are drafted depends on the time that steps take.
    assert 20 < stats.num_accepted_tokens <= stats.num_draft_tokens
    assert stats.num_steps <= without.num_steps
    for number, delta in expected.items():
        assert (delta.token_ids, delta.finish) == (got[number].token_ids, got[number].finish)
        for one, other in zip(logprobs_of(delta), logprobs_of(got[number]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def logprobs_of(delta: Delta) -> list[Float32]:
    found = delta.logprobs
    return [] if found is None else [np.frombuffer(each, np.float32) for each in (found.chosen, found.top)]


def test_deterministic_mode_is_refused_beside_ranks() -> None:
    """Before anything is read, by the names of both settings; alone it is what the model says of itself."""
    config = dataclasses.replace(CONFIG, deterministic=True)
    with pytest.raises(ParallelError, match=r"^deterministic, tensor_parallel_size: .* 2 ranks .* one of the two$"):
        load(dataclasses.replace(config, tensor_parallel_size=2), Reporter(lambda *_: None))
    with Reporter(lambda *_: None) as reporter:
        loaded = load(config, reporter)
    assert loaded.model.deterministic
    assert isinstance(loaded.runner, DeterministicRunner)
    loaded.runner.close()


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100" if number < 3 else "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("four_gpus")
def test_engines_and_their_ranks_take_gpus_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the one that was asked for; an engine's ranks take GPUs of one kind."""

    def devices(name: str, data: int, size: int) -> list[str]:
        config = dataclasses.replace(CONFIG, device=name, data_parallel_size=data, tensor_parallel_size=size)
        engines = [dataclasses.replace(config, engine_number=number) for number in range(data)]
        return [str(_device(engine, rank=rank)) for engine in engines for rank in range(size)]

    assert ["cuda:0"] == devices("auto", 1, 1)
    assert ["cuda:2"] == devices("cuda:2", 1, 1)
    assert ["cuda:0", "cuda:1", "cuda:2", "cuda:3"] == devices("auto", 4, 1)
    assert ["cuda:1", "cuda:2"] == devices("cuda:1", 1, 2)
    assert ["cuda:2", "cuda:3"] == devices("cuda:2", 2, 1)
    assert ["cpu"] * 8 == devices("cpu", 8, 1)
    with pytest.raises(DeviceError, match=r"^tensor_parallel_size: its GPUs must be of one kind, and are H100, A100$"):
        devices("cuda", 2, 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    assert ["cuda:0", "cuda:1", "cuda:2", "cuda:3"] == devices("cuda", 2, 2)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("setting", "value", "least"),
    [("dtype", "int8", (8, 0)), ("dtype", "fp8", (8, 9)), ("kv_cache_dtype", "fp8", (8, 9))],
)
def test_8_bits_are_for_gpus_that_have_them(
    setting: str, value: str, least: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the generation that converts them on; before, refused by the names of the setting and of the GPU."""
    config = dataclasses.replace(CONFIG, device="cuda:1", **{setting: value})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: least)
    assert torch.device("cuda:1") == _device(config, rank=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        DeviceError, match=rf"^{setting}: {value} needs .* {least[0]}\.{least[1]} .* NVIDIA Old has 7.5"
    ):
        _device(config, rank=0)


@pytest.mark.parametrize("setting", ["dtype", "kv_cache_dtype"])
def test_fp8_is_refused_on_a_cpu(setting: str) -> None:
    """By the name of the setting, before anything is read; int8 weights are served there."""
    config = dataclasses.replace(CONFIG, **{setting: "fp8"})
    with pytest.raises(DeviceError, match=rf"^{setting}: fp8 is for a GPU, and the device is a CPU"):
        load(config, Reporter(lambda *_: None))
    assert torch.device("cpu") == _device(dataclasses.replace(CONFIG, dtype="int8"), rank=0)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_speculation_is_refused_on_a_gpu(device: str) -> None:
    """By the name of the setting; on a CPU beside the GPUs it is there."""
    config = dataclasses.replace(CONFIG, speculation="ngram", device=device)
    with pytest.raises(DeviceError, match=r"^speculation: ngram is for a CPU"):
        _device(config, rank=0)
    assert torch.device("cpu") == _device(dataclasses.replace(config, device="cpu"), rank=0)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("device", "data", "size"), [("auto", 5, 1), ("cuda", 3, 2), ("cuda:2", 3, 1), ("cuda:2", 1, 3)]
)
def test_more_gpus_than_there_are(device: str, data: int, size: int) -> None:
    """Every engine refuses, also one whose own GPU is there, so that the service ends at once."""
    config = dataclasses.replace(CONFIG, device=device, data_parallel_size=data, tensor_parallel_size=size)
    for number in range(data):
        with pytest.raises(
            DeviceError, match=rf"^data_parallel_size, tensor_parallel_size: {data} engines .* there are 4$"
        ):
            _device(dataclasses.replace(config, engine_number=number), rank=0)
