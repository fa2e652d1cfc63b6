"""Constrained decoding by llguidance: from a grammar to the tokens that may come next. Used by the engine process.

The library computes masks as it goes, in some ten microseconds each, so there is no long compilation; it is byte-exact
for a byte-level BPE. The API process compiles each grammar too, to refuse what cannot be used before it is submitted.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, Self, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from service.checkpoint.tokenizer import TokenizerFiles
from service.model.batch import Int32

# Without it the library allows only one spelling, in tokens, of bytes that must come.
_BYTE_EXACT = '%llguidance {"no_forcing": true}\n'
# Address space. 65,536 bytes of a schema recurse at most about 60 MiB deep (measured by filling it with references).
_STACK_BYTES = 128 * 2**20
MAX_ITEMS_IN_ROW = 2_000  # what the library may have open at one place of a text; a mask then takes a few ms
_T = TypeVar("_T")


class GrammarError(ValueError):
    """A grammar that cannot be used, or that has become too complex; the message says why."""


class Constraint(Protocol):
    """Which tokens may come next in one sequence, as bit i % 32 of word i // 32."""

    def fill(self, words: Int32) -> None:
        """Write the mask [ceil(V / 32)]. Raises GrammarError."""

    def accept(self, token_id: int) -> None:
        """Take the next token, which the mask allowed. Raises GrammarError."""

    @property
    def finished(self) -> bool:
        """Nothing may follow."""

    def copy(self) -> "Constraint":
        """Another in the same state, independent of this one."""


class _Tokens:
    """What the library asks of a tokenizer. Where the next bytes are certain, it wants them in the usual tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, files: TokenizerFiles, end_of_text_id: int) -> None:
        self.eos_token_id = end_of_text_id
        without_text = {token_id for token_id, data in enumerate(files.token_bytes) if not data} | {end_of_text_id}
        self.special_token_ids = sorted(without_text)
        self.tokens = [
            str(files.backend.id_to_token(token_id)).encode() if token_id in without_text else data
            for token_id, data in enumerate(files.token_bytes)
        ]
        self._backend = files.backend

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self._backend.encode(text, add_special_tokens=False).ids


class _Matcher:
    """A Constraint over the library's matcher, which never raises, but remembers an error."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._check()

    def fill(self, words: Int32) -> None:
        assert words.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_plain(self._matcher.get_error()))


class Grammars:
    """Makes Constraints over the tokens of one model. Any thread may use it."""

    def __init__(self, read: Callable[[], TokenizerFiles], *, end_of_text_id: int) -> None:
        """`read` gives the model's tokenizer; it is called when that is first needed."""
        self._read = read
        self._end_of_text_id = end_of_text_id
        self._tokenizer: LLTokenizer | None = None
        self._reading = threading.Lock()
        self._starting = threading.Lock()

    def compile(self, text: str) -> Constraint:
        """The Constraint at the start of `text`, a Lark grammar of llguidance. Raises GrammarError.

        Takes a few ms as a rule, and about a second at worst (measured); lets go of the GIL.
        """
        return _on_deep_stack(lambda: self._compile(_BYTE_EXACT + text), self._starting)

    def _compile(self, text: str) -> Constraint:
        with self._reading:
            if self._tokenizer is None:
                tokens = _Tokens(self._read(), self._end_of_text_id)
                self._tokenizer = LLTokenizer(tokens)  # type: ignore[arg-type]
        constraint = _Matcher(LLMatcher(self._tokenizer, text, log_level=0, limits=_limits()))
        # Some grammars show only here that they are too complex.
        constraint.copy().fill(np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32))
        return constraint


def _on_deep_stack(work: Callable[[], _T], starting: threading.Lock) -> _T:
    """What `work` returns or raises, from a thread of its own: the library recurses along a schema's references."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="grammar-stack")
    with starting:  # the size is the process's; others that start meanwhile only get more address space
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return future.result()


def _limits() -> LLParserLimits:
    """Work and memory of one grammar, in the library's own units: a second to begin at worst, a few ms a token."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_items_in_row=MAX_ITEMS_IN_ROW,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
    )


def _plain(error: str) -> str:
    """The library's message in one line, without its drawing of the place."""
    if "limits." in error or "max is" in error:
        return "is too complex"
    if error.startswith("NoExtension"):
        return "nothing can match it"
    lines = [line.strip() for line in error.partition("Tokens:")[0].splitlines()]
    kept = [line for line in lines if line.strip("^ ") and "|" not in line[:8] and not line.startswith("<")]
    text = re.sub(r"\bat \d+\(\d+\): ", "", " ".join(kept))
    # The caller cannot set the library's options.
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf")
    text = re.sub(r"(\S{20})\S{40,}", r"\1...", text)  # it repeats a pattern, before and after it says why
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"
