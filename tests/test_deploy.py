"""Dockerfile, compose.yaml and nginx.conf say what Settings say: ports, variables, paths, times, sizes.

Nothing is built or started here: that is for tests/deploy and tests/image.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.api.errors import unavailable
from service.api.process import _CLOSE_SECONDS
from service.cli import _parser
from service.engine.client import EngineNotReady
from service.serve import _END_SECONDS
from service.settings import ENV_PREFIX, Settings, load, parse_bytes

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
NGINX = (ROOT / "docker" / "nginx.conf").read_text()
SERVICES = ("cpu", "gpu")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (instruction, arguments), comments left out and continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def final_stage() -> list[tuple[str, str]]:
    every = instructions()
    start = max(place for place, (name, _) in enumerate(every) if name == "FROM")
    return every[start:]


def commands() -> str:
    """What the final stage runs."""
    return " ".join(arguments for name, arguments in final_stage() if name == "RUN")


def only(name: str) -> str:
    """The arguments of an instruction that the final stage has once."""
    (arguments,) = [arguments for other, arguments in final_stage() if other == name]
    return arguments


def environment() -> dict[str, str]:
    """Of the final stage."""
    return dict(pair.split("=", 1) for name, value in final_stage() if name == "ENV" for pair in value.split())


def default(name: str) -> Any:
    return Settings.model_fields[name].default


def arguments_of_build() -> dict[str, str]:
    """The arguments of the build with their defaults; a stage that takes one over gives none."""
    return dict(text.split("=", 1) for name, text in instructions() if name == "ARG" and "=" in text)


def nginx(directive: str) -> str:
    """The value of a directive that nginx.conf has once."""
    (value,) = re.findall(rf"^\s*{directive} ([^;{{]+);", NGINX, re.MULTILINE)
    return str(value)


def seconds(text: str) -> float:
    """`75s` or `1h`."""
    match = re.fullmatch(r"(\d+)([smh])", text)
    assert match is not None, text
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def test_nothing_that_plain_builders_do_not_know() -> None:
    """No heredocs and no COPY --link."""
    for name, arguments in instructions():
        assert "<<" not in arguments, name
        assert "--link" not in arguments, name


def test_base_image_is_an_argument() -> None:
    assert ("ARG", "PYTHON_IMAGE=python:3.12-slim-bookworm") == instructions()[0]
    assert ["${PYTHON_IMAGE}"] * 2 == [arguments.split()[0] for name, arguments in instructions() if name == "FROM"]


def test_dependencies_come_before_the_source() -> None:
    """A change of code leaves the layer with torch as it is."""
    text = [" ".join(instruction) for instruction in instructions()]
    assert text.index("COPY service service") > next(i for i, line in enumerate(text) if "-c requirements.lock" in line)


def test_image_is_not_root() -> None:
    """A user by number, which an orchestrator can check; group 0, as a random user would have."""
    assert re.fullmatch(r"[1-9]\d{3,}:0", only("USER"))


def test_image_serves_on_the_port_of_the_settings() -> None:
    port = default("port")
    assert str(port) == only("EXPOSE")
    assert f"HTTPConnection('127.0.0.1', {port}, " in only("HEALTHCHECK")
    assert "'/livez'" in only("HEALTHCHECK")
    assert '["megatron-gpt2"]' == only("ENTRYPOINT")
    assert '["serve"]' == only("CMD")
    assert "0.0.0.0" == environment()["MGPT_HOST"]


def test_image_writes_to_its_cache_alone() -> None:
    """Whatever looks for a place to write finds it there."""
    assert '["/cache"]' == only("VOLUME")
    places = {name: value for name, value in environment().items() if re.search("HOME|DIR", name)}
    assert {"HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} == set(places)
    assert all(place == "/cache" or place.startswith("/cache/") for place in places.values())
    user, group = only("USER").split(":")
    assert f"install -d -m 0775 -o {user} -g {group} /cache" in " ".join(text for _, text in final_stage())


def test_build_context_holds_what_the_dockerfile_copies() -> None:
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        source
        for name, text in instructions()
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize("service", SERVICES)
def test_variables_are_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every MGPT_* variable of the image and of compose is a setting, and its value is one that is taken."""
    values = environment() | COMPOSE["services"][service]["environment"]
    ours = {name: value for name, value in values.items() if name.startswith(ENV_PREFIX)}
    assert {"MGPT_HOST", "MGPT_MODEL", "MGPT_DRAIN_SECONDS"} == set(ours)
    for name, value in ours.items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))  # as where the caller sets nothing
    settings = load({})
    assert (None, "0.0.0.0") == (settings.model, settings.host)


@pytest.mark.parametrize("service", SERVICES)
def test_compose_lets_every_connection_have_its_descriptor(service: str) -> None:
    assert default("max_connections") + 128 < COMPOSE["services"][service]["ulimits"]["nofile"]


@pytest.mark.parametrize("service", SERVICES)
def test_compose_waits_longer_than_the_service_drains(service: str) -> None:
    """The drain, then the answers on their way out, then the end of both processes."""
    drain = float(COMPOSE["services"][service]["environment"]["MGPT_DRAIN_SECONDS"])
    assert default("drain_seconds") == drain >= default("unready_seconds")
    grace = seconds(COMPOSE["services"][service]["stop_grace_period"])
    assert grace > drain + _CLOSE_SECONDS + 2 * _END_SECONDS


def least_grace(settings: Settings, hook: Sequence[str]) -> float:
    """What terminationGracePeriodSeconds must be more than, by the rule of docs/operations.md.

    `hook` is the preStop command: a drain, or a shell that sleeps before one.
    """
    words = shlex.split(hook[2]) if hook[:2] == ["sh", "-c"] else list(hook)
    pause = 0.0
    if words[0] == "sleep":
        pause, words = float(words[1].removesuffix(";")), words[words.index("exec") + 1 :]
    program, *arguments = words
    given = vars(_parser().parse_args(arguments))
    assert ("megatron-gpt2", "drain") == (program, given["command"])
    pause += max(given.get("seconds", settings.drain_seconds), settings.unready_seconds)
    return pause + max(settings.drain_seconds, settings.unready_seconds) + 15


def test_documented_grace_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example for Kubernetes follows the rule beside it, and the rule's 15 seconds are the processes' own."""
    text = (ROOT / "docs" / "operations.md").read_text()
    assert "terminationGracePeriodSeconds > preStop + max(drain_seconds, unready_seconds) + 15\n" in text
    assert _CLOSE_SECONDS + 2 * _END_SECONDS <= 15
    example = yaml.safe_load(re.findall(r"^```yaml\n(terminationGrace.*?)^```$", text, re.MULTILINE | re.DOTALL)[0])
    (container,) = example["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = load({})
    assert settings.admin_port
    least = least_grace(settings, container["lifecycle"]["preStop"]["exec"]["command"])
    assert 20 + 60 + 15 == least < example["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("service", SERVICES)
def test_compose_fits_the_image(service: str) -> None:
    """Its port, its volumes, its context; locked down as far as the image allows."""
    about = COMPOSE["services"][service]
    port = default("port")
    assert [f"127.0.0.1:${{PORT-{port}}}:{port}"] == about["ports"]
    check = about["healthcheck"]["test"][-1]
    assert check.replace("/readyz", "/livez") in only("HEALTHCHECK")
    places = [re.sub(r":ro$", "", volume).rsplit(":", 1)[1] for volume in about["volumes"]]
    assert ["/cache", "/models"] == places
    assert set(places) <= set(commands().split())
    assert {"cache", "models"} <= set(COMPOSE["volumes"])
    assert ["ALL"] == about["cap_drop"]
    assert ["no-new-privileges:true"] == about["security_opt"]
    assert [service] == about["profiles"]
    given = {name: re.sub(r"\$\{\w+:?-(.*)\}", r"\1", value) for name, value in about["build"]["args"].items()}
    assert given == {name: arguments_of_build()[name] for name in given} | {"DEVICE": service}
    assert (ROOT / "docker" / about["build"]["context"] / "Dockerfile").is_file()


def test_the_image_for_gpus_can_compile_kernels() -> None:
    """Triton takes gcc, whose headers Debian has in a package of their own, and keeps its work where one may write."""
    assert 'if [ "$DEVICE" = gpu ]' in commands()
    assert {"gcc", "libc6-dev"} <= set(commands().split())
    assert environment()["TRITON_CACHE_DIR"].startswith("/cache/")


def test_labels_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\S+)="([^"]*)"', only("LABEL")))
    assert {
        "title": project["name"],
        "version": project["version"],
        "licenses": project["license"],
        "revision": "${REVISION}",
        "base.name": "${PYTHON_IMAGE}",
        "description": labels["description"],
    } == labels
    assert "REVISION" in arguments_of_build()


def test_pip_stays_out_of_the_image() -> None:
    assert "python3 -m venv --without-pip /opt/venv" in " ".join(text for _, text in instructions())


def test_the_service_is_a_layer_of_its_own() -> None:
    """It is installed beside what it depends on, and comes after it."""
    assert any("install --no-deps --root /opt/service ." in text for _, text in instructions())
    copies = [text for name, text in final_stage() if name == "COPY"]
    assert ["--from=build /opt/venv /opt/venv", "--from=build /opt/service/opt/venv /opt/venv"] == copies


def test_nginx_asks_the_replicas_of_compose() -> None:
    """By the name that they share; and compose publishes the port that nginx listens on."""
    assert f"megatron-gpt2:{default('port')} max_fails=0" == nginx("server")
    for service in SERVICES:
        assert ["megatron-gpt2"] == COMPOSE["services"][service]["networks"]["default"]["aliases"]
    port = nginx("listen")
    proxy = COMPOSE["services"]["nginx"]
    assert [f"127.0.0.1:{port}:{port}"] == proxy["ports"]
    assert f"http://127.0.0.1:{port}/livez" in proxy["healthcheck"]["test"]
    assert int(nginx("worker_rlimit_nofile")) == proxy["ulimits"]["nofile"] >= 2 * int(nginx("worker_connections"))


def test_nginx_takes_what_the_service_takes() -> None:
    """Bodies and heads as large; one buffer holds any line of a head."""
    assert default("max_body_bytes") == parse_bytes(nginx("client_max_body_size"))
    _, size = nginx("large_client_header_buffers").split()
    assert default("max_header_bytes") == parse_bytes(size) >= default("max_url_bytes")


def test_nginx_outlives_a_drain() -> None:
    """What is under way when either of them ends is finished; and no kept connection is closed by the service first."""
    drain = float(COMPOSE["services"]["cpu"]["environment"]["MGPT_DRAIN_SECONDS"])
    for directive in ("worker_shutdown_timeout", "proxy_read_timeout", "proxy_send_timeout", "send_timeout"):
        assert seconds(nginx(directive)) > max(drain, default("send_seconds")), directive
    assert seconds(COMPOSE["services"]["nginx"]["stop_grace_period"]) > seconds(nginx("worker_shutdown_timeout"))
    assert seconds(nginx("keepalive_timeout")) < default("http_keep_alive_seconds")


def test_nginx_answers_as_the_service_does() -> None:
    """Where no replica does: the envelope of the service's own 503."""
    (body,) = re.findall(r"return 503 '(.+)';", NGINX)
    own = unavailable(EngineNotReady("no replica answers"))
    assert own.body == json.loads(body)
    assert f"{own.headers['Retry-After']} always" == nginx("add_header Retry-After")
