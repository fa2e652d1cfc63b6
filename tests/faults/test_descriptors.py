"""File descriptors used up: what is open goes on, and what comes later is answered when others have left."""

import contextlib
import socket
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.faults.conftest import Watching
from tests.service.server import Client, Server, eventually

_SPARE = 8  # descriptors that the API process may still open
_CROWD = 60


@pytest.mark.parametrize("engine_dies", [False, True], ids=["alone", "with an engine that is killed"])
async def test_descriptors_that_are_used_up(
    shared_server: Server, connect: Callable[[Server], Client], watching: Watching, engine_dies: bool
) -> None:
    """Streams under way are answered whole; a crowd of connections is not, but the process lives and gets over it."""
    api = shared_server.api
    limits = api.rlimit(psutil.RLIMIT_NOFILE)
    async with watching(shared_server) as watch:
        restarts = await watch.client.metric("engine_restarts_total")
        beside = [watch.ask(stream=True), watch.ask(n=2)]
        await watch.client.wait_metric("requests_running", 3)
        api.rlimit(psutil.RLIMIT_NOFILE, (api.num_fds() + _SPARE, limits[1]))
        with contextlib.ExitStack() as crowd:
            try:
                address = ("127.0.0.1", int(shared_server.url.rpartition(":")[2]))
                for _ in range(_CROWD):
                    connection = crowd.enter_context(socket.create_connection(address))
                    connection.settimeout(20)
                    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                if engine_dies:
                    shared_server.engine.kill()
                    await watch.client.wait_metric("engine_restarts_total", restarts + 1)
                else:
                    for request in beside:
                        assert (await request).whole
                assert await watch.client.status("/livez") == 200
            finally:
                crowd.close()
                api.rlimit(psutil.RLIMIT_NOFILE, limits)
        newcomer = connect(shared_server)

        async def is_answered() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return await newcomer.status("/readyz") == 200
            return False

        await eventually(is_answered, seconds=60)
        await newcomer.http.aclose()
