"""The load generator against a server with known timing: what it sends, what it counts, what it writes and refuses."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from service.cli import main as cli
from service.load.command import main
from tests.load.fake_server import FakeServer


def measure(server: FakeServer, out: Path, *flags: str, code: int = 0) -> list[dict[str, Any]]:
    """The levels of the results; one client and no warm-up, unless they are asked for."""
    if not {"--concurrency", "--rate"} & set(flags):
        flags = ("--concurrency", "1", *flags)
    asked = ["--url", server.url, "--out", str(out / "result"), "--processes", "2", "--warmup-seconds", "0", *flags]
    assert code == main(asked)
    levels: list[dict[str, Any]] = json.loads((out / "result.json").read_bytes())["levels"]
    return levels


def test_a_closed_loop_measures_the_timing_of_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Time to first token, time a token, gap and throughput follow from the server's own waits; usage gives tokens."""
    with FakeServer() as server:
        (level,) = measure(server, tmp_path, "--concurrency", "4", "--requests", "20", "--max-tokens", "40")
    assert (20, {}, 4.0) == (level["requests"], level["errors"], level["tokens_per_event"])
    assert 30 <= level["ttft"]["p50"] < 60
    assert 10 <= level["gap"]["p50"] < 20
    assert 9 * 10 / 39 <= level["tpot"]["p50"] < 9 * 20 / 39  # 9 gaps, and 39 tokens after the first
    assert 120 <= level["end_to_end"]["p50"] < 240
    assert 20 * 40 / level["seconds"] == pytest.approx(level["tokens_per_second"], rel=1e-3)
    assert 20 * 128 / level["seconds"] == pytest.approx(level["prompt_tokens_per_second"], rel=1e-3)
    out = capsys.readouterr().out
    assert "4 clients" in out
    assert "tokens/event" in out


def test_what_is_sent_by_default_is_standard_but_for_ignore_eos(tmp_path: Path) -> None:
    """Distinct prompts of random ids, the first served name, a usage at the end of streams."""
    with FakeServer(first_seconds=0) as server:
        measure(server, tmp_path, "--concurrency", "2", "--requests", "6", "--max-tokens", "4", "--prompt-tokens", "9")
        body = server.bodies[-1]
        expected = {"prompt", "model", "max_tokens", "stream", "stream_options", "ignore_eos"}
        assert expected == body.keys()
        assert ("fake", 4, {"include_usage": True}) == (body["model"], body["max_tokens"], body["stream_options"])
        prompts = {tuple(each["prompt"]) for each in server.bodies[1:]}  # the first is a trial
        assert 6 == len(prompts)
        assert all(9 == len(prompt) and max(prompt) < 50256 for prompt in prompts)


def test_a_server_that_refuses_ignore_eos_is_not_sent_it(tmp_path: Path) -> None:
    with FakeServer(first_seconds=0, fault=lambda _, body: "400" if "ignore_eos" in body else None) as server:
        (level,) = measure(server, tmp_path, "--requests", "3", "--max-tokens", "4")
        assert (3, {}) == (level["requests"], level["errors"])


def test_fields_headers_and_texts_are_sent_as_given(tmp_path: Path) -> None:
    """--body adds fields and takes others away; --prompts gives its lines in turn; notes stay with the results."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo é\n")
    flags = ["--body", '{"temperature": 0, "ignore_eos": null}', "--header", "Authorization: Bearer x"]
    flags += ["--prompts", str(prompts), "--note", "api_processes=1", "--no-stream", "--requests", "4"]
    with FakeServer(first_seconds=0.02) as server:
        (level,) = measure(server, tmp_path, *flags)
        assert {"one", "two é"} == {body["prompt"] for body in server.bodies}
        assert all(0 == body["temperature"] and "ignore_eos" not in body for body in server.bodies)
        assert all("Authorization: Bearer x" in head for head in server.heads)
    assert (None, None, None) == (level["ttft"], level["gap"], level["tokens_per_event"])
    assert 20 <= level["end_to_end"]["p50"] < 60
    about = json.loads((tmp_path / "result.json").read_bytes())
    assert "1" == about["api_processes"]
    assert {"url", "model", "device", "host", "date", "client", "command"} <= about.keys()
    assert "--header 'Authorization:…' --prompts" in about["command"], "files of results have no keys"
    assert "Bearer" not in (tmp_path / "result.json").read_text() + (tmp_path / "result.svg").read_text()


@pytest.mark.parametrize(
    ("metrics", "engine"),
    [
        (
            "# TYPE megatron_gpt2_ready gauge\nmegatron_gpt2_ready 1.0\n# TYPE megatron_gpt2_model_info gauge\n"
            'megatron_gpt2_model_info{device="cuda:0",dtype="bfloat16",num_blocks="84453"} 1.0\n',
            {"device": "cuda:0", "dtype": "bfloat16", "num_blocks": "84453"},
        ),
        ("<html>", None),
        (None, None),
    ],
    ids=["ours", "no metrics", "no page"],
)
def test_what_the_server_says_of_itself_stays_with_the_results(
    tmp_path: Path, metrics: str | None, engine: dict[str, str] | None
) -> None:
    """Its version and, of our own service, what the engine has loaded; nothing where it says nothing."""
    pages = {"/version": '{"version": "1.2"}'} | ({} if metrics is None else {"/metrics": metrics})
    with FakeServer(0.001, 0.001, pages=pages) as server:
        measure(server, tmp_path, "--requests", "2", "--max-tokens", "4")
    about = json.loads((tmp_path / "result.json").read_bytes())
    assert {"version": "1.2"} == about["server"]
    assert engine == about["engine"]


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("429", "429"),
        ("500", "500"),
        ("drop", "connection lost"),
        ("error event", "error event: broken"),
        ("no usage", "no usage in the answer"),
    ],
)
def test_errors_are_counted_by_what_they_are(tmp_path: Path, fault: str, counted: str) -> None:
    """Every third request fails; the others are measured as if nothing had been."""
    with FakeServer(0.001, 0.001, fault=lambda number, _: fault if number % 3 == 0 else None) as server:
        flags = ["--concurrency", "3", "--requests", "12", "--max-tokens", "12"]
        (level,) = measure(server, tmp_path, *flags)
    assert {counted: 4} == level["errors"]
    assert 8 == level["requests"]


def test_an_open_loop_keeps_its_rate(tmp_path: Path) -> None:
    """Arrivals are Poisson: of 200 expected within 4.5 standard deviations, however long an answer takes."""
    with FakeServer(first_seconds=0.3) as server:
        (level,) = measure(server, tmp_path, "--rate", "100", "--seconds", "2", "--max-tokens", "4")
    assert 200 - 64 <= level["requests"] <= 200 + 64
    assert 300 <= level["ttft"]["p50"] < 400


def test_each_level_is_a_line_a_record_and_a_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is well-formed and has a mark a level in each line."""
    with FakeServer(0.001, 0.001) as server:
        levels = measure(server, tmp_path, "--concurrency", "1,3", "--seconds", "0.3", "--max-tokens", "8")
    assert [1, 3] == [level["level"]["load"] for level in levels]
    assert 3 == len(capsys.readouterr().out.splitlines())
    picture = ElementTree.fromstring((tmp_path / "result.svg").read_text())
    assert 2 * 5 == len(picture.findall(".//{http://www.w3.org/2000/svg}circle"))


def test_clients_double_until_more_of_them_gain_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is the default; the level that saturates is told, in the results and in the picture."""
    with FakeServer(0.02, 0.02, most_at_once=4) as server:
        flags = ["--url", server.url, "--warmup-seconds", "0.1", "--seconds", "0.6", "--max-tokens", "8"]
        assert 0 == cli(["bench", *flags, "--out", str(tmp_path / "result")])
    found = json.loads((tmp_path / "result.json").read_bytes())
    loads = [level["level"]["load"] for level in found["levels"]]
    assert [1, 2, 4, 8, 16][: len(loads)] == loads
    assert 4 <= len(loads)
    assert 4 == found["saturated_from"]
    assert found["command"].startswith("megatron-gpt2 bench --url")
    assert "saturated from 4 clients on, with " in capsys.readouterr().out
    assert 3 == (tmp_path / "result.svg").read_text().count(">saturated<")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--concurrency", "1,x"], "--concurrency"),
        (["--concurrency", "0"], "--concurrency"),
        (["--rate", "-1"], "--rate"),
        (["--url", "127.0.0.1:80"], "--url"),
        (["--url", "http://127.0.0.1:1"], "--url"),
        (["--body", "[1]"], "--body"),
        (["--body", "{"], "--body"),
        (["--header", "nothing"], "--header"),
        (["--header", "Authorization: Bearer mgpt-…"], "--header: must be ASCII"),
        (["--prompts", "no/such/file"], "--prompts"),
        (["--note", "x"], "--note"),
    ],
)
def test_a_mistake_is_told_by_its_flag(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with exit code 2."""
    with FakeServer() as server:
        assert 2 == main(["--url", server.url, *flags])
    error = capsys.readouterr().err
    assert named in error
    assert 1 == len(error.splitlines())


@pytest.mark.parametrize("flags", [["--seconds", "0"], ["--processes", "0"], ["--rate", "1", "--concurrency", "1"]])
def test_the_parser_names_the_flag_too(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert flags[-2] in capsys.readouterr().err


def test_a_server_that_refuses_all_is_told_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(fault=lambda _number, _body: "401") as server:
        assert 2 == main(["--url", server.url])
    assert "401" in (error := capsys.readouterr().err)
    assert "fault 401" in error


def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    """The table and the files come, with what was answered until then; the exit code is a shell's for SIGINT."""
    with FakeServer(0.001, 0.001) as server:
        flags = [
            "--url",
            server.url,
            "--concurrency",
            "1",
            "--seconds",
            "60",
            "--warmup-seconds",
            "0",
            "--out",
            str(tmp_path / "result"),
        ]
        command = [sys.executable, "-m", "bench.load", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while len(server.bodies) < 20:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, _ = process.communicate(timeout=20)
    assert 130 == process.returncode
    assert "cut short" in out
    (level,) = json.loads((tmp_path / "result.json").read_bytes())["levels"]
    assert 15 <= level["requests"]
    assert level["interrupted"]
    assert {} == level["errors"]
