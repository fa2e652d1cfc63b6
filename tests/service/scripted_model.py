"""A GPT-2 that recites: whatever the prompt, its position decides the next token. Made by conftest, read by the tests.

Its text is known beforehand, so a test can say what an answer must be, in any script and for any split of a character.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from service.api.text import Tokenizer
from tests.service.server import Streamed

CONTEXT = 1024
LONGEST: dict[str, Any] = {"prompt": "", "max_tokens": CONTEXT - 1, "ignore_eos": True}  # seconds of work
_HIDDEN = 64
_LAYERS = 24  # of zeros: they make a step take milliseconds, so that there is time to do harm
_TEXT = (
    "Families 👨‍👩‍👧‍👦 and flags 🏳️‍🌈 🇯🇵🇫🇷, hands 👍🏽👎🏿; "
    "日本語のテキストは、途切れません。中文字符也一样。한국어도 마찬가지입니다. "
    "Ελληνικά, עברית, हिन्दी, ไทย — naïve café, “quotes”, ∑∞√, 🦜🦖🧬.\n"
)


@dataclass(frozen=True, slots=True)
class ScriptedModel:
    """A folder to serve, and what comes out: a prompt of L tokens is followed by token_ids[L - 1:].

    That is one line over and over, then the end of text. What follows it is babble: tokens drawn from those that are
    no ASCII, whole characters and pieces of them, all about equally likely.
    """

    folder: Path
    token_ids: tuple[int, ...]
    num_line_tokens: int
    tokenizer: Tokenizer

    @property
    def end(self) -> int:
        """Where the end of text is; the line before it is whole."""
        return len(self.token_ids) - 1

    def text(self, num_tokens: int, *, num_prompt_tokens: int = 1) -> str:
        """The answer of `num_tokens` tokens; a character cut off at its end is U+FFFD."""
        start = num_prompt_tokens - 1
        return self.tokenizer.decode(self.token_ids[start : start + num_tokens])

    def is_broken_off(self, streamed: Streamed) -> bool:
        """It said what was right so far, then an error and [DONE], and never that a choice has finished."""
        assert streamed.error is not None
        assert {"message", "type", "param", "code"} == set(streamed.error)
        assert self.text(CONTEXT).startswith(streamed.text())
        return streamed.done and not streamed.finish_reasons


def write_scripted_model(folder: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> ScriptedModel:
    """Write the model into `folder`, with the tokenizer's files from `tokenizer_folder`."""
    line = tokenizer.encode([_TEXT])[0]
    token_ids = [*line * (900 // len(line)), tokenizer.end_of_text_id]
    config = GPT2Config(
        n_layer=_LAYERS, n_embd=_HIDDEN, n_head=2, n_positions=CONTEXT, tie_word_embeddings=False, dtype="float32"
    )
    model = GPT2LMHeadModel(config)
    # A random code a token, which its positions hold and its row of the head finds; the last number says babble.
    codes = torch.randn((config.vocab_size, _HIDDEN), generator=torch.Generator().manual_seed(0))
    codes[:, -1] = 0
    is_babble = torch.tensor([not token.isascii() for token in tokenizer.token_bytes])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wpe.weight[: len(token_ids)] = codes[token_ids]
        model.transformer.wpe.weight[len(token_ids) :, -1] = 1
        model.lm_head.weight.copy_(codes)
        model.lm_head.weight[is_babble, -1] = 4
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, folder)
    return ScriptedModel(folder, tuple(token_ids), len(line), tokenizer)
