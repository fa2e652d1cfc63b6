"""Pieces of an answer as server-sent events. What is the same in all events of a request is encoded once."""

import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

import msgspec

from service.api.choice import Piece

_ascii_json = json.JSONEncoder(separators=(",", ":")).encode
_numbers = msgspec.json.Encoder().encode
_NOTHING_ELSE = ',"logprobs":null,"finish_reason":null,"stop_reason":null}'


class Chunks:
    """The events of one request. All but ASCII is escaped: some clients break lines at U+2028 and its like."""

    def __init__(self, head: Mapping[str, Any], *, with_usage: bool) -> None:
        """`head` is in every chunk; with `with_usage` so is a usage, null but where it is told."""
        self._head = f'data: {_ascii_json(head)[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if with_usage else "]}\n\n"
        self._starts: dict[int, str] = {}  # by the choice's index

    def of(self, piece: Piece, *, usage: Mapping[str, Any] | None = None) -> str:
        """The event of a piece, with the usage so far if it is given."""
        index = piece.choice.index
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = f'{self._head}{{"index":{index},"text":'
        rest = _NOTHING_ELSE if piece.is_text else _rest(piece)
        tail = self._tail if usage is None else f'],"usage":{_numbers(usage).decode()}}}\n\n'
        return f"{start}{_quoted(piece.text)}{rest}{tail}"

    def of_usage(self, usage: Mapping[str, Any]) -> str:
        """The event without choices."""
        return f'{self._head}],"usage":{_numbers(usage).decode()}}}\n\n'


def _rest(piece: Piece) -> str:
    """An entry of `choices`, after its text."""
    logprobs = "null" if piece.logprobs is None else _ascii_json(piece.logprobs)
    finish_reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
    stop_reason = "null" if piece.stop_reason is None else _ascii_json(piece.stop_reason)
    ids = "" if piece.token_ids is None else f',"token_ids":{_ascii_json(piece.token_ids)}'
    if piece.prompt_token_ids is not None:
        ids += f',"prompt_token_ids":{_ascii_json(piece.prompt_token_ids)}'
    return f',"logprobs":{logprobs},"finish_reason":{finish_reason},"stop_reason":{stop_reason}{ids}}}'
