"""Every snippet of every page is checked.

A block of code has one claim in CLAIMS, and a new block without one fails: a test runs it as the page has it, or a test
does the like of it, or neither can be where tests run, and why. Commands are parsed besides, in blocks and in prose,
by what would read them (tests/commands.py).
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from service.api.keys import parse_keys
from tests.commands import DOCUMENTED_URL, OTHERS, check, check_flags, check_ray, curl, is_command
from tests.markdown import PAGES, ROOT, Block, anchors, blocks, links, prose, spans
from tests.service.server import Server, until_drained
from tests.test_api_docs import EXAMPLES
from tests.test_evaluation_docs import blocks as evaluation_blocks
from tests.test_readme import COMMAND, served_demo


@dataclass(frozen=True)
class Runs:
    """The test takes the block from its page, and runs it, builds it or compares it with what it is of."""

    test: str


@dataclass(frozen=True)
class Alike:
    """The test does the same with other names or tools; why not this very block."""

    test: str
    why: str


@dataclass(frozen=True)
class Parsed:
    """Its commands are parsed, no more; why."""

    why: str


HERE = "tests/test_snippets.py::"
_NO_HUB = "NVIDIA's 345M cannot be fetched where tests run"
_DOCKER = "by podman, in `make image-test`: Docker's engine is not there"
# The page, how the block begins, and its claim.
CLAIMS: list[tuple[str, str, Runs | Alike | Parsed]] = [
    ("README.md", "$ make run ", Parsed("`make test` is what runs this; both set up .venv from a registry first")),
    ("README.md", "$ curl -N", Runs("tests/test_readme.py::test_curl_prints_the_documented_answer")),
    ("README.md", "$ megatron-gpt2 bench", Runs(HERE + "test_the_benchmark_runs")),
    ("README.md", "$ make run MODEL=", Alike("tests/checkpoint/test_download.py::test_revision_is_a_pin", _NO_HUB)),
    ("README.md", "from openai", Runs("tests/test_readme.py::test_python_example_runs")),
    ("README.md", "$ megatron-gpt2 key", Runs(HERE + "test_a_key_lets_its_client_in")),
    ("docs/api.md", "$ curl", Runs("tests/test_api_docs.py::test_examples_run")),
    ("docs/architecture.md", "graph TD", Runs("tests/test_imports.py::test_the_diagram_is_of_the_imports")),
    (
        "docs/checkpoints.md",
        "$ megatron-gpt2",
        Alike("tests/service/test_raw_checkpoints.py::test_convert_and_verify", _NO_HUB),
    ),
    (
        "docs/evaluation.md",
        "$ megatron-gpt2 eval wiki",
        Alike("tests/evaluation/test_parity.py::test_wikitext_is_transformers", _NO_HUB + ", nor the test sets"),
    ),
    ("docs/evaluation.md", "$ printf", Runs("tests/test_evaluation_docs.py::test_the_commands_print_what_is_shown")),
    (
        "docs/evaluation.md",
        "$ megatron-gpt2 eval text",
        Runs("tests/test_evaluation_docs.py::test_the_commands_print_what_is_shown"),
    ),
    (
        "docs/evaluation.md",
        "$ megatron-gpt2 eval lambada --data lines",
        Runs("tests/test_evaluation_docs.py::test_the_commands_print_what_is_shown"),
    ),
    ("docs/evaluation.md", "$ lm_eval", Runs("tests/clients/test_lm_eval_tasks.py::test_the_documented_command")),
    ("docs/evaluation.md", "include:", Runs("tests/clients/test_lm_eval_tasks.py::test_the_documented_command")),
    (
        "docs/kubernetes.md",
        "$ docker build",
        Alike("tests/image/test_kube.py::test_a_streamed_completion", "no registry and no cluster"),
    ),
    ("docs/kubernetes.md", "# mine/kust", Runs("tests/deploy/test_kustomize.py::test_documented_overlay_builds")),
    ("docs/kubernetes.md", "$ kubectl label", Parsed("no cluster")),
    (
        "docs/operations.md",
        "$ megatron-gpt2 drain",
        Alike(
            "tests/service/test_drain.py::test_the_command_waits_for_what_is_open",
            "its 20 seconds, and a request that takes them",
        ),
    ),
    ("docs/operations.md", '{"status"', Runs("tests/api/test_admin.py::test_the_documented_answer_is_of_this_form")),
    ("docs/operations.md", "terminationGrace", Runs("tests/test_deploy.py::test_documented_grace_is_enough")),
    (
        "docs/operations.md",
        "$ megatron-gpt2 selftest",
        Alike("tests/test_selftest.py::test_everybody_gets_the_same_bits", "minutes"),
    ),
    ("docs/operations.md", "$ megatron-gpt2 key", Runs(HERE + "test_a_key_lets_its_client_in")),
    ("docs/operations.md", "- name: alice", Runs(HERE + "test_the_file_of_keys_is_one")),
    ("docs/operations.md", "$ docker build", Alike("tests/image/test_image.py::test_a_streamed_completion", _DOCKER)),
    (
        "docs/operations.md",
        "$ docker run --read-only",
        Alike("tests/image/test_models.py::test_a_release_archive_is_converted_once", _DOCKER),
    ),
    ("docs/operations.md", "$ docker run -p 8000", Parsed(_DOCKER)),
    ("docs/operations.md", "$ make up", Alike("tests/image/test_compose.py::test_a_streamed_completion", _DOCKER)),
    (
        "docs/ray.md",
        "$ pip install",
        Alike(
            "tests/ray/test_ingress.py::test_an_answer_is_that_of_the_command",
            "by `make ray-test`, on a cluster within one machine",
        ),
    ),
    ("docs/ray.md", "http_options", Runs(HERE + "test_the_file_for_serve_deploy")),
    (
        "service/demo/model/README.md",
        "$ pip install",
        Alike("tests/demo/test_train.py::test_train_learns_and_exports", "minutes of a GPU, and downloads"),
    ),
]
BLOCKS = [block for page in PAGES for block in blocks(page)]
PROSE = [(page, span) for page in PAGES for span in spans(page)]


def claims_of(block: Block) -> list[Runs | Alike | Parsed]:
    """The claims with the longest of the beginnings that fit."""
    fitting = [
        (len(start), claim) for page, start, claim in CLAIMS if page == block.page and block.text.startswith(start)
    ]
    longest = max((length for length, _ in fitting), default=0)
    return [claim for length, claim in fitting if length == longest]


def name_of(block: Block) -> str:
    return f"{block.page}: {block.text[:40]!r}"


def claimed(test: str) -> list[Block]:
    """The blocks that a test of this file runs."""
    return [block for block in BLOCKS if claims_of(block) == [Runs(HERE + test)]]


def test_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "service/demo/model/README.md"} <= set(PAGES)
    assert {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} <= set(PAGES)
    fences = sum((ROOT / page).read_text().count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "each block is read"


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_every_block_is_claimed(block: Block) -> None:
    """Once; it says what language it is in, and a console has commands."""
    assert block.language in ("console", "python", "json", "yaml", "mermaid")
    assert block.commands or block.language != "console"
    assert 1 == len(claims_of(block))


def test_every_claim_is_of_a_block() -> None:
    used = [claim for block in BLOCKS for claim in claims_of(block)]
    assert [] == [(page, start) for page, start, claim in CLAIMS if claim not in used]


def test_blocks_that_are_found_by_their_form_are_all_found() -> None:
    """Those tests run as many as claims say."""
    for test, num_found in (
        ("tests/test_api_docs.py::test_examples_run", len(EXAMPLES.findall((ROOT / "docs/api.md").read_text()))),
        ("tests/test_evaluation_docs.py::test_the_commands_print_what_is_shown", len(evaluation_blocks())),
    ):
        assert num_found == sum(claims_of(block) == [Runs(test)] for block in BLOCKS)


@pytest.mark.parametrize(
    ("page", "test", "reads"),
    sorted({(page, claim.test, isinstance(claim, Runs)) for page, _, claim in CLAIMS if not isinstance(claim, Parsed)}),
)
def test_tests_that_are_named_exist(page: str, test: str, reads: bool) -> None:
    """And those that take a block from its page read that page."""
    file, _, name = test.partition("::")
    source = (ROOT / file).read_text()
    assert re.search(rf"def {name}\(", source), f"no {name} in {file}"
    assert not reads or Path(page).name in source


@pytest.mark.parametrize(
    "command", dict.fromkeys(command for block in BLOCKS if block.page != "docs/api.md" for command in block.commands)
)
def test_commands_are_those_of_their_programs(command: str) -> None:
    """Flags, values, targets, modules, images, ports, folders."""
    check(command)


@pytest.mark.parametrize(("page", "command"), [(page, span) for page, span in PROSE if is_command(span)])
def test_commands_in_prose_are_too(page: str, command: str) -> None:
    check(command, in_prose=True)


@pytest.mark.parametrize(("page", "flags"), [(page, span) for page, span in PROSE if span.startswith("--")])
def test_flags_in_prose_are_there(page: str, flags: str) -> None:
    check_flags(flags)


def test_flags_of_others_are_still_named() -> None:
    assert set(OTHERS) == {flag for flag in OTHERS if any(flag in span for _, span in PROSE)}


@pytest.mark.parametrize(
    "command",
    [
        "megatron-gpt2 serve --no-such-flag",
        "megatron-gpt2 serve --dtype int7",
        "megatron-gpt2 eval nothing",
        "python -m bench.cpu --no-such-flag",
        "python -m bench.nothing",
        "make nothing",
        "make fuzz NOTHING=1",
        "docker run -p 127.0.0.1:8000:80 megatron-gpt2",
        "docker run megatron-gpt2 serve --no-such-flag",
        "docker build -t megatron-gpt2 --build-arg NOTHING=1 .",
        "docker compose -f docker/compose.yaml --profile nothing up",
        "kubectl apply -k k8s/nothing",
        "pip install 'megatron-gpt2[nothing]'",
        "pytest -m nothing",
        "curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": 1.5}'",
        "serve run service.ray_serve:build nothing=1",
    ],
)
def test_what_is_not_there_is_seen(command: str) -> None:
    """Of each program: a page with this would fail."""
    with pytest.raises((AssertionError, OSError, ValueError, SystemExit)):
        check(command)


@pytest.mark.parametrize("page", PAGES)
def test_files_in_prose_are_there(page: str) -> None:
    """And the tests that are named within them."""
    for path, name in re.findall(r"`((?:bench|docker|docs|k8s|service|tests)/[\w./-]+)(?:::(\w+))?`", prose(page)):
        assert (ROOT / path).exists(), path
        assert not name or re.search(rf"def {name}\(", (ROOT / path).read_text()), f"no {name} in {path}"


# What no other test runs


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_demo() as url:
        yield url


def shell(command: str, folder: Path) -> str:
    """What a command prints, as a shell runs it, in a folder with nothing else; it must end well."""
    environment = os.environ | {"PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=110
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


def test_the_benchmark_runs(url: str, tmp_path: Path) -> None:
    """As README.md has it, but for few and short requests."""
    (block,) = claimed("test_the_benchmark_runs")
    (command,) = block.commands
    printed = shell(
        f"{command.replace(DOCUMENTED_URL, url)} --requests 16 --max-tokens 2 --prompt-tokens 8 --warmup-seconds 0",
        tmp_path,
    )
    assert "64 clients" in printed


def test_a_text_is_generated(tmp_path: Path) -> None:
    """By README.md's command in prose."""
    (command,) = [span for page, span in PROSE if page == "README.md" and span.startswith("megatron-gpt2 generate")]
    assert len(shell(command + " --cpu-threads 1", tmp_path)) > 20


@pytest.mark.parametrize("block", claimed("test_a_key_lets_its_client_in"), ids=lambda block: block.page)
def test_a_key_lets_its_client_in(block: Block, tmp_path: Path) -> None:
    """The key that is printed is asked for by the service that is started next, in README.md by the curl below."""
    new, serve, *asked = block.commands
    key = shell(new, tmp_path).strip()
    assert key.startswith("mgpt-")
    program, command, *flags = shlex.split(serve)
    assert ("megatron-gpt2", "serve") == (program, command)
    flags = [str(tmp_path / flag) if flag == "keys.yaml" else flag for flag in flags]
    for server in until_drained(Server(*flags, "--kv-memory", "64MiB")):
        url = re.sub(r"//0\.0\.0\.0:", "//127.0.0.1:", server.url)
        for line in asked or [f"curl {DOCUMENTED_URL}/v1/models -H 'Authorization: Bearer mgpt-…'"]:
            assert 200 == curl(line.replace("mgpt-…", key), url).status_code
        assert 401 == httpx.get(url + "/v1/models").status_code


def test_the_file_of_keys_is_one() -> None:
    """That of docs/operations.md, with a hash in it."""
    (block,) = claimed("test_the_file_of_keys_is_one")
    (key,) = parse_keys(block.text.replace("…", "ab" * 32).encode(), Path("keys.yaml"))
    assert ("alice", 600, 32, 10) == (key.name, key.requests_per_minute, key.max_concurrent, key.priority_floor)


def test_the_file_for_serve_deploy() -> None:
    """That of docs/ray.md: the application is there, and takes these arguments."""
    (block,) = claimed("test_the_file_for_serve_deploy")
    (application,) = yaml.safe_load(block.text)["applications"]
    check_ray(application["import_path"], application["args"])


# Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files of the repository, and headings in them."""
    for link in links(page):
        if link.startswith(("https:", "http:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link
