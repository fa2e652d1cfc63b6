"""An engine that dies, as OpenAI's client sees it too; tests/faults has all that may go wrong."""

import asyncio

import openai

from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import Client, Server, assert_unavailable


async def test_an_engine_that_is_killed(
    scripted_server: Server, scripted: Client, scripted_model: ScriptedModel
) -> None:
    """What it worked on ends with an error, what it had not begun is answered after the restart, and all goes on.

    Readiness falls and rises by itself, liveness stays; OpenAI's client, told to wait, is answered by its own retries.
    """
    restarts = await scripted.metric("engine_restarts_total")
    stream = asyncio.create_task(scripted.stream(**LONGEST))
    plain = asyncio.create_task(scripted.post(**LONGEST))
    await scripted.wait_metric("requests_running", 2)
    queued = asyncio.create_task(scripted.complete(prompt="", max_tokens=20))
    queued_stream = asyncio.create_task(scripted.stream(prompt="", max_tokens=30, n=2))
    await scripted.wait_metric("requests_waiting", 3)
    scripted_server.engine.kill()

    await scripted.wait_status("/readyz", 503)
    assert await scripted.status("/livez") == 200
    assert await scripted.status("/v1/models") == 200
    assert scripted_model.is_broken_off(await stream)
    assert (await plain).status_code == 500
    assert (await plain).json()["error"]["type"] == "server_error"
    assert_unavailable(await scripted.post(prompt=""))
    assert not queued.done()
    async with openai.AsyncOpenAI(base_url=f"{scripted_server.url}/v1", api_key="none", max_retries=8) as client:
        (model,) = (await client.models.list()).data
        answer = await client.completions.create(model=model.id, prompt="", max_tokens=9)
    assert scripted_model.text(9) == answer.choices[0].text

    await scripted.wait_status("/readyz", 200)
    assert scripted_model.text(20) == (await queued)["choices"][0]["text"]
    for choice in range(2):
        assert scripted_model.text(30) == (await queued_stream).text(choice)
    assert {0: "length", 1: "length"} == (await queued_stream).finish_reasons
    assert restarts + 1 == await scripted.metric("engine_restarts_total")
    await scripted.wait_metric("kv_cache_usage_ratio", 0)
    assert (0, 0) == (await scripted.metric("requests_running"), await scripted.metric("requests_waiting"))
