"""`megatron-gpt2 eval --url` against the running service: the numbers of a run without it, whatever happens."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.evaluation import server as server_module
from service.evaluation.items import Item, Outcome
from service.evaluation.server import ServerScorer
from tests.service.conftest import DEMO
from tests.service.server import COMMAND, Server, Start, until_drained
from tests.service.test_access import ALICE

HELD_OUT = Path(__file__).parents[1] / "data" / "held_out.txt"
WORDS = [  # the demo model finds some of them
    "The people of the United States",
    "My fellow citizens of the Senate and of the House of Representatives",
    "In the year of our Lord",
    "He said that he was a",
    "She went to the door and opened it",
    "The Secretary of the Treasury",
    "It was the best of times, it was the worst of times",
    "I do not know what you mean",
]
Answer = tuple[int, dict[str, str], dict[str, Any] | None]  # status, headers, body; without a body it is the server's


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, for those who have ALICE's key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"- name: alice\n  sha256: {hashlib.sha256(ALICE.encode()).hexdigest()}\n")
    yield from until_drained(Server("--kv-memory", "64MiB", "--api-key-file", str(keys)))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in LAMBADA's form."""
    file = tmp_path_factory.mktemp("lambada") / "words.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    return file


def run(*arguments: str) -> tuple[int, str, str]:
    """`eval` to its end: exit code, standard output and error."""
    ended = subprocess.run([COMMAND, "eval", *arguments, "--log-format", "text"], capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def started(*arguments: str) -> subprocess.Popen[str]:
    """`eval` once it has said how far it is."""
    process = subprocess.Popen([COMMAND, "eval", *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("eval: ")
    return process


def evaluated(out: Path, *arguments: str) -> dict[str, Any]:
    """The report of `eval`, which must go well."""
    code, _, err = run(*arguments, "--out", str(out))
    assert 0 == code, err
    report: dict[str, Any] = json.loads(out.read_text())
    assert not out.with_name(out.name + ".partial").exists()
    return report


def refused(*arguments: str) -> str:
    """What `eval` says, in a line, that ends with 2."""
    code, out, err = run(*arguments)
    assert (2, "", 1) == (code, out, err.count("\n")), err
    return err


def assert_same(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Two reports of the same data: counts and shares equal, losses within 1e-6 and what follows from them."""
    for part in ("version", "task", "protocol", "data", "skipped"):
        assert expected[part] == got[part]
    assert expected["figures"].keys() == got["figures"].keys()
    for name, value in expected["figures"].items():
        exact = isinstance(value, int) or name.startswith("accuracy") or value is None
        assert got["figures"][name] == (value if exact else pytest.approx(value, rel=1e-6, abs=1e-6)), name


class Between:
    """An HTTP server before another one, which asks `answer` of each request what to do with it."""

    def __init__(self, url: str, answer: Callable[[str, Any], Answer]) -> None:
        self.upstream, self.answer = url, answer
        between = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, found = between.answer(self.path, json.loads(body) if body else None)
                content = json.dumps(found).encode()
                if found is None:
                    asked = {"Content-Type": "application/json"}
                    theirs = httpx.request(
                        self.command, between.upstream + self.path, content=body, headers=asked, timeout=100
                    )
                    status, content = theirs.status_code, theirs.content
                with suppress(ConnectionError):  # who asked may have gone
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever)

    def __enter__(self) -> "Between":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def scores(body: Any) -> dict[str, Any]:
    """An answer of /v1/score, of any numbers."""
    return {"results": [{"logprob": -1.0, "is_greedy": False} for _ in body["items"]], "system_fingerprint": "fp_0"}


# The same numbers


@pytest.mark.parametrize("task", ["lambada", "text", "wikitext103"])
def test_through_the_server_the_numbers_are_the_same(
    demo_server: Server, words: Path, tmp_path: Path, task: str
) -> None:
    """Accuracy exactly and losses within 1e-6 of a run without a server, whose cache has room for a single window.

    The text has windows of 1,025 tokens, a context and one more.
    """
    asked = {
        "lambada": ["--data", str(words)],
        "text": [str(HELD_OUT)],
        "wikitext103": ["--data", str(HELD_OUT), "--stride", "700"],
    }[task]
    here = evaluated(tmp_path / "here.json", task, *asked, "--kv-memory", "64MiB", "--cpu-threads", "1")
    there = evaluated(tmp_path / "there.json", task, *asked, "--url", demo_server.url)
    assert_same(here, there)
    assert here["verdict"] == there["verdict"]
    assert {"name": "megatron-gpt2-demo", "url": demo_server.url}.items() <= there["model"].items()
    if task == "lambada":
        assert 0 < here["figures"]["correct"] < len(WORDS) == here["data"]["lines_scored"]
    else:
        assert here["figures"]["loss_interval"] is not None  # so there are several windows


@pytest.mark.parametrize("layers", [24, 12])
def test_only_a_server_of_the_papers_shape_is_compared(demo_server: Server, layers: int) -> None:
    """By what /v1/models says of its sizes."""
    model = {"id": "345m", "max_model_len": 1024, "num_layers": layers, "hidden_size": 1024, "num_heads": 16}

    def answer(path: str, body: Any) -> Answer:
        return 200, {}, {"data": [model | {"vocab_size": 50257}]} if path == "/v1/models" else None

    with (
        Between(demo_server.url, answer) as between,
        closing(ServerScorer(between.url, headers={}, tokenizer=DEMO)) as scorer,
    ):
        assert (layers == 24) == (scorer.incomparable is None)


def test_a_server_with_keys(keyed_server: Server, words: Path, tmp_path: Path) -> None:
    """`--header` has the key; without one, and with another, it ends before it scores, with what the server says."""
    url = ["--url", f"{keyed_server.url}/v1/"]  # as OpenAI's clients have it
    asked = ["lambada", "--data", str(words), "--out", str(tmp_path / "no.json")]
    for headers in ([], ["--header", "Authorization: Bearer mgpt-wrong"]):
        message = refused(*asked, *url, *headers)
        assert f"--url: {keyed_server.url}/tokenizer_info: HTTP 401: " in message
    assert "--header: must be NAME:VALUE, not 'x'" in refused(*asked, *url, "--header", "x")
    assert not list(tmp_path.iterdir())
    report = evaluated(
        tmp_path / "report.json", *asked[:-2], *url, "--header", f"authorization:Bearer {ALICE}", "--header", "X-A: b"
    )
    assert len(WORDS) == report["data"]["lines_scored"]
    assert ALICE not in json.dumps(report)


# A server that is away


def test_a_server_that_is_busy_is_waited_for(demo_server: Server, words: Path, tmp_path: Path) -> None:
    """503 and 429, with and without Retry-After, at the first question and at later ones; then all as if never."""
    refusals = [(503, {"Retry-After": "1"}), (503, {}), (429, {"Retry-After": "0"})]
    left = {"/tokenizer_info": refusals[:1], "/v1/score": refusals[1:]}
    seen = []

    def answer(path: str, body: Any) -> Answer:
        seen.append(path)
        if left.get(path):
            status, headers = left[path].pop()
            return status, headers, {"error": {"message": "not now"}}
        return 200, {}, None

    with Between(demo_server.url, answer) as between:
        there = evaluated(tmp_path / "busy.json", "lambada", "--data", str(words), "--url", between.url)
    assert {"/tokenizer_info": [], "/v1/score": []} == left
    assert 2 == seen.count("/tokenizer_info")
    undisturbed = evaluated(tmp_path / "free.json", "lambada", "--data", str(words), "--url", demo_server.url)
    assert_same(undisturbed, there)


def test_an_engine_that_is_killed_meanwhile(start: Start, tmp_path: Path) -> None:
    """What it worked on is a 500 and what comes then a 503; all is asked again, and the numbers are the same."""
    server = start("--kv-memory", "64MiB", "--device", "cpu")
    arguments = ["text", str(HELD_OUT), "--stride", "32", "--url", server.url]
    process = started(*arguments, "--out", str(tmp_path / "killed.json"))  # a window is scored, and others are open
    server.engine.kill()
    _, err = process.communicate()
    assert 0 == process.returncode, err
    killed = json.loads((tmp_path / "killed.json").read_text())
    undisturbed = evaluated(tmp_path / "report.json", *arguments)
    assert_same(undisturbed, killed)
    answered = [json.loads(line).get("figures", {}) for line in server.log]
    assert {200, 500} <= {figures.get("status") for figures in answered if figures.get("route") == "/v1/score"}


def test_a_run_that_is_interrupted_goes_on(demo_server: Server, tmp_path: Path) -> None:
    """Ctrl-C ends it at once, with 130, though the server still owes answers; the same command scores only the rest."""
    late, answers_all = threading.Event(), threading.Event()

    def answer(path: str, body: Any) -> Answer:
        is_first = path != "/v1/score" or len(body["items"][0]["context"]) == 1  # its first question, the first window
        if is_first or answers_all.is_set():
            return 200, {}, None
        late.wait(60)
        return 503, {}, {}

    out = tmp_path / "report.json"
    with Between(demo_server.url, answer) as between:
        arguments = ["text", str(HELD_OUT), "--url", between.url]
        process = started(*arguments, "--out", str(out))  # the first window is scored
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        late.set()
        assert 130 == process.returncode
        assert "the same command goes on from here" in err
        assert 2 == len(out.with_name("report.json.partial").read_text().splitlines())
        answers_all.set()
        resumed = evaluated(out, *arguments)
    assert 1 == resumed["items_scored_before"]
    whole = evaluated(tmp_path / "whole.json", *arguments[:2], "--url", demo_server.url)
    assert_same(whole, resumed)


def numbered(num_items: int) -> Iterator[tuple[int, Item]]:
    return ((number, Item((1, 2, 3), 1)) for number in range(num_items))


@contextmanager
def scorer_of(demo_server: Server, answer: Callable[[Any], tuple[int, Any]]) -> Iterator[ServerScorer]:
    """A scorer of a server that tokenizes as ours does, and gives `answer` to all but the first question."""
    asked = []

    def all_answers(path: str, body: Any) -> Answer:
        if path != "/v1/score":
            return 200, {}, None
        asked.append(body)
        status, found = answer(body) if len(asked) > 1 else (200, scores(body))
        return status, {}, found

    with Between(demo_server.url, all_answers) as between:
        scorer = ServerScorer(between.url, headers={}, tokenizer=DEMO)
        try:
            yield scorer
        finally:
            scorer.close()


def test_requests_grow_with_the_speed_of_the_server(demo_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one item to 32; no more at a time than are answered in some seconds, before a server gives up its queue."""
    sizes: list[int] = []
    one_at_a_time = threading.Lock()

    def answer(body: Any, seconds: float) -> tuple[int, Any]:
        sizes.append(len(body["items"]))
        with one_at_a_time:
            threading.Event().wait(seconds * len(body["items"]))
        return 200, scores(body)

    expected = [(number, Outcome(-1.0, False)) for number in range(300)]
    with scorer_of(demo_server, lambda body: answer(body, 0)) as scorer:
        assert expected == sorted(scorer.score(numbered(300)), key=lambda each: each[0])
    assert (1, 32) == (sizes[0], max(sizes))

    sizes.clear()
    monkeypatch.setattr(server_module, "_ANSWER_SECONDS", 0.25)
    with scorer_of(demo_server, lambda body: answer(body, 0.05)) as scorer:
        assert expected[:20] == sorted(scorer.score(numbered(20)), key=lambda each: each[0])
    assert max(sizes) <= 8  # one that does not queue may be answered at once, and doubled


def test_a_server_that_takes_few_items(start: Start, tmp_path: Path) -> None:
    """Requests become as small as it takes, and nothing is lost."""
    server = start("--kv-memory", "64MiB", "--max-choices", "5")
    lines = tmp_path / "lambada_test.jsonl"
    lines.write_text("".join(json.dumps({"text": f"My fellow citizens of {number}"}) + "\n" for number in range(60)))
    there = evaluated(tmp_path / "there.json", "lambada", "--data", str(lines), "--url", server.url)
    assert_same(evaluated(tmp_path / "here.json", "lambada", "--data", str(lines)), there)


# No server of ours


@pytest.mark.parametrize(
    ("status", "change", "message"),
    [
        (200, {"system_fingerprint": "fp_1"}, "the model is another than at the beginning"),
        (200, {"results": []}, "v1/score: an answer that cannot be"),
        (400, {"error": {"message": "no\nsuch thing"}}, "v1/score: HTTP 400: no\nsuch thing"),
    ],
)
def test_answers_that_change(demo_server: Server, status: int, change: dict[str, Any], message: str) -> None:
    """Another model behind the same URL, an answer of another form and a refusal end it, with all that was open."""
    with (
        scorer_of(demo_server, lambda body: (status, scores(body) | change)) as scorer,
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        list(scorer.score(numbered(20)))


def test_urls_that_are_no_server_of_ours(words: Path, tmp_path: Path) -> None:
    """Each ends it with 2, in a line that names --url, at once and with no file left behind."""
    asked = ["lambada", "--data", str(words), "--out", str(tmp_path / "no.json")]
    answers: Sequence[tuple[int, Any, str]] = (
        (404, {"detail": "Not Found"}, "tokenizer_info: HTTP 404: "),
        (200, ["a list"], "is no server of ours: its answer is no JSON object"),
        (200, {"object": "list", "data": []}, "is no server of ours: its answers lack "),
        (500, {"error": {"message": "broken"}}, "tokenizer_info: HTTP 500: broken"),
    )
    for status, body, message in answers:
        with Between("", lambda *_, status=status, body=body: (status, {}, body)) as between:  # type: ignore[misc]
            url = between.url
            error = refused(*asked, "--url", url)
        assert f"--url: {url}" in error
        assert message in error
    for wrong in (url, "127.0.0.1:8000", "ftp://127.0.0.1", "http://[::1", ""):  # the first listens no more
        assert "--url" in refused(*asked, "--url", wrong)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_vocabulary(demo_server: Server, words: Path, tmp_path: Path) -> None:
    """Refused by name, also where only an order of merges differs; so is a folder without one."""
    asked = ["lambada", "--data", str(words), "--url", demo_server.url, "--tokenizer"]
    for name in ("merges", "ids"):
        (tmp_path / name).mkdir()
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(DEMO / file, tmp_path / name)
    merges = (DEMO / "merges.txt").read_text().splitlines(keepends=True)
    (tmp_path / "merges" / "merges.txt").write_text("".join(merges[:1] + merges[:200:-1] + merges[1:201]))
    ids = json.loads((DEMO / "vocab.json").read_text())
    swapped = ids | {"Ġthe": ids["Ġof"], "Ġof": ids["Ġthe"], "Ġcat": ids["ĠDog"], "ĠDog": ids["Ġcat"]}
    (tmp_path / "ids" / "vocab.json").write_text(json.dumps(swapped))
    for name in ("merges", "ids"):
        assert f"--tokenizer: {tmp_path / name}: gives other ids" in refused(*asked, str(tmp_path / name))
    assert "--tokenizer: " in refused(*asked, str(tmp_path / "none"))
    assert "--tokenizer: goes with --url only" in refused("lambada", "--data", str(words), *asked[-1:], str(DEMO))
