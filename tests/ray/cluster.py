"""A Ray cluster on this machine, whose nodes can be lost, and the service on it as `serve run` deploys it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from service.ray_serve import PROXY_CALLBACK, build
from tests.service.server import survivors

APPLICATION = "default"
_STORE_BYTES = 80 * 2**20  # Ray takes no less than 75 MiB
_GONE_SECONDS = 20.0
_CALLBACK = "service.ray_proxy:middlewares"


class RayCluster:
    """A head node and one worker node, of one CPU each, so that each has room for one replica."""

    def __init__(self, *, port: int, worker_port: int, retries: bool = True) -> None:
        """The proxies' ports; with `retries` they have the service's middleware."""
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's own is too long for Ray's sockets
        self._environment = {
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(worker_port),
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
            **({PROXY_CALLBACK: _CALLBACK} if retries else {}),
        }
        self.url = f"http://127.0.0.1:{port}"
        self.worker_url = f"http://127.0.0.1:{worker_port}"
        self._seen: set[psutil.Process] = set()
        with self._as_environment():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={**self._node(), "include_dashboard": False},
            )
            self.worker = self.add_worker()
            ray.init(address=self._cluster.address, log_to_driver=False)
            serve.start(http_options={"host": "127.0.0.1", "port": port})

    @staticmethod
    def _node() -> dict[str, Any]:
        return {"num_cpus": 1, "num_gpus": 0, "object_store_memory": _STORE_BYTES}

    @contextmanager
    def _as_environment(self) -> Iterator[None]:
        """What Ray's processes inherit when they are started."""
        before = dict(os.environ)
        os.environ.pop(PROXY_CALLBACK, None)
        os.environ.update(self._environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def add_worker(self) -> Node:
        with self._as_environment():
            self.worker = self._cluster.add_node(**self._node())
        return self.worker

    def deploy(self, *, wait: bool = True, **arguments: Any) -> None:
        """The demo model; returns when all replicas are there, or at once."""
        given = {"device": "cpu", "kv_memory": "64MiB", "stall_seconds": 5, **arguments}
        serve._run(build(given), name=APPLICATION, _blocking=wait)

    @property
    def states(self) -> dict[str, int]:
        """How many replicas there are by state: RUNNING, STOPPING and so on."""
        application = serve.status().applications[APPLICATION]
        (deployment,) = application.deployments.values()
        return {str(state): number for state, number in deployment.replica_states.items() if number}

    @property
    def num_ongoing(self) -> list[int]:
        """The requests that each replica works on."""
        names = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == "serve"]
        replicas = [ray.get_actor(name, namespace="serve") for name in names if name.startswith("SERVE_REPLICA::")]
        numbers: list[int] = ray.get([replica.get_num_ongoing_requests.remote() for replica in replicas])
        return numbers

    def node_processes(self, node: Node) -> list[psutil.Process]:
        """The node's daemon, and everything below it."""
        (info,) = node.all_processes["raylet"]
        raylet = psutil.Process(info.process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        self._seen.update(processes)
        return processes

    @property
    def replicas(self) -> list[psutil.Process]:
        """On all nodes that are there."""
        nodes = (self._cluster.head_node, *self._cluster.worker_nodes)
        return [
            process
            for node in nodes
            for process in self.node_processes(node)
            if any("ServeReplica" in word for word in process.cmdline())
        ]

    @property
    def engines(self) -> list[psutil.Process]:
        """That of each replica."""
        return [
            child
            for replica in self.replicas
            for child in replica.children()
            if any("spawn_main" in word for word in child.cmdline())
        ]

    def lose_worker(self) -> None:
        """The worker node, all of it at once and without a word, as when its power goes."""
        processes = self.node_processes(self.worker)
        for process in processes:
            process.suspend()
        for process in processes:
            process.kill()
        assert not survivors(processes, seconds=_GONE_SECONDS)
        self._cluster.worker_nodes.discard(self.worker)

    def close(self) -> None:
        """Nothing of it is left afterwards."""
        for node in (self._cluster.head_node, *self._cluster.worker_nodes):
            self.node_processes(node)
        serve.shutdown()
        ray.shutdown()
        with self._as_environment():  # it removes its note of the address, which is in that folder
            self._cluster.shutdown()
        left = survivors(list(self._seen), seconds=_GONE_SECONDS)
        for process in left:
            process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        assert not left, left
