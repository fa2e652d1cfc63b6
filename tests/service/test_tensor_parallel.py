"""An engine whose layers are split over ranks, here processes on a CPU: one rank's texts, and what breaks a rank."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from service.api.text import Tokenizer
from tests.service.conftest import DEMO
from tests.service.reference import Reference
from tests.service.server import COMMAND, Client, Connect, Server, Start, survivors, until_drained

PROMPTS = ["In the beginning", "We, the people of the United States", "日本語 🦜", "It is a truth " * 40]
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module", params=[2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    """The demo model has four heads."""
    return int(request.param)


@pytest.fixture(scope="module")
def ranked(num_ranks: int) -> Iterator[Server]:
    yield from until_drained(Server("--tensor-parallel-size", str(num_ranks)))


@pytest.fixture
async def client(ranked: Server) -> AsyncIterator[Client]:
    client = Client(ranked.url)
    yield client
    await client.http.aclose()


async def test_the_texts_of_one_rank(
    ranked: Server, num_ranks: int, client: Client, demo: Client, tokenizer: Tokenizer
) -> None:
    """Greedy and drawn with a seed, many at a time: transformers' own but for ties. Scores are those of one rank."""
    assert num_ranks - 1 == len(ranked.ranks)
    reference = Reference(DEMO, tokenizer)
    for sampling in ({"temperature": 0}, DRAWN):
        body = {"max_tokens": 24, **sampling}
        answer = await client.complete(prompt=PROMPTS, **body)
        for prompt, choice in zip(tokenizer.encode(PROMPTS), answer["choices"], strict=True):
            reference.check([choice["text"]], prompt, 0, **body)
    streamed = await client.stream(prompt=PROMPTS[0], max_tokens=24, temperature=0)
    reference.check([streamed.text()], tokenizer.encode(PROMPTS[:1])[0], 0, max_tokens=24, temperature=0)
    ask = {"prompt": PROMPTS[1], "max_tokens": 0, "echo": True, "logprobs": 2}
    expected, got = [(await each.complete(**ask))["choices"][0]["logprobs"] for each in (demo, client)]
    assert expected["tokens"] == got["tokens"]
    assert pytest.approx(expected["token_logprobs"][1:], abs=1e-4) == got["token_logprobs"][1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_broken_rank_is_replaced_with_its_engine(
    start: Start, connect: Connect, number: signal.Signals
) -> None:
    """Killed: at once. Stopped: when the engine has been silent for stall_seconds. Then all are new, and answer.

    The stream that was under way ends with an error; no process of before is left.
    """
    server = start("--tensor-parallel-size", "2", "--stall-seconds", "2")
    client = connect(server)
    expected = await client.complete(prompt=PROMPTS[0], max_tokens=16, temperature=0)
    before = [server.engine, *server.ranks]
    assert 2 == len(before)
    stream = asyncio.create_task(client.stream(prompt=PROMPTS[0], max_tokens=1000, ignore_eos=True))
    await client.wait_metric("requests_running", 1)
    before[1].send_signal(number)
    streamed = await stream
    assert streamed.done
    assert streamed.error is not None
    await client.wait_status("/readyz", 200)
    assert not survivors(before, seconds=2)
    answer = await client.complete(prompt=PROMPTS[0], max_tokens=16, temperature=0)
    assert expected["choices"] == answer["choices"]
    assert 1 == len(server.ranks)
    assert 1 == await client.metric("engine_restarts_total")
    server.process.terminate()
    assert 0 == await asyncio.to_thread(server.wait, 20)


async def test_a_rank_of_one_of_two_engines(start: Start, connect: Connect) -> None:
    """It takes its own engine with it; the other, with ranks of its own, serves on."""
    server = start("--tensor-parallel-size", "2", "--data-parallel-size", "2")
    client = connect(server)
    ask = {"prompt": [PROMPTS[0], PROMPTS[1]], "max_tokens": 16, "temperature": 0}
    expected = await client.complete(**ask)
    await client.wait_metric("requests_running", 0)  # an engine tells its last steps after the answer
    assert all(num_steps >= 16 for num_steps in await client.metric_by_engine("steps_total"))
    broken, other = server.engines
    server.ranks_of(broken)[0].kill()
    assert not await asyncio.to_thread(survivors, [broken], seconds=5)
    assert 200 == await client.status("/readyz")
    assert expected["choices"] == (await client.complete(**ask))["choices"]
    await client.wait_metric("engine_restarts_total", 1)
    assert other.is_running()
    server.wait_ready()
    assert [1, 1] == [len(server.ranks_of(engine)) for engine in server.engines]
    server.process.terminate()
    assert 0 == await asyncio.to_thread(server.wait, 20)


def test_a_split_that_does_not_come_out_even_is_refused(start: Start) -> None:
    """Before anything is loaded: exit code 2, and an error that names the setting."""
    server = start("--tensor-parallel-size", "3", ready=False)
    assert 2 == server.wait(60)
    assert any("tensor_parallel_size: 4 attention heads do not split over 3 ranks" in line for line in server.log)


def test_a_rank_that_cannot_load_ends_the_service(start: Start) -> None:
    """As one engine's does, with 2, whichever rank finds it first; nobody is left."""
    server = start("--tensor-parallel-size", "2", "--kv-memory", "1KiB", ready=False)
    assert 2 == server.wait(60)
    assert any("kv_memory: 1024 bytes hold 0 blocks" in line for line in server.log)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_generate_over_ranks(ends: str) -> None:
    """It prints what one rank does, or why it cannot, and leaves no rank behind."""
    command = [COMMAND, "generate", PROMPTS[0], "--max-tokens", "8", "--temperature", "0", "--cpu-threads", "1"]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    more = ["--tensor-parallel-size", "2", *(["--kv-memory", "1KiB"] if ends == "badly" else [])]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert ends == "badly" or (0, alone.stdout) == (done.returncode, done.stdout)
    assert ends == "well" or (done.returncode and "kv_memory" in done.stderr)


async def test_a_megatron_tree_is_served_over_another_number_of_ranks(
    start: Start, connect: Connect, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Written for two ranks, served over four: the model's own text."""
    tree = tmp_path / "tree"
    convert = [COMMAND, "convert", DEMO, tree, "--to", "megatron", "--tensor-parallel", "2"]
    await asyncio.to_thread(subprocess.run, convert, check=True)
    assert 2 == len(list(tree.glob("release/mp_rank_*")))
    server = start(str(tree), "--tensor-parallel-size", "4", "--cache-dir", str(tmp_path / "cache"))
    body = {"max_tokens": 16, "temperature": 0}
    answer = await connect(server).complete(prompt=PROMPTS[0], **body)
    reference = Reference(DEMO, tokenizer)
    reference.check([answer["choices"][0]["text"]], tokenizer.encode(PROMPTS[:1])[0], 0, **body)
