"""A tokenizer that raises what no check has foreseen: as it is loaded, at one request, in the midst of an answer."""

import asyncio

from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, Start

_TIMES = 6


async def test_a_tokenizer_that_cannot_encode(
    shared_server: Server, shared_triggers: Triggers, watching: Watching
) -> None:
    """The request is a 500 that tells nothing of the inside; the stream beside it does not notice."""
    async with watching(shared_server) as watch:
        beside = watch.ask(stream=True, max_tokens=300)
        await watch.client.wait_metric("requests_running", 1)
        for number in range(_TIMES):
            shared_triggers.pull("encode")
            failed = await watch.ask(max_tokens=5, stream=bool(number % 2))
            assert failed.status == 500
            assert failed.error is not None
            assert "injected" not in failed.error["message"]
        assert (await beside).whole


async def test_a_tokenizer_that_cannot_decode(
    shared_server: Server, shared_triggers: Triggers, watching: Watching
) -> None:
    """A stream under way ends with an error event, a plain request with a 500; the engine stops working on either."""
    async with watching(shared_server) as watch:
        for _ in range(_TIMES):
            stream = watch.ask(stream=True)
            await watch.client.wait_metric("requests_running", 1)
            shared_triggers.pull("decode")
            assert (await stream).streamed is not None
            await watch.client.wait_metric("requests_running", 0)
            shared_triggers.pull("decode")
            plain = watch.ask()
            assert (await plain).status == 500
            await watch.client.wait_metric("requests_running", 0)
            for failed in (await stream, await plain):
                assert failed.error is not None
                assert "injected" not in failed.error["message"]


async def test_a_tokenizer_that_the_api_cannot_load(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching
) -> None:
    """Nothing can be served then: liveness falls, so that whoever runs the service sees it, and SIGTERM still works."""
    triggers.pull("load_tokenizer")
    server = start(str(scripted_model.folder), ready=False, environment=triggers.environment())
    async with watching(server, gives_up=True) as watch:
        await watch.client.wait_status("/livez", 503)
        assert (await watch.ask(max_tokens=5)).status == 503
    assert any("the tokenizer cannot be used" in line for line in server.log)
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_tokenizer_that_the_engine_cannot_load_at_once(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching
) -> None:
    """It may be better the next time: the engine is restarted, and then serves."""
    triggers.pull("read_tokenizer")
    server = start(str(scripted_model.folder), environment=triggers.environment())
    async with watching(server) as watch:
        assert await watch.client.metric("engine_restarts_total") == 1
