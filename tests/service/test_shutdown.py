"""SIGTERM: drain, then end with nobody left. tests/faults/test_signals.py has it under full load, and twice."""

import asyncio

from tests.service.scripted_model import ScriptedModel
from tests.service.server import Connect, Start, assert_unavailable


async def test_a_drain_answers_what_is_open(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """Streams and plain requests are answered whole, queued ones too; new ones are 503, readiness too; then 0."""
    server = start(str(scripted_model.folder), "--max-num-seqs", "2")
    client = connect(server)
    stream = asyncio.create_task(client.stream(prompt="", max_tokens=200))
    plain = asyncio.create_task(client.complete(prompt="", max_tokens=150))
    await client.wait_metric("requests_running", 2)
    queued = asyncio.create_task(client.complete(prompt="", max_tokens=7))
    await client.wait_metric("requests_waiting", 1)
    server.process.terminate()
    await client.wait_status("/readyz", 503)
    refused, refused_stream = await asyncio.gather(client.post(prompt=""), client.post(prompt="", stream=True))
    assert_unavailable(refused)
    assert_unavailable(refused_stream)
    assert await client.status("/livez") == 200
    assert await client.metric("draining") == 1
    assert not stream.done(), "the drain was to be seen while a stream was open"
    assert scripted_model.text(200) == (await stream).text()
    assert {0: "length"} == (await stream).finish_reasons
    assert (await stream).done
    assert scripted_model.text(150) == (await plain)["choices"][0]["text"]
    assert scripted_model.text(7) == (await queued)["choices"][0]["text"]
    assert await asyncio.to_thread(server.wait, 10) == 0
