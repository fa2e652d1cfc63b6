"""The asyncio face of the engine, against the engine's own loop in a thread."""

import asyncio
import functools
import socket
import threading
from contextlib import closing

import msgspec
import pytest

from service.engine.channel import frame
from service.engine.client import EngineClient, EngineDraining, EngineFailed, EngineNotReady, EngineUnavailable
from service.engine.request import Delta, EngineStats, Finish, Publish, Ready, SamplingParams
from tests.engine.attached import LONG, PARAMS, Attach, collect, request, tokens, until
from tests.engine.loop_thread import MODEL
from tests.engine.oracle import Ask, alone, answers


async def test_a_group_of_requests_gets_all_its_tokens(client: EngineClient, attach: Attach) -> None:
    """Every choice of every request, each with one finish; and the engine is told nothing when all is over."""
    engine = await attach()
    group = [request(client, n=2), request(client, prompt=(9,) * 30)]
    with closing(client.submit(group, PARAMS)) as stream:
        deltas = await collect(stream)
    for each in group:
        assert alone(Ask(each, PARAMS)) == [tokens(deltas[each.id, choice]) for choice in range(each.n)]
        assert all([Finish.LENGTH] == [d.finish for d in deltas[each.id, c] if d.finish] for c in range(each.n))
        assert stream.started_at[each.id] >= stream.submitted_at
    await client.wait_idle()
    await until(lambda: client.stats.num_steps > 0 and client.stats.num_blocks_used == 0)
    assert engine.thread.is_alive()


async def test_leaving_aborts_what_has_not_finished(client: EngineClient, attach: Attach) -> None:
    """The engine hears of it, and the blocks come back long before the requests' natural end."""
    gate = threading.Semaphore(10)
    await attach(before_step=gate.acquire)
    with closing(client.submit([request(client, n=3)], LONG)) as stream:
        async for _ in stream:
            break
    gate.release(5)
    await client.wait_idle()
    await until(lambda: client.stats.num_running == 0 and client.stats.num_blocks_used == 0 < client.stats.num_steps)
    assert client.stats.num_steps < 50


async def test_an_aborted_choice_is_silent_and_the_others_go_on(client: EngineClient, attach: Attach) -> None:
    """As when a stop string is found in one of n."""
    await attach()
    each = request(client, n=3)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    with closing(client.submit([each], LONG)) as stream:
        async for batch in stream:
            for delta in batch:
                seen[delta.choice] += delta.token_ids
                if delta.choice == 1:
                    stream.abort(each.id, 1)
                    length = len(seen[1])
    expected = alone(Ask(each, LONG))
    assert [expected[0], expected[2]] == [seen[0], seen[2]]
    assert expected[1][:length] == seen[1]


async def test_a_slow_reader_finds_its_deltas_merged(client: EngineClient, attach: Attach) -> None:
    """At most one Delta a sequence waits, however many tokens it has become."""
    await attach()
    each = request(client, n=2)
    with closing(client.submit([each], LONG)) as stream:
        await until(lambda: len(stream._mailbox) == 2 and all(d.finish for d in stream._mailbox.values()))
        deltas = await collect(stream)
    assert [1, 1] == [len(found) for found in deltas.values()]
    assert alone(Ask(each, LONG)) == [tokens(deltas[each.id, choice]) for choice in range(2)]


async def test_when_the_engine_dies_the_begun_end_and_the_queued_are_served_by_the_next(
    client: EngineClient, attach: Attach
) -> None:
    """Nothing was sent of the queued and they were in no step, so nothing can be computed twice for a client."""
    gate = threading.Semaphore(3)
    first = await attach(max_num_seqs=1, before_step=gate.acquire)
    begun, queued = request(client), request(client, prompt=(4, 5))
    other, everything = SamplingParams(9, temperature=0, num_logprobs=1, ignore_eos=True), b"\xff" * 13
    with (
        closing(client.submit([begun], PARAMS)) as one,
        closing(client.submit([queued], other, completing_ids=everything)) as two,
    ):
        await until(lambda: begun.id in one.started_at)
        first.die(gate)
        deltas = await collect(one)
        last = deltas[begun.id, 0][-1]
        assert Finish.ERROR is last.finish
        assert "engine stopped" in (last.error or "")
        await until(lambda: not client.ready)
        with pytest.raises(EngineNotReady):
            client.submit([request(client)], PARAMS)
        await attach()
        assert client.engines[0].num_restarts == 1
        served = await collect(two)
        whole = functools.reduce(Delta.then, served[queued.id, 0])
        (expected,) = answers(Ask(queued, other))
        assert (tuple(expected.tokens), expected.logprobs) == (whole.token_ids, whole.logprobs)
        assert all(delta.urgent for delta in served[queued.id, 0])


async def test_of_a_group_only_what_had_not_begun_is_submitted_again(client: EngineClient, attach: Attach) -> None:
    """The next engine computes nothing for a sequence that has ended."""
    gate = threading.Semaphore(3)
    first = await attach(max_num_seqs=1, before_step=gate.acquire)
    begun, queued = request(client), request(client, prompt=(4, 5))
    with closing(client.submit([begun, queued], PARAMS)) as stream:
        await until(lambda: begun.id in stream.started_at)
        first.die(gate)
        await until(lambda: not client.ready)
        second = await attach()
        deltas = await collect(stream)
    assert Finish.ERROR is deltas[begun.id, 0][-1].finish
    assert alone(Ask(queued, PARAMS)) == [tokens(deltas[queued.id, 0])]
    assert {2} == {num for batch in second.runner.launches for num in batch.sampling["num_prompt"].tolist()}


async def test_a_queued_request_is_submitted_again_once(client: EngineClient, attach: Attach) -> None:
    """A second death ends it with an error, so no request can outlive engine after engine."""
    blocker, queued = request(client), request(client)
    gate = threading.Semaphore(0)
    engine = await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([blocker], PARAMS)), closing(client.submit([queued], PARAMS)) as stream:
        for _ in range(2):
            await until(lambda: client.ready)
            engine.die(gate)
            await until(lambda: not client.ready)
            gate = threading.Semaphore(0)
            if stream._open:
                engine = await attach(max_num_seqs=1, before_step=gate.acquire)
        deltas = await collect(stream)
    assert Finish.ERROR is deltas[queued.id, 0][-1].finish
    gate.release(1000)


async def test_a_silent_engine_with_open_work_is_a_stall(
    client: EngineClient, attach: Attach, stalls: list[float]
) -> None:
    """on_stall is called once, not before stall_seconds; an idle engine may be silent for ever."""
    gate = threading.Semaphore(0)
    await attach(before_step=gate.acquire)
    await asyncio.sleep(0.3)
    assert [] == stalls
    began = asyncio.get_running_loop().time()
    with closing(client.submit([request(client)], PARAMS)):
        await until(lambda: bool(stalls))
        assert stalls[0] - began >= 0.19
        assert client.engines[0].last_message_age_seconds >= 0.19
        gate.release(1000)
    assert len(stalls) == 1


async def test_a_reader_that_takes_its_time_is_no_stall(
    client: EngineClient, attach: Attach, stalls: list[float]
) -> None:
    """The engine has done its part and is silent; whoever has not read the answer yet is not its fault."""
    await attach()
    with closing(client.submit([request(client)], PARAMS)) as stream:
        await until(lambda: not stream._open)
        await asyncio.sleep(0.3)
        assert [] == stalls
        assert client.engines[0].last_message_age_seconds == 0
        idle = asyncio.ensure_future(client.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        assert await collect(stream)
    await idle


async def test_nothing_is_taken_before_ready_while_draining_or_after_failure(
    client: EngineClient, attach: Attach
) -> None:
    """Each with its own error, all of one family."""
    with pytest.raises(EngineNotReady, match="phase: start"):
        client.submit([request(client)], PARAMS)
    await attach()
    client.drain()
    with pytest.raises(EngineDraining):
        client.submit([request(client)], PARAMS)
    client.give_up(0)
    with pytest.raises(EngineFailed):
        client.submit([request(client)], PARAMS)
    assert issubclass(EngineFailed, EngineUnavailable)


async def test_draining_lets_open_work_finish_and_abandoning_ends_it(client: EngineClient, attach: Attach) -> None:
    """wait_idle returns when the last request is answered; abandon answers all with an error and frees the engine."""
    gate = threading.Semaphore(0)
    await attach(before_step=gate.acquire)
    with closing(client.submit([request(client)], PARAMS)) as stream:
        client.drain()
        idle = asyncio.ensure_future(client.wait_idle())
        gate.release(1000)
        deltas = await collect(stream)
        assert [Finish.LENGTH] == [found[-1].finish for found in deltas.values()]
        assert not idle.done()
    await idle


async def test_abandon_ends_everything_with_an_error(client: EngineClient, attach: Attach) -> None:
    """Begun or queued; and the engine's blocks come back."""
    gate = threading.Semaphore(5)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client), request(client)], PARAMS)) as stream:
        await until(lambda: bool(stream.started_at))
        client.abandon("the service is shutting down")
        deltas = await collect(stream)
    assert ["the service is shutting down"] * 2 == [found[-1].error for found in deltas.values()]
    gate.release(1000)
    await until(lambda: client.stats.num_steps > 0 and client.stats.num_running + client.stats.num_waiting == 0)


async def test_the_last_words_of_an_engine_are_its_own(client: EngineClient) -> None:
    """Stats that it left in its channel are not taken for those of the one attached after it."""
    heard: list[tuple[int, int]] = []
    client.on_stats = lambda _, stats: heard.append((client.engines[0].num_restarts, stats.num_steps))
    encoder = msgspec.msgpack.Encoder()
    peers = []
    for num_steps in (50, 3):
        ours, theirs = socket.socketpair()
        for message in (Ready(MODEL), Publish(stats=EngineStats(num_steps=num_steps))):
            theirs.sendall(frame(message, encoder))
        client.attach(ours)
        peers.append(theirs)
    peers[0].close()
    await until(lambda: len(heard) == 2)
    assert [(0, 50), (1, 3)] == heard
    peers[1].close()


async def test_a_malformed_message_counts_as_the_engines_end(client: EngineClient) -> None:
    """The channel is closed, which ends the engine, and readiness is gone."""
    ours, theirs = socket.socketpair()
    client.attach(ours)
    theirs.setblocking(False)
    theirs.send(b"\0\0\0\2\x91\x01")
    loop = asyncio.get_running_loop()
    assert await loop.sock_recv(theirs, 1) == b""
    assert client.phase == "restart"
    theirs.close()


async def test_ids_of_two_api_processes_never_meet(client: EngineClient) -> None:
    """The process's number is in the id's high bits."""
    assert 3 == client.new_request_id() >> 48
