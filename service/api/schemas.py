"""What POST /v1/completions takes. Numbers are strict, null is the default, unknown fields are ignored."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from service.api.body import Body
from service.api.errors import invalid
from service.engine.request import MAX_LOGPROBS

log = logging.getLogger(__name__)

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
_FEW_STOPS = 4
MAX_SAMPLES = 128  # n and best_of
_MAX_LISTED = 1024  # ids or words in one field
_MAX_TIMEOUT_SECONDS = 86_400
_INT32, _INT64 = 2**31, 2**63
GREEDY_BELOW = 1e-5  # a temperature under this is 0

Id = Annotated[int, Field(ge=0)]
PromptForms = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[Id], Field(min_length=1)]
    | Annotated[list[list[Id]], Field(min_length=1)]
)
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopForms = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
TokenIds = Annotated[list[Id], Field(max_length=_MAX_LISTED)]
Words = Annotated[list[Stop], Field(max_length=256)]
BiasForm = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MAX_LISTED, json_schema_extra={"additionalProperties": False}),
]

# Fields of this and other servers that would change the answer and are not offered, with their values that ask for
# nothing. null asks for nothing everywhere.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_logprobs": (),
    "prompt_embeds": ([],),
    "use_beam_search": (False,),
    "stop_regex": ("", []),
    "guided_grammar": ("",),
    "structured_outputs": ({},),
    "json_schema": ({},),
    "regex": ("",),
    "grammar": ("",),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "logits_processors": ([],),
}
_INSTEAD: Mapping[str, str] = {
    "suffix": "this model has no infill tokens",
    "prompt_logprobs": "use echo with logprobs",
    "guided_grammar": "use guided_json, guided_regex or guided_choice",
    "structured_outputs": "use guided_json, guided_regex or guided_choice",
    "json_schema": "use guided_json",
    "regex": "use guided_regex",
    "grammar": "use guided_json, guided_regex or guided_choice",
}


def _parse_prompt(value: object) -> list[str | list[int]]:
    """One of the four forms as a list of prompts; "" and [] within it are the empty prompt. Ids are not ranged here."""
    match value:
        case str():
            return [value]
        case list() if not value:
            raise PydanticCustomError("prompt", "must not be an empty list")
        case list() if set(map(type, value)) == {int}:
            return [value]
        case list() if set(map(type, value)) == {str}:
            return list(value)
        case list() if set(map(type, value)) == {list} and all(set(map(type, ids)) <= {int} for ids in value):
            return list(value)
    raise PydanticCustomError(
        "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists"
    )


def _empty_prompt() -> list[str | list[int]]:
    return [""]


def _parse_stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", "must have at most {limit} strings", {"limit": MAX_STOPS})
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        message = "each string must have 1 to {limit} characters"
        raise PydanticCustomError("stop", message, {"limit": MAX_STOP_CHARACTERS})
    return stops


def _parse_logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > _MAX_LISTED:
        message = "must be an object of at most {limit} token ids"
        raise PydanticCustomError("logit_bias", message, {"limit": _MAX_LISTED})
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise PydanticCustomError("logit_bias", "each key must be a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", "each value must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _parse_repetition_stop(value: object) -> object:
    return {False: None, True: {}}[value] if isinstance(value, bool) else value


class StreamOptions(Body):
    """Only read with `stream`."""

    model_config = ConfigDict(frozen=True)  # so that the default is not copied for every request

    include_usage: bool = Field(False, description="Add a last chunk with the usage of the whole request.")
    continuous_usage_stats: bool = Field(False, description="Add the usage so far to every chunk.")


class RepetitionStopOptions(Body):
    """What counts as a loop."""

    max_pattern_tokens: int = Field(16, ge=1, le=128, description="Longest pattern that is looked for.")
    min_repeats: int = Field(4, ge=2, le=1024, description="How often it stands in a row.")


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema under a name, which is ignored."""

    name: str | None = Field(None, description="Taken and ignored.")
    json_schema: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class SchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class CompletionRequest(Body):
    """A completion to generate. Every field may be left out or null."""

    # What to complete
    model: str | None = Field(None, description="A served name; see GET /v1/models.")
    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompt, json_schema_input_type=PromptForms)] = Field(
        default_factory=_empty_prompt,
        description="Text, texts, token ids or lists of token ids. Empty is the start of a document.",
        examples=["The capital of France is"],
    )
    echo: bool = Field(False, description="Begin the text with the prompt, and the log-probabilities with its.")
    split_special_tokens: bool = Field(
        False, description="Take <|endoftext|> in the prompt's text as plain text, not as its token."
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        lt=_INT32,
        description="Keep this many tokens of a longer prompt; -1 keeps what leaves room for max_tokens.",
    )
    truncation_side: Literal["left", "right"] = Field("left", description="Where tokens are dropped.")
    cache_salt: str = Field("", max_length=256, description="Reuse cached prompts only of requests with the same salt.")

    # How much, and where to end
    max_tokens: int | None = Field(
        None,
        ge=0,
        lt=_INT64,
        description="Tokens to generate at most; by default 16, or fewer where only fewer fit. 0 needs echo.",
        examples=[32],
    )
    min_tokens: int = Field(
        0, ge=0, lt=_INT64, description="No end of text, stop id or stop string before this many tokens."
    )
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=StopForms)] = Field(
        default_factory=list,
        description="Up to 64 strings of 1 to 1,024 characters; the text ends before the one that is complete first.",
    )
    stop_token_ids: TokenIds = Field(default_factory=list, description="Token ids that end the text, without theirs.")
    include_stop_str_in_output: bool = Field(False, description="Leave what ended the text in it.")
    ignore_eos: bool = Field(False, description="Go on after the end of text.")
    repetition_stop: Annotated[
        RepetitionStopOptions | None,
        BeforeValidator(_parse_repetition_stop, json_schema_input_type=bool | RepetitionStopOptions),
    ] = Field(None, description="End a text that repeats itself; true takes the defaults.")

    # How tokens are drawn
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample from the likeliest tokens that reach this probability.")
    top_k: int = Field(0, ge=-1, lt=_INT64, description="Sample from this many likeliest tokens; 0 and -1 are all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest one.")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="The same seed draws the same numbers again.")
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logit of each token that was generated before."
    )
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, for each time it was.")
    repetition_penalty: float = Field(
        1.0,
        ge=0.001,
        le=1000,
        description="Divides the positive logits of tokens in prompt or text, multiplies others.",
    )
    logit_bias: Annotated[dict[int, float], PlainValidator(_parse_logit_bias, json_schema_input_type=BiasForm)] = Field(
        default_factory=dict,
        description="Token id to -100..100, added to its logit; -100 bans it, 100 leaves only such tokens.",
    )
    allowed_token_ids: Annotated[list[Id], Field(min_length=1)] | None = Field(
        None, description="Only these tokens are generated."
    )
    bad_words: Words = Field(
        default_factory=list,
        description="Never generated, in the token spellings of the word alone and after a space.",
    )
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = Field(
        None, description="OpenAI's way to say that the text is JSON, of any form or of a JSON schema."
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="The text matches this JSON schema.")
    guided_regex: str | None = Field(None, description="The text matches this regular expression.")
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=_MAX_LISTED)] | None = Field(
        None, description="The text is one of these."
    )

    # What comes back
    n: int = Field(1, ge=1, le=MAX_SAMPLES, description="Completions for each prompt.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLES,
        description="Generate so many, and give the n of the highest mean log-probability. Not with stream.",
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities of each token and of this many best ones."
    )
    return_token_ids: bool = Field(False, description="Add token_ids and prompt_token_ids to each choice.")
    skip_special_tokens: bool = Field(True, description="A generated end of text has no text.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions = Field(StreamOptions(), description="Ignored without stream.")

    # How it is served
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Lower leaves the queue first; ten seconds of waiting count as one less. Below 0 is for some keys.",
    )
    timeout_seconds: float | None = Field(
        None, gt=0, le=_MAX_TIMEOUT_SECONDS, description="Give up, with a 504, when the answer takes longer."
    )
    queue_timeout_seconds: float | None = Field(
        None, gt=0, le=_MAX_TIMEOUT_SECONDS, description="Give up, with a 429, when it has not begun by then."
    )
    user: str | None = Field(None, description="Taken and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _before(cls, value: object) -> object:
        if isinstance(value, dict):
            value = dict(value)
            _refuse_unsupported(value)
            if value.get("stream") in (None, False):
                value.pop("stream_options", None)
        return value

    @model_validator(mode="after")
    def _after(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("best_of", f"must be at least n, which is {self.n}")
        if self.stream and self.num_samples > self.n:
            raise invalid("best_of", "cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "0 is only possible with echo")
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens", "must be at least 1, or -1")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def slow_to_admit(self) -> bool:
        """A grammar has to be compiled, or many stop strings looked for in the vocabulary: some ten milliseconds."""
        grammars = (self.response_format, self.guided_json, self.guided_regex, self.guided_choice)
        return len(self.stop) > _FEW_STOPS or grammars != (None, None, None, None)

    @property
    def num_samples(self) -> int:
        """Sequences that are generated for each prompt; `n` of them are answered."""
        return max(self.n, self.best_of or 1)


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    unknown = body.keys() - CompletionRequest.model_fields.keys()
    if not unknown:
        return
    for name, harmless in _UNSUPPORTED.items():
        if body.get(name) is not None and not any(
            body[name] == value and isinstance(body[name], bool) == isinstance(value, bool) for value in harmless
        ):
            hint = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise invalid(name, f"is not supported by this server{hint}")
    if unknown := unknown - _UNSUPPORTED.keys():
        log.debug("ignored unknown fields: %s", ", ".join(map(ascii, sorted(unknown)))[:500])
