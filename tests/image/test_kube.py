"""The CPU overlay's Deployment under `podman kube play`; kube.py says what is rewritten of it."""

from collections.abc import Iterator

import pytest

from service.settings import parse_bytes
from tests.image.engine import Engine
from tests.image.kube import KEY, PROBES, Pod, played
from tests.image.stream import check, request


@pytest.fixture(scope="module")
def pod(engine: Engine, image: str) -> Iterator[Pod]:
    with played(engine, image, "overlays/cpu") as pod:
        yield pod


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
