"""The pods of a build: their containers, and the variables that these get."""

from typing import Any

from tests.deploy.kinds import Object, of_kind, only
from tests.test_deploy import environment as image_environment


def pod_of(objects: list[Object]) -> dict[str, Any]:
    spec: dict[str, Any] = only(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def serving(objects: list[Object]) -> dict[str, Any]:
    """The container that serves, which is the only one but for init containers."""
    (container,) = pod_of(objects)["containers"]
    assert container["name"] == "serve"
    return dict(container)


def containers(objects: list[Object]) -> list[dict[str, Any]]:
    pod = pod_of(objects)
    return [*pod.get("initContainers", []), *pod["containers"]]


def variables(objects: list[Object], container: dict[str, Any]) -> dict[str, str]:
    """Those that a container of the image gets, as the kubelet puts them together."""
    found = image_environment()
    for source in container["envFrom"]:
        name = source["configMapRef"]["name"]
        (config,) = [thing for thing in of_kind(objects, "ConfigMap") if thing["metadata"]["name"] == name]
        found |= config["data"]
    return found | {variable["name"]: variable["value"] for variable in container.get("env", [])}
