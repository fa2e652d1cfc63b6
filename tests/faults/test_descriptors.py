"""File descriptors: used up, what is open goes on, and what comes later is answered when others have left."""

import contextlib
import json
import resource

import httpx
import psutil
import pytest

from tests.faults.conftest import Watching
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Connect, Server, Start, eventually

_SPARE = 8  # descriptors that the API process may still open
_CROWD = 60


@pytest.mark.parametrize("engine_dies", [False, True], ids=["alone", "with an engine that is killed"])
async def test_descriptors_that_are_used_up(
    shared_server: Server, connect: Connect, watching: Watching, engine_dies: bool
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
                for _ in range(_CROWD):
                    connection = crowd.enter_context(shared_server.open_connection())
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


def test_few_descriptors_are_said_and_bound_the_connections(start: Start, scripted_model: ScriptedModel) -> None:
    """The soft limit is raised as far as it goes; what that is too few for is told in one line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        server = start(str(scripted_model.folder), "--max-connections", str(hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (hard, hard) == server.api.rlimit(psutil.RLIMIT_NOFILE)
    (line,) = (json.loads(line)["message"] for line in server.log if "max_connections" in line)
    assert f"max_connections: {hard - 128} instead of {hard}, as {hard} files may be open" == line
