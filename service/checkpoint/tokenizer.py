"""Reads a model folder's tokenizer files. Called by the engine process for the size, and by the API for the text."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.checkpoint.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A byte-level BPE as it lies in a folder: nothing is added around a text, cut or padded."""

    backend: Tokenizer
    token_bytes: tuple[bytes, ...]  # by id, 0 to the last; a special token has none


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read `folder`'s tokenizer.json, or else its vocab.json and merges.txt. Raises CheckpointError."""
    file, merges = folder / "tokenizer.json", folder / "merges.txt"
    if not file.is_file():
        file = folder / "vocab.json"
        if not file.is_file() or not merges.is_file():
            raise CheckpointError(f"{folder}: has neither tokenizer.json nor both of vocab.json and merges.txt")
    try:
        if file.name == "tokenizer.json":
            backend = Tokenizer.from_file(str(file))
        else:
            backend = Tokenizer(models.BPE.from_file(str(file), str(merges)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{file}: is not a byte-level BPE")
    backend.no_truncation()
    backend.no_padding()
    return TokenizerFiles(backend, _token_bytes(file, backend))


def _token_bytes(file: Path, backend: Tokenizer) -> tuple[bytes, ...]:
    """The bytes of every token, by id. Added tokens are spelled as they are, the others in the byte-level alphabet."""
    alphabet = _byte_alphabet()
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab()
    if wrong := set(vocabulary.values()) ^ set(range(len(vocabulary))):
        raise CheckpointError(f"{file}: its {len(vocabulary)} ids are not 0 to {len(vocabulary) - 1}: see {min(wrong)}")
    table = [b""] * len(vocabulary)
    for token, token_id in vocabulary.items():
        if token_id not in added:
            if not alphabet.keys() >= set(token):
                raise CheckpointError(f"{file}: token {token_id} is not spelled in the byte-level alphabet")
            table[token_id] = bytes([alphabet[character] for character in token])
        elif not added[token_id].special:
            table[token_id] = token.encode()
    return tuple(table)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's spelling: printable Latin-1 is itself, the rest is U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
