"""Two engines behind one port, healthy: both answer, a batch is shared out, prefixes are found, and both drain."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import Client, Connect, Server, Start, until_drained

TWO = ("--data-parallel-size", "2")


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """The demo model on two engines."""
    yield from until_drained(Server(*TWO, "--max-num-seqs", "8"))


@pytest.fixture
def both(pair: Server, connect: Connect) -> Client:
    return connect(pair)


async def since(client: Client, name: str, before: list[float]) -> list[float]:
    """By how much the metric of each engine has grown, once both do nothing more."""
    await client.wait_metric("requests_running", 0)
    return [now - then for now, then in zip(await client.metric_by_engine(name), before, strict=True)]


async def test_a_batch_is_answered_by_both_engines(pair: Server, both: Client, demo: Client) -> None:
    """The prompts of one request, in their order and with their samples; the text is that of a single engine."""
    assert 2 == len(pair.engines)
    body = {"prompt": [f"Article {number}" for number in range(12)], "max_tokens": 6, "temperature": 0, "n": 2}
    before = await both.metric_by_engine("steps_total")
    choices = (await both.complete(**body))["choices"]
    assert list(range(24)) == [choice["index"] for choice in choices]
    expected = (await demo.complete(**body))["choices"]
    assert [choice["text"] for choice in expected] == [choice["text"] for choice in choices]
    assert all(num_steps >= 6 for num_steps in await since(both, "steps_total", before))


async def test_scores_and_beams(both: Client, demo: Client) -> None:
    """Items of a score are shared out; a beam search stays where its prefix is. Both are those of a single engine."""
    items = [{"context": f"Section {number} of the", "continuation": " act"} for number in range(10)]
    beams = {"prompts": ["The Senate"], "tokens_to_generate": 6, "beam_width": 3}
    got, expected = [
        (
            (await client.http.post("/v1/score", json={"items": items})).json()["results"],
            (await client.http.put("/api", json=beams)).json()["text"],
        )
        for client in (both, demo)
    ]
    assert [one["tokens"] for one in expected[0]] == [one["tokens"] for one in got[0]]
    for one, other in zip(expected[0], got[0], strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
    assert expected[1] == got[1]


async def test_a_prefix_is_found_again(both: Client) -> None:
    """Of eight prompts seen before, in another order, all blocks are found, though two engines have half of them."""
    prompts = [[1000 + number] * 80 for number in range(8)]
    await asyncio.gather(*(both.complete(prompt=prompt, max_tokens=1) for prompt in prompts))
    before = await both.metric_by_engine("prefix_cache_hits_total")
    answers = [await both.complete(prompt=[*prompt, 5], max_tokens=1) for prompt in reversed(prompts)]
    assert {80} == {answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers}
    await both.wait_metric("prefix_cache_hits_total", sum(before) + 8 * 80)
    assert all(await since(both, "prefix_cache_hits_total", before)), "both have some"


async def test_a_drain_waits_for_both(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """What runs on each and what waits for each is answered whole; then 0, and nobody is left."""
    server = start(str(scripted_model.folder), *TWO, "--max-num-seqs", "1")
    client = connect(server)
    streams = [asyncio.create_task(client.stream(prompt="", max_tokens=150)) for _ in range(4)]
    await client.wait_metric("requests_running", 2)
    await client.wait_metric("requests_waiting", 2)
    assert [1, 1] == await client.metric_by_engine("requests_running")
    server.process.terminate()
    await client.wait_status("/readyz", 503)
    assert not any(stream.done() for stream in streams)
    for stream in streams:
        assert scripted_model.text(150) == (await stream).text()
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_second_signal_ends_both(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """At once, with an error for what is open; the exit code is 1, and nobody is left."""
    server = start(str(scripted_model.folder), *TWO, "--max-num-seqs", "1")
    client = connect(server)
    streams = [asyncio.create_task(client.stream(**LONGEST)) for _ in range(2)]
    await client.wait_metric("requests_running", 2)
    server.process.terminate()
    await client.wait_status("/readyz", 503)
    server.process.terminate()
    for stream in streams:
        assert scripted_model.is_broken_off(await stream)
    assert await asyncio.to_thread(server.wait, 10) == 1


async def test_a_model_that_cannot_be_used_ends_the_service(start: Start, scripted_model: ScriptedModel) -> None:
    """Whichever engine finds it first: the exit code is 2, and nobody is left."""
    server = start(str(scripted_model.folder), *TWO, "--kv-memory", "1MiB", ready=False)
    assert await asyncio.to_thread(server.wait, 60) == 2
    assert any("kv_memory: 1048576 bytes hold" in json.loads(line)["message"] for line in server.log)
