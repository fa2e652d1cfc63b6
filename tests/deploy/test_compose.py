"""compose.yaml as compose itself reads it, every profile. tests/test_deploy.py compares it with the settings."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import parse_bytes
from tests.deploy.tools import ROOT, output, run

FILE = ROOT / "docker" / "compose.yaml"
PROFILES = {
    "cpu": {"cpu"},
    "gpu": {"gpu"},
    "proxy": {"nginx"},
    "observability": {"prometheus", "grafana"},
}


def port(about: str | dict[str, Any]) -> str:
    """In docker-compose 1.29's words, which Docker Compose v2 says apart; no published port is a free one."""
    if isinstance(about, str):
        return about
    return f"{about.get('host_ip', '')}:{about.get('published', '')}:{about['target']}/{about['protocol']}"


def volume(about: str | dict[str, Any]) -> str:
    """Likewise."""
    if isinstance(about, str):
        return about
    return f"{about['source']}:{about['target']}:{'ro' if about.get('read_only') else 'rw'}"


def resolved(folder: Path) -> dict[str, Any]:
    """What compose makes of it, all profiles together; its variables are those of the environment.

    Whichever compose it is: ports and volumes are lines.
    """
    # The file's name of the project is newer than docker-compose 1.29.
    plain = folder / FILE.name
    plain.write_text(re.sub(r"^name: .*$", "", FILE.read_text(), flags=re.MULTILINE))
    profiles = [word for profile in PROFILES for word in ("--profile", profile)]
    where = ("--file", plain, "--project-directory", FILE.parent)
    config = output("docker-compose", *where, *profiles, "config")
    services: dict[str, Any] = yaml.safe_load(config)["services"]
    for about in services.values():
        about["ports"] = [port(each) for each in about["ports"]]
        about["volumes"] = [volume(each) for each in about["volumes"]]
    return services


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """As where the caller sets nothing."""
    for name in re.findall(r"\$\{(\w+)", FILE.read_text()):
        monkeypatch.delenv(name, raising=False)
    return resolved(tmp_path)


def test_it_is_a_compose_file() -> None:
    """By the schema of the specification, which finds a wrong word."""
    assert "ok" in output("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE)
    wrong = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "-", text="services: {a: {imag: b}}")
    assert wrong.returncode


def test_both_ways_to_say_it_are_read() -> None:
    """A port and a volume, as docker-compose 1.29 and Docker Compose v2 print them."""
    long = {"mode": "ingress", "host_ip": "127.0.0.1", "target": 8000, "published": "8001", "protocol": "tcp"}
    assert "127.0.0.1:8001:8000/tcp" == port("127.0.0.1:8001:8000/tcp") == port(long)
    del long["published"]
    assert "127.0.0.1::8000/tcp" == port("127.0.0.1::8000/tcp") == port(long)
    bind = {"type": "bind", "source": "/a", "target": "/b", "read_only": True, "bind": {"create_host_path": True}}
    assert "/a:/b:ro" == volume("/a:/b:ro") == volume(bind)
    named = {"type": "volume", "source": "cache", "target": "/cache", "volume": {}}
    assert "cache:/cache:rw" == volume("cache:/cache:rw") == volume(named)


def test_every_service_is_in_one_profile(services: dict[str, Any]) -> None:
    """So that `up` alone starts nothing, and each profile what it says."""
    assert PROFILES == {
        profile: {name for name, about in services.items() if about["profiles"] == [profile]} for profile in PROFILES
    }
    assert set().union(*PROFILES.values()) == set(services)


def test_all_are_hardened(services: dict[str, Any]) -> None:
    """No capabilities, no way to more, nothing mounted that they could change but their volumes, no open port."""
    for about in services.values():
        assert ["ALL"] == about["cap_drop"]
        assert ["no-new-privileges:true"] == about["security_opt"]
        assert "privileged" not in about
        mounted = [each for each in about["volumes"] if each.startswith("/")]
        assert all(each.endswith(":ro") for each in mounted), mounted
        assert all(each.startswith("127.0.0.1:") for each in about["ports"])
    assert {"cpu", "nginx", "prometheus"} == {name for name, about in services.items() if about.get("read_only")}


def test_images_of_others_are_pinned(services: dict[str, Any]) -> None:
    """To a version with its patch level."""
    images = {name: about["image"] for name, about in services.items() if "build" not in about}
    assert {"nginx", "prometheus", "grafana"} == set(images)
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images.values()), images


def test_devices_build_images_of_their_own(services: dict[str, Any]) -> None:
    """The same Dockerfile and arguments, but the device; the GPU's has what a GPU needs."""
    cpu, gpu = services["cpu"], services["gpu"]
    assert {"cpu": "cpu", "gpu": "gpu"} == {
        name: services[name]["build"]["args"].pop("DEVICE") for name in ("cpu", "gpu")
    }
    assert cpu["build"] == gpu["build"]
    assert cpu["image"] != gpu["image"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert ("nvidia", ["gpu"]) == (device["driver"], device["capabilities"])
    assert "deploy" not in cpu
    assert {"nofile", "memlock"} == set(gpu["ulimits"])
    assert 2**30 == parse_bytes(gpu["shm_size"])


def test_mounted_files_are_there(services: dict[str, Any]) -> None:
    """A file that is not would become an empty folder."""
    files = [Path(each.split(":")[0]) for about in services.values() for each in about["volumes"]]
    mounted = [file for file in files if file.is_absolute()]
    assert 5 == len(mounted)
    assert all(file.exists() for file in mounted), mounted


def test_variables_change_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty PORT is a free one, which replicas need."""
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("MODEL", "/models/345m")
    monkeypatch.setenv("MODELS", os.fspath(ROOT))
    monkeypatch.setenv("TORCH_CPU_INDEX", "")
    monkeypatch.setenv("REVISION", "0123abcd")
    cpu = resolved(tmp_path)["cpu"]
    assert ["127.0.0.1::8000/tcp"] == cpu["ports"]
    assert "/models/345m" == cpu["environment"]["MGPT_MODEL"]
    assert f"{ROOT}:/models:ro" in cpu["volumes"]
    assert "" == cpu["build"]["args"]["TORCH_CPU_INDEX"]
    assert "0123abcd" == cpu["build"]["args"]["REVISION"]


# What is said is the same where a make runs these tests.
_MAKE = ("env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "make", "--no-print-directory", "--dry-run")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_make_tags_as_compose(device: str, services: dict[str, Any]) -> None:
    """So that the image of one device never takes the other's name."""
    said = output(*_MAKE, "image", f"DEVICE={device}")
    assert said.startswith(f"docker build -t {services[device]['image']} --build-arg DEVICE={device} ")


def test_make_tells_either_build_its_revision() -> None:
    """The one of `git`, for the image's label: `make image` as an argument, `make up` by compose's variable."""
    revision = "$(git rev-parse HEAD)"
    assert f" --build-arg REVISION={revision} " in output(*_MAKE, "image")
    up = output(*_MAKE, "up", "PROFILES=cpu observability").split(" docker compose ")
    assert [f"REVISION={revision}", "-f docker/compose.yaml --profile cpu --profile observability up --build\n"] == up
