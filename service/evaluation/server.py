"""Scores items through a running service's POST /v1/score. Called by command.py."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from service.api.text import load_tokenizer
from service.checkpoint.errors import CheckpointError
from service.checkpoint.tokenizer import read_tokenizer
from service.evaluation.errors import EvaluationError
from service.evaluation.items import Item, Outcome

_NUM_ITEMS = 32  # a request: 32,800 tokens at most, a quarter of a MiB
_NUM_OPEN = 4  # requests at a time
_MOST_TRIES = 10
_LONGEST_WAIT = 60.0  # seconds that a server may ask for before the next try
_SECONDS = 600.0  # for one answer: a CPU takes that long for some items
_PROBE = "The naïve cat's 12,345 tails =  日本 \n\n\t👍 <unk> @-@ isn't"
_PAPER_SIZE = (1024, 50257)  # positions and ids of the 345M


class ServerScorer:
    """A Scorer over HTTP. It tokenizes here, since a file is longer than a server takes, and sends ids."""

    def __init__(self, url: str, *, headers: Mapping[str, str], tokenizer: Path) -> None:
        """`tokenizer` is a folder with the tokenizer of the server's model. Raises EvaluationError."""
        base = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(base_url=base, headers=headers, timeout=_SECONDS)
            known = self._ask("GET", "/tokenizer_info")
            name = self._ask("GET", "/v1/models")["data"][0]["id"]
            self.context_length = int(known["model_max_length"])
            self._check_tokenizer(tokenizer, known)
            fingerprint = self._ask("POST", "/v1/score", _body([Item((0, 0), 1)]))["system_fingerprint"]
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise EvaluationError(f"--url, --header: {error}") from error
        except (KeyError, TypeError, IndexError) as error:
            raise EvaluationError(f"--url: {base}: is no server of ours: its answers lack {error}") from error
        self.model = {"name": name, "fingerprint": fingerprint, "url": base}
        self.incomparable = None
        if (self.context_length, known["vocab_size"]) != _PAPER_SIZE:
            self.incomparable = "the model has another shape than the paper's 345M"

    def _check_tokenizer(self, folder: Path, known: Mapping[str, Any]) -> None:
        try:
            end_of_text_id = read_tokenizer(folder).backend.token_to_id(known["eos_token"])
            if end_of_text_id is not None and end_of_text_id == known["eos_token_id"]:
                self.tokenizer = load_tokenizer(folder, end_of_text_id=end_of_text_id)
                theirs = self._ask("POST", "/tokenize", {"prompt": _PROBE})["tokens"]
                if theirs == self.tokenizer.encode([_PROBE])[0]:
                    return
        except CheckpointError as error:
            raise EvaluationError(f"--tokenizer: {error}") from error
        raise EvaluationError(f"--tokenizer: {folder}: gives other ids than the server's tokenizer")

    def score(self, items: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Outcome]]:
        waiting = iter(items)
        with ThreadPoolExecutor(_NUM_OPEN) as pool:
            asked: set[Future[list[tuple[int, Outcome]]]] = set()
            try:
                while True:
                    while len(asked) < _NUM_OPEN and (numbered := list(islice(waiting, _NUM_ITEMS))):
                        asked.add(pool.submit(self._score, numbered))
                    if not asked:
                        return
                    done, asked = wait(asked, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield from future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, numbered: Sequence[tuple[int, Item]]) -> list[tuple[int, Outcome]]:
        results = self._ask("POST", "/v1/score", _body([item for _, item in numbered]))["results"]
        return [
            (number, Outcome(result["logprob"], result["is_greedy"]))
            for (number, _), result in zip(numbered, results, strict=True)
        ]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON. A server that is away or busy is asked again when it says so. Raises EvaluationError."""
        reason, seconds = "", 0.0
        for attempt in range(_MOST_TRIES):
            time.sleep(seconds)
            try:
                answer = self._http.request(method, path, json=body)
            except httpx.UnsupportedProtocol:
                raise
            except httpx.TransportError as error:
                reason, seconds = str(error) or type(error).__name__, float(min(2**attempt, _LONGEST_WAIT))
                continue
            if answer.status_code == httpx.codes.OK:
                return _object(answer)
            reason, seconds = f"HTTP {answer.status_code}: {_message(answer)}", _retry_after(answer)
            if answer.status_code not in (429, 503):
                break
        raise EvaluationError(f"--url: {self._http.base_url}{path.lstrip('/')}: {reason}")

    def close(self) -> None:
        """Close its connections."""
        self._http.close()


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
        return 1.0
