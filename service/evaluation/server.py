"""Scores items through a running service's POST /v1/score. Called by command.py."""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from service.api.text import load_tokenizer
from service.checkpoint.errors import CheckpointError
from service.checkpoint.tokenizer import read_tokenizer
from service.evaluation.errors import EvaluationError
from service.evaluation.items import Item, Outcome
from service.evaluation.scorer import what_is_incomparable

log = logging.getLogger(__name__)

_MOST_ITEMS = 32  # a request: 32,800 tokens at most, a quarter of a MiB
_NUM_OPEN = 4  # requests at a time
# That an answer may take: a server refuses a request of which something has not begun after its queue_timeout_seconds.
_ANSWER_SECONDS = 5.0
_MOST_TRIES = 10  # four minutes: an engine that is restarted takes less
_LONGEST_WAIT = 60.0  # seconds before the next try
_SECONDS = 600.0  # for one answer, which other clients may have to come before
_BUSY = (429, 503)
_TOO_LARGE = (400, 413)  # items or bytes; what is wrong otherwise is so in smaller requests, too
_BROKEN = (500, 502, 504)  # an engine or a proxy that broke down meanwhile
_SIZES = ("num_layers", "hidden_size", "num_heads", "max_model_len", "vocab_size")  # of a model, as SIZES_345M
_Task = asyncio.Task[tuple[list[tuple[int, Outcome]], float]]  # outcomes, and the seconds that they took
_PROBE = "The naïve cat's 12,345 tails =  日本 \n\n\t👍 <unk> @-@ isn't"


class ServerScorer:
    """A Scorer over HTTP. It tokenizes here, since a file is longer than a server takes, and sends ids."""

    def __init__(self, url: str, *, headers: Mapping[str, str], tokenizer: Path) -> None:
        """`tokenizer` is a folder with the tokenizer of the server's model. Raises EvaluationError."""
        base = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.AsyncClient(base_url=base, headers=headers, timeout=_SECONDS)
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # the last two: a proxy of the environment's
            raise EvaluationError(f"--url, --header: {error}") from error
        self._has_answered = False
        self._runner = asyncio.Runner()
        try:
            self._learn(base, tokenizer)
        except BaseException:
            self.close()
            raise

    def _learn(self, base: str, tokenizer: Path) -> None:
        try:
            known = self._asked("GET", "/tokenizer_info")
            model = self._asked("GET", "/v1/models")["data"][0]
            sizes = tuple(model.get(size) for size in _SIZES)  # an older server does not tell them
            self.context_length = int(known["model_max_length"])
            self._check_tokenizer(tokenizer, known)
            fingerprint = self._asked("POST", "/v1/score", _body([Item((0, 0), 1)]))["system_fingerprint"]
        except httpx.UnsupportedProtocol as error:
            raise EvaluationError(f"--url: {error}") from error
        except EvaluationError:
            raise
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EvaluationError(f"--url: {base}: is no server of ours: its answers lack {error}") from error
        self.incomparable = what_is_incomparable(sizes)
        self.model = {"name": model["id"], "fingerprint": fingerprint, "url": base}

    def _check_tokenizer(self, folder: Path, known: Mapping[str, Any]) -> None:
        try:
            end_of_text_id = read_tokenizer(folder).backend.token_to_id(known["eos_token"])
            if end_of_text_id is not None and end_of_text_id == known["eos_token_id"]:
                self.tokenizer = load_tokenizer(folder, end_of_text_id=end_of_text_id)
                theirs = self._asked("POST", "/tokenize", {"prompt": _PROBE})["tokens"]
                if theirs == self.tokenizer.encode([_PROBE])[0]:
                    return
        except CheckpointError as error:
            raise EvaluationError(f"--tokenizer: {error}") from error
        raise EvaluationError(f"--tokenizer: {folder}: gives other ids than the server's tokenizer")

    def score(self, items: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Outcome]]:
        left = iter(items)
        again: list[tuple[int, Item]] = []  # of requests that were too large
        loop = self._runner.get_loop()
        num_items, most = 1, _MOST_ITEMS  # of a request
        asked: dict[_Task, list[tuple[int, Item]]] = {}
        while True:
            while len(asked) < _NUM_OPEN:
                numbered = [*again[:num_items], *islice(left, max(0, num_items - len(again)))]
                del again[:num_items]
                if not numbered:
                    break
                asked[loop.create_task(self._score(numbered))] = numbered
            if not asked:
                return
            errors = []
            for task in self._runner.run(_first_of(asked)):
                numbered = asked.pop(task)
                error = task.exception()
                if isinstance(error, _TooLargeError) and len(numbered) > 1:
                    again += numbered
                    most = min(most, len(numbered) // 2)
                    num_items = min(num_items, most)
                elif error is not None:
                    errors.append(error)
                else:
                    outcomes, seconds = task.result()
                    num_items = int(len(outcomes) * min(_ANSWER_SECONDS / seconds, 2.0))
                    num_items = min(max(num_items, 1), most)
                    yield from outcomes
            if errors:
                raise errors[0]

    async def _score(self, numbered: Sequence[tuple[int, Item]]) -> tuple[list[tuple[int, Outcome]], float]:
        """The outcomes, and the seconds that they took."""
        began_at = time.monotonic()
        answer = await self._ask("POST", "/v1/score", _body([item for _, item in numbered]))
        try:
            outcomes = [
                (number, Outcome(result["logprob"], result["is_greedy"]))
                for (number, _), result in zip(numbered, answer["results"], strict=True)
            ]
            fingerprint = answer["system_fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"--url: {self._http.base_url}v1/score: an answer that cannot be: {error}") from error
        if fingerprint != self.model["fingerprint"]:
            raise EvaluationError(f"--url: {self._http.base_url}: the model is another than at the beginning")
        return outcomes, time.monotonic() - began_at

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._runner.run(self._ask(method, path, body))

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON. Raises EvaluationError.

        A server that is busy or not ready is asked again, after it has answered once also one that broke down.
        """
        reason, seconds, status = "", 0.0, 0
        for attempt in range(_MOST_TRIES):
            await asyncio.sleep(seconds)
            seconds = min(2.0**attempt, _LONGEST_WAIT)
            try:
                answer = await self._http.request(method, path, json=body)
            except httpx.UnsupportedProtocol:
                raise
            except httpx.RequestError as error:
                reason, try_again = str(error) or type(error).__name__, self._has_answered
            else:
                if answer.status_code == httpx.codes.OK:
                    self._has_answered = True
                    return _object(answer)
                status = answer.status_code
                reason = f"HTTP {status}: {_message(answer)}"
                try_again = answer.status_code in (*_BUSY, *(_BROKEN if self._has_answered else ()))
                seconds = max(seconds, _retry_after(answer))
            if not try_again or attempt + 1 == _MOST_TRIES:
                break
            log.warning("%s: %s; asking again in %.0f s", self._http.base_url.join(path), reason, seconds)
        kind = _TooLargeError if status in _TOO_LARGE else EvaluationError
        raise kind(f"--url: {self._http.base_url.join(path)}: {reason}")

    def close(self) -> None:
        """Close its connections, and wait for no answer any more."""
        self._runner.run(self._end())
        self._runner.close()

    async def _end(self) -> None:
        asked = asyncio.all_tasks() - {asyncio.current_task()}
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await self._http.aclose()


class _TooLargeError(EvaluationError):
    """A request of which the server may take a part."""


async def _first_of(tasks: Iterable[_Task]) -> set[_Task]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return done


def _body(items: Sequence[Item]) -> dict[str, Any]:
    pairs = ((item.ids[: item.score_from], item.ids[item.score_from :]) for item in items)
    return {"items": [{"context": context, "continuation": continuation} for context, continuation in pairs]}


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvaluationError(f"--url: {answer.url}: is no server of ours: its answer is no JSON object")
    return found


def _message(answer: httpx.Response) -> str:
    """What a refusal says, in its envelope or else as text."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:200]


def _retry_after(answer: httpx.Response) -> float:
    """Seconds."""
    try:
        return min(max(float(answer.headers["Retry-After"]), 0.0), _LONGEST_WAIT)
    except (KeyError, ValueError):
        return 0.0
