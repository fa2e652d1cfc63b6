"""Health, readiness, models, version: before, while and after the engine is ready."""

import asyncio

import httpx

from service.api.text import Tokenizer
from service.checkpoint.errors import CheckpointError
from service.engine.request import ModelInfo
from tests.api.conftest import Service, Start


async def statuses(api: Service) -> dict[str, int]:
    paths = ["/livez", "/readyz", "/health", "/ping", "/metrics", "/version", "/docs", "/openapi.json", "/v1/models"]
    return {path: (await api.http.get(path)).status_code for path in paths}


async def test_while_loading(start: Start) -> None:
    """Liveness, metrics, version and docs are 200; readiness tells the progress; the rest is 503 with Retry-After."""
    api: Service = await start(ready=False)
    api.engine.progress("load", 0.5)
    await api.wait_phase("load")
    not_ready = {"/readyz": 503, "/health": 503, "/ping": 503, "/v1/models": 503}
    assert not_ready == {path: status for path, status in (await statuses(api)).items() if status != 200}
    readiness = await api.http.get("/readyz")
    assert {"status": "unavailable", "phase": "load", "progress": 0.5} == readiness.json()
    for stream in (False, True):
        response = await api.http.post("/v1/completions", json={"stream": stream})
        assert (503, "service_unavailable") == (response.status_code, response.json()["error"]["code"])
        assert "load" in response.json()["error"]["message"]
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert 1 <= int(readiness.headers["retry-after"]) <= 60


async def test_ready(api: Service) -> None:
    """Everything answers."""
    assert {200} == set((await statuses(api)).values())
    expected = {"status": "ok", "phase": "ready", "progress": 1.0}
    assert expected == (await api.http.get("/readyz")).json()
    assert {"version": "1.2.3"} == (await api.http.get("/version")).json()


async def test_readiness_waits_for_the_tokenizer(start: Start, tokenizer: Tokenizer) -> None:
    """It is loaded once, off the event loop, from what the engine said; a restart does not load it again."""
    asked: list[ModelInfo] = []
    loop = asyncio.get_running_loop()
    loaded = asyncio.Event()

    def load(model: ModelInfo) -> Tokenizer:
        asked.append(model)
        asyncio.run_coroutine_threadsafe(loaded.wait(), loop).result(5)
        return tokenizer

    api: Service = await start(ready=False, load_tokenizer=load)
    api.engine.progress("warmup", 0.9)
    await api.wait_phase("warmup")
    api.engine.ready()
    while not asked:
        assert 503 == (await api.http.get("/readyz")).status_code
    assert 503 == (await api.http.post("/v1/completions", json={})).status_code
    loaded.set()
    await api.wait_phase("ready")
    await api.complete(prompt="x")
    await api.engine.die()
    (await api.restart()).ready()
    await api.wait_phase("ready")
    await api.complete(prompt="x")
    assert ["demo"] == [model.folder for model in asked]


async def test_without_a_tokenizer_the_service_fails(start: Start) -> None:
    """Liveness goes false: only a new process, with other files, can help."""

    def load(_: ModelInfo) -> Tokenizer:
        raise CheckpointError("vocab.json: has 1 tokens")

    api: Service = await start(ready=False, load_tokenizer=load)
    api.engine.ready()
    await api.wait_phase("failed")
    assert 503 == (await api.http.get("/livez")).status_code
    assert 503 == (await api.http.get("/readyz")).status_code
    response: httpx.Response = await api.http.post("/v1/completions", json={})
    assert (503, "60") == (response.status_code, response.headers["retry-after"])


async def test_draining(api: Service) -> None:
    """Running requests end well, new ones are refused, readiness is false and liveness true."""
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.complete(prompt="x"))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    api.client.drain()
    response = await api.http.post("/v1/completions", json={})
    assert (503, "1") == (response.status_code, response.headers["retry-after"])
    readiness = await api.http.get("/readyz")
    assert (503, "drain") == (readiness.status_code, readiness.json()["phase"])
    assert 200 == (await api.http.get("/livez")).status_code
    assert "megatron_gpt2_draining 1.0" in (await api.http.get("/metrics")).text
    api.engine.gate.set()
    assert 16 == (await running)["usage"]["completion_tokens"]


async def test_models(api: Service) -> None:
    """Every served name, also one with a slash, and the model's sizes; another is a 404."""
    listed = (await api.http.get("/v1/models")).json()
    assert "list" == listed["object"]
    assert ["demo", "org/alias"] == [model["id"] for model in listed["data"]]
    for model in listed["data"]:
        sizes = {"max_model_len": 1024, "num_layers": 6, "hidden_size": 192, "num_heads": 6, "vocab_size": 50257}
        assert {"id", "object", "created", "owned_by", *sizes} == model.keys()
        assert {"object": "model", **sizes} == {name: model[name] for name in ("object", *sizes)}
        assert model == (await api.http.get(f"/v1/models/{model['id']}")).json()
    missing = await api.http.get("/v1/models/org/other")
    assert (404, "model_not_found") == (missing.status_code, missing.json()["error"]["code"])
