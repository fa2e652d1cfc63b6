"""The load generator's command line: `main` is `megatron-gpt2 bench`, and is called by bench/load.py."""

import argparse
import asyncio
import contextlib
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from service.load.connection import Connection
from service.load.crowd import Crowd, CrowdError
from service.load.figures import Figures, figures_of, is_flat
from service.load.plan import Level, Plan, Server
from service.load.report import load_name, picture, table, to_json
from service.pair import parse_header, parse_pair
from service.version import VERSION

_DESCRIPTION = """\
Load on a server with OpenAI's /v1/completions, and what it takes: a table, and with --out JSON and a picture.

Clients ask again as soon as they have the whole answer (--concurrency), or requests arrive at random (--rate). Prompts
are random token ids, or the lines of a file. Only OpenAI's own fields are sent, and ignore_eos where the server takes
it; --body adds others."""
_MOST_CLIENTS = 1024
_MODEL_INFO = "megatron_gpt2_model_info"


class LoadError(Exception):
    """What was asked cannot be done; the message names the flag."""


def main(arguments: Sequence[str], *, program: str = "megatron-gpt2 bench") -> int:
    """Measure; the process's exit code: 0, 1 where no request was answered, 2 for a mistake, 130 after Ctrl-C."""
    asked = _parser(program).parse_args(arguments)
    try:
        levels = _levels(asked)
        plan, about = asyncio.run(_prepare(asked))
        rows, interrupted = _measure(plan, levels)
        about["command"] = _command(program, arguments, asked.header)
        _write(asked.out, about, rows)
    except (LoadError, CrowdError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if interrupted:
        return 130
    return 0 if all(row.requests for row in rows) else 1


def _command(program: str, arguments: Sequence[str], headers: Sequence[str]) -> str:
    """As it was given, but for the values of headers: results are kept and shown, keys are not."""
    for header in headers:
        arguments = [text.replace(header, header.partition(":")[0] + ":…") for text in arguments]
    return shlex.join([*program.split(), *arguments])


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--url", default="http://127.0.0.1:8000", help="base URL of the server (default %(default)s)")
    flag("--model", help="name of the model; by default the first of GET /v1/models")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        metavar="C,C",
        help="clients with one request open each; by default 1 and then twice as many each time, until that gains "
        f"hardly any throughput, or there are {_MOST_CLIENTS}",
    )
    load.add_argument("--rate", metavar="R,R", help="requests a second, arriving at random whatever became of others")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=_positive, default=20, help="time measured of each load (default 20)")
    length.add_argument("--requests", type=_count, help="requests measured of each load, instead of a time")
    flag("--warmup-seconds", type=_not_negative, default=3, help="load before that is not measured (default 3)")
    flag("--processes", type=_count, default=2, help="client processes, among which clients are divided (default 2)")
    flag("--prompt-tokens", type=_count, default=128, help="length of a prompt of random ids (default 128)")
    flag("--vocab-size", type=_count, default=50256, help="random ids are below this (default %(default)s)")
    flag("--prompts", type=Path, metavar="FILE", help="prompts of text instead, one a line, sent in turn")
    flag("--max-tokens", type=_count, default=128, help="tokens to generate a request (default 128)")
    flag("--no-stream", action="store_true", help="ask for whole answers instead of events")
    flag("--body", default="{}", metavar="JSON", help="fields to add to each request; null takes one away")
    flag("--header", action="append", default=[], metavar="NAME:VALUE", help="header to send; may be given again")
    flag("--timeout-seconds", type=_positive, default=300, help="for one request (default 300)")
    flag("--seed", type=int, default=0, help="of prompts and arrivals (default 0)")
    flag("--note", action="append", default=[], metavar="NAME=VALUE", help="kept with the results; may be given again")
    flag("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.svg")
    return parser


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _not_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _levels(asked: argparse.Namespace) -> list[Level] | None:
    """Those that were asked for; None: as many as it takes."""
    try:
        if asked.rate is not None:
            return [Level("open", _positive(item)) for item in asked.rate.split(",")]
        if asked.concurrency is None:
            return None
        return [Level("closed", _count(item)) for item in asked.concurrency.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        if asked.rate is not None:
            raise LoadError(f"--rate: must be numbers above 0, by commas, not {asked.rate!r}") from None
        raise LoadError(f"--concurrency: must be whole numbers above 0, by commas, not {asked.concurrency!r}") from None


async def _prepare(asked: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """What will be sent, once the server has taken one of it; and what belongs with the results."""
    try:
        headers = tuple(parse_header(text) for text in asked.header)
    except ValueError as error:
        raise LoadError(f"--header: {error}") from None
    try:
        server = Server.at(asked.url, headers)
    except ValueError as error:
        raise LoadError(f"--url: {error}") from None
    try:
        extra = msgspec.json.decode(asked.body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise LoadError(f"--body: must be a JSON object: {error}") from None
    try:
        notes = dict(parse_pair(text, "=") for text in asked.note)
    except ValueError as error:
        raise LoadError(f"--note: {error}") from None
    fields: dict[str, Any] = {"model": asked.model, "max_tokens": asked.max_tokens, "stream": not asked.no_stream}
    if not asked.no_stream:
        fields["stream_options"] = {"include_usage": True}
    fields["model"] = fields["model"] or await _first_model(server)
    plan = Plan(
        server=server,
        fields={},
        texts=_texts(asked.prompts),
        prompt_tokens=asked.prompt_tokens,
        vocab_size=asked.vocab_size,
        warmup_seconds=asked.warmup_seconds,
        seconds=None if asked.requests is not None else asked.seconds,
        requests=asked.requests,
        timeout_seconds=asked.timeout_seconds,
        processes=asked.processes,
        seed=asked.seed,
    )
    plan = await _accepted(plan, {"ignore_eos": True, **fields, **extra}, optional={"ignore_eos"} - extra.keys())
    about = {
        "url": asked.url,
        "model": plan.fields.get("model"),
        "device": _device(),
        "host": f"{platform.node()}, {os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "server": await _version(server),
        "engine": await _engine(server),
        "client": f"megatron-gpt2 {VERSION}, Python {platform.python_version()}",
        "client_processes": plan.processes,
        "prompt": str(asked.prompts) if plan.texts else f"{plan.prompt_tokens} random ids",
        "fields": plan.fields,
        **notes,
    }
    return plan, about


def _texts(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        texts = tuple(line for line in file.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--prompts: {file}: {error}") from None
    if not texts:
        raise LoadError(f"--prompts: {file} has no line of text")
    return texts


async def _fetch(server: Server, path: str, body: bytes = b"") -> tuple[int, bytes]:
    try:
        async with asyncio.timeout(10):
            connection = await Connection.open(server)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LoadError(f"--url: cannot connect to {server.host}:{server.port}: {reason}") from None
    try:
        return await connection.fetch(server.request(path, body))
    except OSError as error:
        raise LoadError(f"--url: {server.host}:{server.port} gives no answer to {path}: {error}") from None
    finally:
        connection.abort()


async def _first_model(server: Server) -> str:
    status, body = await _fetch(server, "/v1/models")
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise LoadError(f"--model: GET /v1/models tells no name (status {status}); give one") from None


async def _accepted(plan: Plan, fields: Mapping[str, Any], *, optional: Set[str]) -> Plan:
    """The plan with `fields`, without the optional ones if the server refuses them. Raises LoadError."""
    for names in (fields.keys(), fields.keys() - optional):
        sent = {name: value for name, value in fields.items() if name in names and value is not None}
        plan = replace(plan, fields=sent)
        status, body = await _fetch(plan.server, "/v1/completions", next(plan.bodies(0)))
        if status == 200:
            return plan
        if status not in (400, 422):
            break
    hint = "" if plan.texts or status not in (400, 422) else " (a server that takes no token ids needs --prompts)"
    raise LoadError(f"the server refuses the request with {status}: {body[:500].decode('utf-8', 'replace')}{hint}")


async def _version(server: Server) -> Any:
    """What the server says of itself, where it has a route for that."""
    status, body = await _fetch(server, "/version")
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(body) if status == 200 else None
    return None


async def _engine(server: Server) -> dict[str, str] | None:
    """What our own service has loaded, and on what: the labels of model_info in GET /metrics; None of another one."""
    status, body = await _fetch(server, "/metrics")
    if status != 200:
        return None
    with contextlib.suppress(ValueError):  # a page that is no metrics
        for family in text_string_to_metric_families(body.decode("utf-8", "replace")):
            if family.name == _MODEL_INFO:
                return dict(family.samples[0].labels)
    return None


def _device() -> str:
    """The GPUs of this machine, or its processor."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        names = found.stdout.strip().splitlines()
        if names:
            return f"{len(names)} x {names[0]}"
    except (OSError, subprocess.SubprocessError):
        pass
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _doubling(rows: Sequence[Figures]) -> Iterator[Level]:
    """Twice the clients each time, until the last of `rows`, which grow meanwhile, gained hardly anything."""
    clients = 1
    while clients <= _MOST_CLIENTS and not (rows and (is_flat(rows) or not rows[-1].requests)):
        yield Level("closed", clients)
        clients *= 2


def _measure(plan: Plan, levels: Sequence[Level] | None) -> tuple[list[Figures], bool]:
    """The figures of each level, or of those before Ctrl-C; without levels, of as many as it takes."""
    rows: list[Figures] = []
    total = None if plan.seconds is None else plan.warmup_seconds + plan.seconds
    with Crowd(plan) as crowd:
        for level in _doubling(rows) if levels is None else levels:
            with _progress(level, total) as bar:
                tallies, interrupted = crowd.measure(level, on_wait=lambda seconds: _advance(bar, seconds))
            rows.append(figures_of(level, plan, tallies, interrupted=interrupted))
            print(f"{load_name(rows[-1])}: {rows[-1].tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
            if interrupted:
                return rows, True
    return rows, False


def _progress(level: Level, total: float | None) -> "tqdm[Never]":
    """A bar of seconds on a terminal; without an end where the requests are counted."""
    shape = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left" if total else "{desc}: {elapsed}"
    name = f"{level.load:g} {'clients' if level.loop == 'closed' else 'requests/s'}"
    return tqdm(total=total, desc=name, bar_format=shape, leave=False, disable=not sys.stderr.isatty())


def _advance(bar: "tqdm[Never]", seconds: float) -> None:
    bar.update(max(0.0, min(seconds, bar.total or seconds) - bar.n))


def _write(out: Path | None, about: dict[str, Any], rows: Sequence[Figures]) -> None:
    print(table(rows))
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".json").write_bytes(to_json(about, rows))
        out.with_name(out.name + ".svg").write_text(picture(about, rows), "utf-8")
    except OSError as error:
        raise LoadError(f"--out: {error}") from None
