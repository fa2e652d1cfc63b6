"""A grammar without a library: what may follow is a hash of the grammar's text and the tokens so far."""

import zlib

import numpy as np

from service.model.batch import Int32
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE


class FakeConstraint:
    """Allows about a third of the tokens, now and then none, and after some tokens is finished."""

    def __init__(self, text: str) -> None:
        if text.startswith("wrong"):
            raise ValueError(text)
        self._state = zlib.crc32(text.encode())

    @property
    def allowed(self) -> set[int]:
        if self._state % 13 == 0:
            return set()
        return {token for token in range(VOCAB_SIZE) if (self._state + token * 7919) // 64 % 3 == 0} | {END_OF_TEXT}

    @property
    def finished(self) -> bool:
        return self._state % 29 == 0

    def fill(self, words: Int32) -> None:
        bits = np.ones(len(words) * 32, np.uint8)  # also past the vocabulary, where they mean nothing
        bits[:VOCAB_SIZE] = [token in self.allowed for token in range(VOCAB_SIZE)]
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed
        self._state = zlib.crc32(token_id.to_bytes(4, "little"), self._state)

    def copy(self) -> "FakeConstraint":
        twin = FakeConstraint("")
        twin._state = self._state
        return twin
