"""What a flag takes as NAME:VALUE or NAME=VALUE. Called by `bench` and `eval`."""


def parse_header(text: str) -> tuple[str, str]:
    """The name and value of an HTTP header, in ASCII. Raises ValueError."""
    if not text.isascii():
        raise ValueError(f"must be ASCII, not {text!r}")
    return parse_pair(text, ":")


def parse_pair(text: str, separator: str) -> tuple[str, str]:
    """What stands before and after the first `separator`, stripped; one line. Raises ValueError."""
    name, found, value = text.partition(separator)
    if not found or not name.strip() or "\n" in text or "\r" in text:
        raise ValueError(f"must be NAME{separator}VALUE, not {text!r}")
    return name.strip(), value.strip()
