"""Takes OTLP over HTTP, answers 200 and nothing else, and tells afterwards what arrived.

A process of its own, so that what it takes is not counted with anything that is measured:
`python -m benchmarks.collector` writes its port, and answers `GET /` with one JSON line for each request that it
got: its monotonic time of arrival, the length of its body, and id and name of each span.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Arrival(NamedTuple):
    """One request. `at` is on the clock of `time.monotonic`, which all processes of a machine share."""

    at: float
    size: int
    spans: list[tuple[str, str]]


class Client:
    """What the benchmark sees of the collector."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port

    def arrivals(self) -> list[Arrival]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", "/")
            lines = connection.getresponse().read().splitlines()
        finally:
            connection.close()
        return [Arrival(at, size, [(span, name) for span, name in spans]) for at, size, spans in map(json.loads, lines)]


@contextmanager
def collector() -> Iterator[Client]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.collector"], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE,
    )
    assert process.stdout is not None, "it was asked for"
    try:
        yield Client(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bodies: list[tuple[float, bytes]]

    def do_POST(self) -> None:
        # Decoding waits until somebody asks: a collector that is slow is not what is measured.
        self.bodies.append((time.monotonic(), self.rfile.read(int(self.headers["content-length"]))))
        self._reply(b"")

    def do_GET(self) -> None:
        lines = [json.dumps([at, len(body), _spans(body)]) for at, body in self.bodies]
        self._reply("\n".join(lines).encode())

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def _spans(body: bytes) -> list[tuple[str, str]]:
    request = ExportTraceServiceRequest.FromString(body)
    return [(span.span_id.hex(), span.name)
            for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def main() -> None:
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bodies": []}))
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
