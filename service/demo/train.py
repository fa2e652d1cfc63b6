"""Trains the demo model from scratch: `python -m service.demo.train --out DIR`. Its result is committed as `model/`.

Downloads the corpus, trains a GPT-2 on it, stops on held-out loss, and writes the folder: fp16 weights, configs,
tokenizer, the curve, and `training.json` with all numbers. Where no registry is in reach, `--cache` holds the packages.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from service.demo.corpus import END_OF_TEXT, HELD_OUT, documents, tokenizer_files

log = logging.getLogger(__name__)

POSITIONS = 1024
END_OF_TEXT_ID = 50256
NEWLINE_ID = 198


@dataclass(frozen=True, slots=True)
class Settings:
    """The recipe. Every field is an option of the command."""

    layers: int = 12
    width: int = 128
    heads: int = 4
    dropout: float = 0.1
    weight_decay: float = 0.3
    learning_rate: float = 3e-3
    steps: int = 3000
    warmup: int = 100
    batch_tokens: int = 32768
    average: float = 0.995
    evaluate_every: int = 100
    patience: int = 5
    seed: int = 345


@dataclass(frozen=True, slots=True)
class Streams:
    """Token ids by source, documents joined by end-of-text; `held_out` holds the works training never sees."""

    train: dict[str, NDArray[np.uint16]]
    held_out: dict[str, NDArray[np.uint16]]


def tokenize(cache: Path, tokenizer: GPT2Tokenizer) -> Streams:
    """The corpus as token ids, each document preceded by end-of-text."""
    corpus = documents(cache)
    encoded = tokenizer([END_OF_TEXT + document.text for document in corpus])["input_ids"]
    split: dict[bool, dict[str, list[NDArray[np.uint16]]]] = {False: {}, True: {}}
    for document, ids in zip(corpus, encoded, strict=True):
        part = split[document.work in HELD_OUT]
        part.setdefault(document.source, []).append(np.array(ids, dtype=np.uint16))
    train, held_out = ({source: np.concatenate(ids) for source, ids in split[held].items()} for held in (False, True))
    return Streams(train=train, held_out=held_out)


def batches(train: dict[str, NDArray[np.uint16]], settings: Settings, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of ids [rows, length + 1], length by turns 256 and all positions, rows * length = batch_tokens.

    A row begins where a paragraph or document does, as prompts do. Sources are drawn in proportion to the square root
    of their size, so that the largest does not drown the others.
    """
    random = np.random.default_rng(settings.seed)
    corpus = torch.from_numpy(np.concatenate(list(train.values())).astype(np.int64)).to(device)
    positions = torch.arange(POSITIONS + 1, device=device)
    starts, weights, offset = [], [], 0
    for ids in train.values():
        starts.append(paragraph_starts(ids) + offset)
        weights.append(np.full(len(starts[-1]), len(ids) ** 0.5 / len(starts[-1])))
        offset += len(ids)
    start = np.minimum(np.concatenate(starts), len(corpus) - len(positions))
    cumulative = np.cumsum(np.concatenate(weights))
    while True:
        for length in (256, POSITIONS):
            draws = random.random(settings.batch_tokens // length) * cumulative[-1]
            rows = start[np.searchsorted(cumulative, draws, side="right")]
            yield corpus[torch.from_numpy(rows).to(device)[:, None] + positions[: length + 1]]


def paragraph_starts(ids: NDArray[np.uint16]) -> NDArray[np.intp]:
    """Positions of each end-of-text, and of the first token after each end-of-text and after each run of newlines."""
    breaks = np.isin(ids, (NEWLINE_ID, END_OF_TEXT_ID))
    first = np.flatnonzero(breaks[:-1] & ~breaks[1:]) + 1
    return np.union1d(first, np.flatnonzero(ids == END_OF_TEXT_ID))


def build(settings: Settings, device: torch.device) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, drawn from the seed."""
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=END_OF_TEXT_ID + 1,
        n_positions=POSITIONS,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel; `export` names it as GPT-2 does
        embd_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    with device:
        return GPT2LMHeadModel(config)


def head_loss(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `targets` [n], given hidden states [n, width] and the tied head [ids, width]."""
    return cross_entropy((hidden @ embedding.T).float(), targets)


def loss_of(model: GPT2LMHeadModel, ids: Tensor, head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean loss in nats a token of rows [rows, length + 1], each predicting its own next ids."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        return head(hidden, model.lm_head.weight, ids[:, 1:].flatten())


@torch.no_grad()
def held_out_losses(model: GPT2LMHeadModel, held_out: dict[str, NDArray[np.uint16]]) -> dict[str, float]:
    """Loss in nats a token by source: consecutive windows of all positions, no context carried from one to the next."""
    model.eval()
    losses = {}
    for source, stream in held_out.items():
        ids = torch.from_numpy(stream.astype(np.int64)).to(model.device)
        pieces = [ids[at : at + POSITIONS + 1] for at in range(0, len(ids) - 1, POSITIONS)]
        full = [piece for piece in pieces if len(piece) > POSITIONS]
        windows = [torch.stack(full[at : at + 16]) for at in range(0, len(full), 16)]
        windows += [piece[None] for piece in pieces[len(full) :]]
        sums = [loss_of(model, window, head_loss) * window[:, 1:].numel() for window in windows]
        losses[source] = torch.stack(sums).sum().item() / (len(ids) - 1)
    model.train()
    return losses


class Muon(torch.optim.Optimizer):
    """Muon: the step is the orthogonal matrix nearest to the momentum, scaled to the size of AdamW's steps.

    The same update as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, but the matrices of a group, all of one
    shape, are worked on as one batch: twelve times fewer kernels, which is what a model this small waits for.
    """

    def __init__(
        self, groups: list[dict[str, object]], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter from its gradient."""
        for group in self.param_groups:
            parameters, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([parameter.grad for parameter in parameters])
            state = self.state[parameters[0]]
            average = state.setdefault("average", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(average, momentum)) * (0.2 * max(gradient.shape[1:]) ** 0.5)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.to(gradient.dtype).unbind()), alpha=-lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the nearest orthogonal matrix of each of [n, rows, columns], in bf16."""
    x: Tensor = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.matmul(2.0315 * gram @ gram - 4.7750 * gram, x)
    return x.transpose(1, 2) if tall else x


def optimizers_of(model: GPT2LMHeadModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the tables, biases and norms; only matrices and tables decay."""
    layers = [module for block in model.transformer.h for module in (block.attn, block.mlp)]
    matrices: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in (p for layer in layers for p in layer.parameters() if p.dim() == 2):
        matrices.setdefault(parameter.shape, []).append(parameter)
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    decay = settings.weight_decay
    groups = [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True),
        Muon([{"params": same} for same in matrices.values()], lr=settings.learning_rate, weight_decay=decay),
    ]


def schedule(settings: Settings) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear warm-up, then a cosine down to zero."""

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (settings.steps - settings.warmup)))

    return factor


def train(streams: Streams, settings: Settings, device: torch.device) -> tuple[GPT2LMHeadModel, list[dict[str, float]]]:
    """The averaged weights with the lowest held-out loss (mean over sources), and the curve that chose them.

    The curve has one point every `evaluate_every` steps: step, train (mean loss since the last point), and each source.
    """
    model, averaged = build(settings, device), build(settings, device)
    optimizers = optimizers_of(model, settings)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(settings)) for optimizer in optimizers]
    head = torch.compile(head_loss) if device.type == "cuda" else head_loss
    curve: list[dict[str, float]] = []
    best, best_weights = math.inf, averaged.state_dict()
    recent: list[Tensor] = []
    stale = 0
    for step, ids in zip(range(1, settings.steps + 1), batches(streams.train, settings, device), strict=False):
        loss = loss_of(model, ids, head)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        recent.append(loss.detach())
        with torch.no_grad():
            keep = min(settings.average, step / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
        if step % settings.evaluate_every and step != settings.steps:
            continue
        losses = held_out_losses(averaged, streams.held_out)
        curve.append({"step": step, "train": torch.stack(recent).mean().item(), **losses})
        recent.clear()
        log.info(" ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()))
        mean, stale = sum(losses.values()) / len(losses), stale + 1
        if mean < best:
            best, stale = mean, 0
            best_weights = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
        if stale == settings.patience:
            break
    averaged.load_state_dict(best_weights)
    return averaged, curve


def export(model: GPT2LMHeadModel, out: Path) -> None:
    """Rounds the weights to fp16 and writes them (the head tied, not repeated) with the configs transformers reads."""
    model.config.activation_function = "gelu_new"
    model.generation_config.pad_token_id = END_OF_TEXT_ID
    model.to(torch.float16).save_pretrained(out)


def draw(curve: list[dict[str, float]], path: Path) -> None:
    """The training and held-out curves as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in curve[0]:
        if name != "step":
            label = "training (with dropout)" if name == "train" else f"held-out {name}"
            style = "--" if name == "train" else "-"
            axes.plot([point["step"] for point in curve], [point[name] for point in curve], style, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Demo model: loss on whole works kept from training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m service.demo.train", description="Trains the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--cache", type=Path, default=Path(".corpus"), help="folder of the downloaded packages")
    for field in fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    out, cache, settings = options.pop("out"), options.pop("cache"), Settings(**options)

    out.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer_files(cache).items():
        (out / name).write_bytes(data)
    streams = tokenize(cache, GPT2Tokenizer.from_pretrained(out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    model, curve = train(streams, settings, device)
    seconds = time.monotonic() - began
    export(model, out)
    losses = held_out_losses(model.float(), streams.held_out)
    report = {
        "settings": asdict(settings),
        "tokens": {part: {source: len(ids) for source, ids in of.items()} for part, of in asdict(streams).items()},
        "held_out_perplexity": {source: round(math.exp(loss), 2) for source, loss in losses.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seconds": round(seconds),
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(curve, out / "curve.png")
    log.info("%s", report["held_out_perplexity"])


if __name__ == "__main__":
    main()
