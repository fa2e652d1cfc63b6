"""What stops an evaluation, as its user reads it."""


class EvaluationError(ValueError):
    """Data, a server or a report that cannot be used; the message names the flag, the file and its line."""
