"""One of two engines that dies, freezes or is given up: the other serves on, and takes what was not begun."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.faults.conftest import Watching
from tests.faults.watch import Load, Watch
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, Start, survivors, until_drained

_CACHE_BYTES = 26 * 2**20  # of two sequences, whole
_TWO = ("--data-parallel-size", "2", "--max-num-seqs", "2")


@pytest.fixture(scope="module")
def pair(scripted_model: ScriptedModel) -> Iterator[Server]:
    """Two engines of two sequences each, which may die as often as tests kill them."""
    yield from until_drained(
        Server(
            *(str(scripted_model.folder), *_TWO, "--kv-memory", str(_CACHE_BYTES)),
            *("--stall-seconds", "2", "--restart-window-seconds", "0.1"),
        )
    )


async def loaded(watch: Watch) -> Load:
    """A load on both, once both are ready."""
    await watch.wait_phases("ready", "ready")
    return await watch.load()


async def check(watch: Watch, load: Load) -> None:
    """Of three that ran on two engines, those of the dead one ended with an error, the others' answers are whole.

    All that waited was answered, while no engine was restarted yet, and readiness never fell.
    """
    answers = [await task for task in (*load.running, *load.waiting)]
    whole = [answer.whole for answer in answers]
    assert [True, True] == whole[3:]
    assert any(whole[:3])
    assert not all(whole[:3])
    assert not watch.refusals


async def test_one_that_is_killed(pair: Server, watching: Watching) -> None:
    """Either of them, again and again."""
    for number in (0, 1, 0):
        async with watching(pair, cache_bytes=_CACHE_BYTES) as watch:
            restarts = await watch.client.metric("engine_restarts_total")
            load = await loaded(watch)
            pair.engines[number].kill()
            await check(watch, load)
            await watch.restarted(since=restarts)
        assert not watch.refusals


async def test_one_that_freezes(pair: Server, watching: Watching) -> None:
    """It alone is killed and restarted, after stall_seconds."""
    async with watching(pair, cache_bytes=_CACHE_BYTES) as watch:
        before = await watch.client.metric_by_engine("engine_restarts_total")
        load = await loaded(watch)
        frozen, other = pair.engines
        frozen.suspend()
        await check(watch, load)
        assert not survivors([frozen], seconds=2)
        await watch.restarted(since=sum(before))
        assert other.is_running()
        after = await watch.client.metric_by_engine("engine_restarts_total")
        assert [0, 1] == sorted(now - then for now, then in zip(after, before, strict=True))
    assert not watch.refusals


async def test_both_that_are_killed(pair: Server, watching: Watching) -> None:
    """Readiness falls and rises by itself; what neither had begun is answered by whoever is there first."""
    async with watching(pair, cache_bytes=_CACHE_BYTES) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        load = await loaded(watch)
        for engine in pair.engines:
            engine.suspend()  # so that neither does anything between the two deaths
        for engine in pair.engines:
            engine.kill()
        await watch.client.wait_status("/readyz", 503)
        refused = await watch.ask(max_tokens=1)
        assert 503 == refused.status
        for task in load.running:
            assert (await task).error is not None
        await watch.restarted(since=restarts + 1)


async def test_one_that_dies_too_often(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """It is given up, which the log and the metrics say, and the other serves on; then that too, and all is over."""
    server = start(str(scripted_model.folder), *_TWO, "--max-restarts", "1")
    async with watching(server) as watch:
        first, other = server.engines
        first.kill()
        await watch.client.wait_metric("engine_restarts_total", 1)
        (again,) = [engine for engine in server.engines if engine != other]
        again.kill()
        await watch.wait_phases("failed", "ready")
        assert [200, 200] == [await watch.client.status(path) for path in ("/livez", "/readyz")]
        assert {"status": "ok", "phase": "ready", "progress": 1.0} == (await watch.client.http.get("/readyz")).json()
        messages = [json.loads(line)["message"] for line in server.log]
        assert "engine 0 ended 2 times (exit code -9); giving up" in messages
        assert "the service goes on with 1 of 2 engines" in messages
    assert not watch.refusals
    async with watching(server, gives_up=True) as watch:
        asked = watch.ask()
        await watch.client.wait_metric("requests_running", 1)
        other.kill()
        assert (await asked).error is not None
        await watch.client.wait_metric("engine_restarts_total", 2)
        (last,) = server.engines
        last.kill()
        await watch.client.wait_status("/livez", 503)
        await watch.wait_phases("failed", "failed")
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_one_that_is_killed_in_a_drain(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """What it had not begun the other answers; then 0."""
    server = start(str(scripted_model.folder), *_TWO)
    async with watching(server, ends=True) as watch:
        load = await loaded(watch)
        server.process.terminate()
        await watch.client.wait_status("/readyz", 503)
        server.engines[0].kill()
        for task in load.waiting:
            assert (await task).whole
        assert any([(await task).whole for task in load.running])
        assert await asyncio.to_thread(server.wait, 20) == 0
