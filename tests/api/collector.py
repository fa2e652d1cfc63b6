"""A collector of traces on a real port, and what a span that arrives says."""

import asyncio
import gzip
import http.server
import queue
import threading
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """An OTLP/HTTP receiver on a real port. While `gate` is clear it reads, and does not answer."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.headers: list[dict[str, str]] = []
        self.resource: dict[str, Any] = {}
        self._spans: queue.Queue[Span] = queue.Queue()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.gate.wait()
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                collector.headers.append(dict(self.headers))
                for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resource = {item.key: value_of(item.value) for item in of_resource.resource.attributes}
                    for scope in of_resource.scope_spans:
                        for span in scope.spans:
                            collector._spans.put(span)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.endpoint = f"{self.url}/v1/traces"

    async def span(self) -> Span:
        """The next one that arrives."""
        return await asyncio.to_thread(self._spans.get, timeout=10)

    def left(self) -> list[Span]:
        """Those that have arrived and were not taken."""
        return [self._spans.get() for _ in range(self._spans.qsize())]

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))


def attributes(span: Span) -> dict[str, Any]:
    return {item.key: value_of(item.value) for item in span.attributes}
