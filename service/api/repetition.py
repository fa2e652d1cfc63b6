"""When a text goes round in circles: one pattern of tokens, again and again. Used by a choice with repetition_stop."""

from collections.abc import Sequence


class RepetitionStop:
    """Watches the tokens of one choice for a pattern that stands `min_repeats` times in a row at their end."""

    def __init__(self, max_pattern_tokens: int, min_repeats: int) -> None:
        """Patterns of 1 to `max_pattern_tokens` tokens are looked for; `min_repeats` is at least 2."""
        self._tokens: list[int] = []
        # By period p: how many of the last tokens equal the one p before them.
        self._equal = [0] * (max_pattern_tokens + 1)
        self._min_repeats = min_repeats

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Take tokens; how many of them it took to complete a repetition, or None. After one, push nothing."""
        for place, token_id in enumerate(token_ids, 1):
            self._tokens.append(token_id)
            if self._repeats():
                return place
        return None

    def _repeats(self) -> bool:
        tokens, equal = self._tokens, self._equal
        last = len(tokens) - 1
        for period in range(1, min(len(equal), last + 1)):
            if tokens[last] != tokens[last - period]:
                equal[period] = 0
                continue
            equal[period] += 1
            if equal[period] >= period * (self._min_repeats - 1):
                return True
        return False
