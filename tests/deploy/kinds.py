"""What kustomize builds from k8s/, and the validator of each kind of object in it."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, output, run

K8S = ROOT / "k8s"
BUILDS = tuple(
    str(file.parent.relative_to(K8S))
    for folder in ("overlays", "combinations")
    for file in sorted((K8S / folder).glob("*/kustomization.yaml"))
)
VERSIONS = ("1.31", "1.37")  # of Kubernetes: the oldest that docs/kubernetes.md names, the newest that has schemas here

CORE = frozenset(
    {
        "apps/v1 Deployment",
        "autoscaling/v2 HorizontalPodAutoscaler",
        "networking.k8s.io/v1 NetworkPolicy",
        "policy/v1 PodDisruptionBudget",
        "v1 ConfigMap",
        "v1 Namespace",
        "v1 PersistentVolumeClaim",
        "v1 Secret",
        "v1 Service",
        "v1 ServiceAccount",
    }
)
CUSTOM = frozenset(
    {
        "gateway.networking.k8s.io/v1 HTTPRoute",
        "keda.sh/v1alpha1 ScaledObject",
        "monitoring.coreos.com/v1 PrometheusRule",
        "monitoring.coreos.com/v1 ServiceMonitor",
    }
)
POOL = "inference.networking.k8s.io/v1 InferencePool"
Object = dict[str, Any]


def kind_of(thing: Object) -> str:
    return f"{thing['apiVersion']} {thing['kind']}"


@cache
def _built(folder: Path) -> str:
    return output("kubectl", "kustomize", folder)


def build(folder: str | Path) -> list[Object]:
    """The objects of a folder of k8s/, or of any."""
    return list(yaml.load_all(_built(K8S / folder), Loader=yaml.CSafeLoader))


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def only(objects: Sequence[Object], kind: str) -> Object:
    """The one object of a kind."""
    (thing,) = of_kind(objects, kind)
    return thing


def faults(objects: Sequence[Object], folder: Path) -> list[str | None]:
    """What the validator of each object says against it. `folder` is for files that are made here.

    A kind without a validator is a fault, and so is an object of which its validator does not say that it was read.
    """
    found: list[str | None] = [f"{kind_of(thing)}: no validator" for thing in objects]
    for kinds, check in ((CORE, _core_faults), (CUSTOM, _custom_faults), ({POOL}, _pool_faults)):
        places = [place for place, thing in enumerate(objects) if kind_of(thing) in kinds]
        checked = check([objects[place] for place in places], folder) if places else []
        for place, fault in zip(places, checked, strict=True):
            found[place] = fault
    return found


def _written(objects: Sequence[Object], folder: Path) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(objects))]
    for file, thing in zip(files, objects, strict=True):
        file.write_text(json.dumps(thing))
    return files


def _core_faults(objects: Sequence[Object], folder: Path) -> list[str | None]:
    """kubernetes-validate only warns of a kind that it has no schema of, so its word "passed" is asked for."""
    files = _written(objects, folder)
    ends = [run("kubernetes-validate", "--strict", "-k", version, *files) for version in VERSIONS]
    lines = [line for end in ends for line in (end.stdout + end.stderr).splitlines()]
    found: list[str | None] = []
    for file in files:
        said = [line for line in lines if f" {file} " in line]
        passed = [line for line in said if line.startswith(f"INFO {file} passed ")]
        found.append(None if len(said) == len(passed) == len(VERSIONS) else "\n".join(said) or "was not read")
    return found


def _custom_faults(objects: Sequence[Object], folder: Path) -> list[str | None]:
    script = ROOT / "tests" / "deploy" / "crds" / "validate.mjs"
    said: list[str | None] = json.loads(output("node", script, text=json.dumps(objects)))
    return said


def _pool_faults(objects: Sequence[Object], folder: Path) -> list[str | None]:
    schema = ROOT / "tests" / "deploy" / "crds" / "inferencepool.json"
    ends = [run("check-jsonschema", "--schemafile", schema, file) for file in _written(objects, folder)]
    return [end.stdout + end.stderr if end.returncode else None for end in ends]
