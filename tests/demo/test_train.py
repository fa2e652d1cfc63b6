"""The training recipe: its batches, optimizer and schedule, and a run of a few steps on the CPU."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from service.demo.train import (
    END_OF_TEXT_ID,
    NEWLINE_ID,
    POSITIONS,
    Muon,
    Settings,
    Streams,
    batches,
    build,
    export,
    held_out_losses,
    paragraph_starts,
    schedule,
    train,
)

CPU = torch.device("cpu")
TINY = Settings(layers=1, width=16, heads=2, steps=6, warmup=2, batch_tokens=POSITIONS, evaluate_every=2, patience=9)


def stream(first: int, size: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Documents of 100 ids: end-of-text, then numbers counted up from `first`."""
    ids = first + np.arange(size)
    ids[::100] = END_OF_TEXT_ID
    return ids.astype(np.uint16)


STREAMS = Streams(
    train={"a": stream(1000, 9000), "b": stream(20000, 3000)},
    held_out={"a": stream(1000, POSITIONS + 300), "b": stream(20000, 200)},
)


def test_paragraph_starts() -> None:
    """Each end-of-text, and the first id after end-of-text or newlines."""
    ids = np.array([END_OF_TEXT_ID, 5, 6, NEWLINE_ID, NEWLINE_ID, 7, NEWLINE_ID, 8, END_OF_TEXT_ID, 9], dtype=np.uint16)
    assert [0, 1, 5, 7, 8, 9] == paragraph_starts(ids).tolist()


def test_batches_are_rows_of_the_corpus() -> None:
    """Lengths alternate, rows are consecutive ids that begin where a document does, and the seed fixes them all."""
    corpus = np.concatenate(list(STREAMS.train.values()))
    source, again = batches(STREAMS.train, TINY, CPU), batches(STREAMS.train, TINY, CPU)
    for length in (256, POSITIONS, 256):
        rows = next(source)
        assert (POSITIONS // length, length + 1) == rows.shape
        assert torch.equal(rows, next(again))
        windows = np.lib.stride_tricks.sliding_window_view(corpus, length + 1)
        starts = [int((windows == row).all(axis=1).argmax()) for row in rows.numpy()]
        assert np.array_equal(rows.numpy(), windows[starts])
        last = len(corpus) - POSITIONS - 1  # where a whole row still fits
        assert all(start % 100 in (0, 1) or start == last for start in starts)


def test_sources_are_drawn_by_the_root_of_their_size() -> None:
    """A source three times as large is drawn 1.7 times as often."""
    settings = Settings(batch_tokens=256 * 4000)
    rows = next(batches(STREAMS.train, settings, CPU))
    share = ((rows[:, 1:3] < 20000).any(dim=1)).float().mean().item()
    assert share == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)), abs=0.03)


def test_schedule() -> None:
    """Up in a line, down in a cosine to nothing."""
    factor = schedule(Settings(steps=110, warmup=10))
    assert [0.1, 1.0, 1.0, 0.5, 0.0] == pytest.approx([factor(step) for step in (0, 9, 10, 60, 110)])


def test_muon_is_that_of_torch() -> None:
    """A batch of equal matrices moves as torch's own optimizer moves them one by one, but for bf16's rounding."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(24, 8)) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = theirs[0].detach().clone()
    muon = Muon([{"params": ours}], lr=0.01, weight_decay=0.3)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    assert (theirs[0] - start).norm() > 0.15
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (theirs[0] - start).norm()


def test_train_learns_and_exports(tmp_path: Path) -> None:
    """A few steps lower the held-out loss; the exported folder loads in transformers with the same loss."""
    model, curve = train(STREAMS, TINY, CPU)
    assert [2, 4, 6] == [point["step"] for point in curve]
    assert curve[-1]["a"] < curve[0]["a"] < math.log(50257) + 0.1
    export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    losses = held_out_losses(model.float(), STREAMS.held_out)
    assert losses == pytest.approx(held_out_losses(loaded, STREAMS.held_out), rel=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("gelu_new", "float16", END_OF_TEXT_ID) == tuple(
        config[name] for name in ("activation_function", "dtype", "eos_token_id")
    )


def test_held_out_losses_count_every_token_once() -> None:
    """The mean over a stream is that of its windows of all positions, the short last one included."""
    model = build(TINY, CPU).eval()
    for source, ids in STREAMS.held_out.items():
        total = 0.0
        for start in range(0, len(ids) - 1, POSITIONS):
            window = torch.from_numpy(ids[start : start + POSITIONS + 1].astype(np.int64))
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        assert total / (len(ids) - 1) == pytest.approx(held_out_losses(model, STREAMS.held_out)[source], rel=1e-3)
