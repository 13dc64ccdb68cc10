"""Export over the real protocols: what is on the wire, where it goes, how soon, and what stays behind at a stop."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import MessageToDict

from coding_agent_exporter import export
from coding_agent_exporter.export.otlp_http import HttpTransport
from coding_agent_exporter.export.target import Target, resolve
from otlp_receiver import (
    HttpReceiver,
    MemoryOutbox,
    Receiver,
    Reply,
    deliver,
    drain,
    eventually,
    free_port,
    full_span,
    grpc_receiver,
    http_receiver,
    span,
)
from web_support import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coding_agent_exporter.export import Exporter

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def make(outbox: MemoryOutbox, environ: dict[str, str] | None = None, **settings: Any) -> Exporter:
    made = export.create(outbox, environ or {}, version="1.2.3", instance="abc", host="box", **settings)
    assert made is not None
    return made


@pytest.fixture
def http() -> Iterator[HttpReceiver]:
    with http_receiver() as receiver:
        yield receiver


# --- what is on the wire

EXPECTED = {
    "resourceSpans": [{
        "resource": {"attributes": [
            {"key": "service.name", "value": {"stringValue": "coding-agent-exporter"}},
            {"key": "service.version", "value": {"stringValue": "1.2.3"}},
            {"key": "service.instance.id", "value": {"stringValue": "abc"}},
            {"key": "host.name", "value": {"stringValue": "box"}}]},
        "scopeSpans": [{
            "scope": {"name": "coding_agent_exporter", "version": "1.2.3"},
            "spans": [{
                "traceId": "AAAAAAAAAAAAAAAAAAAABw==", "spanId": "AAAAAAAAAAc=", "parentSpanId": "AAAAAAAAAAY=",
                "name": "chat 7", "kind": "SPAN_KIND_INTERNAL", "flags": 257,
                "startTimeUnixNano": "1700000000000000007", "endTimeUnixNano": "1700000001000000007",
                "attributes": [
                    {"key": "text", "value": {"stringValue": "höchst"}}, {"key": "count", "value": {"intValue": "-3"}},
                    {"key": "cost", "value": {"doubleValue": 0.25}}, {"key": "flag", "value": {"boolValue": True}},
                    {"key": "list", "value": {"arrayValue": {"values": [{"stringValue": "a"}, {"stringValue": "b"}]}}}],
                "events": [{"timeUnixNano": "1700000000500000000", "name": "compaction",
                            "attributes": [{"key": "tokens", "value": {"intValue": "12"}}]}],
                "links": [{"traceId": "AAAAAAAAAAAAAAAAAAAABQ==", "spanId": "AAAAAAAAAAU="}],
                "status": {"code": "STATUS_CODE_ERROR", "message": "overloaded"}}]}]}]}


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_span_is_on_the_wire_as_it_was_made_and_nothing_else_is(
        protocol: str, compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoded request holds the span, the resource and the scope, and no other field or attribute."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    outbox = MemoryOutbox([full_span()])
    receiver: Receiver
    with http_receiver() as web, grpc_receiver() as rpc:
        receiver = rpc if protocol == "grpc" else web
        endpoint = f"http://{rpc.address}" if protocol == "grpc" else web.url
        exporter = make(outbox, {"SECRET_OF_THE_ENVIRONMENT": "hunter2"}, endpoint=endpoint, protocol=protocol,
                        compression=compression, headers="X-Tenant=team%20a")
        exporter.start()
        exporter.stop(20)
    assert [MessageToDict(request) for request in receiver.requests] == [EXPECTED]
    assert receiver.headers[0]["x-tenant"] == "team a"
    assert "coding-agent-exporter/1.2.3" in receiver.headers[0]["user-agent"]
    assert outbox.size() == 0
    everything = b"".join(receiver.raw) + repr(receiver.headers).encode()
    for foreign in (b"hunter2", os.fsencode(os.path.expanduser("~")), sys.executable.encode()):  # noqa: PTH111 - bytes
        assert foreign not in everything


def test_headers_of_an_http_request_are_few(http: HttpReceiver) -> None:
    """What goes with the body is the content type, an agent without details of this machine, and what was set."""
    drain(deliver(http, MemoryOutbox([span(1)]), headers={"x-tenant": "a"}, gzip=True))
    assert set(http.headers[0]) == {":path", "host", "accept-encoding", "content-length", "content-type",
                                    "content-encoding", "user-agent", "x-tenant"}


# --- when it goes

def test_a_wake_sends_at_once_and_the_connection_is_kept(http: HttpReceiver) -> None:
    """A span that is committed later leaves well within a second of the wake, over the same connection."""
    outbox = MemoryOutbox()
    exporter = make(outbox, endpoint=http.url)
    exporter.start()
    took: list[float] = []
    for number in range(1, 21):
        outbox.add(span(number))
        began = time.monotonic()
        exporter.wake()
        http.wait_for(lambda: len(http.numbers) == len(took) + 1)
        took.append(time.monotonic() - began)
        eventually(lambda: not outbox.size())
    exporter.stop(20)
    assert sorted(took)[10] < 1.0
    assert http.numbers == list(range(1, 21))
    assert http.connections == 1
    assert exporter.counts.exported == 20


def test_what_was_in_the_outbox_before_start_goes_in_batches_and_in_order(http: HttpReceiver) -> None:
    """A backlog needs no wake; no request carries more than 512 spans."""
    outbox = MemoryOutbox([span(n) for n in range(1, 1201)])
    exporter = make(outbox, endpoint=http.url)
    exporter.start()
    eventually(lambda: not outbox.size())
    exporter.stop(20)
    assert http.numbers == list(range(1, 1201))
    assert len(http.requests) == 3


def test_a_stop_with_a_dead_collector_is_in_time_and_keeps_the_spans() -> None:
    """Nobody listens: stop() returns when its time is up, and the outbox has everything."""
    outbox = MemoryOutbox([span(n) for n in range(1, 4)])
    exporter = make(outbox, endpoint=f"http://127.0.0.1:{free_port()}")
    exporter.start()
    eventually(lambda: exporter.counts.consecutive)
    began = time.monotonic()
    exporter.stop(0.3)
    assert time.monotonic() - began < 10
    assert outbox.size() == 3


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_stop_cuts_off_a_request_that_hangs(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with a long timeout does not outlast the stop; its spans stay."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    outbox = MemoryOutbox([span(1)])
    receiver: Receiver
    with http_receiver() as web, grpc_receiver() as rpc:
        receiver = rpc if protocol == "grpc" else web
        receiver.replies = [Reply(hang=True)]
        exporter = make(outbox, protocol=protocol, timeout=60.0,
                        endpoint=f"http://{rpc.address}" if protocol == "grpc" else web.url)
        exporter.start()
        receiver.wait_for(lambda: receiver.requests)
        began = time.monotonic()
        exporter.stop(0.2)
        assert time.monotonic() - began < 10
        eventually(no_worker)
    assert outbox.size() == 1


def no_worker() -> bool:
    return not any(thread.name == "otlp-export" for thread in threading.enumerate())


def test_an_answer_that_comes_after_the_stop_does_not_touch_the_outbox(
        http: HttpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a request cannot be cut off (a name that is being looked up), the outbox is left alone all the same."""
    monkeypatch.setattr(HttpTransport, "cut", lambda self: None)
    http.replies = [Reply(late=True)]
    outbox = MemoryOutbox([span(1)])
    exporter = make(outbox, endpoint=http.url, timeout=60.0)
    exporter.start()
    http.wait_for(lambda: http.requests)
    exporter.stop(0.1)
    http.release.set()
    eventually(no_worker)
    assert http.numbers == [1]
    assert outbox.size() == 1


def test_a_stop_does_not_wait_for_a_retry_after(http: HttpReceiver) -> None:
    """The last flush tries once more whatever the wait was for; a collector that is back gets everything."""
    http.replies = [Reply(429, {"retry-after": "500"})]
    outbox = MemoryOutbox([span(1)])
    exporter = make(outbox, endpoint=http.url)
    exporter.start()
    eventually(lambda: exporter.counts.consecutive)
    exporter.wake()
    exporter.stop(20)
    assert http.numbers == [1]
    assert len(http.requests) == 2


def test_a_stop_flushes_what_was_committed_without_a_wake(http: HttpReceiver) -> None:
    """Spans of the last commit are delivered by stop() itself."""
    outbox = MemoryOutbox()
    exporter = make(outbox, endpoint=http.url)
    exporter.start()
    outbox.add(*(span(n) for n in range(1, 700)))
    exporter.stop(20)
    assert http.numbers == list(range(1, 700))


def test_a_stop_before_start_and_a_second_start() -> None:
    """Stopping what never ran is fine; starting twice is a mistake of the caller."""
    exporter = make(MemoryOutbox(), endpoint="http://127.0.0.1:1")
    exporter.stop(0)
    exporter.start()
    with pytest.raises(RuntimeError, match="already started"):
        exporter.start()
    exporter.stop(0)


def test_an_outbox_that_fails_does_not_end_export(http: HttpReceiver) -> None:
    """An exception from the outbox is counted and waited out; a stop then still delivers."""
    outbox = MemoryOutbox([span(1)])
    outbox.failure = OSError("disk I/O error")
    exporter = make(outbox, endpoint=http.url)
    exporter.start()
    eventually(lambda: exporter.counts.failed)
    outbox.failure = None
    exporter.stop(20)
    assert http.numbers == [1]


# --- TLS

@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


def server_context(authority: Authority, *, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.certificate)
    context.load_cert_chain(*authority.issue("server", "127.0.0.1"))
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_https_with_an_authority_and_a_client_certificate(authority: Authority) -> None:
    """The CA of OTEL_EXPORTER_OTLP_CERTIFICATE is trusted, and the client's certificate is shown."""
    certificate, key = authority.issue("client")
    outbox = MemoryOutbox([span(1)])
    with http_receiver(tls=server_context(authority, client=True)) as receiver:
        exporter = make(outbox, {
            ENDPOINT: receiver.url, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.certificate),
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(certificate), "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(key)})
        exporter.start()
        exporter.stop(20)
    assert receiver.numbers == [1]


def test_a_certificate_that_is_not_trusted_holds_the_spans_until_it_is(authority: Authority, tmp_path: Path) -> None:
    """Nothing is sent to a stranger; after the CA file was replaced, the next attempt goes through."""
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(Authority(tmp_path, "other").certificate.read_bytes())
    outbox = MemoryOutbox([span(1)])
    with http_receiver(tls=server_context(authority)) as receiver:
        worker = deliver(receiver, outbox, ca_file=trusted)
        worker._transport = https_transport(receiver, trusted)
        assert worker.step() == 60
        assert "certificate" in worker.counts.last_error
        assert not receiver.requests
        trusted.write_bytes(authority.certificate.read_bytes())
        drain(worker)
    assert receiver.numbers == [1]


def https_transport(receiver: HttpReceiver, ca_file: Path) -> Any:
    transport = HttpTransport(Target("traces", "http/protobuf", f"{receiver.url}/v1/traces", tls=True,
                                     ca_file=ca_file), "agent", lambda: 0.0)
    receiver.clients.append(transport)
    return transport


def test_grpc_over_tls(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """https:// in front of a gRPC endpoint means TLS with the CA that was named."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    certificate, key = authority.issue("grpc", "127.0.0.1")
    with grpc_receiver(tls=(key.read_bytes(), certificate.read_bytes())) as receiver:
        exporter = make(MemoryOutbox([span(1)]), {
            ENDPOINT: f"https://{receiver.address}", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": str(authority.certificate)})
        exporter.start()
        exporter.stop(20)
    assert receiver.numbers == [1]


def test_a_proxy_is_used_where_the_environment_says_so(http: HttpReceiver) -> None:
    """http_proxy gets the request with the whole URL and its credentials; no_proxy goes around it."""
    exporter = make(MemoryOutbox([span(1)]), {
        ENDPOINT: "http://collector.example:4318",
        "http_proxy": http.url.replace("http://", "http://me:pass%21@")})
    exporter.start()
    exporter.stop(20)
    assert http.headers[0][":path"] == "http://collector.example:4318/v1/traces"
    assert http.headers[0]["host"] == "collector.example:4318"
    assert http.headers[0]["proxy-authorization"] == "Basic bWU6cGFzcyE="
    around = resolve({ENDPOINT: "http://a.example.com:1", "http_proxy": "http://p:1", "NO_PROXY": "x, .example.com"})
    assert around is not None
    assert around.proxy == ""


def test_https_goes_through_a_tunnel_of_the_proxy(authority: Authority) -> None:
    """https_proxy is asked to CONNECT to the collector, and never sees what goes through: no header, no span."""
    with http_receiver(tls=server_context(authority)) as receiver, tunnel() as (proxy, asked):
        exporter = make(MemoryOutbox([span(1)]), {
            ENDPOINT: receiver.url, "HTTPS_PROXY": proxy, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.certificate)},
            headers="authorization=sesame")
        exporter.start()
        exporter.stop(20)
    assert receiver.numbers == [1]
    assert asked[0].startswith(receiver.url.replace("https://", "CONNECT ").encode())
    assert b"sesame" not in b"".join(asked)


@contextmanager
def tunnel() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that knows CONNECT, for one connection, and what came to it from the client."""
    asked: list[bytes] = []

    def copy(source: socket.socket, target: socket.socket, seen: list[bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                seen.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            asked.append(client.recv(65536))
            host, port = asked[0].split()[1].decode().split(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=copy, args=(server, client, []))
                back.start()
                copy(client, server, asked)
                back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        thread.join()


# --- cost

def test_nothing_is_imported_before_start_and_grpc_only_when_chosen() -> None:
    """Neither protobuf nor gRPC costs memory where nothing is exported, and gRPC none where HTTP is."""
    program = """
import sys
from coding_agent_exporter import export
def loaded(): return [name for name in ("opentelemetry", "google.protobuf", "grpc", "requests") if name in sys.modules]
class Empty:
    def take(self, limit): return []
exporter = export.create(Empty(), {}, version="1", instance="i", endpoint="http://127.0.0.1:1")
before = loaded()
exporter.start(); exporter.stop(30)
print(before, loaded())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[] ['opentelemetry', 'google.protobuf']\n"


def test_a_server_that_closes_idle_connections_costs_no_failure(http: HttpReceiver) -> None:
    """The next batch opens another connection, and nobody notices."""
    outbox = MemoryOutbox([span(1)])
    worker = deliver(http, outbox)
    drain(worker)
    connection = worker._transport._connection  # type: ignore[attr-defined] # what a server's FIN looks like from here
    connection.sock.shutdown(socket.SHUT_RD)
    outbox.add(span(2))
    assert drain(worker) == [0]
    assert worker.counts.failed == 0
    assert http.connections == 2
