"""The combination with the 345M under `podman kube play`: fetched from a stand-in of the hub by the init container.

kube.py says what is rewritten. The pod's network has nothing but the stand-in, which stands in the settings as a mirror
would. The repository is like the published one: a .bin in fp16 with causal masks beside the weights, here random.
"""

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.settings import parse_bytes
from tests.checkpoint.conftest import Hub, _Handler
from tests.image.engine import Engine
from tests.image.kube import KEY, Pod, played
from tests.image.stream import check, request

COMBINATION = "combinations/cpu-model-observability"
MODEL = "robowaifudev/megatron-gpt2-345m"


class ChunkedFiles(_Handler):
    """Says of every file, as the hub does of large ones, that it is also stored in chunks elsewhere, for xet."""

    def _send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None, **options: Any) -> None:
        if headers and "ETag" in headers:
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.server.url}/api/xet-read-token"}
        super()._send(status, body, headers, **options)


@pytest.fixture(scope="module")
def network(engine: Engine, image: str) -> Iterator[str]:
    """A container whose network has a loopback alone."""
    name = engine.start(image, "--network", "none", "--no-healthcheck", "--entrypoint", "sleep", command=("infinity",))
    yield name
    engine.output("podman", "rm", "--force", "--time", "0", "--volumes", name)


@pytest.fixture(scope="module")
def hub(engine: Engine, network: str, folder_345m: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The stand-in, in that network, with the model."""
    folder = tmp_path_factory.mktemp("hub")
    weights = load_file(folder_345m / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 1024, 1024).tril().byte() for layer in range(24)}
    torch.save(weights | masks, folder / "pytorch_model.bin")
    for name in ("config.json", "vocab.json", "merges.txt"):
        (folder / name).symlink_to(folder_345m / name)
    with ThreadPoolExecutor(1, initializer=enter, initargs=(engine.network(network),)) as inside:
        hub = inside.submit(Hub).result()  # a socket stays in the network that it was made in
    hub.RequestHandlerClass = ChunkedFiles
    hub.push(MODEL, folder)
    with hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def enter(network: Path) -> None:
    """Put this thread, and no other one, into a network."""
    with network.open() as file:
        assert 0 == ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0), ctypes.get_errno()


@pytest.fixture(scope="module")
def pod(engine: Engine, image: str, network: str, hub: Hub) -> Iterator[Pod]:
    with played(engine, image, COMBINATION, network_of=network, settings={"HF_ENDPOINT": hub.url}) as pod:
        yield pod


def test_a_streamed_completion(engine: Engine, pod: Pod) -> None:
    """Of the model that the hub has."""
    status, body = engine.answer(pod.container, *request(8), KEY)
    assert 200 == status
    check(body, 8)
    assert MODEL in engine.answer(pod.container, "/v1/models", "", KEY)[1]


def test_the_init_container_fetches_and_converts(engine: Engine, pod: Pod, hub: Hub) -> None:
    """Within the limits that are written, by plain HTTP, each file once and nothing else; its log has the verdict."""
    (fetch,) = pod.spec["initContainers"]
    about = engine.inspect(pod.container_of(fetch))
    assert (0, False) == (about["State"]["ExitCode"], about["State"]["OOMKilled"])
    assert parse_bytes(fetch["resources"]["limits"]["memory"] + "B") == about["HostConfig"]["Memory"]
    assert about["HostConfig"]["ReadonlyRootfs"]
    assert "verdict    can be served" in engine.output("podman", "logs", pod.container_of(fetch))
    fetched = sorted(Path(path).name for method, path in hub.requests if method == "GET" and "/resolve/" in path)
    assert all(MODEL in path for _, path in hub.requests)
    assert ["config.json", "merges.txt", "pytorch_model.bin", "vocab.json"] == fetched


def test_the_service_asks_no_hub(engine: Engine, pod: Pod, hub: Hub) -> None:
    """It starts from the volume: which version there is was asked once, by the init container."""
    assert 1 == hub.requests.count(("GET", f"/api/models/{MODEL}"))
    assert "converted before, in /cache/" in engine.run("podman", "logs", pod.container).stderr


def test_a_second_start_fetches_nothing(engine: Engine, network: str, pod: Pod, hub: Hub) -> None:
    """Its init container asks which version there is, and finds that in the volume."""
    hub.requests.clear()
    engine.output("podman", "pod", "stop", pod.name)
    engine.output("nsenter", f"--net={engine.network(network)}", "podman", "pod", "start", pod.name)
    engine.wait_ready(pod.container)
    assert 1 == hub.requests.count(("GET", f"/api/models/{MODEL}"))
    assert set() == hub.downloads()
