"""The web server as well-behaved clients see it, over real sockets."""

from __future__ import annotations

import errno
import gzip
import http.client
import logging
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.web import Server
from coding_agent_exporter.web.request import BadRequestError, accepts_gzip, parse_request, split_head
from web_support import DEADLINE, FakeApp, ask, connect, eventually, exchange, get, read_all, serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def app() -> FakeApp:
    return FakeApp()


@pytest.fixture
def server(app: FakeApp) -> Iterator[Server]:
    with serving(app) as server:
        yield server


def test_metrics(server: Server, app: FakeApp) -> None:
    """A scrape gets the exposition, and the app gets what the client accepts and which families it names."""
    answer = get(server, "/metrics?name[]=a_total&name%5B%5D=b&other=c", Accept="application/openmetrics-text")
    assert (answer.status, answer.body) == (200, b"up 1\n")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4"
    assert answer.headers["server"] == "coding-agent-exporter"
    assert app.seen == [("application/openmetrics-text", frozenset({"a_total", "b"}))]


def test_pages(server: Server) -> None:
    """Landing page, health and readiness answer with what the app says, its headers and status included."""
    landing = get(server, "/")
    assert (landing.status, landing.body) == (200, b"<!DOCTYPE html>")
    assert landing.headers["content-security-policy"] == "own"
    assert get(server, "/-/healthy").body == b"healthy\n"
    assert get(server, "/-/ready").status == 503


def test_telemetry_path() -> None:
    """The path of the exposition is configurable, and may even be the root."""
    with serving(telemetry_path="/probe") as server:
        assert get(server, "/probe").body == b"up 1\n"
        assert get(server, "/metrics").status == 404
    with serving(telemetry_path="/") as server:
        assert get(server, "/").body == b"up 1\n"


def test_gzip(server: Server) -> None:
    """The exposition is compressed for those who accept that, and for nobody else."""
    answer = get(server, Accept_Encoding="deflate, gzip;q=0.5")
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body) == b"up 1\n"
    assert "content-encoding" not in get(server, Accept_Encoding="gzip;q=0").headers
    assert "content-encoding" not in get(server, "/-/healthy", Accept_Encoding="gzip").headers


@pytest.mark.parametrize(("header", "expected"), [
    ("gzip", True), ("GZip; q=1.0", True), ("br, gzip ;q=0.001", True), ("", False), ("identity", False),
    ("gzip;q=0", False), ("gzip; q=0.000", False), ("xgzip", False)])
def test_accepts_gzip(header: str, *, expected: bool) -> None:
    """gzip has to be named, with a weight above 0."""
    assert accepts_gzip(header) is expected


def test_head(server: Server, app: FakeApp) -> None:
    """HEAD gets the headers of GET without a body, and does not count as a delivered scrape."""
    answer = get(server, method="HEAD")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "5", b"")
    assert get(server).status == 200
    assert app.sent.acquire(timeout=DEADLINE)
    assert not app.sent.acquire(blocking=False)


def test_refusals(server: Server) -> None:
    """An unknown path is 404 in text, another method 405 with what is allowed."""
    missing = get(server, "/metricsx")
    assert (missing.status, missing.body) == (404, b"not found\n")
    post = get(server, method="POST")
    assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")


def test_keep_alive(server: Server) -> None:
    """One connection serves many requests, until the client asks for its end."""
    host, port = server.addresses[0]
    client = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    assert ask(client).status == 200
    used = client.sock
    assert ask(client, "/nowhere").status == 404
    assert ask(client, "/-/healthy", Connection="close").headers["connection"] == "close"
    assert client.sock is not used
    client.close()


def test_pipelined(server: Server) -> None:
    """Requests that arrive in one piece are answered one after the other, in their order."""
    one = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
    received = exchange(server, one % b"/metrics" + one % b"/-/healthy" + b"GET /nowhere HTTP/1.0\r\n\r\n")
    assert received.count(b"HTTP/1.1 ") == 3
    assert received.index(b"up 1\n") < received.index(b"healthy\n") < received.index(b"not found\n")


def test_body_ends_connection(server: Server) -> None:
    """What follows as a request's body is never taken for a request."""
    received = exchange(server, b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 36\r\n\r\n"
                                b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 405 ")
    assert received.count(b"HTTP/1.1 ") == 1


def test_sent(server: Server, app: FakeApp) -> None:
    """The app hears once of each scrape whose body was delivered."""
    assert get(server).status == 200
    assert app.sent.acquire(timeout=DEADLINE)
    assert not app.sent.acquire(blocking=False)


def test_not_sent(app: FakeApp) -> None:
    """A client that leaves before it has read the body did not get the scrape: the app hears nothing."""
    app.body = b"x" * 50_000_000
    with serving(app) as server:
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(100)
        app.body = b"small"
        assert get(server).body == b"small"
        assert app.sent.acquire(timeout=DEADLINE)
    assert not app.sent.acquire(blocking=False)
    assert server.errors == 0


def test_app_fails(server: Server, app: FakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the app is a 500 without details, one ERROR line and one counted error; serving goes on."""
    app.failure = RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        answer = get(server)
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert [record.getMessage() for record in caplog.records] == ["/metrics failed: RuntimeError: secret"]
    assert server.errors == 1
    app.failure = None
    assert get(server).status == 200


def test_sent_fails(server: Server, app: FakeApp) -> None:
    """An exception in `sent` is counted; the client has its reply, and its connection."""
    app.sent_failure = RuntimeError("no")
    host, port = server.addresses[0]
    client = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    assert ask(client).status == 200
    assert ask(client, "/-/healthy").status == 200
    client.close()
    assert server.errors == 1


def test_stop_lets_replies_finish(app: FakeApp) -> None:
    """Stopping closes what is idle at once, and lets a running scrape have its reply, marked as the last one."""
    app.gate.clear()
    answers = []
    with serving(app) as server:
        with connect(server) as idle:
            scrape = threading.Thread(target=lambda: answers.append(get(server)))
            scrape.start()
            assert app.entered.acquire(timeout=DEADLINE)
            stop = threading.Thread(target=server.stop, args=(DEADLINE,))
            stop.start()
            assert read_all(idle) == b""
            app.gate.set()
            stop.join(DEADLINE)
            scrape.join(DEADLINE)
        assert [(answer.body, answer.headers["connection"]) for answer in answers] == [(b"up 1\n", "close")]
        with pytest.raises(ConnectionRefusedError):
            connect(server)


def test_stop_cuts_after_grace(app: FakeApp) -> None:
    """A client that does not take its reply does not keep the server from stopping."""
    app.body = b"x" * 50_000_000
    with serving(app) as server, connect(server) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert app.entered.acquire(timeout=DEADLINE)
        server.stop(grace=0.05)
        assert len(read_all(client)) < len(app.body)
    assert not app.sent.acquire(blocking=False)


def test_address_in_use(server: Server, app: FakeApp) -> None:
    """An address that is taken fails at start, with the address in the message, and frees those bound before."""
    taken = server.addresses[0]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{taken[1]}: ") as caught:
        Server([free, taken], app).start()
    assert caught.value.errno == errno.EADDRINUSE
    socket.create_server(free).close()


def test_bad_host(app: FakeApp) -> None:
    """A host that does not resolve fails at start, naming it."""
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid:1: "):
        Server([("no.such.host.invalid", 1)], app).start()


def test_all_interfaces() -> None:
    """An empty host listens on IPv4, and on IPv6 where there is any."""
    with serving(host="") as server:
        port = server.addresses[0][1]
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE).close()
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", port), timeout=DEADLINE).close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6() -> None:
    """An IPv6 address is served, beside others."""
    server = Server([("::1", 0), ("127.0.0.1", 0)], FakeApp())
    server.start()
    assert [host for host, _ in server.addresses] == ["::1", "127.0.0.1"]
    assert get(server).status == 200
    server.stop()


def test_no_thread_remains(server: Server) -> None:
    """After a client has left, its thread ends."""
    before = threading.active_count()
    with connect(server):
        eventually(lambda: threading.active_count() > before)
    eventually(lambda: threading.active_count() == before)


@pytest.mark.parametrize(("head", "status"), [
    (b"", 400), (b"GET", 400), (b"GET /", 400), (b"GET  / HTTP/1.1", 400), (b"GET / HTTP/11", 400),
    (b"GET / HTTP/2.0", 505), (b"GET / HTTP/1.1", 400), (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nno colon", 400), (b"GET / HTTP/1.1\r\nHost: a\r\n folded: b", 400),
    (b"GET / HTTP/1.1\r\nHost : a", 400), (b"GET / HTTP/1.1\r\nHost: a\x00b", 400),
    (b"\xff\xfe / HTTP/1.1\r\nHost: a", 400)])
def test_parse_refuses(head: bytes, status: int) -> None:
    """What is not a request in good form is refused with the status that says why."""
    with pytest.raises(BadRequestError) as caught:
        parse_request(head)
    assert caught.value.status == status


def test_parse() -> None:
    """A request is taken apart: target, query, headers in lower case, repeated ones joined."""
    request = parse_request(b"GET http://h:1/a/b?x=1&y HTTP/1.1\r\nHost:h\r\nX-A:  1 \r\nx-a: 2\nConnection: TE, Close")
    assert (request.method, request.path, request.query) == ("GET", "/a/b", "x=1&y")
    assert request.headers == {"host": "h", "x-a": "1, 2", "connection": "TE, Close"}
    assert not request.keep_alive
    assert not request.has_body
    assert parse_request(b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked").has_body


def test_split_head() -> None:
    """A head ends with an empty line, in either notation; what follows is kept; empty lines before it do not count."""
    assert split_head(b"GET / HTTP/1.0\r\nA: b\r\n") is None
    assert split_head(b"\r\nGET / HTTP/1.0\r\n\r\nrest") == (b"GET / HTTP/1.0", b"rest")
    assert split_head(b"GET / HTTP/1.0\n\n") == (b"GET / HTTP/1.0", b"")
    with pytest.raises(BadRequestError):
        split_head(b"\r\n" * 10_000)
