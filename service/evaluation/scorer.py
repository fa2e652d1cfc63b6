"""What gives items their outcomes: this process's engine (engine.py) or a running service (server.py)."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from service.api.text import Tokenizer
from service.evaluation.items import Item, Outcome
from service.model.config import SIZES_345M


class Scorer(Protocol):
    """A model that is loaded, here or elsewhere."""

    tokenizer: Tokenizer
    context_length: int
    model: dict[str, Any]  # what it is: equal where the numbers are
    incomparable: str | None  # why the model is none to compare with the paper's; else None

    def score(self, items: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Outcome]]:
        """Each item's number and outcome, in any order. Raises EvaluationError."""

    def close(self) -> None:
        """Give back what it holds."""


def what_is_incomparable(sizes: tuple[int, ...]) -> str | None:
    """For `Scorer.incomparable`, of a model of these sizes, which are as SIZES_345M has them."""
    return None if sizes == SIZES_345M else "the model has another shape than the paper's 345M"
