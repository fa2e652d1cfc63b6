"""Checkpoints of Megatron-LM in every layout, each written by megatron_files.py, become the same GPT-2."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from service.checkpoint import distributed
from service.checkpoint.convert import Job, convert
from service.checkpoint.errors import CheckpointError
from tests.checkpoint import megatron_files as files
from tests.checkpoint.megatron_files import Layout


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return files.random_model()


def converted(source: Path, target: Path, **job: Any) -> dict[str, torch.Tensor]:
    convert(Job(str(source), str(target), **job), lambda done, total: None)
    return load_file(target / "model.safetensors")


def check_equal(model: GPT2LMHeadModel, found: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.to(dtype), found[name]), name


TREES = [
    *(Layout(version=version, names="transformer") for version in (None, 0, 1.0, 2.0, 3.0)),
    *(Layout(version=version, tensor_parallel=2, names="transformer") for version in (None, 1.0, 2.0)),
    *(Layout(version=version, tensor_parallel=4) for version in (0, 1.0, 3.0)),
    *(Layout(pipeline_parallel=stages) for stages in (2, 4)),
    Layout(tensor_parallel=2, pipeline_parallel=2, virtual=2),
    Layout(pipeline_parallel=2, virtual=2),
    *(Layout(names=names, tensor_parallel=2) for names in ("norm", "te", "local", "core-te")),
    *(Layout(names=names, pipeline_parallel=2, tensor_parallel=2) for names in ("local", "core-te")),
    Layout(names="local", pipeline_parallel=2, virtual=2),
    *(Layout(dtype=dtype, tensor_parallel=2) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    Layout(version=0, tensor_parallel=2, names="transformer", old_pickle=True, dtype=torch.float16),
]


@pytest.mark.parametrize("layout", TREES, ids=str)
def test_a_tree_of_ranks_is_the_model(model: GPT2LMHeadModel, layout: Layout, tmp_path: Path) -> None:
    """Bit by bit, in its own dtype, without the padding."""
    source = files.write_tree(model, layout, tmp_path / "in")
    check_equal(model, converted(source, tmp_path / "out"), layout.dtype)


SINGLES = [
    Layout(version=version, with_args=with_args, old_pickle=old_pickle, dtype=dtype, names="transformer")
    for version in (None, 1.0, 2.0, 3.0)
    for with_args in (True, False)
    for old_pickle, dtype in ((True, torch.float16), (False, torch.float32))
]


@pytest.mark.parametrize("layout", SINGLES, ids=str)
def test_a_single_file_is_the_model(model: GPT2LMHeadModel, layout: Layout, tmp_path: Path) -> None:
    """With and without args, in the pickles of both times; only the heads must be told where there are no args."""
    source = files.write_rank(model, layout, tmp_path / "my.pt")
    num_heads = None if layout.with_args else files.NUM_HEADS
    check_equal(model, converted(source, tmp_path / "out", num_heads=num_heads), layout.dtype)


@pytest.mark.parametrize("latest", ["release", "7", "7\n"])
def test_the_latest_iteration_is_taken(model: GPT2LMHeadModel, latest: str, tmp_path: Path) -> None:
    """Out of several; without the file that names it, only one may be there."""
    source = tmp_path / "in"
    name = "release" if latest == "release" else "iter_0000007"
    files.write_tree(model, Layout(), source / name)
    check_equal(model, converted(source, tmp_path / "alone"))
    files.write_tree(files.random_model("gelu"), Layout(tensor_parallel=2), source / "iter_0000003")
    with pytest.raises(CheckpointError, match=r"iter_0000003, \.\.\., \w+ and no latest_checkpointed_iteration\.txt"):
        converted(source, tmp_path / "out")
    (source / "latest_checkpointed_iteration.txt").write_text(latest)
    check_equal(model, converted(source, tmp_path / "out"))


def test_the_release_archive_is_read(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """NVIDIA's own has no args and no version."""
    layout = Layout(version=None, names="transformer", with_args=False, dtype=torch.float16)
    source = files.write_release_zip(model, layout, tmp_path / "megatron_lm_345m_v0.0.zip")
    check_equal(model, converted(source, tmp_path / "out", num_heads=files.NUM_HEADS), torch.float16)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("names", ["local", "core-te"])
def test_torch_dist_is_read(model: GPT2LMHeadModel, names: str, stacked: bool, tmp_path: Path) -> None:
    """With a name for each layer, and with layers stacked in one tensor."""
    source = files.write_torch_dist(model, tmp_path / "in" / "iter_0000007", stacked=stacked, names=names)
    check_equal(model, converted(source.parent, tmp_path / "out"))


def test_a_folder_of_one_rank_is_a_checkpoint(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    source = files.write_tree(model, Layout(), tmp_path / "in") / "mp_rank_00"
    check_equal(model, converted(source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("fused", "openai", "activation"), [(True, False, "gelu_new"), (False, True, "gelu_new"), (False, False, "gelu")]
)
def test_each_gelu_gives_its_own_numbers(fused: bool, openai: bool, activation: str, tmp_path: Path) -> None:
    """The logits of transformers with the same tensors, within 1e-4."""
    original = files.random_model(activation)
    layout = Layout(extra_args={"bias_gelu_fusion": fused, "openai_gelu": openai})
    converted(files.write_tree(original, layout, tmp_path / "in"), tmp_path / "out")
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40)[None] * 97
    with torch.no_grad():
        assert (original(ids).logits - reloaded(ids).logits).abs().max() < 1e-4
    assert activation == reloaded.config.activation_function
    assert (50257, 50256, 50256) == (
        reloaded.config.vocab_size,
        reloaded.config.eos_token_id,
        reloaded.config.bos_token_id,
    )


REFUSED = [
    ({"position_embedding_type": "rope"}, "position_embedding_type: is 'rope': a GPT-2 has a table of positions"),
    ({"use_rotary_position_embeddings": True}, "use_rotary_position_embeddings: is True"),
    ({"add_position_embedding": False}, "add_position_embedding: is False"),
    ({"normalization": "RMSNorm"}, "normalization: is 'RMSNorm': a GPT-2 has LayerNorm"),
    ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
    ({"swiglu": True}, "swiglu: is True: a GPT-2 has GELU"),
    ({"squared_relu": True}, "squared_relu"),
    ({"add_bias_linear": False}, "add_bias_linear: is False: a GPT-2's layers have biases"),
    ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights"),
    ({"group_query_attention": True, "num_query_groups": 2}, "num_query_groups: is 2, fewer than the 4 heads"),
    ({"num_experts": 8}, "num_experts: is 8: a GPT-2 has no experts"),
    ({"multi_latent_attention": True}, "multi_latent_attention"),
    ({"qk_layernorm": True}, "qk_layernorm"),
    ({"window_size": (128, 0)}, "window_size: is something else"),
    ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ({"kv_channels": 16}, "4 attention heads do not share a width of 32"),
    ({"hidden_size": 64}, "hidden_size: is 64, and the tensors have 32"),
    ({"num_layers": 6}, "num_layers: is 6, and the tensors have 4"),
    ({"padded_vocab_size": 51200}, "padded_vocab_size: is 51200, and the tensors have 50304"),
    ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size: is 2, and there are 1 ranks"),
    ({"layernorm_epsilon": 7}, "layernorm_epsilon: expected a small number, found 7"),
    ({"num_attention_heads": None}, "give --num-heads"),
]


@pytest.mark.parametrize(("args", "why"), REFUSED, ids=str)
def test_what_is_no_gpt2_by_its_args_is_refused(
    model: GPT2LMHeadModel, args: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """With the field that says so."""
    source = files.write_tree(model, Layout(extra_args=args), tmp_path / "in")
    with pytest.raises(CheckpointError, match=why):
        converted(source, tmp_path / "out")
    assert ["in"] == [path.name for path in tmp_path.iterdir()]


def without(*patterns: str) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        for name in list(model):
            if any(re.search(pattern, name) for pattern in patterns):
                del model[name]

    return change


def with_rows(pattern: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        for name in model:
            if re.search(pattern, name):
                rows = int(model[name].shape[0] * factor)
                model[name] = torch.cat((model[name], model[name]))[:rows].clone()

    return change


CHANGED = [
    (without("position_embeddings"), "has no table of positions"),
    (without("layernorm.bias"), r"final_norm\.bias: missing \(RMSNorm\)"),
    (without(r"linear_\w+\.bias"), r"layers\.0\.qkv\.bias: missing; a GPT-2's norms and layers have biases"),
    (without(r"layers\.2\..*fc1"), r"layers\.2\.up\.weight: missing"),
    (without("final"), r"final_norm\.weight: missing"),
    (without("word_embeddings"), r"token_embedding\.weight: missing"),
    (without("layers"), "has no layers"),
    (with_rows("linear_fc1", 2), "twice args' ffn_hidden_size: gated"),
    (with_rows("linear_qkv", 2 / 3), "have keys and values of their own"),
    (with_rows("word_embeddings", 0.5), "padded_vocab_size: is 50304, and the tensors have 25152"),
    (lambda model: model.update({"output_layer.weight": torch.zeros(50304, 32)}), "untied"),
    (
        lambda model: model.update({"decoder.layers.0.mlp.router.weight": torch.zeros(2, 2)}),
        "experts; a GPT-2 has none",
    ),
    (lambda model: model.update({"decoder.layers.0.mlp.experts.linear_fc1.weight": torch.zeros(2)}), "experts"),
    (lambda model: model.update({"decoder.layers.0.self_attention.q_layernorm.weight": torch.zeros(2)}), "queries"),
    (lambda model: model.update({"decoder.layers.0.what.weight": torch.zeros(2)}), "what.weight: not a tensor of a"),
    (
        lambda model: model.update({"decoder.layers.0.input_layernorm.weight": torch.ones(32).int()}),
        "no floating-point",
    ),
]


@pytest.mark.parametrize(("change", "why"), CHANGED, ids=[why for _, why in CHANGED])
def test_what_is_no_gpt2_by_its_tensors_is_refused(
    model: GPT2LMHeadModel, change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path
) -> None:
    """With the tensor that says so."""
    value = files.rank_value(model, Layout(names="local"), 0, 0)
    change(value["model"])
    torch.save(value, tmp_path / "my.pt")
    with pytest.raises(CheckpointError, match=why):
        converted(tmp_path / "my.pt", tmp_path / "out")


def test_ranks_that_do_not_fit_together_are_named(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """One that is missing, one of another run, and one that has other values where all have the same."""
    layout = Layout(tensor_parallel=2)
    source = files.write_tree(model, layout, tmp_path / "in")
    file = source / "mp_rank_01" / "model_optim_rng.pt"
    for changed, why in (
        (replace(layout, version=2.0), "checkpoint_version: not that of the other ranks"),
        (replace(layout, dtype=torch.float16), "of other dtypes in other ranks"),
    ):
        files.write_rank(model, changed, file, 1)
        with pytest.raises(CheckpointError, match=why):
            converted(source, tmp_path / "out")
    value = files.rank_value(model, layout, 1, 0)
    del value["model"]["language_model"]["encoder"]["final_layernorm.bias"]
    torch.save(value, file)
    with pytest.raises(CheckpointError, match=r"final_norm\.bias: not in all tensor-parallel ranks"):
        converted(source, tmp_path / "out")
    with torch.no_grad():
        other = files.random_model()
        other.transformer.wpe.weight += 1
    files.write_rank(other, layout, file, 1)
    with pytest.raises(
        CheckpointError, match=r"position_embedding\.weight: differs between tensor-parallel ranks 0 and 1"
    ):
        converted(source, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01: has neither model_optim_rng\.pt nor model_rng\.pt"):
        converted(source, tmp_path / "out")
    file.parent.rmdir()
    with pytest.raises(CheckpointError, match="is 2, and there are 1 ranks"):
        converted(source, tmp_path / "out")
    (source / "mp_rank_00").rename(source / "mp_rank_00_000_001")
    with pytest.raises(CheckpointError, match="experts are not for a GPT-2"):
        converted(source, tmp_path / "out")


def test_torch_dist_without_a_file_or_a_block_is_refused(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Cut off, missing, or with a name that leads elsewhere."""
    source = files.write_torch_dist(model, tmp_path / "in", stacked=True)
    (file,) = source.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"\.distcp: .*cut off"):
        converted(source, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"\.distcp: cannot be read"):
        converted(source, tmp_path / "out")
    metadata = (source / ".metadata").read_bytes()
    (source / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../../a.disc"))
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("rows", [50000, 52000])
def test_a_table_that_is_not_of_gpt2s_ids_needs_a_tokenizer(rows: int, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Too small for them, or larger than padding makes it."""
    value = files.rank_value(model, Layout(names="local", with_args=False), 0, 0)
    table = value["model"]["embedding.word_embeddings.weight"]
    value["model"]["embedding.word_embeddings.weight"] = torch.cat((table, table))[:rows].clone()
    torch.save(value, tmp_path / "my.pt")
    with pytest.raises(CheckpointError, match=rf"has {rows} rows for 50257 ids, .*give its --tokenizer"):
        converted(tmp_path / "my.pt", tmp_path / "out", num_heads=4)


def test_a_distributed_optimizer_beside_the_model_is_passed_over(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Its folders have a data-parallel rank in their names, with and without a pipeline."""
    for number, stages in enumerate((1, 2)):
        source = files.write_tree(model, Layout(pipeline_parallel=stages, tensor_parallel=2), tmp_path / f"in{number}")
        for rank in list(source.iterdir()):
            (rank / "model_optim_rng.pt").rename(rank / "model_rng.pt")
            for shard in range(2):
                folder = source / f"{rank.name}_{shard:03d}"
                folder.mkdir()
                (folder / "optim.pt").write_bytes(b"not read")
        check_equal(model, converted(source, tmp_path / f"out{number}"))


def test_layers_of_experts_in_the_same_place_are_refused(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Their folders have a model in them."""
    source = files.write_tree(model, Layout(pipeline_parallel=2), tmp_path / "in")
    (source / "mp_rank_00_000").rename(source / "mp_rank_00_000_000")
    with pytest.raises(CheckpointError, match="experts are not for a GPT-2"):
        converted(source, tmp_path / "out")


def test_a_block_that_is_there_twice_does_not_stand_for_another(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """What no block fills is no weight."""
    blocks = [torch.arange(6.0).view(2, 3)] * 2
    for number, block in enumerate(blocks):
        torch.save(block, tmp_path / f"{number}.distcp")
    sizes = [path.stat().st_size for path in (tmp_path / "0.distcp", tmp_path / "1.distcp")]
    for offsets, works in (((0, 2), True), ((0, 0), False), ((0, 3), False), ((0, 1), False)):
        chunks = tuple(
            distributed._Chunk((offset, 0), (2, 3), tmp_path / f"{number}.distcp", 0, sizes[number])
            for number, offset in enumerate(offsets)
        )
        tensor = distributed._Sharded("here", "float32", (4, 3), chunks)
        if works:
            assert torch.equal(torch.cat(blocks), tensor.read())
        else:
            with pytest.raises(CheckpointError, match="here: "):
                tensor.read()


@pytest.mark.parametrize(
    ("names", "args", "activation"),
    [
        ("core-te", {"bias_gelu_fusion": False, "openai_gelu": True}, "gelu"),
        ("local", {"bias_gelu_fusion": True}, "gelu_new"),
        ("core-te", {"bias_gelu_fusion": False, "use_te_activation_func": True}, "gelu_new"),
        ("te", {"bias_gelu_fusion": False}, "gelu_new"),
    ],
)
def test_gelu_depends_on_whose_layers_they_are(
    model: GPT2LMHeadModel, names: str, args: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    """The core knows no openai_gelu, and Transformer Engine's own GELU is the tanh form."""
    converted(files.write_tree(model, Layout(names=names, extra_args=args), tmp_path / "in"), tmp_path / "out")
    assert activation == json.loads((tmp_path / "out" / "config.json").read_text())["activation_function"]


def test_a_table_padded_as_args_say_is_cut(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """By any multiple."""
    args = {"padded_vocab_size": 53248, "make_vocab_size_divisible_by": 4096, "orig_vocab_size": 50257}
    value = files.rank_value(model, Layout(names="local", extra_args=args), 0, 0)
    table = value["model"]["embedding.word_embeddings.weight"]
    value["model"]["embedding.word_embeddings.weight"] = torch.cat((table, table))[:53248].clone()
    torch.save(value, tmp_path / "my.pt")
    check_equal(model, converted(tmp_path / "my.pt", tmp_path / "out"))


def test_heads_that_do_not_split_over_the_ranks_are_refused(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """And so is a number of heads that is none."""
    source = files.write_tree(model, Layout(tensor_parallel=4, with_args=False), tmp_path / "in")
    for num_heads, why in ((2, "2 attention heads do not split over 4"), (-4, "--num-heads: must be at least 1")):
        with pytest.raises(CheckpointError, match=why):
            converted(source, tmp_path / "out", num_heads=num_heads)


def test_a_mutated_checkpoint_gives_our_error_or_a_model(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A bounded fuzz of whole conversions: tensors of other shapes, dtypes and names, values of other kinds."""
    numbers = random.Random(3)
    wrong: list[Any] = [
        None,
        3,
        "x",
        [1],
        {},
        torch.tensor(1.0),
        torch.zeros(3),
        torch.zeros(2, 3, 4),
        torch.ones(5).int(),
    ]
    num_refused = 0
    for _ in range(120):
        layout = Layout(names=numbers.choice(list(files.STEMS)), tensor_parallel=numbers.choice([1, 2]))
        source = tmp_path / "in"
        for rank in range(layout.tensor_parallel):
            value = files.rank_value(model, layout, rank, 0)
            tables = [value, value["model"]]
            tables += [item for item in value["model"].values() if isinstance(item, dict)]
            tables += [item for table in tables for item in table.values() if isinstance(item, dict)]
            for _ in range(numbers.choice([0, 1, 1, 2])):
                table = numbers.choice([table for table in tables if table])
                name = numbers.choice(list(table))
                match numbers.randrange(3):
                    case 0:
                        table[name] = numbers.choice(wrong)
                    case 1:
                        table[name + numbers.choice([".x", "0", ".weight"])] = table[name]
                    case _:
                        del table[name]
            file = source / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(value, file)
        try:
            converted(source, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except CheckpointError:
            num_refused += 1
        shutil.rmtree(source)
    assert 20 < num_refused < 120
