"""The command line: its help, what it refuses and with which exit code, and `generate` beside transformers."""

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.checkpoint.tokenizer import read_tokenizer
from service.cli import main
from service.serve import DEMO_MODEL
from service.settings import Settings

COMMAND = Path(sys.executable).with_name("megatron-gpt2")
PROMPT = "The people of the United States"
# Settings that only a server has; the rest must be flags of `generate` too.
SERVER_ONLY = {
    "vllm_metrics",
    "otlp_traces_endpoint",
    "served_model_name",
    "host",
    "port",
    "data_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "speculation",
    "speculation_tokens",
    "max_body_bytes",
    "max_choices",
    "stream_keep_alive_seconds",
    "http_keep_alive_seconds",
    "max_event_interval_ms",
    "drain_seconds",
    "stall_seconds",
    "max_restarts",
    "restart_window_seconds",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_keyfile_password",
    "api_key",
    "api_key_file",
    "open_routes",
    "share_prefixes",
    "cors_origins",
    "admin_port",
    "admin_socket",
    "max_queued_requests",
    "max_queued_tokens",
    "queue_timeout_seconds",
    "request_timeout_seconds",
    "max_url_bytes",
    "max_header_bytes",
    "max_connections",
    "header_seconds",
    "body_seconds",
    "send_seconds",
    "unready_seconds",
}


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands that run in this process set up its logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, to its end."""
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a command that must end with 2 and print nothing to standard output."""
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse's own
        code = int(end.code or 0)
    output = capsys.readouterr()
    assert 2 == code
    assert "" == output.out
    assert "Traceback" not in output.err
    return output.err.splitlines()[-1]


def help_of(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert 0 == end.value.code
    return " ".join(capsys.readouterr().out.split())


def test_serve_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its description and its default."""
    text = help_of(capsys, "serve")
    for name, field in Settings.model_fields.items():
        assert ("model" if name == "model" else "--" + name.replace("_", "-")) in text
        assert str(field.description) in text
        if field.default not in (None, ()):
            assert f"{field.description} Default: {field.default}." in text


def test_generate_lists_every_setting_that_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    """And no setting of the HTTP service."""
    text = help_of(capsys, "generate")
    for name, field in Settings.model_fields.items():
        assert (name not in SERVER_ONLY) == (str(field.description) in text), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert 0 == end.value.code
    assert version("megatron-gpt2") == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "http"], "megatron-gpt2: --port: Input should be a valid integer"),
        (["serve", "--kv-memory", "much"], "megatron-gpt2: --kv-memory: must be a size such as 4GiB"),
        (["serve", "--max-num-seqs", "0"], "megatron-gpt2: --max-num-seqs: Input should be greater than or equal to 1"),
        (["serve", "--config", "none.yaml"], "megatron-gpt2: config: no such file: none.yaml"),
        (["serve", "--nonsense"], "megatron-gpt2: error: unrecognized arguments: --nonsense"),
        (["serve", "--max-num", "3"], "megatron-gpt2: error: unrecognized arguments: --max-num"),
        ([], "megatron-gpt2: error: the following arguments are required: command"),
        (["generate", "x", "--top-k", "many"], "megatron-gpt2 generate: error: argument --top-k: invalid int value"),
        (["generate", "x", "--temperature", "3"], "megatron-gpt2: --temperature: Input should be less than or equal"),
        (["generate", "x", "--top-p", "nan"], "megatron-gpt2: --top-p: "),
        (["generate", "x", "--max-tokens", "0"], "megatron-gpt2: --max-tokens: 0 is only possible with echo"),
        (["generate", "x", "--model", "./none"], "megatron-gpt2: ./none: no such file or folder"),
        (["generate", "x", "--kv-memory", "1M"], "megatron-gpt2: kv_memory: 1048576 bytes hold"),
        (["generate", "x", "--device", "cuda:99"], "megatron-gpt2: device: cuda:99 was asked for"),
        (["drain"], "megatron-gpt2: admin_port, admin_socket: one of them has to say where"),
        (["drain", "--admin-port", "0"], "megatron-gpt2: admin_port, admin_socket: one of them has to say where"),
        (["drain", "--admin-port", "70000"], "megatron-gpt2: --admin-port: Input should be less than or equal"),
        (
            ["drain", "--admin-socket", "./none"],
            "megatron-gpt2: admin_socket: no service answers on none: No such",
        ),
        (["drain", "--admin-port", "1"], "megatron-gpt2: admin_port: no service answers on 127.0.0.1:1: Connection"),
        (["drain", "--admin-port", "1", "--seconds", "-1"], "megatron-gpt2: --seconds: must be from 0 to 86400"),
        (["drain", "--admin-port", "1", "--seconds", "nan"], "megatron-gpt2: --seconds: must be from 0 to 86400"),
    ],
)
def test_mistakes_end_with_2_and_a_line_that_names_the_flag(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *arguments).startswith(message)


def test_prompt_over_the_context_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "generate", " a" * 1000, "--max-tokens", "25")
    assert "maximum context length is 1024 tokens" in line
    assert "the prompt has 1000 and max_tokens is 25, which is 1025 in all" in line


def test_text_that_is_no_utf8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell passes such bytes on as lone surrogates."""
    assert "megatron-gpt2: text: not valid UTF-8" == refusal(capsys, "generate", "caf\udce9")


def test_unknown_variable_ends_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGPT_PROT", "1")
    expected = "megatron-gpt2: unknown environment variable MGPT_PROT; did you mean MGPT_PORT?"
    assert expected == refusal(capsys, "serve")


def test_generate_is_what_transformers_generates() -> None:
    """The greedy text of the demo model, by the installed command, and nothing else on either stream."""
    tokenizer = read_tokenizer(DEMO_MODEL).backend
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    done = run("generate", PROMPT, "--max-tokens", "20", "--temperature", "0")
    assert (tokenizer.decode(ids[0].tolist()) + "\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_generate_draws_the_same_text_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """And another for another seed; the empty text is the start of a document."""
    texts = []
    for seed in ("1", "1", "2"):
        assert 0 == main(["generate", "", "--max-tokens", "12", "--seed", seed, "--kv-memory", "64MiB"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_serve_on_a_port_in_use() -> None:
    """Ends with 2 at once, naming the settings and the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port), "--log-format", "text")
    assert 2 == done.returncode
    assert 1 == done.stderr.count("\n")
    assert f"host, port: cannot listen on 127.0.0.1:{port}: " in done.stderr


def test_serve_on_an_admin_port_in_use() -> None:
    """Ends with 2 at once, naming the setting and the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", "0", "--admin-port", str(port), "--log-format", "text")
    assert 2 == done.returncode
    assert 1 == done.stderr.count("\n")
    assert f"admin_port: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


@pytest.mark.parametrize("there", ["socket", "file"])
def test_serve_on_an_admin_socket_in_use(tmp_path: Path, there: str) -> None:
    """By another service or as another file: ends with 2, naming the setting, and leaves it as it was."""
    path = tmp_path / "admin"
    with socket.socket(socket.AF_UNIX) as taken:
        if there == "socket":
            taken.bind(str(path))
            taken.listen()
        else:
            path.write_text("kept")
        done = run("serve", "--port", "0", "--admin-socket", str(path), "--log-format", "text")
        assert 2 == done.returncode
        assert 1 == done.stderr.count("\n")
        assert f"admin_socket: cannot listen on {path}: Address already in use" in done.stderr
        assert path.is_socket() if there == "socket" else "kept" == path.read_text()


def test_drain_asks_what_is_no_service() -> None:
    """What hangs up without an answer, or answers otherwise, is none of ours: 2 and a line that names the setting."""

    def answer(connection: socket.socket, text: bytes) -> None:
        with connection:
            connection.recv(1000)
            connection.sendall(text)

    for text, said in (
        (b"", "Remote end closed connection without response"),
        (b"220 mail\r\n", "220 mail"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "POST /admin/drain was answered with a 200 that says"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "POST /admin/drain was answered with a 404 that says"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            thread = threading.Thread(target=lambda: answer(other.accept()[0], text))  # noqa: B023 - it ends in here
            thread.start()
            done = run("drain", "--admin-port", str(port))
            thread.join()
        assert (2, "") == (done.returncode, done.stdout)
        assert done.stderr.startswith(f"megatron-gpt2: admin_port: no service answers on 127.0.0.1:{port}: ")
        assert 1 == done.stderr.count("\n")
        assert said in done.stderr


def test_serve_without_its_folder(tmp_path: Path) -> None:
    """Ends with 2, naming the folder."""
    folder = tmp_path / "no-such-model"
    done = run("serve", str(folder), "--port", "0", "--log-format", "text")
    assert 2 == done.returncode
    assert f"{folder}: no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr
