"""The way out of a process: who is waited for, who is cut, and how long the port stays open."""

import asyncio

import pytest

from service.api.drain import Drain
from tests.api.conftest import Service


async def test_it_begins_once(api: Service) -> None:
    """The port's time runs from the first."""
    drain = Drain(api.client, unready_seconds=1000)
    assert 1000 == drain.unready_seconds_left
    assert not api.client.draining
    drain.begin()
    first = drain.unready_seconds_left
    assert api.client.draining
    await asyncio.sleep(0.01)
    drain.begin()
    assert 0 < drain.unready_seconds_left <= first - 0.01


async def test_what_is_open_at_the_end_is_cut(api: Service) -> None:
    """With a 503 that says try again; it is counted, and the port stays open until balancers have noticed."""
    api.engine.gate.clear()
    requests = [asyncio.ensure_future(api.http.post("/v1/completions", json={"prompt": "x", "n": 3})) for _ in "ab"]
    await api.engine.wait_for(lambda: 2 == len(api.engine.submitted))
    drain = Drain(api.client, unready_seconds=0.2)
    await drain.finish(0.01)
    assert 0 == drain.unready_seconds_left
    for response in await asyncio.gather(*requests):
        assert (503, "1") == (response.status_code, response.headers["retry-after"])
    text = (await api.http.get("/metrics")).text
    assert "megatron_gpt2_drain_cut_requests_total 2.0" in text
    assert "megatron_gpt2_requests_open 0.0" in text


@pytest.mark.parametrize("seconds", [0, 60])
async def test_nothing_is_cut_where_nothing_is_open(api: Service, seconds: float) -> None:
    await Drain(api.client, unready_seconds=0).finish(seconds)
    assert "megatron_gpt2_drain_cut_requests_total 0.0" in (await api.http.get("/metrics")).text


async def test_a_wait_cuts_nothing(api: Service) -> None:
    """Nor does one that is cancelled; what was open then is still waited for by the next."""
    drain = Drain(api.client, unready_seconds=0)
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.complete(prompt="x"))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    drain.begin()
    await drain.wait(0.01)
    cancelled = asyncio.ensure_future(drain.wait(60))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert 1 == api.client.num_open
    finishing = asyncio.ensure_future(drain.finish(60))
    api.engine.gate.set()
    await finishing
    assert 16 == (await running)["usage"]["completion_tokens"]
    assert 0 == api.client.num_cut
