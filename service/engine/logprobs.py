"""The log-probabilities of a step, as the records that Deltas carry. Used by the scheduler as a step comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from service.engine.request import Logprobs
from service.model.batch import TopLogprobs

if TYPE_CHECKING:
    from service.engine.rows import Scoring
    from service.engine.sequence import Sequence


class PackedLogprobs:
    """Turned into bytes a batch at a time: a row's record is slices of these."""

    def __init__(self, found: TopLogprobs) -> None:
        self._found = found
        self._finite: list[bool] = np.isfinite(found.chosen).tolist()
        self._chosen = found.chosen.tobytes()
        self._best: dict[int, tuple[bytes, bytes]] = {}  # by how many of each row: ids, values

    def records(self, start: int, stop: int, num_best: int) -> Logprobs | None:
        """Rows start .. stop - 1 with the `num_best` of each; None if one of the tokens' own is not finite."""
        if not all(self._finite[start:stop]):
            return None
        if num_best not in self._best:
            ids, values = self._found.top_ids[:, :num_best], self._found.top[:, :num_best]
            self._best[num_best] = ids.tobytes(), values.tobytes()
        ids_bytes, values_bytes = self._best[num_best]
        row = slice(4 * num_best * start, 4 * num_best * stop)
        return Logprobs(self._chosen[4 * start : 4 * stop], ids_bytes[row], values_bytes[row])


def take_scores(scored: Iterable[Scoring], found: TopLogprobs) -> Iterator[Sequence]:
    """Give those that have not ended the scores of a step; the sequences of which one is not finite, which get none."""
    packed = PackedLogprobs(found)
    for scoring in scored:
        sequence = scoring.sequence
        start = scoring.start + sequence.next_score - scoring.first  # a preemption may have some computed again
        if sequence.finish is not None or start >= scoring.stop:
            continue
        scores = packed.records(start, scoring.stop, sequence.group.params.num_logprobs or 0)
        if scores is None:
            yield sequence
        else:
            assert sequence.scores is not None
            sequence.scores += scores
            sequence.next_score += scoring.stop - start
