"""Takes nothing, gives the export tests an outbox in memory, and collectors that decode OTLP and misbehave on order."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from coding_agent_exporter.export.delivery import Counts, Delivery
from coding_agent_exporter.export.otlp_grpc import GrpcTransport
from coding_agent_exporter.export.otlp_http import HttpTransport
from coding_agent_exporter.export.target import Target
from coding_agent_exporter.export.wire import Encoder
from coding_agent_exporter.spanmodel import Span, SpanEvent, SpanLink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PROTOBUF = "application/x-protobuf"


def span(number: int, **changes: Any) -> Span:
    """A finished span with ids made from `number` (from 1 up)."""
    values: dict[str, Any] = {
        "trace": f"{number:032x}", "span": f"{number:016x}", "parent": "", "name": f"chat {number}", "kind": "client",
        "start": 1_700_000_000_000_000_000 + number, "end": 1_700_000_001_000_000_000 + number,
        "attributes": {"number": number}}
    return Span(**{**values, **changes})


def full_span() -> Span:
    """A span with everything a span can have."""
    return span(7, parent=f"{6:016x}", error="overloaded", kind="internal",
                attributes={"text": "höchst", "count": -3, "cost": 0.25, "flag": True, "list": ["a", "b"]},
                events=[SpanEvent("compaction", 1_700_000_000_500_000_000, {"tokens": 12})],
                links=[SpanLink(f"{5:032x}", f"{5:016x}")])


class MemoryOutbox:
    """An outbox that remembers what became of each span."""

    def __init__(self, spans: Sequence[Span] = ()) -> None:
        self.rows = dict(enumerate(spans, 1))
        self.dropped: list[tuple[int, str]] = []
        self.failure: Exception | None = None
        self._next = len(self.rows) + 1

    def add(self, *spans: Span) -> None:
        for new in spans:
            self.rows[self._next] = new
            self._next += 1

    def take(self, limit: int) -> list[tuple[int, Span]]:
        if self.failure:
            raise self.failure
        return list(self.rows.items())[:limit]

    def done(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.rows[number]

    def drop(self, numbers: Sequence[int], reason: str) -> None:
        self.done(numbers)
        self.dropped += [(number, reason) for number in numbers]

    def size(self) -> int:
        return len(self.rows)


@dataclass
class Reply:
    """How a collector answers one request. `store` decides whether it keeps the spans."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = PROTOBUF
    rejected: int = 0
    message: str = ""
    store: bool | None = None
    reset: bool = False
    hang: bool = False
    late: bool = False
    drip: bool = False
    cut_body: bool = False
    cut_headers: bool = False
    code: grpc.StatusCode | None = None
    retry_delay: float | None = None

    @property
    def stores(self) -> bool:
        if self.store is not None:
            return self.store
        return self.status == 200 and self.code is None and not (self.reset or self.hang or self.drip)


class Receiver:
    """What both collectors have: `replies` are used up one by one, then `rule` answers."""

    url = ""
    """Of the HTTP collector."""
    address = ""
    """Of the gRPC collector."""

    def __init__(self) -> None:
        self.clients: list[HttpTransport | GrpcTransport] = []
        self.replies: list[Reply] = []
        self.rule: Callable[[list[Any]], Reply] = lambda spans: Reply()
        self.spans: list[Any] = []
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.raw: list[bytes] = []
        self.connections = 0
        self.release = threading.Event()
        self.arrived = threading.Condition()

    @property
    def numbers(self) -> list[int]:
        """The stored spans by the number in their ids."""
        return [int.from_bytes(stored.span_id, "big") for stored in self.spans]

    def receive(self, body: bytes, headers: dict[str, str], raw: bytes) -> Reply:
        request, found, offered = self.decode(body)
        with self.arrived:
            reply = self.replies.pop(0) if self.replies else self.rule(offered)
            self.requests.append(request)
            self.headers.append(headers)
            self.raw.append(raw)
            if reply.stores:
                self.spans += found
            self.arrived.notify_all()
        return reply

    def decode(self, body: bytes) -> tuple[Any, list[Any], list[Any]]:
        """The request, what it would have stored, and what `rule` is given."""
        request = ExportTraceServiceRequest.FromString(body)
        scopes = [scope for resource in request.resource_spans for scope in resource.scope_spans]
        spans = [found for scope in scopes for found in scope.spans]
        return request, spans, spans

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, 20), "did not come true"

    def close(self) -> None:
        """Let go who hangs here, and disconnect the clients that were made for this collector."""
        self.release.set()
        for client in self.clients:
            client.close()

    @staticmethod
    def response(reply: Reply) -> bytes:
        return ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(
            rejected_spans=reply.rejected, error_message=reply.message)).SerializeToString()


class HttpReceiver(Receiver):
    """A collector that speaks http/protobuf."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    receiver: HttpReceiver

    def setup(self) -> None:
        self.receiver.connections += 1
        super().setup()

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(raw) if self.headers["content-encoding"] == "gzip" else raw
        headers = {name.lower(): value for name, value in self.headers.items()} | {":path": self.path}
        reply = self.receiver.receive(body, headers, raw)
        if reply.hang or reply.reset:
            if reply.hang:
                self.receiver.release.wait(60)
            self._reset()
            return
        if reply.late:
            self.receiver.release.wait(60)
        if reply.drip:
            self._drip()
            return
        if reply.cut_headers:
            self.connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-")
            self.close_connection = True
            return
        content = reply.body if reply.body is not None else Receiver.response(reply) if reply.status == 200 else b""
        self.send_response(reply.status)
        for name, value in {"content-type": reply.content_type, **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content) + (50 if reply.cut_body else 0)))
        self.end_headers()
        self.wfile.write(content)
        if reply.cut_body:
            self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        # Lingering for zero seconds: the client sees a reset, not an end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def _drip(self) -> None:
        """A header that grows for ever, a byte at a time: no single read ever times out."""
        self.close_connection = True
        try:
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not self.receiver.release.wait(0.01):
                self.connection.sendall(b"y")
        except OSError:
            return

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            return

    def log_message(self, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, or does not trust us, is what these tests are about."""


@contextmanager
def http_receiver(*, port: int = 0, tls: ssl.SSLContext | None = None,
                  receiver: HttpReceiver | None = None) -> Iterator[HttpReceiver]:
    """A collector on loopback. With `receiver`, one that was seen before: it comes back at `port`."""
    receiver = receiver or HttpReceiver()
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"receiver": receiver}))
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.close()
        server.shutdown()
        server.server_close()
        thread.join()


class GrpcReceiver(Receiver):
    """A collector that speaks gRPC."""

    def export(self, body: bytes, context: Any) -> bytes:
        reply = self.receive(body, dict(context.invocation_metadata()), body)
        if reply.hang:
            self.release.wait(60)
        if reply.code is None:
            return reply.body if reply.body is not None else self.response(reply)
        if reply.retry_delay is not None:
            delay = Duration(seconds=int(reply.retry_delay), nanos=int(reply.retry_delay % 1 * 1e9))
            info = RetryInfo(retry_delay=delay)
            status = Status(code=reply.code.value[0], message=reply.message)
            status.details.add().Pack(info)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.set_code(reply.code)
        context.set_details(reply.message)
        return b""


@contextmanager
def grpc_receiver(*, port: int = 0, tls: tuple[bytes, bytes] | None = None,
                  receiver: GrpcReceiver | None = None, service: str = "trace.v1.TraceService",
                  ) -> Iterator[GrpcReceiver]:
    """The same over gRPC; `tls` is a key and its certificate, in PEM."""
    receiver = receiver or GrpcReceiver()
    handler = grpc.method_handlers_generic_handler(
        f"opentelemetry.proto.collector.{service}",
        {"Export": grpc.unary_unary_rpc_method_handler(receiver.export)})
    server = grpc.server(ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{port}"
    bound = (server.add_secure_port(address, grpc.ssl_server_credentials([tls])) if tls
             else server.add_insecure_port(address))
    receiver.address = f"127.0.0.1:{bound}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.close()
        server.stop(0).wait()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Clock:
    """A monotonic clock that a test sets."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.002)


def deliver(receiver: Receiver, outbox: MemoryOutbox, *, timeout: float = 20.0, clock: Clock | None = None,
            jitter: Callable[[float, float], float] = lambda low, high: high, **target: Any) -> Delivery:
    """Delivery over the real transport, without a thread. Delays are the longest that the jitter allows."""
    transport: HttpTransport | GrpcTransport
    if isinstance(receiver, GrpcReceiver):
        transport = GrpcTransport(Target("traces", "grpc", receiver.address, tls=False, **target), "agent/1")
    else:
        url = f"{receiver.url}/v1/traces"
        transport = HttpTransport(Target("traces", "http/protobuf", url, tls=False, **target), "agent/1", lambda: 0.0)
    receiver.clients.append(transport)
    return Delivery(outbox, transport, Encoder({"service.name": "test"}, "1.2.3"), Counts(), timeout=timeout,
                    clock=clock or Clock(), jitter=jitter)


def drain(worker: Delivery, limit: int = 100) -> list[float]:
    """Step until the outbox is empty, without waiting; the delays that were asked for."""
    delays: list[float] = []
    for _ in range(limit):
        delay = worker.step()
        if delay is None:
            return delays
        delays.append(delay)
    raise AssertionError(f"not empty after {limit} passes: {delays}")


def refusing(bad: set[int], reply: Reply) -> Callable[[list[Any]], Reply]:
    """A collector that takes no request with one of these spans in it."""
    return lambda spans: reply if bad & {int.from_bytes(found.span_id, "big") for found in spans} else Reply()
