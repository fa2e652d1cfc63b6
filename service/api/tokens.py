"""Text and token ids over HTTP, as vLLM and lm-evaluation-harness have these routes: at the root, without /v1."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from service.api import errors
from service.api.body import Body, documented_body, parse_body, read_body, work_on
from service.api.errors import check_ids, invalid
from service.api.schemas import Id
from service.api.served import ServedModel
from service.engine.client import EngineClient
from service.engine.request import ModelInfo

_MAX_TEXT_BYTES = 2**20  # a long book has about as many


class TokenizeRequest(Body):
    """A text to turn into token ids."""

    model: str | None = Field(None, description="A served name; see GET /v1/models.")
    prompt: str = Field(description="The text.", examples=["Hello world"])
    add_special_tokens: bool = Field(True, description="Taken and ignored: this model puts none around a text.")
    return_token_strs: bool = Field(False, description="Add token_strs, what log-probabilities call each token.")
    split_special_tokens: bool = Field(
        False, description="Take <|endoftext|> in the text as plain text, not as its token."
    )


class DetokenizeRequest(Body):
    """Token ids to turn into text."""

    model: str | None = Field(None, description="A served name; see GET /v1/models.")
    tokens: list[Id] = Field(description="Token ids.", examples=[[15496, 995]])


REQUEST_SCHEMAS = (TokenizeRequest, DetokenizeRequest)


class Tokenized(BaseModel):
    tokens: list[int]
    count: int = Field(description="Of tokens.")
    max_model_len: int = Field(description="Tokens of the context.")
    token_strs: list[str] | None = Field(None, description="Only with return_token_strs.")


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """In the words of transformers' tokenizer_config.json."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str | None
    eos_token_id: int
    add_prefix_space: bool
    chat_template: str | None


def tokens_router(*, client: EngineClient, served: ServedModel) -> APIRouter:
    router = APIRouter()

    def tokenize(body: bytes, model: ModelInfo) -> Tokenized:
        ask = parse_body(body, TokenizeRequest)
        served.check_name(ask.model)
        if len(ask.prompt) > _MAX_TEXT_BYTES or len(ask.prompt.encode()) > _MAX_TEXT_BYTES:
            raise invalid("prompt", f"{len(ask.prompt)} characters have more than {_MAX_TEXT_BYTES} bytes")
        (ids,) = served.tokenizer.encode([ask.prompt], split_special=ask.split_special_tokens)
        names = [served.tokenizer.names[token_id] for token_id in ids] if ask.return_token_strs else None
        return Tokenized(tokens=ids, count=len(ids), max_model_len=model.context_length, token_strs=names)

    def detokenize(body: bytes, model: ModelInfo) -> Detokenized:
        ask = parse_body(body, DetokenizeRequest)
        served.check_name(ask.model)
        check_ids("tokens", ask.tokens, model.vocab_size)
        num_bytes = sum(len(served.tokenizer.spelled_bytes[token_id]) for token_id in ask.tokens)
        if num_bytes > _MAX_TEXT_BYTES:  # a body of ids can be a twentieth of its text
            raise invalid("tokens", f"their text of {num_bytes} bytes is larger than {_MAX_TEXT_BYTES}")
        return Detokenized(prompt=served.tokenizer.decode(ask.tokens, spelled=True))

    @router.post(
        "/tokenize",
        summary="Token ids of a text",
        description="Nothing is added around it. A text may be longer than the context, up to 1 MiB.",
        responses=errors.documented(400, 404, 413, 500, 503),
        response_model_exclude_none=True,
        openapi_extra=documented_body(TokenizeRequest),
    )
    async def post_tokenize(request: Request) -> Tokenized:
        model = client.check_ready()
        return await work_on(await read_body(request), lambda body: tokenize(body, model))

    @router.post(
        "/detokenize",
        summary="Text of token ids",
        description="Of up to 1 MiB. Bytes that are no UTF-8 become U+FFFD; the end of text is spelled out.",
        responses=errors.documented(400, 404, 413, 500, 503),
        openapi_extra=documented_body(DetokenizeRequest),
    )
    async def post_detokenize(request: Request) -> Detokenized:
        model = client.check_ready()
        return await work_on(await read_body(request), lambda body: detokenize(body, model))

    @router.get("/tokenizer_info", summary="What a remote tokenizer must know", responses=errors.documented(500, 503))
    async def get_tokenizer_info() -> TokenizerInfo:
        model = client.check_ready()
        end_of_text = served.tokenizer.end_of_text
        return TokenizerInfo(
            tokenizer_class="GPT2Tokenizer",
            vocab_size=model.vocab_size,
            model_max_length=model.context_length,
            bos_token=end_of_text,
            eos_token=end_of_text,
            unk_token=end_of_text,
            pad_token=None,
            eos_token_id=served.tokenizer.end_of_text_id,
            add_prefix_space=False,
            chat_template=None,
        )

    return router
