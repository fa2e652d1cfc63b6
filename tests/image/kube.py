"""Deployments as kustomize builds them, run by `podman kube play`.

Podman has no scheduler, Services, timers of probes or preStop hooks, so none of these is seen. What it cannot run as it
is written is rewritten, and nothing else:

    replicas   one
    image      the one that was built
    init       by an annotation containers of this kind are kept when they have ended; and they do not start again then,
               which is the policy of a Deployment's containers and to podman theirs too
    probes     left out, as podman would run curl in the image; the tests ask them
    ports      left out, as the pod has no network to publish them in; the tests ask from within
    Secret     with a key of the tests' own, as one's own overlay has; given to podman beforehand and in plain text, as
               podman 4.3 mounts the base64; and its volume says that it is not optional, which podman asks without need
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from service.api.keys import hash_key
from tests.deploy.kinds import build, of_kind, only
from tests.image.engine import Engine

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
KEY = "mgpt-of-the-tests"


@dataclass(frozen=True, slots=True)
class Pod:
    """A played Deployment, ready; and its pod's spec as it was written."""

    name: str
    spec: dict[str, Any]
    settings: dict[str, str]

    @property
    def serve(self) -> dict[str, Any]:
        """The container that serves, as it was written."""
        (serve,) = self.spec["containers"]
        assert isinstance(serve, dict)
        return serve

    @property
    def container(self) -> str:
        """The name of that container."""
        return self.container_of(self.serve)

    def container_of(self, written: dict[str, Any]) -> str:
        """The name of a container, of one that has ended too."""
        return f"{self.name}-{written['name']}"


@contextmanager
def played(
    engine: Engine, image: str, folder: str, *, network_of: str | None = None, settings: dict[str, str] | None = None
) -> Iterator[Pod]:
    """The Deployment that a folder of k8s/ has, ready; gone in the end, but for its volumes.

    It has no network but its own loopback, or that of a container. `settings` come beside those of its ConfigMap.
    """
    written = build(folder)
    as_written = only(written, "Deployment")["spec"]["template"]["spec"]
    documents = json.loads(json.dumps(written))
    deployment, secret = only(documents, "Deployment"), only(documents, "Secret")
    deployment["spec"]["replicas"] = 1
    deployment["metadata"].setdefault("annotations", {})["io.podman.annotations.init.container.type"] = "always"
    spec = deployment["spec"]["template"]["spec"]
    spec["restartPolicy"] = "OnFailure"
    (source,) = spec["containers"][0]["envFrom"]
    (variables,) = (
        each for each in of_kind(documents, "ConfigMap") if each["metadata"]["name"] == source["configMapRef"]["name"]
    )
    variables["data"] |= settings or {}
    for volume in spec["volumes"]:
        if "secret" in volume:
            volume["secret"].setdefault("optional", False)
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        container["image"] = image
        for left_out in ("ports", *PROBES):
            container.pop(left_out, None)
    (file,) = secret["data"]
    secret["data"][file] = json.dumps([{"name": "tests", "sha256": hash_key(KEY.encode())}])
    engine.output("podman", "secret", "create", secret["metadata"]["name"], "-", text=json.dumps(secret))
    text = yaml.safe_dump_all([variables, *of_kind(documents, "PersistentVolumeClaim"), deployment])
    # Podman's host network is whichever it is started in; to a pod it gives no other one that is there already.
    network = ("none",) if network_of is None else ("host",)
    within = () if network_of is None else ("nsenter", f"--net={engine.network(network_of)}")
    try:
        done = engine.run(*within, "podman", "kube", "play", "--network", *network, "-", text=text)
        assert 0 == done.returncode, done.stderr + engine.logs()
        (name,) = engine.output("podman", "pod", "ps", "--format", "{{.Name}}").split()
        pod = Pod(name, as_written, variables["data"])
        engine.wait_ready(pod.container)
        yield pod
    finally:
        engine.run("podman", "kube", "down", "-", text=text)
        engine.run("podman", "secret", "rm", secret["metadata"]["name"])
