"""lm-evaluation-harness: what its own client classes read off the service equals transformers' numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tests.clients.conftest import CONTEXT, DEMO, MODEL, Oracle, Server, load_oracle, text

PAIRS = [
    ("The people of the United", " States"),
    ("The people of the United", " Kingdom of Great Britain"),
    ("My fellow citizens of the Senate and of the House", " of Representatives"),
    ("Question: who was the king?\nAnswer: ", "George"),
    ("Question: who was the king?\nAnswer:", " George"),
    ("“Naïve” café — 日本", "語 and 👍"),
    ("", "Once upon a time"),
    ("x " * 1500, "and so it goes"),  # longer than the context: the client cuts it to 1,023 tokens and sends 1 more
]
SPLIT_NUMBER = ("In the year 1", "776")  # as one text it has other tokens, so only token ids can ask for it


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return load_oracle(DEMO)


def local_completions(server: Server, **arguments: Any) -> Any:
    """The harness's model, over the service."""
    settings = {"base_url": f"{server.url}/v1/completions", "model": MODEL, "max_length": CONTEXT} | arguments
    return get_model("local-completions")(**settings)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, idx) for idx, each in enumerate(arguments)]


def expected_scores(oracle: Oracle, pairs: list[tuple[str, str]]) -> list[tuple[float, bool, int]]:
    """By transformers, over the tokens that the harness makes of each pair: sum, greedy flag, number of tokens."""
    found = []
    encode = oracle.encode
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        whole = encode(context + continuation)
        before = encode(context[: len(context) - spaces]) if spaces else encode(context)
        context_ids, continuation_ids = (before, whole[len(before) :]) if before else ([50256], whole)
        ids = (context_ids + continuation_ids)[-(CONTEXT - 1) :]
        score, greedy = oracle.score(ids[: -len(continuation_ids)], continuation_ids)
        found.append((score, greedy, len(continuation_ids)))
    return found


def check_scores(model: Any, oracle: Oracle, pairs: list[tuple[str, str]]) -> None:
    """The model's log-likelihoods are the oracle's within 1e-4 a token, and so are the greedy flags, of both kinds."""
    got = model.loglikelihood(instances("loglikelihood", pairs))
    expected = expected_scores(oracle, pairs)
    assert [greedy for _, greedy, _ in expected] == [bool(greedy) for _, greedy in got]
    assert {True, False} == {greedy for _, greedy, _ in expected}
    for (score, _, num_tokens), (found, _) in zip(expected, got, strict=True):
        assert abs(score - found) <= 1e-4 * num_tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenizer_backend": "auto"},
        {"tokenizer_backend": "remote", "tokenized_requests": False},
        {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO), "batch_size": 4},
        {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO), "num_concurrent": 4},
    ],
    ids=["auto", "text", "batched", "concurrent"],
)
def test_log_likelihoods_are_transformers(server: Server, oracle: Oracle, arguments: dict[str, Any]) -> None:
    """Within 1e-4 a token, and the greedy flags equal, by token ids and by text, alone, batched and concurrent."""
    pairs = PAIRS if arguments.get("tokenized_requests") is False else [*PAIRS, SPLIT_NUMBER]
    check_scores(local_completions(server, **arguments), oracle, pairs)


def test_log_likelihoods_of_another_model(random_server: Server, random_folder: Path) -> None:
    """A GPT-2 of another shape, whose tokens are far from equally likely; what it would say itself is greedy."""
    oracle = load_oracle(random_folder)
    model = local_completions(random_server, model=str(random_folder), tokenizer_backend="auto", batch_size=3)
    said = [(context, oracle.greedy(oracle.encode(context), 4)) for context in ("The king", "In the year")]
    check_scores(model, oracle, [*PAIRS, SPLIT_NUMBER, *said])


def test_the_remote_tokenizer_is_transformers(server: Server, oracle: Oracle) -> None:
    """/tokenizer_info, /tokenize and /detokenize: the same ids both ways, and the end of text is one id."""
    tokenizer = local_completions(server).tokenizer
    assert "RemoteTokenizer" == type(tokenizer).__name__
    assert (50256, "<|endoftext|>") == (tokenizer.eos_token_id, tokenizer.eos_token)
    for context, continuation in PAIRS[:-1]:
        ids = tokenizer.encode(context + continuation)
        assert oracle.encode(context + continuation) == ids
        assert context + continuation == tokenizer.decode(ids)


def test_rolling_log_likelihoods(server: Server, oracle: Oracle) -> None:
    """A text of several windows, each of up to 1,023 tokens and the one that is generated."""
    long = (DEMO / "README.md").read_text()[:6000]
    model = local_completions(server, tokenizer_backend="auto", batch_size=2)
    (got,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(long,)]))
    ids = oracle.encode(long)
    assert len(ids) > CONTEXT
    windows = get_rolling_token_windows(ids, prefix_token=50256, max_seq_len=CONTEXT - 2, context_len=1)
    expected = sum(oracle.score(*make_disjoint_window(window))[0] for window in windows)
    assert abs(expected - got) <= 1e-4 * len(ids)


def test_generation_until_a_stop(server: Server) -> None:
    """More than four stops and the end of text among them; the text is cut at the first that is met."""
    model = local_completions(server, tokenizer_backend="auto")
    until = ["\n", ".", ";", ",", "!", "?"]
    prompts = ["The people of the United States", "In the year"]
    arguments = {"until": until, "max_gen_toks": 40, "do_sample": False}
    got = model.generate_until(instances("generate_until", [(prompt, dict(arguments)) for prompt in prompts]))
    assert [text(server, prompt=prompt, max_tokens=40, temperature=0, stop=until) for prompt in prompts] == got


def test_a_task_from_a_local_file(server: Server, oracle: Oracle, tmp_path: Path) -> None:
    """The whole harness: a multiple-choice task of local texts, its accuracy as transformers' scores give it."""
    rows = [
        {"question": "The people of the United", "choices": [" States", " Kingdom", " bread"], "gold": 0},
        {"question": "In the year of our", "choices": [" Lord", " cheese", " of"], "gold": 0},
        {"question": "My fellow", "choices": [" the", " potatoes", " citizens"], "gold": 2},
        {"question": "He said that he was", "choices": [" xylophone", " not", " Zanzibar"], "gold": 0},
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        json.dumps(
            {
                "task": "local_choice",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "gold",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    results = simple_evaluate(
        model=local_completions(server),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for row in rows:
        scores = [
            oracle.score(oracle.encode(row["question"]), oracle.encode(choice))[0]  # type: ignore[arg-type]
            for choice in row["choices"]  # type: ignore[attr-defined]
        ]
        right += scores.index(max(scores)) == row["gold"]
    assert right / len(rows) == results["results"]["local_choice"]["acc,none"]
    assert 0 < right < len(rows)


def test_the_gguf_client(server: Server, oracle: Oracle) -> None:
    """It finds the continuation by text_offset, and the greedy flag by the names of tokens; it names no model."""
    model = get_model("gguf")(base_url=server.url)
    pairs = [pair for pair in PAIRS[:-1] if pair[0] and pair[0] == pair[0].rstrip()]
    got = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (found, greedy) in zip(pairs, got, strict=True):
        whole, before = oracle.encode(context + continuation), oracle.encode(context)
        assert whole[: len(before)] == before
        score, flag = oracle.score(before, whole[len(before) :])
        assert abs(score - found) <= 1e-4 * (len(whole) - len(before))
        assert flag == greedy
    (generated,) = model.generate_until(
        instances("generate_until", [("The people", {"until": ["."]})]), disable_tqdm=True
    )
    assert text(server, prompt="The people", temperature=0, stop=["."]).strip() == generated
