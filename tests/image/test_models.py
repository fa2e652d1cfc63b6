"""Other models than the demo's, given as docs/operations.md says: a folder, a release archive, a hub's id."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from service.settings import parse_bytes
from tests.checkpoint import megatron_files
from tests.checkpoint.megatron_files import Layout
from tests.deploy.kinds import build, only
from tests.image.conftest import LOCKED
from tests.image.engine import Engine

IDS = [262, 318, 257, 11, 290]
NUM_TOKENS = 8
PUBLISHED = "robowaifudev/megatron-gpt2-345m"


def greedy(model: GPT2LMHeadModel) -> list[int]:
    """The ids by which transformers goes on from IDS."""
    with torch.no_grad():
        ids = model.generate(torch.tensor([IDS]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=50256)
    return ids[0, len(IDS) :].tolist()  # type: ignore[no-any-return]


def check_greedy(engine: Engine, container: str, name: str, expected: list[int]) -> None:
    """The service answers the same, under the model's name."""
    body = {"model": name, "prompt": IDS, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    status, answer = engine.answer(container, "/v1/completions", json.dumps(body))
    assert 200 == status, answer
    found = json.loads(answer)
    assert (name, expected) == (found["model"], found["choices"][0]["token_ids"])


@pytest.fixture
def volume(engine: Engine) -> Iterator[str]:
    """A cache that outlives its container."""
    name = engine.output("podman", "volume", "create")
    yield name
    engine.output("podman", "volume", "rm", name)


def test_the_345m_by_volume(engine: Engine, image: str, user: int, folder_345m: Path, figures: list[str]) -> None:
    """A folder of its shape: offline, read-only, by a random user, with what memory the CPU overlay gives it."""
    (serve,) = only(build("overlays/cpu"), "Deployment")["spec"]["template"]["spec"]["containers"]
    memory = parse_bytes(serve["resources"]["limits"]["memory"] + "B")
    mounted = ("--volume", f"{folder_345m}:/models/345m:ro", "--user", f"{user}:0", "--memory", str(memory))
    began = time.monotonic()
    with engine.ready(image, *LOCKED, *mounted, "--no-healthcheck", command=("serve", "/models/345m")) as container:
        seconds = time.monotonic() - began
        check_greedy(
            engine,
            container,
            "/models/345m",
            greedy(GPT2LMHeadModel.from_pretrained(folder_345m, dtype=torch.float32)),
        )
        peak = engine.peak_memory(container)
    figures.append(f"345M's shape ready in {seconds:.1f} s; peak of its memory {peak / 2**30:.2f} GiB, files included")


def test_a_release_archive_is_converted_once(
    engine: Engine, image: str, user: int, volume: str, tmp_path: Path
) -> None:
    """NVIDIA's zip as it is, under /models: what it is converted to lies in /cache, and a second start reads that."""
    model = megatron_files.random_model()
    layout = Layout(version=None, names="transformer", old_pickle=True)  # as NVIDIA's of 2019, but for the arguments
    archive = megatron_files.write_release_zip(model, layout, tmp_path / "megatron_lm_345m_v0.0.zip")
    mounted = ("--volume", f"{archive}:/models/345m.zip:ro", "--volume", f"{volume}:/cache", "--user", f"{user}:0")
    for log in ("/models/345m.zip: converted into /cache/", "/models/345m.zip: converted before, in /cache/"):
        with engine.ready(
            image, *LOCKED, *mounted, "--no-healthcheck", command=("serve", "/models/345m.zip")
        ) as container:
            check_greedy(engine, container, "/models/345m.zip", greedy(model))
            assert log in engine.run("podman", "logs", container).stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ((), "fetching it from the hub failed ("),
        (("--env", "MGPT_OFFLINE=true"), "offline is on"),
        (("--env", "HF_HUB_OFFLINE=1"), "offline is on"),
    ],
)
def test_a_hub_id_without_a_network(engine: Engine, image: str, variables: tuple[str, ...], reason: str) -> None:
    """Is refused at once, with exit code 2, its name, and which of cache, network and switch it is for."""
    began = time.monotonic()
    done = engine.run(
        *("podman", "run", "--rm", "--pull=never", "--no-healthcheck", *LOCKED, *variables, image, "serve", PUBLISHED)
    )
    assert 2 == done.returncode, done.stderr
    errors = [line["message"] for line in map(json.loads, done.stderr.splitlines()) if line["level"] == "ERROR"]
    assert [True] == [error.startswith(f"{PUBLISHED}: not in the cache, and {reason}") for error in errors], errors
    assert time.monotonic() - began < 20


def test_a_collector_of_traces_that_is_away(engine: Engine, image: str) -> None:
    """Is told of in the log alone: requests are answered, and the end is no error and in time."""
    away = ("--env", "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:9")
    with engine.ready(image, *LOCKED, *away, "--no-healthcheck") as container:
        body = json.dumps({"prompt": "Once", "max_tokens": 4})
        assert [200, 200] == [engine.answer(container, "/v1/completions", body)[0] for _ in range(2)]
        engine.output("podman", "stop", "--time", "10", container)
        assert 0 == engine.inspect(container)["State"]["ExitCode"]
        log = engine.run("podman", "logs", container).stderr
    assert "trace_id" in log
    assert "encountered while exporting" in log
    assert 1 == log.count("phase: load")  # no engine is started while the service ends
