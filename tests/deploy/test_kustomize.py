"""Every overlay and combination of k8s/ builds, and the real validators find nothing in what comes out."""

import base64
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.api.keys import parse_keys
from service.cli import main
from service.version import VERSION
from tests.deploy.kinds import BUILDS, CORE, CUSTOM, K8S, POOL, VERSIONS, Object, build, faults, kind_of, of_kind, only
from tests.deploy.tools import ROOT, output, run

BASE = Counter(
    {
        "v1 Namespace": 1,
        "v1 ServiceAccount": 1,
        "v1 ConfigMap": 1,
        "v1 Secret": 1,
        "v1 Service": 1,
        "apps/v1 Deployment": 1,
        "policy/v1 PodDisruptionBudget": 1,
        "networking.k8s.io/v1 NetworkPolicy": 1,
    }
)
ADDED = {
    "model": ["v1 PersistentVolumeClaim"],
    "observability": [
        "monitoring.coreos.com/v1 ServiceMonitor",
        "monitoring.coreos.com/v1 PrometheusRule",
        "v1 ConfigMap",
    ],
    "autoscale": ["autoscaling/v2 HorizontalPodAutoscaler"],
    "autoscale-keda": ["keda.sh/v1alpha1 ScaledObject"],
    "gateway": [POOL, "gateway.networking.k8s.io/v1 HTTPRoute", "v1 ConfigMap"],
}
# For each kind, a field that it has and a value that it must not have.
WRONG: dict[str, tuple[Sequence[str | int], Any]] = {
    "v1 Namespace": (("metadata", "labels"), "restricted"),
    "v1 ServiceAccount": (("automountServiceAccountToken",), "no"),
    "v1 ConfigMap": (("data",), ["MGPT_PORT=8000"]),
    "v1 Secret": (("data", "keys.yaml"), 1),
    "v1 Service": (("spec", "ports", 0, "port"), "http"),
    "v1 PersistentVolumeClaim": (("spec", "accessModes"), "ReadWriteOnce"),
    "apps/v1 Deployment": (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "http"),
    "policy/v1 PodDisruptionBudget": (("spec", "selector"), "megatron-gpt2"),
    "networking.k8s.io/v1 NetworkPolicy": (("spec", "policyTypes"), "Ingress"),
    "autoscaling/v2 HorizontalPodAutoscaler": (("spec", "maxReplicas"), "6"),
    "monitoring.coreos.com/v1 ServiceMonitor": (("spec", "endpoints", 0, "port"), 8000),
    "monitoring.coreos.com/v1 PrometheusRule": (("spec", "groups", 0, "name"), 1),
    "keda.sh/v1alpha1 ScaledObject": (("spec", "triggers", 0, "metadata", "threshold"), 5),
    "gateway.networking.k8s.io/v1 HTTPRoute": (("spec", "rules", 0, "backendRefs", 0, "name"), 1),
    POOL: (("spec", "targetPorts", 0, "number"), "http"),
}


def kustomization(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return about


def components(folder: Path) -> list[str]:
    """The components of a build, those of what it builds upon first."""
    about = kustomization(folder)
    below = [name for path in about["resources"] if path.startswith("..") for name in components(folder / path)]
    return below + [Path(path).name for path in about.get("components", [])]


@pytest.fixture(scope="module")
def every_kind() -> dict[str, Object]:
    """An object of each kind that is built anywhere."""
    return {kind_of(thing): thing for name in BUILDS for thing in build(name)}


def test_combinations_have_everything() -> None:
    """Both overlays and each component are in some combination, whose name says what it has."""
    assert {"overlays/cpu", "overlays/gpu"} < set(BUILDS)
    for folder in (K8S / "combinations").iterdir():
        about = kustomization(folder)
        (overlay,) = about["resources"]
        parts = [Path(path).name for path in (overlay, *about["components"])]
        assert folder.name == "-".join(parts)
    there = {path.name for path in (K8S / "components").iterdir()}
    assert there == {name for build_name in BUILDS for name in components(K8S / build_name)} == set(ADDED)


@pytest.mark.parametrize("name", BUILDS)
def test_nothing_is_missing_and_nothing_is_skipped(name: str, tmp_path: Path) -> None:
    """A build has the kinds that its parts say, and each object's own validator has read it and finds no fault."""
    objects = build(name)
    added = [kind for component in components(K8S / name) for kind in ADDED[component]]
    assert BASE + Counter(added) == Counter(map(kind_of, objects))
    found = faults(objects, tmp_path)
    assert {} == {kind_of(thing): fault for thing, fault in zip(objects, found, strict=True) if fault}


def test_every_kind_has_a_validator(every_kind: dict[str, Object]) -> None:
    assert set(every_kind) == CORE | CUSTOM | {POOL} == set(WRONG)


def test_a_broken_object_of_each_kind_is_refused(every_kind: dict[str, Object], tmp_path: Path) -> None:
    """One with a value of a wrong type, and one with a field that there is not."""
    broken: list[Object] = []
    for kind, thing in every_kind.items():
        (*path, last), value = WRONG[kind]
        wrong, unknown = deepcopy(thing), deepcopy(thing)
        place: Any = wrong
        for step in path:
            place = place[step]
        assert place[last] != value, kind
        place[last] = value
        unknown.get("spec", unknown)["unknownField"] = "x"
        broken += [wrong, unknown]
    assert [] == [kind_of(thing) for thing, fault in zip(broken, faults(broken, tmp_path), strict=True) if not fault]


def test_a_kind_without_a_validator_is_a_fault(tmp_path: Path) -> None:
    assert ["v1 Pod: no validator"] == faults([{"apiVersion": "v1", "kind": "Pod"}], tmp_path)


def test_never_two_autoscalers(tmp_path: Path) -> None:
    """No combination has both, and kustomize builds none that has."""
    for name in BUILDS:
        assert len(of_kind(build(name), "HorizontalPodAutoscaler") + of_kind(build(name), "ScaledObject")) <= 1
    text = (K8S / "combinations" / "cpu-observability-autoscale" / "kustomization.yaml").read_text()
    folder = tmp_path / "k8s" / "combinations" / "both"
    shutil.copytree(K8S, tmp_path / "k8s")
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(f"{text}  - ../../components/autoscale-keda\n")
    done = run("kubectl", "kustomize", folder)
    assert done.returncode != 0
    assert "/spec/replicas" in done.stderr


@pytest.mark.parametrize("name", BUILDS)
def test_one_image_pinned_in_one_place(name: str) -> None:
    """All containers are of this version's image, for GPUs where there are any; the base and an overlay name it."""
    pod = only(build(name), "Deployment")["spec"]["template"]["spec"]
    images = {container["image"] for container in [*pod["containers"], *pod.get("initContainers", [])]}
    on_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    assert {f"megatron-gpt2:{VERSION}{'-gpu' * on_gpu}"} == images
    assert {K8S / folder / "kustomization.yaml" for folder in ("base", "overlays/gpu")} == {
        file for file in K8S.rglob("*.yaml") if re.search(r"newTag|image: \S+:", file.read_text())
    }


def test_documented_overlay_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of docs/kubernetes.md: its image for every container, and the file of keys as `key new` writes it."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (example,) = re.findall(r"^```yaml\n(# mine/kustomization.yaml\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shutil.copytree(K8S, tmp_path / "k8s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(example)
    file = tmp_path / "mine" / "keys.yaml"
    assert 0 == main(["key", "new", "alice", "--file", str(file)])
    key = capsys.readouterr().out.strip()
    objects = build(tmp_path / "mine")
    assert [None] * len(objects) == faults(objects, tmp_path)
    secret = only(objects, "Secret")
    assert "keys" == secret["metadata"]["name"]
    assert ["alice"] == [known.name for known in parse_keys(base64.b64decode(secret["data"]["keys.yaml"]), file)]
    assert key not in json.dumps(objects)
    about = yaml.safe_load(example)
    (image,) = about["images"]
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    expected = f"{image['newName']}@{image['digest']}"
    assert {expected} == {container["image"] for container in [*pod["containers"], *pod["initContainers"]]}
    assert {about["namespace"]} == {thing["metadata"].get("namespace", about["namespace"]) for thing in objects}
    assert about["namespace"] == only(objects, "Namespace")["metadata"]["name"]
    (literals,) = [entry["literals"] for entry in about["configMapGenerator"]]
    settings = next(thing for thing in of_kind(objects, "ConfigMap") if "MGPT_API_KEY_FILE" in thing["data"])
    assert dict(literal.split("=", 1) for literal in literals).items() <= settings["data"].items()
    assert "MGPT_REVISION" in settings["data"]
    (labels,) = about["labels"]
    assert ["release"] == list(labels["pairs"])  # what kube-prometheus-stack selects by
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert labels["pairs"].items() <= only(objects, kind)["metadata"]["labels"].items()


def test_documented_combinations_are_there() -> None:
    """docs/kubernetes.md lists every overlay and combination, and the versions of Kubernetes that were validated."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert set(BUILDS) == set(re.findall(r"^\| `k8s/((?:overlays|combinations)/\S+)`", text, re.MULTILINE))
    assert f"Kubernetes {VERSIONS[0]} and {VERSIONS[1]}" in text


# --- checkov and yamllint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each build."""
    folder = tmp_path_factory.mktemp("built")
    for name in BUILDS:
        (folder / f"{Path(name).name}.yaml").write_text(yaml.safe_dump_all(build(name)))
    return folder


def waived() -> set[str]:
    return set(yaml.safe_load((ROOT / ".checkov.yaml").read_text())["skip-check"])


def test_checkov_finds_nothing_but_what_is_waived(built: Path) -> None:
    """With the waivers nothing; without them just those, the writable root with a GPU only."""
    assert "Failed checks: 0" in output("checkov", "--config-file", ROOT / ".checkov.yaml", "--directory", built)
    report = json.loads(run("checkov", "--skip-check", "NONE", "--output", "json", "--directory", built).stdout)
    found: dict[str, set[str]] = {}
    for check in report["results"]["failed_checks"]:
        found.setdefault(Path(check["file_path"]).stem, set()).add(check["check_id"])
    assert {Path(name).name for name in BUILDS} == set(found)
    for name, checks in found.items():
        assert waived() - (set() if name.startswith("gpu") else {"CKV_K8S_22"}) == checks, name


def test_waivers_have_reasons() -> None:
    lines = re.findall(r"^ +- (CKV\w+)(.*)$", (ROOT / ".checkov.yaml").read_text(), re.MULTILINE)
    assert waived() == {check for check, _ in lines}
    assert all(re.match(r" # \w.{20}", reason) for _, reason in lines)


def test_checkov_sees_a_privileged_container(built: Path, tmp_path: Path) -> None:
    objects = build("overlays/cpu")
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    container["securityContext"] = {"privileged": True}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump_all(objects))
    done = run("checkov", "--config-file", ROOT / ".checkov.yaml", "--directory", tmp_path)
    assert done.returncode == 1
    assert "CKV_K8S_16" in done.stdout


def test_yamllint_finds_nothing(tmp_path: Path) -> None:
    """In any YAML file of the repository; and it does find what is wrong."""
    files = [ROOT / ".yamllint", ROOT / ".checkov.yaml"]
    files += [file for folder in ("docker", "k8s", "tests") for file in (ROOT / folder).rglob("*.y*ml")]
    names = [file.relative_to(ROOT) for file in files if "node_modules" not in file.parts]  # as .yamllint knows them
    assert len(names) > 30
    output("yamllint", "--strict", *names)
    (tmp_path / "broken.yaml").write_text("a: 1\na: 2\n")
    assert "duplication of key" in run("yamllint", "--strict", tmp_path / "broken.yaml").stdout
