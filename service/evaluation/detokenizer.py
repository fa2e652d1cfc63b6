"""Undoes the spaces that WikiText has around punctuation.

The rules and their order are those of Megatron-LM's evaluation (tasks/zeroshot_gpt/detokenizer.py, v1.0 to
core_v0.9.0), which lm-evaluation-harness has too; also where a rule does little, as the second one does.
"""

import re

_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(text: str) -> str:
    """A file of WikiText as the text it was made from, as far as the rules go."""
    for found, instead in _RULES:
        text = text.replace(found, instead) if isinstance(found, str) else found.sub(instead, text)
    return text
