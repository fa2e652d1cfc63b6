"""Every setting, once: flags, environment variables with the prefix MGPT_ and the config file are one list.

Read by cli.py and serve.py only. Command line beats environment, environment beats file, file beats default.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "MGPT_"
_SECRET = frozenset({"api_key", "ssl_keyfile_password"})  # whose values no message repeats
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it."""


def parse_bytes(value: object) -> object:
    """`4GiB`, `512M` or `1073741824` as a number of bytes (units are powers of 1,024)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("must be a size such as 4GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def split_names(value: object) -> object:
    """`a,b` as two names; so are the items of a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        return value
    return [name.strip() for item in values for name in item.split(",") if name.strip()]


def read_off(value: object) -> object:
    """A file's `off` as the word: to YAML it is a boolean."""
    return "off" if value is False else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_names)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_names)]


class Settings(BaseSettings):
    """The service's settings."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        env_ignore_empty=True,
    )

    model: str | None = Field(
        None,
        description="Local folder or file, or hub id; without one, the embedded demo model.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the hub model.")
    offline: bool = Field(False, description="Never ask the hub: local folders and its cache only.")
    cache_dir: Path | None = Field(
        None, description="Where converted checkpoints are kept; by default megatron-gpt2 in ~/.cache."
    )
    served_model_name: Names = Field(
        (),
        description="Names clients may use for the model, by commas or spaces; the first is the one in answers.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    ssl_certfile: Path | None = Field(None, description="Certificate chain (PEM); with it the port speaks TLS.")
    ssl_keyfile: Path | None = Field(None, description="The certificate's key, if it is in a file of its own.")
    ssl_keyfile_password: SecretStr | None = Field(None, description="Of an encrypted key.")
    api_key: Secrets = Field((), description="Keys that clients must have one of, by commas; better in api_key_file.")
    api_key_file: Path | None = Field(
        None, description="File of keys, as `megatron-gpt2 key new` writes it; read again when it changes."
    )
    open_routes: Names = Field(
        (), description="With keys, routes that need none: /metrics, /version, /docs, /openapi.json, by commas."
    )
    share_prefixes: bool = Field(False, description="With keys, share computed prefixes between them too.")
    cors_origins: Names = Field((), description="Origins whose pages may ask, by commas, or *; by default none.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port on 127.0.0.1 that `megatron-gpt2 drain` asks; by default none."
    )
    admin_socket: Path | None = Field(None, description="The same as a unix socket, for its owner alone.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes a GPU if any.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32", "int8", "fp8"] = Field(
        "auto",
        description="Of the weights; auto is the checkpoint's own on a GPU and float32 on a CPU, fp8 is for a GPU.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="Of keys and values; auto is as the weights' own, fp8 (e4m3) is for a GPU."
    )
    deterministic: bool = Field(
        False,
        description="The same bits for a request in any company and order, slower; not with tensor_parallel_size.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="GPUs that an engine splits each layer over; must divide the attention heads."
    )
    data_parallel_size: int = Field(
        1, ge=1, le=64, description="Engines behind the one port, each with GPUs of its own; on a CPU they share it."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, le=4096, description="Sequences computed at the same time; by default 256 on a GPU and 64 on a CPU."
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens computed a step; by default 2048 on a GPU and 256 on a CPU.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens in a KV block.")
    kv_memory: Bytes | None = Field(
        None,
        description="Size of the KV cache, or of each rank's, such as 4GiB; by default from gpu_memory_utilization, "
        "or 1GiB on a CPU. Weights and what computes take theirs beside it.",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory to use in all.")
    cpu_threads: int | None = Field(
        None, ge=1, description="Threads of an engine on a CPU; by default one a core, shared by all engines."
    )
    speculation: Annotated[Literal["off", "ngram"], BeforeValidator(read_off)] = Field(
        "off",
        description="ngram: on a CPU, also compute the tokens that followed a text's last ones before: the same text, "
        "but for rounding, sooner where it repeats.",
    )
    speculation_tokens: int = Field(
        8, ge=1, le=64, description="How many such tokens a step has of a sequence at most."
    )
    max_body_bytes: Bytes = Field(8 * 2**20, description="Largest request body.")
    max_choices: int = Field(1024, ge=1, description="Sequences of one request: prompts x max(n, best_of), or items.")
    max_queued_requests: int = Field(2048, ge=1, description="Sequences that may wait; beyond, requests get a 429.")
    max_queued_tokens: int = Field(
        1_000_000, ge=1, description="Tokens that may wait: of prompts, and max_tokens of each sequence."
    )
    queue_timeout_seconds: Seconds = Field(60, description="A request that has waited so long gets a 429.")
    request_timeout_seconds: Seconds | None = Field(
        None, description="A request that is not done by then gets a 504; by default there is no such limit."
    )
    max_url_bytes: Bytes = Field(8192, description="Longest URL.")
    max_header_bytes: Bytes = Field(32768, description="Largest head of a request, all of its headers together.")
    max_connections: int = Field(4096, ge=1, description="Connections at a time; more are answered with a 503.")
    header_seconds: Seconds = Field(20, description="For a request's head to arrive.")
    body_seconds: Seconds = Field(120, description="For a request's body to arrive.")
    send_seconds: Seconds = Field(60, description="A client that takes nothing of its answer for so long is cut off.")
    stream_keep_alive_seconds: Seconds = Field(15, description="A silent stream gets a comment line this often.")
    max_event_interval_ms: float = Field(
        16,
        ge=0,
        le=1000,
        description="How long a busy service may hold a stream's tokens, to send them in one event; 0: not at all.",
    )
    http_keep_alive_seconds: int = Field(75, ge=1, description="How long an idle HTTP connection is kept.")
    drain_seconds: float = Field(60, ge=0, le=10**6, description="After SIGTERM, how long running requests may go on.")
    unready_seconds: float = Field(
        0,
        ge=0,
        le=10**6,
        description="How long the port stays open at least after a drain began, for balancers to notice.",
    )
    stall_seconds: Seconds = Field(
        30,
        description="An engine with open work that is silent this long is restarted.",
    )
    max_restarts: int = Field(
        5,
        ge=0,
        description="Restarts of an engine within the window before it is given up.",
    )
    restart_window_seconds: Seconds = Field(600, description="The window that max_restarts counts in.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "text", "json"] = Field(
        "auto",
        description="text or json lines; auto is text on a terminal and json otherwise.",
    )
    vllm_metrics: bool = Field(
        False, description="Show running, waiting and KV use by vLLM's metric names too, as routers read them."
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        description="URL that traces go to (OTLP/HTTP), such as http://collector:4318/v1/traces; "
        "or OpenTelemetry's own variables. Needs the extra otel.",
    )
    config: Path | None = Field(None, description="YAML file with any of these settings.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if not _is_service_link(name, value)
        }
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        file = init_settings().get("config") or env_settings().get("config")
        if file is not None:
            sources.append(InitSettingsSource(settings_cls, _read_file(Path(file))))
        return tuple(sources)


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse an unknown MGPT_* variable, naming the nearest one. Raises SettingsError.

    Kubernetes' service links (MGPT_PORT=tcp://..., MGPT_SERVICE_HOST and the like) are passed over.
    """
    for name, value in environment.items():
        setting = name.upper().removeprefix(ENV_PREFIX).lower()
        if not name.upper().startswith(ENV_PREFIX) or setting in Settings.model_fields or _is_service_link(name, value):
            continue
        nearest = ENV_PREFIX + _nearest(setting).upper()
        raise SettingsError(f"unknown environment variable {name}; did you mean {nearest}?")


def _is_service_link(name: str, value: str | None) -> bool:
    """True for what Kubernetes injects for a Service named mgpt or mgpt-something."""
    return bool(
        re.search(r"_SERVICE_(HOST|PORT)(_\w+)?$", name, re.IGNORECASE)
        or re.search(r"_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$", name, re.IGNORECASE)
        or (name.upper().endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value or ""))
    )


def _read_file(path: Path) -> dict[str, Any]:
    """The config file's settings by name. Raises SettingsError for what is no table of known settings."""
    if not path.is_file():
        raise SettingsError(f"config: no such file: {path}")
    try:
        settings = yaml.safe_load(path.read_bytes()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"config: {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f"config: {path}: expected lines of `name: value`")
    for name in settings:
        if name not in Settings.model_fields:
            raise SettingsError(f"config: {path}: unknown setting {name}; did you mean {_nearest(str(name))}?")
    return settings


def _nearest(name: str) -> str:
    name = name.lower().removeprefix(ENV_PREFIX.lower())
    return difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0)[0]


def load(given: Mapping[str, Any]) -> Settings:
    """Settings from the command line's `given`, the environment and the config file. Raises SettingsError."""
    check_environment(os.environ)
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(item, given) for item in error.errors())) from error


def _explain(item: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is wrong with one value, under the name it was given by: a flag, a variable, or a setting of the file."""
    name = setting = str(item["loc"][0])
    variable = ENV_PREFIX + name.upper()
    if name in given:
        name = "--" + name.replace("_", "-")
    elif any(variable == other.upper() for other in os.environ):
        name = variable
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}" if setting in _SECRET else f"{name}: {message} (got {item['input']!r})"
