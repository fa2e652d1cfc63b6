"""What POST /v1/completions takes and gives. Numbers are strict, null is the default, unknown fields are ignored."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from service.api.errors import ApiError

log = logging.getLogger(__name__)

MAX_SEQUENCES = 1024  # prompts x n of one request
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
_INT64 = 2**63
_GREEDY_BELOW = 1e-5  # a temperature under this is 0

_Schema = TypeVar("_Schema", bound=BaseModel)
PromptForms = str | list[str] | list[int] | list[list[int]]

# Fields of this and other servers that would change the answer and are not offered, with their values that ask for
# nothing. null asks for nothing everywhere.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "split_special_tokens": (False,),
    "return_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "cache_salt": ("",),
    "prompt_logprobs": (),
    "prompt_embeds": ([],),
    "use_beam_search": (False,),
    "stop_regex": ("", []),
    "response_format": ({}, {"type": "text"}),
    "guided_json": ({},),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "structured_outputs": ({},),
    "json_schema": ({},),
    "regex": ("",),
    "grammar": ("",),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "logits_processors": ([],),
    "repetition_stop": (False, {}, 0),
    "timeout_seconds": (),
    "queue_timeout_seconds": (),
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


def _drop_nulls(value: object) -> object:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(BaseModel):
    """Only read with `stream`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = Field(default=False, description="Add a last chunk with the usage of the whole request.")
    continuous_usage_stats: bool = Field(default=False, description="Add the usage so far to every chunk.")

    _nulls = model_validator(mode="before")(_drop_nulls)


class CompletionRequest(BaseModel):
    """A completion to generate. Every field may be left out or null."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str | None = Field(None, description="A served name; see GET /v1/models.")
    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompt, json_schema_input_type=PromptForms)] = Field(
        default_factory=_empty_prompt,
        description="Text, texts, token ids or lists of token ids. Empty is the start of a document.",
    )
    max_tokens: int | None = Field(
        None, ge=1, lt=_INT64, description="Tokens to generate at most; by default 16, or fewer where only fewer fit."
    )
    min_tokens: int = Field(
        0, ge=0, lt=_INT64, description="No end of text and no stop string before this many tokens."
    )
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample from the likeliest tokens that reach this probability.")
    top_k: int = Field(0, ge=-1, lt=_INT64, description="Sample from this many likeliest tokens; 0 and -1 are all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest one.")
    n: int = Field(1, ge=1, le=128, description="Completions for each prompt.")
    best_of: int | None = Field(None, ge=1, le=128, description="Only the value of n is supported.")
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=str | list[str])] = Field(
        default_factory=list, description="Up to 64 strings; the text ends before the one that is complete first."
    )
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="The same seed draws the same numbers again.")
    ignore_eos: bool = Field(False, description="Go on after the end of text.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(None, description="Taken and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _before(cls, value: object) -> object:
        value = _drop_nulls(value)
        if isinstance(value, dict):
            _refuse_unsupported(value)
            if value.get("stream", False) is False:
                value.pop("stream_options", None)
        return value

    @model_validator(mode="after")
    def _after(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ApiError(400, "best_of: is not supported by this server, except as the value of n", param="best_of")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            message = f"prompt: {len(self.prompt)} prompts x n of {self.n} is more than {MAX_SEQUENCES} completions"
            raise ApiError(400, message, param="prompt")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if name in body and not any(
            body[name] == value and isinstance(body[name], bool) == isinstance(value, bool) for value in harmless
        ):
            raise ApiError(400, f"{name}: is not supported by this server", param=name)
    unknown = body.keys() - CompletionRequest.model_fields.keys() - _UNSUPPORTED.keys()
    if unknown:
        log.debug("ignored unknown fields: %s", ", ".join(sorted(unknown))[:500])


def parse_body(body: bytes, schema: type[_Schema]) -> _Schema:
    """The request in a body of JSON. Raises ApiError (400), naming the parameter."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:  # also invalid UTF-8 and too deep a nesting
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
        message = "; ".join(f"{param}: {problem}" for param, problem in problems)
        raise ApiError(400, message, param=problems[0][0]) from None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Timings(BaseModel):
    """Milliseconds, in the usage chunk of a stream; a plain answer has them in its Server-Timing header."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Usage(BaseModel):
    """Each prompt counts once; completion tokens are all that were sampled, up to the one that completes a stop."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: Timings | None = None


class Choice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None = None


class Completion(BaseModel):
    """The answer; with `stream`, also the shape of every event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    system_fingerprint: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
