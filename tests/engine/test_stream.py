"""How a stream is read, by the engine's own loop in a thread: deadlines, and what the reader finds merged."""

import asyncio
import threading
import time
from contextlib import closing

import msgspec
import pytest

import service.engine.stream as stream_module
from service.engine.client import (
    DeadlineExceeded,
    EngineClient,
    EngineDraining,
    EngineUnavailable,
    QueueTimeout,
    Stream,
)
from service.engine.request import Delta, Finish, Request
from tests.engine.attached import LONG, PARAMS, Attach, collect, request, tokens, until
from tests.engine.oracle import Answer, Ask, alone, answers


async def idle(client: EngineClient) -> None:
    """The engine has let go of everything."""
    await client.wait_idle()
    await until(lambda: client.stats.num_running + client.stats.num_waiting + client.stats.num_blocks_used == 0)


async def test_a_deadline_ends_a_wait_and_aborts_what_is_open(client: EngineClient, attach: Attach) -> None:
    """Not before its time; the engine is freed by leaving the context."""
    gate = threading.Semaphore(2)
    await attach(before_step=gate.acquire)
    deadline = time.monotonic() + 0.1
    with (
        pytest.raises(DeadlineExceeded),
        closing(client.submit([request(client, n=2)], LONG, timeout_seconds=0.1)) as stream,
    ):
        await collect(stream)
    assert time.monotonic() >= deadline
    gate.release(1000)
    await idle(client)
    assert client.stats.num_steps < 50


async def test_a_deadline_ends_a_stream_whose_tokens_keep_coming(client: EngineClient, attach: Attach) -> None:
    """It is looked at before each batch of deltas, not only where the reader must wait."""
    gate = threading.Semaphore(0)
    await attach(before_step=gate.acquire)
    deadline = time.monotonic() + 0.05
    batches: list[list[Delta]] = []

    async def read(stream: Stream) -> None:
        gate.release()
        async for deltas in stream:
            batches.append(deltas)
            gate.release()
            await until(lambda: bool(stream._mailbox))

    with (
        closing(client.submit([request(client)], LONG, timeout_seconds=0.05)) as stream,
        pytest.raises(DeadlineExceeded),
    ):
        await read(stream)
    assert 0 < len(batches) < 100
    assert time.monotonic() >= deadline
    gate.release(1000)
    await idle(client)


async def test_a_whole_answer_is_not_late(client: EngineClient, attach: Attach) -> None:
    """A reader that comes for it after the deadline gets all of it."""
    await attach()
    each = request(client)
    with closing(client.submit([each], PARAMS, timeout_seconds=0.05)) as stream:
        await until(lambda: not stream._open)
        await asyncio.sleep(0.06)
        deltas = await collect(stream)
    assert Finish.LENGTH is deltas[each.id, 0][-1].finish


async def test_a_request_that_has_not_started_in_time_is_a_queue_timeout(client: EngineClient, attach: Attach) -> None:
    """The one that runs meanwhile is past its own."""
    gate = threading.Semaphore(0)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    queue_deadline = time.monotonic() + 0.1
    group = [request(client), request(client)]
    with closing(client.submit([request(client)], LONG, queue_timeout_seconds=0.1)) as running:
        gate.release()
        await until(lambda: bool(running.started_at))
        with pytest.raises(QueueTimeout), closing(client.submit(group, LONG, queue_timeout_seconds=0.1)) as stream:
            await collect(stream)
        assert time.monotonic() >= queue_deadline
        gate.release(1000)
        await collect(running)
    await idle(client)


async def test_a_start_ends_the_queue_deadline(client: EngineClient, attach: Attach) -> None:
    """A reader that waits through it then waits for its tokens, until the deadline of the whole."""
    gate = threading.Semaphore(1)
    await attach(before_step=gate.acquire)
    now = time.monotonic()
    with (
        pytest.raises(DeadlineExceeded),
        closing(client.submit([request(client)], LONG, queue_timeout_seconds=0.4, timeout_seconds=0.6)) as stream,
    ):
        await collect(stream)
    assert time.monotonic() >= now + 0.6
    gate.release(1000)


async def test_a_choice_aborted_before_its_start_is_not_waited_for(client: EngineClient, attach: Attach) -> None:
    """The request's start, which then never comes, is no queue timeout; nor is it submitted to a next engine."""
    gate = threading.Semaphore(1)
    engine = await attach(max_num_seqs=1, before_step=gate.acquire)
    first, second = request(client), request(client)
    with closing(client.submit([first, second], PARAMS, queue_timeout_seconds=0.2)) as stream:
        await until(lambda: first.id in stream.started_at)
        stream.abort(second.id, 0)
        await asyncio.sleep(0.21)
        gate.release(1000)
        deltas = await collect(stream)
        assert {(first.id, 0)} == set(deltas)
        engine.die(gate)
        await until(lambda: not client.ready)
        assert not stream._take_unstarted(client.engines[0])


async def test_a_reader_finds_what_came_meanwhile_as_one_delta(client: EngineClient, attach: Attach) -> None:
    """Tokens, log-probabilities, the prompt's, and the finish."""
    await attach()
    each = Request(client.new_request_id(), tuple(range(9)), 2, score_from=1)
    params = msgspec.structs.replace(PARAMS, num_logprobs=3)
    with closing(client.submit([each], params, completing_ids=b"\xff" * 13)) as stream:
        await until(lambda: not stream._open)
        deltas = await collect(stream)
    for choice, expected in enumerate(answers(Ask(each, params))):
        (got,) = deltas[each.id, choice]
        assert expected == Answer(list(got.token_ids), got.finish, got.logprobs, got.prompt_logprobs)
        assert got.urgent


async def test_what_waits_for_a_reader_is_bounded(
    client: EngineClient, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream whose reader is too far behind ends with an error, and the engine is told; a patient group does not."""
    monkeypatch.setattr(stream_module, "_MAX_UNREAD", 150)
    gate = threading.Semaphore(0)
    await attach(before_step=gate.acquire)
    each, patient = request(client, n=2), request(client, n=2)
    with (
        closing(client.submit([each], LONG)) as stream,
        closing(client.submit([patient], LONG, patient=True)) as whole,
    ):
        gate.release(10_000)
        await until(lambda: not stream._open)
        deltas = await collect(stream)
        assert {(each.id, 0), (each.id, 1)} == set(deltas)
        for (last,) in deltas.values():
            assert (Finish.ERROR, "the client takes its answer too slowly") == (last.finish, last.error)
        found = await collect(whole)
    assert alone(Ask(patient, LONG)) == [tokens(found[patient.id, choice]) for choice in range(2)]
    await idle(client)


def test_deadlines_are_no_unavailability() -> None:
    """Another replica would not mend them."""
    assert not issubclass(DeadlineExceeded, EngineUnavailable)
    assert not issubclass(QueueTimeout, EngineUnavailable)


# Groups that go on


async def test_a_group_goes_on_with_more_requests(client: EngineClient, attach: Attach) -> None:
    """Drawn alike; it is open in between, so the client is not idle, and it ends when the last have finished."""
    await attach()
    found: dict[int, list[int]] = {}
    asked: list[Request] = []
    with closing(client.submit([request(client)], PARAMS)) as stream:
        asked += stream._submit.requests
        async for deltas in stream:
            for delta in deltas:
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
            if not stream._open and len(asked) < 9:
                assert not client._idle.is_set()
                group = [request(client, prompt=(len(asked), number)) for number in range(2)]
                asked += group
                stream.go_on(group)
                assert {each.id for each in group} == client.engines[0]._streams.keys()
                assert not client._idle.is_set()
    assert 9 == len(asked)
    for each in asked:
        (expected,) = answers(Ask(each, PARAMS))
        assert expected.tokens == found[each.id]
    await idle(client)


async def test_a_group_that_has_begun_is_never_late_for_the_queue(client: EngineClient, attach: Attach) -> None:
    """Its later parts come when they come."""
    gate = threading.Semaphore(1000)
    await attach(before_step=gate.acquire)
    with closing(client.submit([request(client)], PARAMS, queue_timeout_seconds=0.05)) as stream:
        await collect(stream)
        while gate.acquire(blocking=False):
            pass
        stream.go_on([each := request(client)])
        reading = asyncio.ensure_future(collect(stream))
        await asyncio.sleep(0.1)
        gate.release(1000)
        assert Finish.LENGTH is (await reading)[each.id, 0][-1].finish


async def test_a_group_goes_on_during_a_drain(client: EngineClient, attach: Attach) -> None:
    """It was taken before, and the drain waits for it; new ones are refused."""
    await attach()
    with closing(client.submit([request(client)], PARAMS)) as stream:
        await collect(stream)
        client.drain()
        waiting = asyncio.ensure_future(client.wait_idle())
        with pytest.raises(EngineDraining):
            client.submit([request(client)], PARAMS)
        stream.go_on([each := request(client)])
        deltas = await collect(stream)
        assert not waiting.done()
    assert Finish.LENGTH is deltas[each.id, 0][-1].finish
    await waiting


@pytest.mark.parametrize(("end", "finish"), [("abandon", Finish.ABORT), ("fail", Finish.ERROR)])
async def test_a_group_that_was_ended_does_not_go_on(
    client: EngineClient, attach: Attach, end: str, finish: Finish
) -> None:
    """Also when the end came between two of its parts: its reader is told, and does not wait."""
    await attach()
    with closing(client.submit([request(client)], PARAMS)) as stream:
        await collect(stream)
        getattr(client, end)("over")
        stream.go_on([each := request(client)])
        (delta,) = (await collect(stream))[each.id, 0]
        assert (finish, "over") == (delta.finish, delta.error)
    await client.wait_idle()


async def test_a_group_does_not_go_on_with_another_engine(client: EngineClient, attach: Attach) -> None:
    """What it has begun ends with an error when its engine is lost, also between two of its parts."""
    gate = threading.Semaphore(1000)
    engine = await attach(before_step=gate.acquire)
    with closing(client.submit([request(client)], PARAMS)) as stream:
        await collect(stream)
        engine.die(gate)
        await until(lambda: not client.ready)
        stream.go_on([each := request(client)])
        (delta,) = (await collect(stream))[each.id, 0]
    assert (Finish.ERROR, "the engine stopped while it worked on this request") == (delta.finish, delta.error)
    await client.wait_idle()
