"""The served model as the routes see it: its names, its tokenizer, and what makes a prompt acceptable."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.api.errors import ApiError
from service.api.text import Tokenizer
from service.engine.client import EngineClient
from service.engine.request import ModelInfo

log = logging.getLogger(__name__)


class ServedModel:
    """One model under one or more names. `tokenizer` is there whenever the client is ready."""

    def __init__(
        self,
        client: EngineClient,
        *,
        names: Sequence[str],
        version: str,
        load_tokenizer: Callable[[ModelInfo], Tokenizer],
    ) -> None:
        assert names, "a model needs a name"
        self.names = tuple(names)
        self.created = int(time.time())
        self._client = client
        self._version = version
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None

    @property
    def name(self) -> str:
        """The name in answers."""
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "asked for before the client was ready"
        return self._tokenizer

    async def on_ready(self, model: ModelInfo) -> None:
        """EngineClient.on_ready: read the tokenizer, once. Without one nothing can be served, so the client fails."""
        if self._tokenizer is None:
            try:
                self._tokenizer = await asyncio.to_thread(self._load_tokenizer, model)
            except Exception as error:  # whatever it is, another try would not mend it
                log.exception("the tokenizer cannot be used")
                self._client.fail(f"the tokenizer cannot be used: {error}")
                return
        log.info("ready: %s answers on /v1/completions", self.name)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError (404) for a name that is not served."""
        if name is not None and name not in self.names:
            message = f"model: {name[:200]!r} is not served here; served: {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def stop_token_ids(self, stops: Sequence[str]) -> tuple[int, ...]:
        """The end of text has no text that could match a stop string, so a stop that names it stops at its id."""
        return (self.tokenizer.end_of_text_id,) if self.tokenizer.end_of_text in stops else ()

    def fingerprint(self, model: ModelInfo) -> str:
        """Equal where the version, the model (a hub snapshot's folder is its commit), dtype and device are."""
        device = model.device.split(":")[0]
        about = f"{self._version} {Path(model.folder).name} {model.dtype} {device}"
        return f"fp_{hashlib.sha256(about.encode()).hexdigest()[:12]}"

    def prompt_ids(self, prompts: Sequence[str | list[int]], model: ModelInfo) -> list[tuple[int, ...]]:
        """The ids of each prompt; the empty one is the end of text. Raises ApiError (400).

        Encodes, so call it in a thread for long texts. The length in tokens is for the caller to check.
        """
        end_of_text = [self.tokenizer.end_of_text_id]
        max_bytes = model.context_length * self.tokenizer.longest_token_bytes
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            if len(text) > max_bytes or len(text.encode()) > max_bytes:
                raise ApiError(
                    400,
                    f"prompt: a text of {len(text)} characters cannot fit the model's context of "
                    f"{model.context_length} tokens, which is at most {max_bytes} bytes",
                    param="prompt",
                    code="context_length_exceeded",
                )
        encoded = iter(self.tokenizer.encode(texts) if texts else [])
        ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
        for place, prompt in enumerate(ids):
            if prompt and not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
                message = f"prompt: ids must be 0..{model.vocab_size - 1}, and prompt {place} has others"
                raise ApiError(400, message, param="prompt")
        return [tuple(prompt or end_of_text) for prompt in ids]
