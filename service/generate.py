"""`megatron-gpt2 generate`: one completion on standard output, by the service's own engine, without a server."""

import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.api.errors import ApiError
from service.api.params import sampling_params
from service.api.schemas import CompletionRequest
from service.api.text import StopStrings, TextStream, load_tokenizer
from service.engine.core import Core
from service.engine.loading import Reporter, Unusable, load
from service.engine.request import Finish, Request
from service.serve import engine_config, log_quietly, wants_json
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_MAX_TOKENS = 50


def generate(settings: Settings, *, text: str, sampling: Mapping[str, Any]) -> int:
    """Print `text` and its continuation as it comes; the exit code. Raises SettingsError for what cannot be used."""
    log_quietly(settings)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a shell's bytes come as lone surrogates
        raise SettingsError("text: not valid UTF-8") from error
    try:
        ask = CompletionRequest.model_validate({"prompt": text} | dict(sampling))
        with Reporter(lambda phase, progress: None) as reporter:
            loaded = load(engine_config(settings, json_lines=wants_json(settings)), reporter)
        model = loaded.model
        tokenizer = load_tokenizer(Path(model.folder), end_of_text_id=model.end_of_text_id)
        prompt = tuple(tokenizer.encode([text])[0]) or (model.end_of_text_id,)
        params = sampling_params(ask, [prompt], model, tokenizer, default_max_tokens=_MAX_TOKENS)
    except Unusable as error:
        raise SettingsError(str(error)) from error
    except ApiError as error:
        message, param = str(error), error.body["error"]["param"] or ""
        if message.startswith(f"{param}: "):
            message = f"--{param.replace('_', '-')}{message.removeprefix(param)}"
        raise SettingsError(message) from error
    except ValidationError as error:
        problems = [f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()]
        raise SettingsError("; ".join(problems)) from error
    stream = TextStream(tokenizer, StopStrings(()))
    print(text, end="", flush=True)
    loaded.scheduler.add(Request(1, prompt), params)
    core = Core(loaded.scheduler, loaded.runner)
    with closing(loaded.runner):
        while not core.idle:
            for delta in (*core.step(), *loaded.scheduler.take_held()):
                print(stream.push(delta.token_ids), end="", flush=True)
                if delta.finish is Finish.ERROR:
                    log.error("%s", delta.error)
                    return 1
    print(stream.finish())
    return 0
