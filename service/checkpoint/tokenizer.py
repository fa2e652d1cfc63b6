"""Reads a model folder's tokenizer files. Called by the engine process for the size, and by the API for the text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.checkpoint.hub import CheckpointError


def read_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE of `folder`'s tokenizer.json, or else of its vocab.json and merges.txt.

    Nothing is added around a text, cut or padded. Raises CheckpointError.
    """
    file, merges = folder / "tokenizer.json", folder / "merges.txt"
    if not file.is_file():
        file = folder / "vocab.json"
        if not file.is_file() or not merges.is_file():
            raise CheckpointError(f"{folder}: has neither tokenizer.json nor both of vocab.json and merges.txt")
    try:
        if file.name == "tokenizer.json":
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = Tokenizer(models.BPE.from_file(str(file), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{file}: is not a byte-level BPE")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
