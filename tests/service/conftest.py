"""Servers and clients of them. A server that a test does not break is shared by the session."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import service.demo
from service.api.text import Tokenizer, load_tokenizer
from tests.service.scripted_model import ScriptedModel, write_scripted_model
from tests.service.server import Client, Connect, Server, Start, until_drained

DEMO = Path(service.demo.__file__).parent / "model"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The servers need the other cores; threads that wait for a busy core make a step of milliseconds take seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO, end_of_text_id=50256)


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> ScriptedModel:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"), tokenizer, DEMO)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Server]:
    """The demo model in fp32, with blocks for a single full context, so that a crowd runs out of them."""
    yield from until_drained(Server("--kv-memory", "12MiB"))


@pytest.fixture(scope="session")
def scripted_server(scripted_model: ScriptedModel) -> Iterator[Server]:
    """The scripted model; two sequences at a time, so that others wait; little patience with a silent engine."""
    yield from until_drained(Server(str(scripted_model.folder), "--max-num-seqs", "2", "--stall-seconds", "2"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server for one test, which may break it: what is left of it is killed."""
    servers: list[Server] = []

    def start_server(*arguments: str, ready: bool = True, **options: Any) -> Server:
        server = Server(*arguments, **options)
        servers.append(server)
        if ready:
            server.wait_ready()
            assert server.engines
        return server

    yield start_server
    for server in servers:
        server.kill()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """A client of a server."""
    clients: list[Client] = []

    def make(server: Server) -> Client:
        clients.append(Client(server.url, verify=server.verify))
        return clients[-1]

    yield make
    for client in clients:
        await client.http.aclose()


@pytest.fixture
def demo(demo_server: Server, connect: Connect) -> Client:
    return connect(demo_server)


@pytest.fixture
async def scripted(scripted_server: Server, connect: Connect) -> Client:
    """A client of the scripted server, which may first have to get over what the test before did to it."""
    client = connect(scripted_server)
    await client.wait_status("/readyz", 200)
    return client
