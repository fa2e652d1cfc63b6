"""Settings: which source wins, what is refused, and that each error names what it is about."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, SettingsError, check_environment, load, parse_bytes


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that runs the tests sets nothing."""
    for name in [name for name in os.environ if name.upper().startswith("MGPT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def refusal(**given: object) -> str:
    with pytest.raises(SettingsError) as error:
        load(given)
    assert "\n" not in str(error.value), "one line"
    return str(error.value)


# Sources


def test_flag_beats_environment_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, file: Callable[[str], Path]
) -> None:
    """Each source decides only what the ones before it leave open."""
    config = file("max_num_seqs: 1\nport: 1\nhost: 0.0.0.1\n")
    monkeypatch.setenv("MGPT_MAX_NUM_SEQS", "2")
    monkeypatch.setenv("MGPT_PORT", "2")
    settings = load({"config": str(config), "max_num_seqs": "3"})
    assert (3, 2, "0.0.0.1", 16) == (settings.max_num_seqs, settings.port, settings.host, settings.block_size)


def test_environment_names_the_file(monkeypatch: pytest.MonkeyPatch, file: Callable[[str], Path]) -> None:
    monkeypatch.setenv("MGPT_CONFIG", str(file("port: 1234\n")))
    assert 1234 == load({}).port


def test_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass `MGPT_MODEL=` for a model that was not chosen."""
    monkeypatch.setenv("MGPT_MODEL", "")
    monkeypatch.setenv("MGPT_KV_MEMORY", "")
    assert (None, None) == (load({}).model, load({}).kv_memory)


def test_variables_may_be_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("mgpt_port", "1234")
    assert 1234 == load({}).port


def test_settings_do_not_change() -> None:
    settings = load({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


# Values


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (1073741824, "1073741824"),
        (4 * 2**30, "4GiB"),
        (4 * 2**30, "4G"),
        (4 * 2**30, "4gb"),
        (512 * 2**20, " 512 MiB "),
        (1536, "1.5K"),
        (2**40, "1T"),
        (7, 7),
    ],
)
def test_sizes(expected: int, text: object) -> None:
    """Units are powers of 1,024, however they are spelled."""
    assert expected == parse_bytes(text)


@pytest.mark.parametrize("text", ["", "4XB", "GiB", "-1G", "1e3", "4 G i B"])
def test_sizes_that_are_none(text: str) -> None:
    assert f"--kv-memory: must be a size such as 4GiB, 512MiB or a number of bytes (got {text!r})" == refusal(
        kv_memory=text
    )


@pytest.mark.parametrize("size", ["0", "0.1"])
def test_size_of_nothing(size: str) -> None:
    assert "--kv-memory: Input should be greater than 0" in refusal(kv_memory=size)


def test_served_model_names(monkeypatch: pytest.MonkeyPatch, file: Callable[[str], Path]) -> None:
    """Separated by commas where there is only text, a list in a file."""
    assert () == load({}).served_model_name
    assert ("a", "b/c") == load({"served_model_name": "a, b/c,"}).served_model_name
    assert ("a", "b") == load({"config": file("served_model_name: [a, b]\n")}).served_model_name
    monkeypatch.setenv("MGPT_SERVED_MODEL_NAME", "d,e")
    assert ("d", "e") == load({}).served_model_name


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert device == load({"device": device}).device


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("dtype", "int4"),
        ("kv_cache_dtype", "int8"),
        ("max_num_seqs", "0"),
        ("max_num_batched_tokens", "15"),
        ("block_size", "257"),
        ("gpu_memory_utilization", "1.1"),
        ("cpu_threads", "0"),
        ("speculation", "on"),
        ("speculation_tokens", "0"),
        ("drain_seconds", "-1"),
        ("drain_seconds", "nan"),
        ("stall_seconds", "0"),
        ("log_level", "verbose"),
        ("log_format", "xml"),
        ("offline", "perhaps"),
    ],
)
def test_bad_values_are_refused_by_the_name_they_were_given_by(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, file: Callable[[str], Path]
) -> None:
    """By its flag, its variable, or its name in the file; and the value is shown."""
    flag, variable = "--" + name.replace("_", "-"), "MGPT_" + name.upper()
    assert refusal(**{name: value}).startswith(f"{flag}: ")
    assert refusal(config=file(f'{name}: "{value}"\n')).startswith(f"{name}: ")
    monkeypatch.setenv(variable, value)
    assert refusal().startswith(f"{variable}: ")
    assert refusal().endswith(f"(got {value!r})")


# Environment


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MGPT_PROT", "MGPT_PORT"),
        ("MGPT_MAX_SEQS", "MGPT_MAX_NUM_SEQS"),
        ("mgpt_modl", "MGPT_MODEL"),
        ("MGPT_KVMEMORY", "MGPT_KV_MEMORY"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest(name: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert f"unknown environment variable {name}; did you mean {nearest}?" == refusal()


def test_kubernetes_links_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is injected for Services named mgpt and mgpt-web sets nothing, and is not refused."""
    for name in ("MGPT", "MGPT_WEB"):
        for suffix, value in {
            "_PORT": "tcp://10.0.0.1:80",
            "_PORT_80_TCP": "tcp://10.0.0.1:80",
            "_PORT_80_TCP_ADDR": "10.0.0.1",
            "_PORT_80_TCP_PORT": "80",
            "_PORT_80_TCP_PROTO": "tcp",
            "_SERVICE_HOST": "10.0.0.1",
            "_SERVICE_PORT": "80",
            "_SERVICE_PORT_HTTP": "80",
        }.items():
            monkeypatch.setenv(name + suffix, value)
    assert Settings() == load({})
    assert 8000 == load({}).port


def test_other_programs_variables_are_passed_over() -> None:
    check_environment({"MGPTX_PORT": "1", "XMGPT_PORT": "1", "HF_HOME": "/x", "MGPT": "1"})


def test_unknown_keyword_is_refused() -> None:
    """Only cli.py makes these; a slip there is an error, not a setting that does nothing."""
    assert refusal(prot=1).startswith("--prot: ")


# The file


def test_empty_file_sets_nothing(file: Callable[[str], Path]) -> None:
    config = file("# nothing yet\n")
    assert load({}).model_copy(update={"config": config}) == load({"config": config})


def test_missing_file(tmp_path: Path) -> None:
    assert f"config: no such file: {tmp_path}/none.yaml" == refusal(config=str(tmp_path / "none.yaml"))
    assert f"config: no such file: {tmp_path}" == refusal(config=str(tmp_path))


@pytest.mark.parametrize("text", ["port: [1,\n", "port: 1\n\tport: 2\n", "a: b: c\n"])
def test_file_that_is_no_yaml(text: str, file: Callable[[str], Path]) -> None:
    config = file(text)
    assert refusal(config=str(config)).startswith(f"config: {config}: not readable as YAML: ")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(config=path).startswith(f"config: {path}: not readable as YAML: ")


@pytest.mark.parametrize("text", ["- port\n- 1\n", "port\n", "3\n"])
def test_file_that_is_no_table(text: str, file: Callable[[str], Path]) -> None:
    config = file(text)
    assert f"config: {config}: expected lines of `name: value`" == refusal(config=config)


@pytest.mark.parametrize(("name", "nearest"), [("prot", "port"), ("MGPT_PORT", "port"), ("kv-memory", "kv_memory")])
def test_unknown_setting_in_the_file(name: str, nearest: str, file: Callable[[str], Path]) -> None:
    config = file(f"{name}: 1\n")
    assert f"config: {config}: unknown setting {name}; did you mean {nearest}?" == refusal(config=config)


def test_every_setting_can_be_given_by_every_source(
    monkeypatch: pytest.MonkeyPatch, file: Callable[[str], Path], tmp_path: Path
) -> None:
    """No setting has a type that a flag, a variable or a line of YAML could not carry."""
    values = {
        name: str(field.default)
        for name, field in Settings.model_fields.items()
        if field.default is not None and field.default != ()
    }
    values |= {"model": "m", "revision": "r", "served_model_name": "s", "kv_memory": "1GiB", "cache_dir": "c"}
    values |= {"max_num_seqs": "8", "max_num_batched_tokens": "16", "cpu_threads": "1"}
    values |= {"ssl_certfile": "c", "ssl_keyfile": "k", "ssl_keyfile_password": "p", "request_timeout_seconds": "9"}
    values |= {"api_key": "k,l", "api_key_file": "f", "open_routes": "/docs", "cors_origins": "https://a.example"}
    values |= {"admin_port": "1", "admin_socket": "s", "otlp_traces_endpoint": "http://t:4318/v1/traces"}
    values |= {"config": str(tmp_path / "empty.yaml")}
    (tmp_path / "empty.yaml").touch()
    assert set(Settings.model_fields) == set(values)
    from_flags = load(values)
    path = file("".join(f"{name}: {value}\n" for name, value in values.items() if name != "config"))
    assert from_flags == load({"config": path}).model_copy(update={"config": from_flags.config})
    for name, value in values.items():
        monkeypatch.setenv(f"MGPT_{name.upper()}", value)
    assert from_flags == load({})
