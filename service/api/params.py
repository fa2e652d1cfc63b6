"""From a request's fields to the engine's numbers, checked against the served model. Used by routes and `generate`."""

import secrets
from collections.abc import Sequence

from service.api.errors import ApiError, check_ids, invalid
from service.api.schemas import CompletionRequest
from service.api.text import Tokenizer
from service.engine.request import ModelInfo, SamplingParams

DEFAULT_MAX_TOKENS = 16
_BANS, _FORCES = -100, 100  # logit_bias


def sampling_params(
    ask: CompletionRequest,
    prompts: Sequence[Sequence[int]],
    model: ModelInfo,
    tokenizer: Tokenizer,
    *,
    grammar: str | None = None,
    default_max_tokens: int = DEFAULT_MAX_TOKENS,
) -> SamplingParams:
    """How the tokens of all `prompts` are drawn. Raises ApiError (400), naming the field."""
    max_tokens = _max_tokens(ask, max(map(len, prompts)), model, default_max_tokens)
    # top_p 0 keeps the best token, and so does a top_k of 1; a top_k of the whole vocabulary keeps all.
    top_k = 1 if ask.top_p == 0 else ask.top_k
    allowed, banned, bad_words = _token_sets(ask, model, tokenizer)
    num_logprobs = 0 if ask.logprobs is None and ask.num_samples > ask.n else ask.logprobs
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if ask.greedy else ask.temperature,
        top_k=top_k if 0 < top_k < model.vocab_size else 0,
        top_p=ask.top_p or 1.0,
        min_p=ask.min_p,
        seed=secrets.randbits(63) if ask.seed is None else ask.seed,
        min_tokens=ask.min_tokens,
        ignore_eos=ask.ignore_eos,
        stop_token_ids=_stop_token_ids(ask, model, tokenizer),
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        repetition_penalty=ask.repetition_penalty,
        logit_bias=tuple((token_id, bias) for token_id, bias in ask.logit_bias.items() if _BANS < bias < _FORCES),
        allowed_token_ids=allowed,
        banned_token_ids=banned,
        bad_words=bad_words,
        grammar=grammar,
        num_logprobs=num_logprobs,
    )


def prompt_limit(ask: CompletionRequest, model: ModelInfo) -> int | None:
    """How many tokens of a prompt truncate_prompt_tokens keeps."""
    if ask.truncate_prompt_tokens != -1:
        return ask.truncate_prompt_tokens
    max_tokens = DEFAULT_MAX_TOKENS if ask.max_tokens is None else ask.max_tokens
    return max(1, model.context_length - max_tokens)


def _max_tokens(ask: CompletionRequest, longest: int, model: ModelInfo, default: int) -> int:
    fitting = model.context_length - longest
    max_tokens = max(1, min(default, fitting)) if ask.max_tokens is None else ask.max_tokens
    if max_tokens > fitting:
        raise ApiError(
            400,
            # The beginning is OpenAI's: LiteLLM tells by it that a model of a longer context might do.
            f"This model's maximum context length is {model.context_length} tokens, prompt and completion together; "
            f"the prompt has {longest} and max_tokens is {max_tokens}, which is {longest + max_tokens} in all.",
            param="max_tokens" if fitting > 0 else "prompt",
            code="context_length_exceeded",
        )
    if ask.min_tokens > max_tokens:
        raise invalid("min_tokens", f"{ask.min_tokens} is more than max_tokens, which is {max_tokens}")
    return max_tokens


def _stop_token_ids(ask: CompletionRequest, model: ModelInfo, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end of text may have no text that could match a stop string, so one that names it stops at its id."""
    check_ids("stop_token_ids", ask.stop_token_ids, model.vocab_size)
    named = (tokenizer.end_of_text_id,) if tokenizer.end_of_text in ask.stop else ()
    return tuple(dict.fromkeys((*named, *ask.stop_token_ids)))


def _token_sets(
    ask: CompletionRequest, model: ModelInfo, tokenizer: Tokenizer
) -> tuple[tuple[int, ...] | None, tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The ids that alone may be generated, those that may not, and the sequences of ids that may not be completed."""
    if ask.allowed_token_ids is None and not ask.logit_bias and not ask.bad_words:
        return None, (), ()
    check_ids("allowed_token_ids", ask.allowed_token_ids or (), model.vocab_size)
    check_ids("logit_bias", ask.logit_bias, model.vocab_size)
    banned = {token_id for token_id, bias in ask.logit_bias.items() if bias == _BANS}
    forced = {token_id for token_id, bias in ask.logit_bias.items() if bias == _FORCES}
    spellings = tokenizer.encode([form for word in ask.bad_words for form in (word, f" {word.lstrip(' ')}")])
    banned.update(ids[0] for ids in spellings if len(ids) == 1)
    bad_words = tuple(dict.fromkeys(tuple(ids) for ids in spellings if len(ids) > 1))
    allowed = None if ask.allowed_token_ids is None else set(ask.allowed_token_ids)
    if forced:
        allowed = forced if allowed is None else allowed & forced
    if allowed is not None and not allowed - banned:
        param = "logit_bias" if ask.logit_bias else "allowed_token_ids"
        raise invalid(param, "leaves no token that may be generated")
    return None if allowed is None else tuple(sorted(allowed)), tuple(sorted(banned)), bad_words
