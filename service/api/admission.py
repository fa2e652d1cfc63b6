"""From a body to what is submitted: everything that can be wrong with a completion request is found here."""

from dataclasses import dataclass

from service.api.choice import Echo
from service.api.errors import invalid
from service.api.grammar import grammar_of
from service.api.params import prompt_limit, sampling_params
from service.api.schemas import CompletionRequest
from service.api.served import ServedModel
from service.api.text import StopStrings
from service.engine.request import ModelInfo, SamplingParams

_MAX_LOGPROBS = 4_000_000  # log-probabilities in one answer: they are some 100 bytes each, in memory and in JSON
_NO_STOPS = StopStrings(())


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine can take."""

    ask: CompletionRequest
    prompts: list[tuple[int, ...]]
    num_truncated: list[int]  # tokens dropped of each prompt
    echoes: list[Echo | None]
    params: SamplingParams
    stops: StopStrings
    completing_ids: bytes


def admit(ask: CompletionRequest, served: ServedModel, model: ModelInfo, *, max_choices: int) -> Admitted:
    """Raises ApiError (400, 404). Encodes, and compiles a grammar: call it in a thread where that may take long."""
    served.check_name(ask.model)
    num_choices = len(ask.prompt) * ask.num_samples
    if num_choices > max_choices:
        message = f"{len(ask.prompt)} prompts x {ask.num_samples} samples are more than {max_choices} sequences"
        raise invalid("prompt", message)
    prompts, num_truncated = served.prompt_ids(
        ask.prompt,
        model,
        split_special=ask.split_special_tokens,
        truncate=prompt_limit(ask, model),
        side=ask.truncation_side,
    )
    tokenizer = served.tokenizer
    params = sampling_params(ask, prompts, model, tokenizer, grammar=grammar_of(ask, served.grammars))
    _check_logprobs(ask, prompts, params)
    # The end of text has no text where it is skipped, so it is stopped at by its id alone.
    stops = [stop for stop in ask.stop if stop != tokenizer.end_of_text or not ask.skip_special_tokens]
    echoes: list[Echo | None] = [None] * len(prompts)
    if ask.echo:
        echoes = [
            Echo(sent if isinstance(sent, str) and not dropped else tokenizer.decode(ids, spelled=True), ids)
            for sent, ids, dropped in zip(ask.prompt, prompts, num_truncated, strict=True)
        ]
    return Admitted(
        ask=ask,
        prompts=prompts,
        num_truncated=num_truncated,
        echoes=echoes,
        params=params,
        stops=StopStrings(stops) if stops else _NO_STOPS,
        completing_ids=tokenizer.completing(stops),
    )


def _check_logprobs(ask: CompletionRequest, prompts: list[tuple[int, ...]], params: SamplingParams) -> None:
    if ask.logprobs is None:
        return
    echoed = sum(map(len, prompts)) if ask.echo else 0
    count = (echoed + len(prompts) * params.max_tokens) * ask.num_samples * (ask.logprobs + 1)
    if count > _MAX_LOGPROBS:
        raise invalid("logprobs", f"{count} log-probabilities in one answer are more than {_MAX_LOGPROBS}")
