"""What the manifests of a pod say is what the code says: ports, paths, variables, commands, times, users."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli import _parser
from service.serve import cache_folder
from service.settings import ENV_PREFIX, Settings, load
from tests.api.conftest import Service, Start, start, tokenizer  # noqa: F401 - fixtures
from tests.deploy.kinds import BUILDS, Object, build, of_kind, only
from tests.deploy.pods import containers, pod_of, serving, variables
from tests.service.server import COMMAND, Server
from tests.test_deploy import environment as image_environment
from tests.test_deploy import least_grace
from tests.test_deploy import only as instruction

GPU_BUILDS = [name for name in BUILDS if "/gpu" in name]
WITH_MODEL = [name for name in BUILDS if "/gpu" in name or "-model" in name]
SCALED = [name for name in BUILDS if "autoscale" in name]


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings of a container of a build, as the service reads them there."""

    def read(objects: list[Object], container: dict[str, Any]) -> Settings:
        for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
            monkeypatch.delenv(name)
        for name, value in variables(objects, container).items():
            monkeypatch.setenv(name, value)
        return load({})

    return read


def seconds(amount: dict[str, int]) -> int:
    """How long a probe has to fail until something is done."""
    return amount["periodSeconds"] * amount["failureThreshold"]


def gibibytes(amount: str) -> int:
    assert amount.endswith("Gi")
    return int(amount.removesuffix("Gi"))


@pytest.fixture
async def loading(start: Start) -> Service:  # noqa: F811
    """A service that has not loaded its model yet, on a real port."""
    service: Service = await start(ready=False)
    return service


# --- Settings, ports, paths and commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_variables_are_settings(name: str, settings_of: Any) -> None:
    """Those of the ConfigMap are all ours, and taken; others are variables that the image has too."""
    objects = build(name)
    for container in containers(objects):
        found = variables(objects, container)
        assert {each for each in found if not each.startswith(ENV_PREFIX)} == {
            each for each in image_environment() if not each.startswith(ENV_PREFIX)
        }
        settings = settings_of(objects, container)
        assert "0.0.0.0" == settings.host
        assert "json" == settings.log_format
        assert ("/metrics",) == settings.open_routes
    (config,) = [thing for thing in of_kind(objects, "ConfigMap") if thing["metadata"]["name"].startswith("settings-")]
    assert all(each.startswith(ENV_PREFIX) for each in config["data"])


@pytest.mark.parametrize("name", BUILDS)
def test_ports(name: str, settings_of: Any) -> None:
    """One port, the setting's, goes by one name through container, probes, Service, policy and monitor."""
    objects = build(name)
    container = serving(objects)
    assert [{"name": "http", "containerPort": settings_of(objects, container).port}] == container["ports"]
    probes = [container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert ["http"] * 3 == probes
    (port,) = only(objects, "Service")["spec"]["ports"]
    assert ("http", "http") == (port["name"], port["targetPort"])
    (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
    assert [{"port": "http"}] == rule["ports"]
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert ["http"] == [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]]
    for pool in of_kind(objects, "InferencePool"):
        assert [{"number": container["ports"][0]["containerPort"]}] == pool["spec"]["targetPorts"]


@pytest.mark.parametrize("name", BUILDS)
def test_files_and_folders(name: str, settings_of: Any) -> None:
    """A container may write where it writes; the keys are where the setting says, in a folder that changes with it."""
    objects = build(name)
    pod = pod_of(objects)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in containers(objects):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert json.loads(instruction("VOLUME"))[0] in mounts
        writable = [Path(path) for path, mount in mounts.items() if not mount.get("readOnly")]
        found = variables(objects, container)
        settings = settings_of(objects, container)
        written = [Path(found[each]) for each in found if re.search("HOME|DIR", each)]
        for path in (*written, settings.admin_socket, cache_folder(settings)):
            assert any(path.is_relative_to(folder) for folder in writable), path
    keys = mounts[str(settings.api_key_file.parent)]
    assert {"name", "mountPath", "readOnly"} == set(keys)
    source = volumes[keys["name"]]["secret"]
    secret = only(objects, "Secret")
    assert secret["metadata"]["name"] == source["secretName"]
    assert {settings.api_key_file.name} == set(secret["data"])
    assert 0o440 == source["defaultMode"]  # read through the group, which fsGroup gives the file to
    assert set(volumes) == {mount["name"] for container in containers(objects) for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", BUILDS)
def test_commands(name: str) -> None:
    """A container runs the image's own command, or one that the command line has."""
    objects = build(name)
    for container in containers(objects):
        assert "command" not in container  # the image's entry point
        given = vars(_parser().parse_args(container.get("args", json.loads(instruction("CMD")))))
        assert ("verify" if container["name"] == "fetch" else "serve") == given["command"]


@pytest.mark.parametrize("name", BUILDS)
def test_grace_is_longer_than_the_drain(name: str, settings_of: Any) -> None:
    """By the rule of docs/operations.md; and no longer than it has to be by more than a few seconds."""
    objects = build(name)
    container = serving(objects)
    settings = settings_of(objects, container)
    assert settings.unready_seconds > 0
    assert settings.admin_socket is not None
    least = least_grace(settings, container["lifecycle"]["preStop"]["exec"]["command"])
    assert least < pod_of(objects)["terminationGracePeriodSeconds"] <= least + 15


# --- Probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
async def test_probes_ask_what_they_mean(name: str, loading: Service) -> None:
    """While a model loads a pod has started, lives, and is not ready."""
    container = serving(build(name))
    statuses = {
        probe: (await loading.http.get(container[probe]["httpGet"]["path"])).status_code
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503} == statuses


@pytest.mark.parametrize("name", BUILDS)
def test_probes_are_patient(name: str) -> None:
    """A busy pod is taken out before it is restarted, and no answer within a second is no failure."""
    objects = build(name)
    container = serving(objects)
    startup, liveness, readiness = (container[f"{probe}Probe"] for probe in ("startup", "liveness", "readiness"))
    assert all(probe["timeoutSeconds"] >= 5 for probe in (startup, liveness, readiness))
    assert all("initialDelaySeconds" not in probe for probe in (startup, liveness, readiness))
    assert seconds(liveness) >= 3 * seconds(readiness)
    start_period = re.search(r"--start-period=(\d+)s", instruction("HEALTHCHECK"))
    assert start_period is not None
    assert seconds(startup) >= 3 * int(start_period[1])
    assert only(objects, "Deployment")["spec"]["progressDeadlineSeconds"] > 2 * seconds(startup)


# --- Pods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_locked_down(name: str) -> None:
    """The image's user and nobody's token; a root that can be written to only where a GPU's hook needs it."""
    objects = build(name)
    pod = pod_of(objects)
    user, group = map(int, instruction("USER").split(":"))
    expected = {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert expected == pod["securityContext"]
    account = only(objects, "ServiceAccount")
    assert account["metadata"]["name"] == pod["serviceAccountName"]
    assert False is account["automountServiceAccountToken"] is pod["automountServiceAccountToken"]
    assert False is pod["enableServiceLinks"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in containers(objects):
        assert {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": not (name in GPU_BUILDS and container["name"] == "serve"),
            "capabilities": {"drop": ["ALL"]},
        } == container["securityContext"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert "restricted" == only(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]


@pytest.mark.parametrize("name", BUILDS)
def test_rollouts_and_evictions(name: str) -> None:
    """On CPUs no pod goes before another is ready; with GPUs none comes before one has gone. One eviction at a time."""
    objects = build(name)
    deployment = only(objects, "Deployment")["spec"]
    surge, away = (0, 1) if name in GPU_BUILDS else (1, 0)
    assert {"maxSurge": surge, "maxUnavailable": away} == deployment["strategy"]["rollingUpdate"]
    assert deployment["revisionHistoryLimit"] > 0
    budget = only(objects, "PodDisruptionBudget")["spec"]
    assert 1 == budget["maxUnavailable"]
    assert "minAvailable" not in budget


@pytest.mark.parametrize("name", sorted(set(BUILDS) - set(GPU_BUILDS)))
def test_cpu_pods_use_what_they_have(name: str, settings_of: Any) -> None:
    """Threads for the limit's cores but one, and memory for the KV cache and a 345M in float32 twice over."""
    objects = build(name)
    container = serving(objects)
    settings = settings_of(objects, container)
    assert "cpu" == settings.device
    assert int(container["resources"]["limits"]["cpu"]) - 1 == settings.cpu_threads
    assert gibibytes(container["resources"]["limits"]["memory"]) * 2**30 > settings.kv_memory + 2 * 4 * 355_000_000


@pytest.mark.parametrize("name", GPU_BUILDS)
def test_gpu_pods_have_a_gpu(name: str, settings_of: Any) -> None:
    """One card, shared memory of its own, and a service that does not start without."""
    objects = build(name)
    container = serving(objects)
    assert "cuda" == settings_of(objects, container).device
    assert "1" == container["resources"]["limits"]["nvidia.com/gpu"]
    (volume,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (shared,) = [each["emptyDir"] for each in pod_of(objects)["volumes"] if each["name"] == volume]
    assert "Memory" == shared["medium"]
    assert gibibytes(shared["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", WITH_MODEL)
def test_model_is_fetched_once(name: str, settings_of: Any) -> None:
    """The init container may ask the hub and the service does not; both have the same model and the same volume."""
    objects = build(name)
    fetch, serve = containers(objects)
    before, after = settings_of(objects, fetch), settings_of(objects, serve)
    assert (False, True) == (before.offline, after.offline)
    assert before.model == after.model is not None
    assert cache_folder(before) == cache_folder(after)
    cache = [[mount for mount in each["volumeMounts"] if mount["mountPath"] == "/cache"] for each in (fetch, serve)]
    assert cache[0] == cache[1]
    (volume,) = [each for each in pod_of(objects)["volumes"] if each["name"] == cache[0][0]["name"]]
    claim = only(objects, "PersistentVolumeClaim")
    assert {"name", "persistentVolumeClaim"} == set(volume)
    assert claim["metadata"]["name"] == volume["persistentVolumeClaim"]["claimName"]
    deployment = only(objects, "Deployment")["spec"]
    if name in SCALED or deployment["replicas"] > 1 or deployment["strategy"]["rollingUpdate"]["maxSurge"]:
        assert ["ReadWriteMany"] == claim["spec"]["accessModes"]
    (rule,) = only(objects, "NetworkPolicy")["spec"]["egress"]
    assert {("UDP", 53), ("TCP", 53), ("TCP", 443)} == {(port["protocol"], port["port"]) for port in rule["ports"]}


@pytest.mark.parametrize("name", sorted(set(BUILDS) - set(WITH_MODEL)))
def test_without_a_hub_nothing_goes_out(name: str, settings_of: Any) -> None:
    objects = build(name)
    assert settings_of(objects, serving(objects)).model is None
    policy = only(objects, "NetworkPolicy")["spec"]
    assert [] == policy["egress"]
    assert {"Ingress", "Egress"} == set(policy["policyTypes"])


# --- The service itself ---------------------------------------------------------------------------------------------


def test_service_runs_with_these_settings(tmp_path: Path) -> None:
    """The CPU overlay's variables and keys, with its folders moved.

    Probes and metrics need no key, and nobody has one. The hook's own command drains, and SIGTERM then ends with 0.
    """
    objects = build("overlays/cpu")
    container = serving(objects)
    for folder in ("cache", "keys", "tmp"):
        (tmp_path / folder).mkdir()
    for file, content in only(objects, "Secret")["data"].items():
        (tmp_path / "keys" / file).write_bytes(base64.b64decode(content))
    moved = {
        name: f"{tmp_path}{value}" if value.startswith("/") else value
        for name, value in variables(objects, container).items()
        if name not in ("MGPT_HOST", "MGPT_OPEN_ROUTES", "PATH")
    }
    server = Server("--open-routes", "/metrics", environment=moved)
    try:
        server.wait_ready()
        with httpx.Client(base_url=server.url) as http:
            probes = [container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")]
            assert [200, 200, 200] == [http.get(path).status_code for path in probes]
            assert "megatron_gpt2_ready 1" in http.get("/metrics").text
            assert 401 == http.get("/v1/models", headers={"Authorization": "Bearer mgpt-guessed"}).status_code
            hook = subprocess.run(
                container["lifecycle"]["preStop"]["exec"]["command"],
                env=os.environ | moved | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (0, "nothing is open") == (hook.returncode, hook.stdout[:15]), hook.stderr
            assert [200, 200, 503] == [http.get(path).status_code for path in probes]
        server.process.terminate()
        assert 0 == server.wait(20)
    finally:
        server.kill()
