"""One sequence's place in the answer: from the engine's Deltas to text, log-probabilities and the reason it ended."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from service.api.logprobs import LogprobStream
from service.api.repetition import RepetitionStop
from service.api.schemas import CompletionRequest
from service.api.text import StopStrings, TextStream, Tokenizer
from service.engine.request import Delta, Finish, Logprobs, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it comes back in the text."""

    text: str
    token_ids: tuple[int, ...]


class Piece(NamedTuple):  # made ten thousand times a second: a frozen dataclass takes three times as long
    """What is new of one choice: text, entries of log-probabilities, token ids, its end."""

    choice: "Choice"
    text: str
    logprobs: dict[str, list[Any]] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: tuple[int, ...] | None = None  # in a choice's first piece
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_text(self) -> bool:
        """And nothing else."""
        return self.finish_reason is None and self.logprobs is None and self.token_ids is None

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.finish_reason or (self.logprobs and self.logprobs["tokens"]))


class Choice:
    """`index` is its place in the answer: prompt * n + sample. Tokens that arrive after its end are not counted."""

    def __init__(
        self,
        index: int,
        request: Request,
        *,
        ask: CompletionRequest,
        params: SamplingParams,
        tokenizer: Tokenizer,
        stops: StopStrings,
        echo: Echo | None,
    ) -> None:
        self.index = index
        self.request = request
        self.finished = False
        self.delivered_at = 0.0  # its last tokens, in monotonic seconds; 0 is none so far
        self._end_of_text = tokenizer.end_of_text
        self._end_of_text_id = tokenizer.end_of_text_id
        self._end_of_text_named = tokenizer.end_of_text in ask.stop
        ends = () if params.ignore_eos else (tokenizer.end_of_text_id,)
        self._stop_token_ids = frozenset((*ends, *params.stop_token_ids))
        self._text = TextStream(
            tokenizer,
            stops,
            min_tokens=params.min_tokens,
            include_stop=ask.include_stop_str_in_output,
            skip_special=ask.skip_special_tokens,
        )
        self._repetition: RepetitionStop | None = None
        if ask.repetition_stop is not None:
            options = ask.repetition_stop
            self._repetition = RepetitionStop(options.max_pattern_tokens, options.min_repeats)
        self._logprobs: LogprobStream | None = None
        if ask.logprobs is not None:
            self._logprobs = LogprobStream(tokenizer, ask.logprobs, skip_special=ask.skip_special_tokens)
        self._echo = echo
        self._num_characters = 0
        self._token_ids: list[int] | None = [] if ask.return_token_ids else None  # not in a piece yet
        self._prompt_token_ids = request.prompt if ask.return_token_ids else None  # the same
        self._begun = False
        self._only_text = params.num_logprobs is None and not ask.return_token_ids  # in its pieces, but for the end
        self._sum_logprobs = 0.0

    @property
    def num_tokens(self) -> int:
        """Sampled, up to and including the one that ended the text."""
        return self._text.num_tokens

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, where the engine gave log-probabilities."""
        return self._sum_logprobs / max(1, self.num_tokens)

    def take(self, delta: Delta, *, prompt_logprobs: Logprobs | None = None) -> Piece:
        """The next tokens. A `finish_reason` in the piece says that the choice has ended.

        The first call needs the `prompt_logprobs`, where they are echoed.
        """
        before = self._text.num_tokens
        text = "" if self._begun else self._begin(prompt_logprobs)
        token_ids, repeats = delta.token_ids, False
        if self._repetition is not None and (end := self._repetition.push(token_ids)) is not None:
            token_ids, repeats = token_ids[:end], True
        if delta.finish is None and not repeats:
            text += self._text.push(token_ids)
            if self._text.stop is None and self._only_text:
                return Piece(self, text)
            stopped = False
        else:
            stopped = delta.finish is Finish.STOP and not repeats and self._ends_with_stop_token(token_ids)
            text += self._text.push(token_ids[:-1] if stopped else token_ids)
            if stopped and self._text.stop is None:
                text += self._text.push_stop_token(token_ids[-1])
            text += self._text.finish()
        finish_reason: str | None = None
        stop_reason: str | int | None = None
        if self._text.stop is not None:
            finish_reason, stop_reason = Finish.STOP.value, self._text.stop
        elif repeats:
            finish_reason, stop_reason = Finish.STOP.value, "repetition"
        elif delta.finish is not None:
            finish_reason = delta.finish.value
            stop_reason = self._stop_reason(token_ids[-1]) if stopped else None
        self.finished = finish_reason is not None
        return self._piece(text, delta, self._text.num_tokens - before, finish_reason, stop_reason)

    def _begin(self, prompt_logprobs: Logprobs | None) -> str:
        """The echo, with which a choice starts."""
        self._begun = True
        if self._echo is None:
            return ""
        if self._logprobs is not None:
            self._logprobs.push_prompt(self._echo.token_ids, prompt_logprobs, text=self._echo.text)
        return self._echo.text

    def _ends_with_stop_token(self, token_ids: tuple[int, ...]) -> bool:
        return bool(token_ids) and token_ids[-1] in self._stop_token_ids

    def _stop_reason(self, token_id: int) -> str | int | None:
        if token_id == self._end_of_text_id:
            return self._end_of_text if self._end_of_text_named else None
        return token_id

    def _piece(
        self, text: str, delta: Delta, num_new: int, finish_reason: str | None, stop_reason: str | int | None
    ) -> Piece:
        token_ids = delta.token_ids[:num_new]
        self._num_characters += len(text)
        entries = None
        if delta.logprobs is not None:
            self._sum_logprobs += float(np.frombuffer(delta.logprobs.chosen, np.float32)[:num_new].sum())
        if self._logprobs is not None:
            if token_ids:
                assert delta.logprobs is not None
                self._logprobs.push(token_ids, delta.logprobs)
            entries = self._logprobs.release(None if finish_reason else self._num_characters)
        if self._token_ids is not None:
            self._token_ids += token_ids
        piece = Piece(self, text, entries, self._token_ids, self._prompt_token_ids, finish_reason, stop_reason)
        if self._token_ids is not None and piece.says_something:
            self._token_ids, self._prompt_token_ids = [], None
        return piece
