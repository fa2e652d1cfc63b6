"""Whether a command that a page shows is one that its program would take: parsed by the program's own parser where it
is ours, and else compared with the files that it names. Nothing is run."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, Never
from unittest import mock

import httpx
import yaml

from service import cli
from service.api.schemas import CompletionRequest
from service.load import command as load
from service.settings import ENV_PREFIX, Settings
from tests.markdown import ROOT

DOCUMENTED_URL = "http://127.0.0.1:8000"
# Flags that prose names and no program of ours has, and whose they are.
OTHERS = {
    "--build-arg": "docker",
    "--include_path": "lm_eval",
    "--overlapping-eval": "Megatron-LM",
    "--strict-lambada": "Megatron-LM",
    "--transformer-impl": "Megatron-core",
}
_ASSIGNED = re.compile(r"[A-Z_]+=")


class _ParsedError(Exception):
    """A parser of ours has taken a command line."""


def check(command: str, *, in_prose: bool = False) -> None:
    """AssertionError, or a program's own error, where it would not be taken; in prose what is required may be left
    out."""
    for words in _split(command):
        CHECKS[words[0]](words[1:], in_prose)


def is_command(span: str) -> bool:
    """Whether code in prose begins with the name of a program that is known here."""
    try:
        words = _split(span)
    except ValueError:  # a quote that is not closed
        return False
    return bool(words and words[0]) and words[0][0] in CHECKS


def _split(command: str) -> list[list[str]]:
    """The words of each program, without variables that are set for it alone."""
    programs: list[list[str]] = [[]]
    for word in shlex.split(command, comments=True):
        if word == "&&":
            programs.append([])
        elif programs[-1] or not _ASSIGNED.match(word):
            programs[-1].append(word)
    return programs


def check_flags(span: str) -> None:
    """Flags alone, in prose: they are there, and where all are of settings, so are the values."""
    flags = re.findall(r"(?<!\S)--[\w-]+", span)
    own = {flag for flag in flags if flag not in OTHERS}
    assert own <= _flags(), own - _flags()
    settings = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    words = shlex.split(span)
    if own and own <= settings and len(words) > len(flags) and not any(word.isupper() for word in words):
        check(f"megatron-gpt2 serve {span}")


def _flags() -> set[str]:
    """All that the command and the benchmarks have."""
    found = {"--help"}
    parsers = [cli._parser(), load._parser("")]
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for file in (ROOT / "bench").glob("*.py"):
        source = file.read_text()
        found.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
        switches = re.findall(r'"--([\w-]+)", action=argparse.BooleanOptionalAction', source)
        found.update(f"--no-{name}" for name in switches)
    return found


def _megatron_gpt2(words: Sequence[str], in_prose: bool) -> None:
    """By the command's own parser, values by Settings."""
    if in_prose and not words:
        return
    errors = StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(StringIO()):
            if words[0] == "bench":
                load._parser("bench").parse_args(words[1:])
                return
            with mock.patch.object(cli, "_run", return_value=0):
                code = cli.main(words)
    except SystemExit as exit:
        if exit.code == 0 or (in_prose and "the following arguments are required" in errors.getvalue()):
            return
        raise AssertionError(errors.getvalue()) from exit
    assert 0 == code, errors.getvalue()


def _python(words: Sequence[str], _in_prose: bool) -> None:
    """A module of ours that is a program; its flags by its own parser."""
    dash_m, name, *flags = words
    assert "-m" == dash_m
    source = ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text()
    assert 'if __name__ == "__main__":' in source
    if not any(flag.startswith("-") for flag in flags):
        return

    def parse_only(parser: argparse.ArgumentParser, args: Sequence[str] | None = None) -> Never:
        real(parser, args)
        raise _ParsedError

    real = argparse.ArgumentParser.parse_args
    main: Callable[..., Any] = importlib.import_module(name).main
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(sys, "argv", words[1:]),
    ):
        try:
            main(*([flags] if inspect.signature(main).parameters else []))
        except _ParsedError:
            return
    raise AssertionError(f"{name} has parsed nothing")


def _make(words: Sequence[str], _in_prose: bool) -> None:
    """A target, by make itself without doing it; variables that the Makefile has; what it would run of ours."""
    known = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    given = {word.partition("=")[0] for word in words if "=" in word}
    assert given <= known, given - known
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    ours = r"\.venv\S*/bin/(megatron-gpt2 serve|python -m (?:bench|tests|service)\.)([^;|&\n]*)"
    for program, rest in re.findall(ours, done.stdout):
        check(program + rest)


def _pytest(words: Sequence[str], _in_prose: bool) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("paths", nargs="*")
    given = parser.parse_args(words)
    assert f'"{given.m}: ' in (ROOT / "pyproject.toml").read_text()
    assert all((ROOT / path).exists() for path in given.paths)


def _pip(words: Sequence[str], _in_prose: bool) -> None:
    """An extra of ours."""
    install, asked = words
    assert "install" == install
    match = re.fullmatch(r"(?:megatron-gpt2|\.)\[(\w+)\]", asked)
    assert match is not None, asked
    assert re.search(rf"^{match[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def _docker(words: Sequence[str], in_prose: bool) -> None:
    """The Dockerfile's arguments, the image's port, places, variables and command, compose's profiles and services."""
    name, *rest = words
    parser = argparse.ArgumentParser(exit_on_error=False)
    match name:
        case "build":
            parser.add_argument("-t", required=True)
            parser.add_argument("--build-arg", action="append", default=[])
            parser.add_argument("folder", choices=["."])
            given = parser.parse_args(rest)
            assert re.fullmatch(r"(registry\.example/)?megatron-gpt2(:[\w.]+(-gpu)?)?", given.t)
            arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
            assert {pair.partition("=")[0] for pair in given.build_arg} <= arguments
            assert ("DEVICE=gpu" in given.build_arg) == given.t.endswith("gpu")
        case "push":
            assert re.fullmatch(r"registry\.example/megatron-gpt2:[\w.-]+", *rest)
        case "run":
            for flag in ("-p", "-v", "-e"):
                parser.add_argument(flag, action="append", default=[])
            for flag in ("--cap-drop", "--security-opt", "--gpus"):
                parser.add_argument(flag)
            parser.add_argument("--read-only", action="store_true")
            parser.add_argument("image", choices=["megatron-gpt2", "megatron-gpt2:gpu"])
            parser.add_argument("command", nargs=argparse.REMAINDER)
            given = parser.parse_args(rest)
            assert (given.gpus is not None) == given.image.endswith(":gpu")
            assert all(port.endswith(f":{Settings.model_fields['port'].default}") for port in given.p)
            places = [volume.removesuffix(":ro").rpartition(":")[2] for volume in given.v]
            assert all(re.fullmatch("/cache|/models/.+|/keys", place) for place in places), places
            for variable in given.e:
                setting, _, value = variable.removeprefix(ENV_PREFIX).partition("=")
                check(shlex.join(["megatron-gpt2", "serve", "--" + setting.lower().replace("_", "-"), value]))
            check(shlex.join(["megatron-gpt2", *(given.command or ["serve"])]))
        case "compose":
            parser.add_argument("-f", required=True)
            parser.add_argument("--profile", action="append")
            parser.add_argument("up", choices=["up"])
            parser.add_argument("--build", action="store_true")
            parser.add_argument("--scale")
            given = parser.parse_args(rest)
            services = yaml.safe_load((ROOT / given.f).read_text())["services"]
            assert set(given.profile) <= {profile for about in services.values() for profile in about["profiles"]}
            assert given.scale.partition("=")[0] in services
        case "stop":
            assert rest[0] == "--time"
            assert int(rest[1]) > Settings.model_fields["drain_seconds"].default
        case _:
            raise AssertionError(f"docker {name} is new here")


def _kubectl(words: Sequence[str], in_prose: bool) -> None:
    """Folders of k8s/, names and labels of its objects; `mine` is the folder that docs/kubernetes.md makes."""
    objects = (ROOT / "k8s").rglob("*.yaml")
    match words:
        case ["apply", "-k", folder] | ["kustomize", folder]:
            assert folder == "mine" or (ROOT / folder / "kustomization.yaml").is_file()
        case ["-n", _, "rollout", "status", name]:
            kind, _, name = name.partition("/")
            assert "deployment" == kind
            about = yaml.safe_load((ROOT / "k8s/base/deployment.yaml").read_text())
            assert name == about["metadata"]["name"]
        case ["label", "namespace", _, label]:
            key, _, value = label.partition("=")
            assert any(f'{key}: "{value}"' in file.read_text() for file in objects)
        case ["port-forward"] if in_prose:
            pass
        case _:
            raise AssertionError(f"kubectl {' '.join(words)} is new here")


def _curl(words: Sequence[str], _in_prose: bool) -> None:
    """A route of ours, and a body that it takes."""
    asked = _asked(words)
    assert f"{DOCUMENTED_URL}/v1/completions" == asked.target, "its own test must send it"
    CompletionRequest.model_validate(json.loads(asked.d))


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in ("-s", "-N"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-X")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d")
    parser.add_argument("target")
    return parser.parse_args(words)


def curl(command: str, url: str) -> httpx.Response:
    """What a curl command of a page is answered by the service at `url`; curl itself need not be there."""
    asked = _asked(shlex.split(command)[1:])
    return httpx.request(
        asked.X or ("GET" if asked.d is None else "POST"),
        asked.target.replace(DOCUMENTED_URL, url),
        content=None if asked.d is None else asked.d.encode(),
        headers=[tuple(header.split(": ", 1)) for header in asked.H],
        timeout=60,
    )


def _export(words: Sequence[str], _in_prose: bool) -> None:
    """What Ray Serve imports."""
    (name, _, value) = words[0].partition("=")
    module, _, attribute = value.partition(":")
    assert name in (ROOT / "service/ray_serve.py").read_text()
    assert callable(getattr(importlib.import_module(module), attribute))


def _ray(words: Sequence[str], in_prose: bool) -> None:
    if in_prose and not words:
        return
    assert words[0] == "start"
    assert words[1] == "--head" or words[1].startswith("--address=")


def _serve(words: Sequence[str], in_prose: bool) -> None:
    """Ray Serve's: the application, and arguments that it takes."""
    if in_prose and words in (["run"], ["deploy"], ["run", "IMPORT"]):
        return
    run, application, *arguments = words
    assert "run" == run
    check_ray(application, dict(argument.split("=", 1) for argument in arguments))


def check_ray(application: str, arguments: dict[str, Any]) -> None:
    """Ray need not be installed: the file is read."""
    module, _, function = application.partition(":")
    tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()).body
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree)
    (placement,) = (node for node in tree if isinstance(node, ast.ClassDef) and node.name == "Placement")
    own = {
        node.target.id
        for node in placement.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    Settings(**{name: value for name, value in arguments.items() if name not in own})


def _any(_words: Sequence[str], _in_prose: bool) -> None:
    """Nothing of ours is in it."""


CHECKS: dict[str, Callable[[Sequence[str], bool], None]] = {
    "megatron-gpt2": _megatron_gpt2,
    "python": _python,
    "make": _make,
    "pytest": _pytest,
    "pip": _pip,
    "docker": _docker,
    "kubectl": _kubectl,
    "curl": _curl,
    "export": _export,
    "ray": _ray,
    "serve": _serve,
    "mkdir": _any,
    "printf": _any,
    "lm_eval": _any,
}
