"""A streamed completion as bytes: what asks for one, and what has to come."""

import json


def request(num_tokens: int) -> tuple[str, str]:
    """Path and body."""
    body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    return "/v1/completions", json.dumps({**body, "stream_options": {"include_usage": True}})


def check(body: str, num_tokens: int) -> None:
    """Every token, a finish, and [DONE] at the end."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert "[DONE]" == events.pop()
    chunks = [json.loads(event) for event in events]
    assert num_tokens == chunks[-1]["usage"]["completion_tokens"]
    assert ["length"] == [
        reason for chunk in chunks for choice in chunk["choices"] if (reason := choice["finish_reason"])
    ]
