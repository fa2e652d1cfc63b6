"""The served model as the routes see it: its names, its tokenizer, and what makes a prompt acceptable."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from service.api.errors import ApiError, check_ids, invalid
from service.api.text import Tokenizer
from service.checkpoint.tokenizer import TokenizerFiles
from service.engine.client import EngineClient
from service.engine.grammar import Grammars
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
        self._grammars: Grammars | None = None

    @property
    def name(self) -> str:
        """The name in answers."""
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "asked for before the client was ready"
        return self._tokenizer

    @property
    def grammars(self) -> Grammars:
        """What compiles grammars over the tokenizer's tokens."""
        assert self._grammars is not None, "asked for before the client was ready"
        return self._grammars

    async def on_ready(self, model: ModelInfo) -> None:
        """EngineClient.on_ready: read the tokenizer, once. Without one nothing can be served, so the client fails."""
        if self._tokenizer is None:
            try:
                tokenizer = await asyncio.to_thread(self._load_tokenizer, model)
            except Exception as error:  # whatever it is, another try would not mend it
                log.exception("the tokenizer cannot be used")
                self._client.fail(f"the tokenizer cannot be used: {error}")
                return
            self._tokenizer = tokenizer
            self._grammars = Grammars(
                lambda: TokenizerFiles(tokenizer.backend, tokenizer.token_bytes),
                end_of_text_id=tokenizer.end_of_text_id,
            )
        log.info("ready: %s answers on /v1/completions", self.name)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError (404) for a name that is not served."""
        if name is not None and name not in self.names:
            message = f"model: {name[:200]!r} is not served here; served: {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def fingerprint(self, model: ModelInfo) -> str:
        """Equal where the version, the model (a hub snapshot's folder is its commit), dtype, mode and device are."""
        mode = f"{model.dtype} deterministic" if model.deterministic else model.dtype
        return _fingerprint(self._version, model.folder, mode, model.device)

    def prompt_ids(
        self,
        prompts: Sequence[str | list[int]],
        model: ModelInfo,
        *,
        split_special: bool = False,
        truncate: int | None = None,
        side: str = "left",
        param: str = "prompt",
    ) -> tuple[list[tuple[int, ...]], list[int]]:
        """The ids of each prompt, and how many of each were dropped; the empty one is the end of text.

        `truncate` is the most that are kept; `side` is where the others are dropped. Raises ApiError (400), naming
        `param`. Encodes, so call it in a thread for long texts. The length in tokens is for the caller to check.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if truncate is None:
            self.check_texts(texts, model, param=param)
        encoded = iter(self.tokenizer.encode(texts, split_special=split_special) if texts else [])
        ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
        for prompt in ids:
            check_ids(param, prompt, model.vocab_size)
        whole = [tuple(prompt or [self.tokenizer.end_of_text_id]) for prompt in ids]
        if truncate is None:
            return whole, [0] * len(whole)
        kept = [prompt[-truncate:] if side == "left" else prompt[:truncate] for prompt in whole]
        return kept, [len(prompt) - len(part) for prompt, part in zip(whole, kept, strict=True)]

    def check_texts(self, texts: Sequence[str], model: ModelInfo, *, param: str) -> None:
        """Raises ApiError (400) for a text that cannot fit the context, before it is encoded."""
        max_bytes = model.context_length * self.tokenizer.longest_token_bytes
        for text in texts:
            if len(text) > max_bytes or len(text.encode()) > max_bytes:
                raise invalid(
                    param,
                    f"This model's maximum context length is {model.context_length} tokens, which are at most "
                    f"{max_bytes} bytes; a text of {len(text)} characters cannot fit",
                    code="context_length_exceeded",
                )


@lru_cache(maxsize=8)
def _fingerprint(version: str, folder: str, mode: str, device: str) -> str:
    about = f"{version} {Path(folder).name} {mode} {device.split(':')[0]}"
    return f"fp_{hashlib.sha256(about.encode()).hexdigest()[:12]}"
