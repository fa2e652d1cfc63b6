"""What is wrong with a checkpoint, as its user reads it."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found, fetched or used; the message names the file, the tensor or the config's field."""
