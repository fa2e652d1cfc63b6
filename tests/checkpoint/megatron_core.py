"""Megatron-core itself, on CPUs: writes a random GPT in its own formats, and loads what the service has written.

Run by test_megatron_core.py in processes of its own, one a rank: it has global state, and asks for CUDA now and then.
"""

import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_config import TransformerConfig

NUM_LAYERS, HIDDEN, NUM_HEADS, CONTEXT, PADDED_VOCAB = 2, 32, 4, 64, 50432  # padded for two ranks
IDS = torch.arange(20)[None] * 97


def gpt(*, num_ranks: int, stacked: bool) -> GPTModel:
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=NUM_HEADS,
        ffn_hidden_size=4 * HIDDEN,
        tensor_model_parallel_size=num_ranks,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        hetereogenous_dist_checkpoint=not stacked,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=PADDED_VOCAB,
        max_sequence_length=CONTEXT,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
        parallel_output=False,
    ).eval()


def logits(model: GPTModel) -> torch.Tensor:
    hidden = torch.ones(1, 1, IDS.shape[1], IDS.shape[1]).tril() < 0.5
    with torch.no_grad():
        found: torch.Tensor = model(IDS, torch.arange(IDS.shape[1])[None], hidden)
    return found


def write(folder: Path, rank: int, num_ranks: int, *, stacked: bool) -> None:
    """torch_dist under dist/iter_0000007, the older format under ranks/iter_0000007, and logits.pt."""
    torch.manual_seed(5)
    model = gpt(num_ranks=num_ranks, stacked=stacked)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # as a run leaves them, no ones and zeros
            noise = torch.randn(parameter.shape[0] * num_ranks) * 0.1
            split = getattr(parameter, "tensor_model_parallel", False)
            parameter.data += noise.chunk(num_ranks)[rank] if split else noise[: parameter.shape[0]]
    args = Namespace(num_attention_heads=NUM_HEADS, num_layers=NUM_LAYERS, bias_gelu_fusion=False, openai_gelu=False)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    target = folder / "dist" / "iter_0000007"
    if rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(common | model.sharded_state_dict(), str(target))
    file = folder / "ranks" / "iter_0000007" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save(common | {"model": model.state_dict_for_save_checkpoint()}, file)
    found = logits(model)
    if rank == 0:
        torch.save(found, folder / "logits.pt")


def load(folder: Path, rank: int, num_ranks: int) -> None:
    """Take our ranks' files as they are; the logits go beside them."""
    model = gpt(num_ranks=num_ranks, stacked=False)
    value: dict[str, Any] = torch.load(folder / f"release/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
    model.load_state_dict(value["model"], strict=True)
    found = logits(model)
    if rank == 0:
        torch.save(found, folder / "logits.pt")


def main(work: str, folder: str, rank: str, num_ranks: str, rendezvous: str) -> None:
    # There is nothing to wait for and no other device; dropout, whose random numbers these are, is 0.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    tracker: Any = megatron_random.get_cuda_rng_tracker()
    tracker.fork = lambda *_: contextlib.nullcontext()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(num_ranks))
    parallel_state.initialize_model_parallel(int(num_ranks), 1)
    if work == "load":
        load(Path(folder), int(rank), int(num_ranks))
    else:
        write(Path(folder), int(rank), int(num_ranks), stacked=work == "write-stacked")
    dist.barrier()
    dist.destroy_process_group()  # a process that ends with its threads running may abort


if __name__ == "__main__":
    main(*sys.argv[1:])
