"""A sequence: one sample of a request, from admission to its finish. The scheduler alone changes it."""

from service.engine.request import Finish, Request


class Sequence:
    """Tokens known, and how many of them the device has been asked to compute; steps close the gap."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "choice",
        "finish",
        "limit",
        "node",
        "num_in_flight",
        "num_prompt",
        "num_registered",
        "num_scheduled",
        "request",
        "row",
        "sample_row",
        "started",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, choice: int, *, end_of_text_id: int, node: int) -> None:
        params = request.params
        self.request = request
        self.choice = choice
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.limit = self.num_prompt + params.max_tokens
        ends = () if params.ignore_eos else (end_of_text_id,)
        self.stop_ids = frozenset((*ends, *params.stop_token_ids))
        self.num_scheduled = 0  # tokens whose keys and values are computed, or being computed
        self.num_in_flight = 0  # tokens sampled on the device that the host has not seen
        self.sample_row = 0  # the row of the last launch that samples for this sequence
        self.row = -1  # its row in the scheduler's arrays; -1 while it waits
        self.blocks: list[int] = []
        self.node = node  # of the last registered block
        self.num_registered = 0  # blocks
        self.started = False  # it has left the queue before
        self.cached_tokens = 0
        self.finish: Finish | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.request.id, self.choice

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_to_schedule(self) -> int:
        """Tokens that still must be computed before the next can be sampled; 0 when no more is wanted."""
        return 0 if self.length >= self.limit else self.length - self.num_scheduled
