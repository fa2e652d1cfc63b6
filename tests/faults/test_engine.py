"""Engine processes that die or freeze: who asked is told, who waited is answered, and nobody is left behind."""

import asyncio
import shutil
from pathlib import Path

from tests.api.raw_http import request
from tests.faults.conftest import Watching
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Connect, Server, Start, eventually, survivors

_FOUR = ("--max-num-seqs", "4")


async def test_an_engine_that_is_killed(shared_server: Server, watching: Watching) -> None:
    """Again and again: readiness falls and rises by itself, and what it had not begun the next one answers."""
    async with watching(shared_server) as watch:
        for _ in range(2):
            restarts = await watch.client.metric("engine_restarts_total")
            load = await watch.load()
            shared_server.engine.kill()
            await watch.client.wait_status("/readyz", 503)
            refused = await watch.ask(max_tokens=1)
            assert refused.status == 503
            await load.running_failed()
            await watch.restarted(since=restarts)


async def test_an_engine_that_freezes(shared_server: Server, watching: Watching) -> None:
    """Silent for stall_seconds with open work, it is killed and restarted; a request that it never saw is answered."""
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        stream = watch.ask(stream=True)
        await watch.client.wait_metric("requests_running", 1)
        frozen = shared_server.engine
        frozen.suspend()
        unseen = watch.ask(max_tokens=20)
        assert (await stream).error is not None
        assert not survivors([frozen], seconds=2)  # its channel closes a moment before it is gone
        assert (await unseen).whole
        await watch.restarted(since=restarts)


async def test_an_engine_that_was_replaced_unseen(shared_server: Server, watching: Watching) -> None:
    """An API process that stood still meanwhile finds the old one's end and the new one's readiness at once."""
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        num_lines = len(shared_server.log)
        stream = watch.ask(stream=True)
        await watch.client.wait_metric("requests_running", 1)
        api, old = shared_server.api, shared_server.engine

        async def replaced() -> bool:
            return any("model loaded in" in line for line in shared_server.log[num_lines:])

        api.suspend()
        try:
            old.kill()
            await eventually(replaced, seconds=60)
        finally:
            api.resume()
        assert (await stream).error is not None
        await watch.restarted(since=restarts)


async def test_an_engine_that_is_killed_in_the_midst_of_a_message(shared_server: Server, watching: Watching) -> None:
    """Of a request that is more than a socket holds, it has read a part; the next engine gets it whole."""
    prompts = [[50000 - number] * 700 for number in range(2) for _ in range(60)]
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        num_tokens = await watch.client.metric("prompt_tokens_total")
        shared_server.engine.suspend()
        large = watch.ask(prompt=prompts, max_tokens=1)

        async def was_sent() -> bool:
            return await watch.client.metric("prompt_tokens_total") > num_tokens

        await eventually(was_sent)
        shared_server.engine.kill()
        assert (await large).whole
        assert len((await large).texts) == len(prompts)
        await watch.restarted(since=restarts)


async def test_an_engine_that_dies_too_often(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """Past max_restarts nothing is tried again: liveness falls, requests end or are refused; SIGTERM still works."""
    server = start(str(scripted_model.folder), *_FOUR, "--max-restarts", "2")
    async with watching(server, gives_up=True) as watch:
        load = await watch.load()
        for restarts in range(2):
            server.engine.kill()
            await watch.client.wait_metric("engine_restarts_total", restarts + 1)
        server.engine.kill()
        await watch.client.wait_status("/livez", 503)
        for request in (*load.running, *load.waiting):
            assert (await request).error is not None
        assert (await watch.client.http.get("/readyz")).json()["phase"] == "failed"
        assert (await watch.ask()).status == 503
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_an_engine_that_dies_while_it_loads(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """It is started again, and counted."""
    server = start(str(scripted_model.folder), ready=False)
    client = connect(server)
    for restarts in range(2):
        await client.wait_status("/livez", 200)
        await client.wait_metric("engine_restarts_total", restarts)
        server.engine.kill()
    await client.wait_status("/readyz", 200)
    assert await client.metric("engine_restarts_total") == 2
    assert scripted_model.text(5) == (await client.complete(prompt="", max_tokens=5))["choices"][0]["text"]


async def test_a_model_that_cannot_be_used_ends_the_service(start: Start, scripted_model: ScriptedModel) -> None:
    """No restart would mend it: the exit code is 2, the log names the setting, and nobody is left."""
    server = start(str(scripted_model.folder), "--kv-memory", "1MiB", ready=False)
    await server.wait_children()
    assert await asyncio.to_thread(server.wait, 60) == 2
    assert any("kv_memory: 1048576 bytes hold" in line for line in server.log)


async def test_what_a_running_service_cannot_load_again_it_tries_again(
    start: Start, scripted_model: ScriptedModel, watching: Watching, tmp_path: Path
) -> None:
    """A folder that is away for a while ends a first start, but not a service that has been ready."""
    folder = tmp_path / "model"
    shutil.copytree(scripted_model.folder, folder)
    server = start(str(folder), *_FOUR)
    async with watching(server) as watch:
        load = await watch.load()
        folder.rename(tmp_path / "away")
        server.engine.kill()
        await watch.client.wait_metric("engine_restarts_total", 2)
        assert await watch.client.status("/readyz") == 503
        (tmp_path / "away").rename(folder)
        await load.running_failed()


async def test_a_reader_that_stops_reading_is_no_fault_of_the_engine(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """Its answer waits for it; the engine, which has nothing more to do, is not taken for stalled."""
    name = "n" * 8000  # in every event, so that a few hundred are more than sockets hold
    server = start(str(scripted_model.folder), "--stall-seconds", "1", "--served-model-name", name)
    client = connect(server)
    body = {"prompt": "", "max_tokens": 250, "ignore_eos": True, "n": 4, "stream": True}
    with server.open_connection(receive_bytes=4096) as reader:
        reader.sendall(request(body))
        await client.wait_metric("requests_running", 4)
        await client.wait_metric("requests_running", 0, seconds=60)
        await asyncio.sleep(2.5)
        assert await client.metric("engine_restarts_total") == 0
        assert await client.status("/readyz") == 200
        assert await client.metric("requests_open") == 1, "it was to be unread all the while"
