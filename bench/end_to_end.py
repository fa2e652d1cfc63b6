"""The whole service on this machine's device: starts it, checks its answers, kills its engine, drains it.

python -m bench.end_to_end [--model FOLDER | --random-345m] [--out FILE] [-- flags of `megatron-gpt2 serve`]
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.random_model import write_random_model
from bench.served import Service
from service.serve import DEMO_MODEL
from service.version import VERSION

PROMPT = "Plants create energy through a process known as photosynthesis."


class Progress(dict[str, Any]):
    """Results, shown on standard error as they come."""

    def __setitem__(self, name: str, value: Any) -> None:
        print(f"{name}: {value}", file=sys.stderr, flush=True)
        super().__setitem__(name, value)


async def plain(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text}")
    return dict(answer.json())


async def streamed(client: httpx.AsyncClient, **body: Any) -> tuple[str, float]:
    """The joined text, and the seconds to the first chunk."""
    began, first, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                text += json.loads(line[6:])["choices"][0]["text"]
    return text, first


async def closed_loop(client: httpx.AsyncClient, num_streams: int, num_tokens: int) -> float:
    """Tokens/s of `num_streams` streams of 128 tokens in and `num_tokens` out, started together."""
    began = time.perf_counter()
    bodies = [
        {"prompt": [(7 * i + j) % 50000 for j in range(128)], "max_tokens": num_tokens, "ignore_eos": True, "seed": i}
        for i in range(num_streams)
    ]
    await asyncio.gather(*(streamed(client, **body) for body in bodies))
    return num_streams * num_tokens / (time.perf_counter() - began)


async def run(service: Service, stream_counts: list[int]) -> dict[str, Any]:
    result = Progress()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:
        await service.ready(client)
        result["start_to_ready_seconds"] = round(time.perf_counter() - service.began, 2)
        greedy = {"prompt": PROMPT, "max_tokens": 38, "temperature": 0}
        first = await plain(client, **greedy)
        text, _ = await streamed(client, **greedy)
        result["text"] = first["choices"][0]["text"]
        result["stream_equals_plain"] = text == result["text"]
        result["first_chunk_ms"] = round(1000 * min([(await streamed(client, **greedy))[1] for _ in range(5)]), 2)
        many = await asyncio.gather(*(plain(client, **greedy, n=1 + i % 3) for i in range(64)))
        texts = [choice["text"] for answer in many for choice in answer["choices"]]
        result["of_64_requests_equal_to_alone"] = f"{texts.count(result['text'])} of {len(texts)} choices"
        bodies = [{"prompt": f"Seed {i}:", "max_tokens": 40, "seed": i, "top_p": 0.9} for i in range(32)]
        alone = [(await plain(client, **body))["choices"][0]["text"] for body in bodies]
        crowd = [
            (answer["choices"][0]["text"]) for answer in await asyncio.gather(*(plain(client, **b) for b in bodies))
        ]
        result["seeded_equal_to_alone"] = f"{sum(a == b for a, b in zip(alone, crowd, strict=True))} of {len(bodies)}"
        for num_streams in stream_counts:
            await closed_loop(client, num_streams, 16)
            result[f"tokens_per_second_{num_streams}_streams"] = round(await closed_loop(client, num_streams, 128), 1)
        victim = asyncio.ensure_future(
            client.post("/v1/completions", json=greedy | {"max_tokens": 900, "ignore_eos": True})
        )
        await asyncio.sleep(0.3)
        os.kill(service.processes()["engine"].pid, signal.SIGKILL)
        answer = await victim
        result["open_request_when_engine_killed"] = [answer.status_code, answer.json()["error"]["message"]]
        result["readiness_after_kill"] = (await client.get("/readyz")).status_code
        result["restart_seconds"] = round(await service.ready(client), 2)
        result["text_after_restart_equal"] = (await plain(client, **greedy))["choices"][0]["text"] == result["text"]
        last = asyncio.ensure_future(streamed(client, **greedy | {"max_tokens": 300, "ignore_eos": True}))
        await asyncio.sleep(0.1)
        service.process.send_signal(signal.SIGTERM)
        result["stream_finished_while_draining"] = bool((await last)[0])
    result["exit_code"] = service.process.wait(timeout=30)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--random-345m", action="store_true")
    parser.add_argument("--streams", default="1,8,64,256" if torch.cuda.is_available() else "1,8")
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "version": VERSION,
        "date": time.strftime("%Y-%m-%d"),
        "model": "random 345M" if arguments.random_345m else arguments.model.name,
        "flags": arguments.flags,
    }
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random_model(Path(scratch)) if arguments.random_345m else arguments.model
        service = Service(model, arguments.flags)
        try:
            result = about | asyncio.run(run(service, list(map(int, arguments.streams.split(",")))))
        finally:
            service.process.kill()
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
