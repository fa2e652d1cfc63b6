"""Which engine is asked: the least loaded, or who has the prefix, within bounds."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

import service.engine.routing as routing
from service.engine.request import Request
from service.engine.routing import Router

_IDS = itertools.count()
BLOCK = 4
PREFIX = tuple(range(100, 116))  # four blocks


def ask(*prompt: int, score_from: int | None = None, salt: str = "") -> Request:
    return Request(next(_IDS), prompt, score_from=score_from, cache_salt=salt)


def choose(router: Router, request: Request, loads: dict[int, int], *, margin: float = 8) -> int:
    return router.choose(request, loads, block_size=BLOCK, margin=margin)


@given(st.lists(st.tuples(st.integers(1, 8), st.lists(st.booleans(), min_size=3, max_size=3).filter(any)), max_size=60))
def test_strangers_go_to_the_least_loaded(asked: list[tuple[int, list[bool]]]) -> None:
    """Whichever are ready, and however many sequences each asks for."""
    router, loads = Router(), dict.fromkeys(range(3), 0)
    for number, (num_sequences, are_ready) in enumerate(asked):
        ready = {engine: loads[engine] for engine in loads if are_ready[engine]}
        chosen = choose(router, ask(*[1000 + number] * 20), ready)
        assert min(ready.values()) == ready[chosen]
        loads[chosen] += num_sequences


def test_a_prefix_leads_to_where_it_is() -> None:
    """For as long as whole blocks are the same; the other engine, which is as free, has it not."""
    router = Router()
    assert 0 == choose(router, ask(*PREFIX, 1), {0: 0, 1: 0})
    assert 1 == choose(router, ask(*[7] * 17), {0: 1, 1: 0})
    for length in (BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK):
        assert 0 == choose(router, ask(*PREFIX[:length], 9), {0: 2, 1: 0}), length
    assert 1 == choose(router, ask(*[7] * 16, 1), {0: 1, 1: 2})
    assert 1 == choose(router, ask(*PREFIX[: BLOCK - 1], 9), {0: 2, 1: 1}), "no whole block"
    assert 1 == choose(router, ask(*PREFIX[:BLOCK]), {0: 2, 1: 1}), "the last token is always computed"


def test_a_prefix_is_worth_no_more_than_the_margin() -> None:
    """That is of a whole prompt; of half of one it is half."""
    for num_more, chosen in ((8, 0), (9, 1)):
        router = Router()
        choose(router, ask(*PREFIX, 1), {0: 0, 1: 0})
        assert chosen == choose(router, ask(*PREFIX, 2), {0: num_more, 1: 0}, margin=8 * 17 / 16)
    for num_more, chosen in ((4, 0), (5, 1)):
        router = Router()
        choose(router, ask(*PREFIX, 1), {0: 0, 1: 0})
        assert chosen == choose(router, ask(*PREFIX, *[5] * 16), {0: num_more, 1: 0})


def test_a_prefix_that_all_have_is_shared_out() -> None:
    """A crowd with one system prompt fills an engine up to the margin, and then all of them alike."""
    router, loads = Router(), dict.fromkeys(range(4), 0)
    for number in range(400):
        loads[choose(router, ask(*PREFIX, 200 + number), loads)] += 1
    assert max(loads.values()) - min(loads.values()) <= 1 + 8


def test_prefixes_of_other_salts_are_others() -> None:
    """As in the engine's own blocks: nobody's requests go where another's prefix is."""
    router = Router()
    assert 0 == choose(router, ask(*PREFIX, 1, salt="a"), {0: 0, 1: 0})
    assert 1 == choose(router, ask(*PREFIX, 1, salt="b"), {0: 1, 1: 0})
    assert 0 == choose(router, ask(*PREFIX, 1, salt="a"), {0: 1, 1: 0})


def test_what_is_to_be_scored_is_computed() -> None:
    """A prefix counts up to the first token whose log-probability is wanted, and not at all from the second on."""
    router = Router()
    choose(router, ask(*PREFIX, 1), {0: 0, 1: 0})
    assert 0 == choose(router, ask(*PREFIX, 1, score_from=16), {0: 1, 1: 0})
    assert 1 == choose(router, ask(*PREFIX, 2, score_from=1), {0: 2, 1: 0})


def test_a_lost_engine_has_nothing() -> None:
    """What others have they still have."""
    router = Router()
    choose(router, ask(*PREFIX, 1), {0: 0})
    choose(router, ask(*[7] * 17), {1: 0})
    router.forget(0)
    assert 1 == choose(router, ask(*PREFIX, 2), {0: 1, 1: 0})
    assert 1 == choose(router, ask(*[7] * 17), {0: 0, 1: 1})


def test_what_is_remembered_is_bounded() -> None:
    """The prefixes that were asked for last; a prompt counts with as many as it can be halved."""
    router = Router()
    for number in range(routing._MAX_PREFIXES):
        choose(router, ask(*[number] * 9), {0: 0, 1: 0})
    assert routing._MAX_PREFIXES == len(router._holders)
    assert 0 == choose(router, ask(*[routing._MAX_PREFIXES - 1] * 9), {0: 1, 1: 0})
    assert 1 == choose(router, ask(*[0] * 9), {0: 1, 1: 0})
