"""The application on a real port of 127.0.0.1, over a fake engine behind a real socket pair."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.routing import Route

import service.demo
from service.api.access import Access, AccessConfig
from service.api.app import create_app
from service.api.metrics import Metrics
from service.api.protocol import HttpLimits, protocol_within
from service.api.text import Tokenizer, load_tokenizer
from service.engine.backlog import QueueLimits
from service.engine.client import EngineClient
from tests.api.fake_engine import FakeEngine

DEMO = Path(service.demo.__file__).parent / "model"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO, end_of_text_id=50256)


@dataclass
class Service:
    """A running service. `http` speaks to it; `engine` is the one attached last."""

    engine: FakeEngine
    client: EngineClient
    http: httpx.AsyncClient
    url: str
    tokenizer: Tokenizer
    app: Any
    extra_engines: list[FakeEngine] = field(default_factory=list)

    async def complete(self, **body: Any) -> dict[str, Any]:
        response = await self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def routes(self) -> list[Route]:
        """Every route of the application, those of included routers too."""

        def walk(routes: Iterable[Any]) -> Iterator[Route]:
            for route in routes:
                if isinstance(route, Route):
                    yield route
                else:
                    yield from walk(route.original_router.routes)

        return list(walk(self.app.routes))

    async def restart(self) -> FakeEngine:
        """Attach a new engine, which is not ready yet."""
        self.engine = FakeEngine()
        self.extra_engines.append(self.engine)
        await self.engine.start()
        self.client.attach(self.engine.api_end)
        return self.engine

    async def wait_metric(self, name: str, value: float) -> None:
        """Return once the metric without labels `name` has reached `value`."""
        async with asyncio.timeout(5):
            while True:
                lines = (await self.http.get("/metrics")).text.splitlines()
                if any(float(line.split()[1]) >= value for line in lines if line.startswith(f"{name} ")):
                    return

    async def wait_phase(self, phase: str) -> None:
        async with asyncio.timeout(5):
            while (await self.http.get("/readyz")).json()["phase"] != phase:
                pass


Start = Callable[..., Any]


@pytest.fixture
async def start(tokenizer: Tokenizer) -> AsyncIterator[Start]:
    """Start a service; `ready=False` leaves it loading, `limits` are the protocol's, two are the metrics'.

    The rest goes to create_app.
    """
    stops = []

    async def start_service(
        *,
        ready: bool = True,
        queue: QueueLimits | None = None,
        limits: HttpLimits | None = None,
        by_client: bool = False,
        vllm_model_name: str | None = None,
        **arguments: Any,
    ) -> Service:
        engine = FakeEngine()
        await engine.start()
        client = EngineClient(api_number=0, stall_seconds=60, queue=queue or QueueLimits(), on_stall=lambda _: None)
        defaults: dict[str, Any] = {
            "model_names": ["demo", "org/alias"],
            "max_body_bytes": 8 * 2**20,
            "max_choices": 1024,
            "stream_keep_alive_seconds": 15.0,
            "version": "1.2.3",
            "load_tokenizer": lambda _: tokenizer,
            "access": Access(AccessConfig()),
        }
        metrics = Metrics(client, version="1.2.3", by_client=by_client, vllm_model_name=vllm_model_name)
        app = create_app(client=client, metrics=metrics, **(defaults | arguments))
        client.attach(engine.api_end)
        config = uvicorn.Config(
            app,
            http=protocol_within(limits or HttpLimits(), on_refused=metrics.refused),
            log_config=None,
            lifespan="off",
            access_log=False,
            ws="none",
            proxy_headers=False,
        )
        server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it each answer waits 40 ms for an ACK
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])  # without the main loop, which ticks ten times a second
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = httpx.AsyncClient(
            base_url=url,
            timeout=20,
            verify=False,
            limits=httpx.Limits(max_connections=200),
        )
        running = Service(engine, client, http, url, tokenizer, app)

        async def stop() -> None:
            await http.aclose()
            for listening in server.servers:
                listening.close()
            for connection in list(server.server_state.connections):
                connection.shutdown()
            async with asyncio.timeout(5):  # a request's task that outlives its client is a fault
                await asyncio.gather(*server.server_state.tasks)
            for each in (engine, *running.extra_engines):
                await each.die()
            await client.close()

        stops.append(stop)
        if ready:
            engine.ready()
            await running.wait_phase("ready")
        return running

    yield start_service
    for stop in stops:
        await stop()


@pytest.fixture
async def api(start: Start) -> Service:
    running: Service = await start()
    return running
