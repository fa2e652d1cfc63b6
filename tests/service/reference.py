"""What an answer must be, computed apart from the service: transformers' logits, and the sampling rules in numpy.

Two runs of a request may part where their logits, equal but for rounding, fall on two sides of a boundary. `Reference`
finds the first place where that could happen; up to there, every answer must be its own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GPT2LMHeadModel

from service.api.text import Tokenizer
from service.model.sampler import uniform

SCORE_MARGIN = 1e-3  # between two logits, over the temperature where there is one
UNIFORM_MARGIN = 1e-4  # between the uniform number, or top_p, and a boundary of the cumulative distribution

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Walk:
    """The tokens that leave no doubt; `tied` says that there are more, and that the next is within the margin."""

    token_ids: list[int]
    tied: bool


class Reference:
    """transformers' model of a folder, in fp32. `score_margin` is wider for answers of a narrower dtype."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, score_margin: float = SCORE_MARGIN) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = tokenizer
        self._score_margin = score_margin

    def check(self, texts: list[str], prompt: list[int], choice: int, **body: Any) -> Walk:
        """Assert that each of `texts` is the answer to this request; texts that have parted may only do so at a tie."""
        walk = self.walk(prompt, choice, **body)
        expected = self.tokenizer.decode(walk.token_ids)
        for text in texts:
            if walk.tied:  # the tokens in doubt may complete the last character
                assert text.startswith(expected.rstrip("\ufffd"))
            else:
                assert expected == text
        return walk

    @torch.inference_mode()
    def walk(self, prompt: list[int], choice: int, **body: Any) -> Walk:
        """Follow a request's choice until its end, or the first token within the margin."""
        token_ids: list[int] = []
        end_of_text = self.tokenizer.end_of_text_id
        step = torch.tensor([prompt])
        past = None
        while len(token_ids) < body["max_tokens"]:
            output = self.model(step, past, use_cache=True)
            past = output[1]  # by place: its name changes within transformers 5
            logits = output.logits[0, -1].double().numpy()
            found = candidates(logits, choice, len(prompt) + len(token_ids), self._score_margin, **body)
            if len(found) > 1:
                return Walk(token_ids, tied=True)
            token_ids += found
            if token_ids[-1] == end_of_text and not body.get("ignore_eos", False):
                break
            step = torch.tensor([token_ids[-1:]])
        return Walk(token_ids, tied=False)


def candidates(logits: Floats, choice: int, position: int, score_margin: float, **body: Any) -> set[int]:
    """Every token that a sampler could take here whose numbers are off by no more than the margins."""
    temperature = body["temperature"]
    if temperature == 0:
        return set(np.flatnonzero(logits > logits.max() - score_margin).tolist())
    scores = (logits - logits.max()) / temperature
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    numbers = torch.tensor([body["seed"]]), torch.tensor([choice]), torch.tensor([position])
    drawn = uniform(*numbers).item()
    found: set[int] = set()
    for kept in _filtered(probabilities, score_margin, body):
        cumulative = kept.cumsum() / kept.sum()
        near = (cumulative > drawn - UNIFORM_MARGIN) & (cumulative - kept / kept.sum() <= drawn + UNIFORM_MARGIN)
        found.update(np.flatnonzero(near & (kept > 0)).tolist())
    return found


def _filtered(probabilities: Floats, score_margin: float, body: dict[str, Any]) -> Iterator[Floats]:
    """The weights that top_k, then top_p, then min_p leave, with each threshold a hair lower, as it is, and higher."""
    top_k, top_p, min_p = body.get("top_k", 0), body.get("top_p", 1.0), body.get("min_p", 0.0)
    off_by = (1 - score_margin, 1.0, 1 + score_margin) if top_k or top_p < 1 or min_p else (1.0,)
    shifts = (-UNIFORM_MARGIN, 0.0, UNIFORM_MARGIN) if top_p < 1 else (0.0,)
    for factor, shift in itertools.product(off_by, shifts):
        ordered = np.sort(probabilities)[::-1]
        if top_k:
            ordered = ordered[ordered >= ordered[top_k - 1] * factor]
        if top_p < 1:
            before = ordered.cumsum() - ordered
            ordered = ordered[before < (top_p + shift) * ordered.sum()]
        least = max(ordered[-1] * min(factor, 1.0), min_p * ordered[0] * factor)
        yield np.where(probabilities >= least, probabilities, 0.0)
