"""The CPU overlay's Deployment, as kustomize builds it, run by `podman kube play`.

Podman has no scheduler, Services, timers of probes or preStop hooks, so none of these is seen here. What it cannot run
as it is written is rewritten, and nothing else:

    replicas   one
    image      the one that was built
    probes     left out, as podman would run curl in the image; the tests ask them
    ports      left out, as the pod has no network to publish them in; the tests ask from within
    Secret     with a key of the tests' own, as one's own overlay has; given to podman beforehand and in plain text, as
               podman 4.3 mounts the base64; and its volume says that it is not optional, which podman asks without need
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from service.api.keys import hash_key
from service.settings import parse_bytes
from tests.deploy.kinds import only
from tests.image.engine import ROOT, Engine
from tests.image.stream import check, request

OVERLAY = ROOT / "k8s" / "overlays" / "cpu"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
KEY = "mgpt-of-the-tests"


@dataclass(frozen=True, slots=True)
class Pod:
    """A played Deployment, ready; and its pod's spec as it was written."""

    name: str
    container: str
    spec: dict[str, Any]
    settings: dict[str, str]

    @property
    def serve(self) -> dict[str, Any]:
        """The container that serves, as it was written."""
        (serve,) = self.spec["containers"]
        assert isinstance(serve, dict)
        return serve


@pytest.fixture(scope="module")
def pod(engine: Engine, image: str) -> Iterator[Pod]:
    written = engine.output("kubectl", "kustomize", OVERLAY)
    documents = list(yaml.safe_load_all(written))
    deployment, secret = only(documents, "Deployment"), only(documents, "Secret")
    deployment["spec"]["replicas"] = 1
    spec = deployment["spec"]["template"]["spec"]
    for volume in spec["volumes"]:
        if "secret" in volume:
            volume["secret"].setdefault("optional", False)
    for container in spec["containers"]:
        container["image"] = image
        del container["ports"]
        for probe in PROBES:
            del container[probe]
    (file,) = secret["data"]
    secret["data"][file] = json.dumps([{"name": "tests", "sha256": hash_key(KEY.encode())}])
    engine.output("podman", "secret", "create", secret["metadata"]["name"], "-", text=json.dumps(secret))
    text = yaml.safe_dump_all([only(documents, "ConfigMap"), deployment])
    engine.output("podman", "kube", "play", "--network", "none", "-", text=text)
    try:
        (name,) = engine.output("podman", "pod", "ps", "--format", "{{.Name}}").split()
        as_written = only(list(yaml.safe_load_all(written)), "Deployment")["spec"]["template"]["spec"]
        container = f"{name}-{spec['containers'][0]['name']}"
        engine.wait_ready(container)
        yield Pod(name, container, as_written, only(documents, "ConfigMap")["data"])
    finally:
        engine.run("podman", "kube", "down", "-", text=text)
        engine.run("podman", "secret", "rm", secret["metadata"]["name"])


def test_a_streamed_completion(engine: Engine, pod: Pod) -> None:
    """For who has a key, and for nobody else."""
    assert 401 == engine.answer(pod.container, *request(20))[0]
    status, body = engine.answer(pod.container, *request(20), KEY)
    assert 200 == status
    check(body, 20)


def test_its_probes_answer(engine: Engine, pod: Pod) -> None:
    """Each at the port that its name stands for, which is the service's."""
    ports = {port["name"]: port["containerPort"] for port in pod.serve["ports"]}
    for probe in PROBES:
        get = pod.serve[probe]["httpGet"]
        assert 8000 == ports[get["port"]]
        assert 200 == engine.answer(pod.container, get["path"])[0]


def test_its_security_is_as_written(engine: Engine, pod: Pod) -> None:
    """User and group, no capabilities, no new privileges, a read-only root, the memory's limit, no account's token."""

    def inside(*command: str) -> str:
        return engine.output("podman", "exec", pod.container, *command)

    status = dict(line.split(":\t", 1) for line in inside("cat", "/proc/1/status").splitlines())
    context = pod.spec["securityContext"] | pod.serve["securityContext"]
    assert {str(context["runAsUser"])} == set(status["Uid"].split())
    assert {str(context["runAsGroup"])} == set(status["Gid"].split())
    assert (["ALL"], 0) == (context["capabilities"]["drop"], int(status["CapBnd"], 16) | int(status["CapEff"], 16))
    assert (False, "1") == (context["allowPrivilegeEscalation"], status["NoNewPrivs"])
    assert context["readOnlyRootFilesystem"]
    assert "Read-only file system" in engine.run("podman", "exec", pod.container, "touch", "/opt/new").stderr
    limit = parse_bytes(pod.serve["resources"]["limits"]["memory"] + "B")
    assert limit == engine.inspect(pod.container)["HostConfig"]["Memory"]
    assert pod.spec["automountServiceAccountToken"] is False
    assert engine.run("podman", "exec", pod.container, "ls", "/var/run/secrets/kubernetes.io").returncode


def test_its_settings_are_the_config_map(engine: Engine, pod: Pod) -> None:
    """Every one reaches the service, whose own ones are all of them."""
    found = dict(line.split("=", 1) for line in engine.output("podman", "exec", pod.container, "env").splitlines())
    ours = {name: value for name, value in found.items() if name.startswith("MGPT_")}
    assert pod.settings == {name: value for name, value in ours.items() if name != "MGPT_HOST"}  # which the image has


def test_its_hook_drains_and_it_ends(engine: Engine, pod: Pod) -> None:
    """The preStop command waits for a stream while nobody new is served; SIGTERM then ends the service, with 0."""
    stream = engine.ask(pod.container, *request(900), KEY)
    assert stream.stdout is not None
    assert "200" == stream.stdout.readline().strip()
    command = pod.serve["lifecycle"]["preStop"]["exec"]["command"]
    with engine.suspended(pod.container):
        hook = engine.begin("podman", "exec", pod.container, *command)
        engine.wait_log(pod.container, "draining: 1 requests are open")
    output, errors = hook.communicate(timeout=60)
    assert 0 == hook.returncode, output + errors
    assert 503 == engine.answer(pod.container, *request(1), KEY)[0]
    assert 503 == engine.answer(pod.container, "/readyz")[0]
    check(stream.communicate(timeout=20)[0], 900)
    engine.output("podman", "stop", "--time", str(pod.spec["terminationGracePeriodSeconds"]), pod.container)
    assert 0 == engine.inspect(pod.container)["State"]["ExitCode"]
