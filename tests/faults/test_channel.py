"""Malformed messages between the processes: the engine is restarted, and every request answered."""

import msgspec
import pytest

from service.engine.channel import frame
from service.engine.request import Abort, Publish
from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.service.server import Server

_ENCODER = msgspec.msgpack.Encoder()
_FORMS = {
    "no msgpack": bytes([0, 0, 0, 2, 0xC1, 0xC1]),
    "over the bound": b"\xff\xff\xff\xff",
    "longer than it is": (200_000_000).to_bytes(4, "big"),  # all that follows seems to belong to it
    "shorter than it is": bytes([0, 0, 0, 1]) + frame(Abort(1), _ENCODER),
}
_TO_API = _FORMS | {"of the other direction": frame(Abort(1), _ENCODER)}
_TO_ENGINE = _FORMS | {"of the other direction": frame(Publish(), _ENCODER)}


@pytest.mark.parametrize("malformed", _TO_API.values(), ids=_TO_API)
async def test_a_malformed_message_to_the_api(
    shared_server: Server, shared_triggers: Triggers, watching: Watching, malformed: bytes
) -> None:
    """The API cannot know what it lost: what ran ends with an error, what waited is answered by the next engine."""
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        load = await watch.load()
        shared_triggers.pull("to_api", malformed.hex())
        await load.running_failed()
        await watch.restarted(since=restarts)


@pytest.mark.parametrize("malformed", _TO_ENGINE.values(), ids=_TO_ENGINE)
async def test_a_malformed_message_to_the_engine(
    shared_server: Server, shared_triggers: Triggers, watching: Watching, malformed: bytes
) -> None:
    """The engine ends, or where it waits for the rest of a message that never comes, is found stalled."""
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        load = await watch.load()
        shared_triggers.pull("to_engine", malformed.hex())
        unseen = watch.ask(max_tokens=25)
        for waiting in (*load.waiting, unseen):
            assert (await waiting).whole
        await watch.restarted(since=restarts)
