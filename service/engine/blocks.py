"""KV blocks: take, give back, share by prefix. Counts and ids only; used by the scheduler."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

TOKEN_BYTES = 4  # of an id in what is looked up: int32
Node = int | str  # a registered block's number, or a root: what a first block comes after
ROOT: Node = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, each free or held by one or more sequences.

    A full block may be registered under (node of the block before it, the bytes of its own tokens); nodes are numbers
    never used twice, so a match is exact: no hash can collide. Sequences share blocks only with those of the same root:
    ROOT, or any string. A registered block that nobody holds keeps its content, and can be shared again, until the
    pool needs it; the one given back longest ago goes first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing registered
        # Free but registered, oldest first. A plain dict looks for its first entry past all that were taken before it.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._nodes: dict[tuple[Node, bytes], tuple[int, int]] = {}  # -> (node, block)
        self._keys: dict[int, tuple[Node, bytes]] = {}  # block -> its key in _nodes
        self._next_node = 1  # after ROOT

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def match(self, tokens: bytes, root: Node = ROOT) -> tuple[list[int], Node]:
        """The registered blocks that hold the longest prefix of `tokens` after `root`, and the node of the last.

        The last token is never part of it: a sequence needs one token to compute for its logits.
        """
        blocks: list[int] = []
        node = root
        num_bytes = self.block_size * TOKEN_BYTES
        for end in range(num_bytes, len(tokens), num_bytes):
            found = self._nodes.get((node, tokens[end - num_bytes : end]))
            if found is None:
                break
            node, block = found
            blocks.append(block)
        return blocks, node

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them takes that many from num_free."""
        return sum(not self._holders[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, which `match` has just returned."""
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks for one holder; there must be as many free."""
        assert count <= self.num_free
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._nodes[self._keys.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a sequence's `blocks`; of a prefix, the end is reused first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def register(self, block: int, node: Node, tokens: bytes) -> int:
        """Let `block`, full with `tokens` after `node`, be shared; its node, or that of its equal."""
        key = (node, tokens)
        found = self._nodes.get(key)
        if found is not None:
            return found[0]
        own = self._next_node
        self._next_node += 1
        self._nodes[key] = (own, block)
        self._keys[block] = key
        return own

    def forget(self) -> None:
        """Unregister every block: what a failed step wrote is not to be shared."""
        self._nodes.clear()
        self._keys.clear()
        self._blank.extend(self._cached)
        self._cached.clear()
