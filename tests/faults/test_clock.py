"""A wall clock that jumps by hours, forth and back, at every look and in every process: nothing is decided by it."""

import asyncio
import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Start, Streamed


async def test_a_wall_clock_that_jumps(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching
) -> None:
    """Answers, deadlines, queue times, keep-alives, the stall watchdog, restarts, metrics and the drain go on."""
    began_at = time.monotonic()
    server = start(
        *(str(scripted_model.folder), "--max-num-seqs", "4", "--stall-seconds", "2"),
        *("--stream-keep-alive-seconds", "0.2"),
        environment=triggers.environment(FAULTS_CLOCK="1"),
    )
    async with watching(server) as watch:
        load = await watch.load()
        late = watch.ask(timeout_seconds=1)
        impatient = watch.ask(queue_timeout_seconds=1, stream=True)
        comments, streamed = await _read_events(watch.client.http, max_tokens=5)
        assert comments, "it waited for its turn for longer than a keep-alive's time"
        assert scripted_model.text(5) == streamed.text()
        assert (await late).status == 504
        answer = await impatient
        assert 429 == answer.status or answer.error["code"] == "queue_timeout"
        for request in (*load.running, *load.waiting):
            assert (await request).whole
        watch.answers.remove(impatient)
    async with watching(server) as watch:
        stream = watch.ask(stream=True)
        await watch.client.wait_metric("requests_running", 1)
        server.engine.suspend()
        assert (await stream).error is not None
        await watch.restarted(since=0)
        lived = time.monotonic() - began_at
        sums = _sums((await watch.client.http.get("/metrics")).text)
        for name in ("time_to_first_token", "time_between_tokens", "request", "queue", "step"):
            assert 0 <= sums[f"megatron_gpt2_{name}_seconds_sum"] < 100 * lived, name
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 20) == 0


def _sums(text: str) -> dict[str, float]:
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if sample.name.endswith("_sum")}


async def _read_events(http: Any, *, max_tokens: int) -> tuple[int, Streamed]:
    """How many keep-alive comments came, and the stream."""
    comments, streamed = 0, Streamed()
    body = {"prompt": "", "max_tokens": max_tokens, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            comments += line.startswith(":")
            streamed.take(line)
    return comments, streamed
