"""What waits for the engine, as the API process counts it: bounds, and when to try again."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of what may wait."""

    max_requests: int = 2048  # sequences
    max_tokens: int = 1_000_000
    timeout_seconds: float = 60.0
