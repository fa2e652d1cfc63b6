"""How tensor parallelism splits a model over ranks, as Megatron-LM does (Shoeybi et al., arXiv 1909.08053, section 3).

Read by model/parallel.py, which computes a part, and by checkpoint/, which joins and writes parts. Loads no torch.
"""

from collections.abc import Mapping

from service.model.config import ModelConfig

# By the end of a canonical name (checkpoint/hub.py), the dimension: 0 where a matrix gives (each rank computes some of
# the outputs), 1 where it takes (each computes a part of every output's sum). What is not here, each rank has whole.
SPLIT_AT: Mapping[str, int] = {
    "token_embedding.weight": 0,
    "head.weight": 0,
    "qkv.weight": 0,
    "qkv.bias": 0,
    "up.weight": 0,
    "up.bias": 0,
    "attention_output.weight": 1,
    "down.weight": 1,
}
MULTIPLE = 128  # of rows that a rank has of the vocabulary, the last ones filled up


def end_of(name: str) -> str:
    """Of a canonical name, what SPLIT_AT knows it by."""
    return ".".join(name.split(".")[-2:])


def vocabulary_rows(config: ModelConfig, num_ranks: int) -> int:
    """Rows of the vocabulary that each rank has."""
    return -(-config.vocab_size // (num_ranks * MULTIPLE)) * MULTIPLE


def what_does_not_split(config: ModelConfig, num_ranks: int) -> str | None:
    """In words; None when everything does."""
    for what, number in (("attention heads", config.num_heads), ("MLP units", config.intermediate_size)):
        if number % num_ranks:
            return f"{number} {what} do not split over {num_ranks} ranks"
    return None
