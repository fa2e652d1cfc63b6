"""What /v1/completions and /v1/models give, for the schema. The routes write these shapes themselves."""

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Found in the cache of prefixes.")
    truncated_tokens: int = Field(description="Dropped by truncate_prompt_tokens; not among prompt_tokens.")


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


class LogprobsObject(BaseModel):
    """Parallel lists, an entry a token, of the raw distribution; the first token of an echoed prompt has null."""

    tokens: list[str] = Field(description=r"A piece of a character is spelled bytes:\xf0\x9f.")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Characters from the start of the text.")
    token_ids: list[int]
    bytes: list[list[int]]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: LogprobsObject | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null until the last chunk of an index.")
    stop_reason: str | int | None = Field(description="The stop string or stop token id that ended the text.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


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
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
