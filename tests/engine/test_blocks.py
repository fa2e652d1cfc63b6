"""The block pool against a model of it: holders and contents in plain dictionaries."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.blocks import ROOT, BlockPool, Node

BLOCK_SIZE = 2
NUM_BLOCKS = 12


def ids(*tokens: int) -> bytes:
    """As the pool takes them."""
    return np.asarray(tokens, np.int32).tobytes()


class Pool(RuleBasedStateMachine):
    """Sequences of token pairs come and go; what `match` finds must hold exactly the tokens and root asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[Node, tuple[int, ...]]] = {}  # block -> root, and all tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8), root=st.sampled_from([ROOT, "a", "b"]))
    def begin(self, tokens: list[int], root: Node) -> None:
        blocks, node = self.pool.match(ids(*tokens), root)
        for number, block in enumerate(blocks):
            assert (root, tuple(tokens[: (number + 1) * BLOCK_SIZE])) == self.content[block]
        needed = self.pool.blocks_for(len(tokens)) - len(blocks)
        if needed + self.pool.num_cached(blocks) > self.pool.num_free:
            return
        self.pool.share(blocks)
        num_hits = len(blocks)
        taken = self.pool.take(needed)
        assert not set(taken) & {block for sequence in self.held for block in sequence}
        blocks = blocks + taken
        for number in range(num_hits, len(tokens) // BLOCK_SIZE):
            start = number * BLOCK_SIZE
            self.content[blocks[number]] = (root, tuple(tokens[: start + BLOCK_SIZE]))
            node = self.pool.register(blocks[number], node, ids(*tokens[start : start + BLOCK_SIZE]))
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert ([], ROOT) == self.pool.match(ids(0, 0, 0))

    @invariant()
    def every_block_is_held_or_free(self) -> None:
        held = {block for sequence in self.held for block in sequence}
        assert NUM_BLOCKS - len(held) == self.pool.num_free
        assert len(held) == self.pool.num_used


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_the_block_given_back_longest_ago_is_reused_first() -> None:
    """And of one sequence its end before its beginning, so that short prefixes stay shared longest."""
    pool = BlockPool(4, 1)
    first = pool.take(2)
    node = pool.register(first[0], ROOT, ids(7))
    pool.register(first[1], node, ids(8))
    second = pool.take(2)
    pool.register(second[0], ROOT, ids(9))
    pool.give_back(first)
    pool.give_back(second)
    assert [second[1]] == pool.take(1)  # never registered: nothing is lost
    assert [first[1]] == pool.take(1)
    assert [first[0]] == pool.match(ids(7, 8, 0))[0]


def test_a_stale_child_is_never_found() -> None:
    """When a block's content is gone, what was registered after it does not match its successor's tokens."""
    pool = BlockPool(2, 1)
    blocks = pool.take(2)
    node = pool.register(blocks[0], ROOT, ids(1))
    pool.register(blocks[1], node, ids(2))
    pool.give_back([blocks[0]])
    again = pool.take(1)
    pool.register(again[0], ROOT, ids(1))
    assert again == pool.match(ids(1, 2, 3))[0]
