"""Which of several engines a request goes to: the least loaded, or one that has the request's prefix in its blocks."""

from collections import OrderedDict
from collections.abc import Mapping

from service.engine.request import Request

_MAX_PREFIXES = 2**15  # about 7 MB; a prompt of 64 blocks has seven


class Router:
    """Remembers which engines were lately asked for what, by prefixes of 1, 2, 4, 8 … whole blocks of a prompt.

    An engine's load is the sequences that it owes. Steps take about as long for one sequence as for another, while
    `max_tokens` is a bound that says little of where an answer ends.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[int, int] = OrderedDict()  # hash of a prefix -> a bit for each engine

    def choose(self, request: Request, loads: Mapping[int, int], *, block_size: int, margin: float) -> int:
        """The engine to ask, of those in `loads`, which has their sequences by their numbers.

        That is the least loaded of those that have most of the request's prefix, unless it owes more sequences than
        the least loaded of all, and these are more than `margin` times the share of the prompt that it has.
        """
        prefixes = self._prefixes(request, block_size)
        chosen = least = min(loads, key=loads.__getitem__)
        for length, prefix in reversed(prefixes):
            # The token before one that is to be scored is computed, and so is whatever follows it.
            if request.score_from is None or length < request.score_from:
                holders = self._holders.get(prefix, 0)
                with_prefix = [number for number in loads if holders >> number & 1]
                if with_prefix:
                    nearest = min(with_prefix, key=loads.__getitem__)
                    if loads[nearest] - loads[least] <= margin * length / len(request.prompt):
                        chosen = nearest
                    break
        for _, prefix in prefixes:
            self._holders[prefix] = self._holders.pop(prefix, 0) | 1 << chosen
        while len(self._holders) > _MAX_PREFIXES:
            self._holders.popitem(last=False)
        return chosen

    def forget(self, number: int) -> None:
        """The engine has lost its blocks."""
        kept = ((prefix, holders & ~(1 << number)) for prefix, holders in self._holders.items())
        self._holders = OrderedDict((prefix, holders) for prefix, holders in kept if holders)

    def _prefixes(self, request: Request, block_size: int) -> list[tuple[int, int]]:
        """Length and hash of each that may be shared: with requests of the same salt, and not with the last token.

        Two that have the same hash would only send a request to another engine.
        """
        prefixes = []
        length = block_size
        while length < len(request.prompt):
            prefixes.append((length, hash((request.cache_salt, request.prompt[:length]))))
            length *= 2
        return prefixes
