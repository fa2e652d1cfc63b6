"""guidellm: a short benchmark over the service, in which every request succeeds and every token is counted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.clients.conftest import DEMO, Server

_GUIDELLM = Path(sys.executable).with_name("guidellm")


def test_a_benchmark_runs(server: Server, tmp_path: Path) -> None:
    """It checks /health, takes the first of /v1/models, streams with both usage options, and sends ignore_eos."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            _GUIDELLM,
            "run",
            "--backend",
            f"kind=openai_http,target={server.url},request_format=/v1/completions",
            "--tokenizer",
            f"kind=huggingface_auto,model={DEMO}",
            "--profile",
            "kind=concurrent,streams=4",
            "--constraint",
            "kind=max_requests,count=12",
            "--data",
            "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--output",
            f"kind=json,path={report}",
            "--disable-console",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, list[dict[str, Any]]] = benchmark["requests"]
    assert (12, [], []) == (len(requests["successful"]), requests["errored"], requests["incomplete"])
    assert [16] * 12 == [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
