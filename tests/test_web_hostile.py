"""The web server under clients that are slow, greedy, broken or hostile: others are served all the same."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.web import server as server_module
from web_support import DEADLINE, FakeApp, connect, eventually, exchange, get, read_all, read_until, serving

if TYPE_CHECKING:
    from coding_agent_exporter.web import Server

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def slow_reader(server: Server) -> socket.socket:
    """A client that asks for the exposition, and takes no more of it than fits into a small buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(DEADLINE)
    client.connect(server.addresses[0])
    client.sendall(SCRAPE)
    return client


def waiting(server: Server) -> int:
    """How many connections wait for a request."""
    return sum(connection.waits_for_request for connection in list(server._connections))


def trickle(client: socket.socket) -> None:
    """Take a little, now and then, until the server has enough of it."""
    while client.recv(1000):
        threading.Event().wait(0.005)


def test_idle_connections() -> None:
    """300 connections that say nothing do not keep a scrape waiting, nor do they pile up."""
    with serving(max_connections=64) as server, ExitStack() as idle:
        before = threading.active_count()
        for _ in range(300):
            idle.enter_context(connect(server))
        assert get(server).status == 200
        eventually(lambda: threading.active_count() <= before + 64)
        assert server.errors == server.refused == 0


def test_longest_idle_makes_room() -> None:
    """When every place is taken, the connection that has waited longest is closed, and no other."""
    with serving(max_connections=2) as server, connect(server) as first, connect(server) as second:
        eventually(lambda: waiting(server) == 2)
        first.sendall(SCRAPE)
        assert read_until(first, b"up 1\n").endswith(b"up 1\n")
        eventually(lambda: waiting(server) == 2)  # and `second` has waited longer
        assert get(server).status == 200
        assert read_all(second) == b""
        first.sendall(SCRAPE)
        assert read_until(first, b"up 1\n").endswith(b"up 1\n")


def test_busy_connections_stay() -> None:
    """Scrapes in progress are not cut to make room: the newcomer is told to come back, and they are delivered."""
    app = FakeApp()
    app.gate.clear()
    with serving(app, max_connections=2) as server, connect(server) as one, connect(server) as two:
        for client in (one, two):
            client.sendall(SCRAPE)
            assert app.entered.acquire(timeout=DEADLINE)
        answer = get(server, "/-/healthy")
        assert (answer.status, answer.headers["connection"]) == (503, "close")
        assert server.refused == 1
        app.gate.set()
        assert all(read_until(client, b"up 1\n").endswith(b"up 1\n") for client in (one, two))


def test_slow_readers_do_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers who take nothing lose their places, once they have stalled, to clients who do."""
    monkeypatch.setattr(server_module, "STALLED", 0.05)
    app = FakeApp(body=b"x" * 20_000_000)
    with serving(app, max_connections=3) as server, ExitStack() as slow:
        for _ in range(3):
            slow.enter_context(slow_reader(server))
            assert app.entered.acquire(timeout=DEADLINE)
        eventually(lambda: get(server, "/-/healthy").status == 200)
    assert not app.sent.acquire(blocking=False)


def test_write_deadline() -> None:
    """A reader who trickles is cut when the time for the whole reply is over, however often it takes a byte."""
    app = FakeApp(body=b"x" * 20_000_000)
    with serving(app, write_timeout=0.3) as server, slow_reader(server) as client:
        assert app.entered.acquire(timeout=DEADLINE)
        with pytest.raises(ConnectionResetError):
            trickle(client)
        assert not app.sent.acquire(blocking=False)
        assert server.errors == 0


def test_scrape_beside_slow_reader() -> None:
    """A scrape is served while another client does not take its own."""
    app = FakeApp(body=b"x" * 20_000_000)
    with serving(app) as server, slow_reader(server):
        assert app.entered.acquire(timeout=DEADLINE)
        assert len(get(server).body) == len(app.body)


@pytest.mark.parametrize("requests_before", [0, 1])
def test_slow_loris(requests_before: int) -> None:
    """The head of a request, the first or a later one, has one deadline in total: a byte now and then does not
    prolong it."""
    with serving(read_timeout=0.3) as server, connect(server) as client:
        for _ in range(requests_before):
            client.sendall(SCRAPE)
            assert read_until(client, b"up 1\n").endswith(b"up 1\n")
        stop = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-A: ")
                while not stop.wait(0.02):
                    client.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        assert get(server).status == 200
        received = read_all(client)
        stop.set()
        thread.join(DEADLINE)
        assert received.startswith(b"HTTP/1.1 408 ")


def test_silent_client() -> None:
    """A connection on which no request ever begins is closed without a word."""
    with serving(read_timeout=0.05) as server, connect(server) as client:
        assert read_all(client) == b""


@pytest.mark.parametrize("request_bytes", [
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1234567890\r\n" * 4000 + b"\r\n",
    b"\r\n" * 40_000,
    b"\x80" * 500_000,
])
def test_huge_head(request_bytes: bytes) -> None:
    """A head without measure is refused, and the client can read that although it has sent more than was read."""
    with serving() as server:
        with connect(server) as client:
            client.sendall(request_bytes)
            received = b""
            while data := client.recv(65536):  # a reset would raise here
                received += data
        assert received.startswith(b"HTTP/1.1 431 ")
        assert get(server).status == 200


@pytest.mark.parametrize("garbage", [
    b"\x00\xff\x80\r\n\r\n", b"\r\n\r\nhello\r\n\r\n", b"GET /metrics\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n"])
def test_garbage(garbage: bytes) -> None:
    """Bytes that are no request get a 400 and the end of the connection; the server goes on, nothing is logged."""
    with serving() as server:
        assert exchange(server, garbage).startswith(b"HTTP/1.1 400 ")
        assert get(server).status == 200
        assert server.errors == 0


def test_many_query_fields() -> None:
    """A query with thousands of fields is refused before the app sees it."""
    app = FakeApp()
    with serving(app) as server:
        assert get(server, "/metrics?" + "name[]=a&" * 1500).status == 400
    assert app.seen == []


def test_flood() -> None:
    """Many clients that scrape as fast as they can, on new connections, are answered or told to come back."""
    statuses: list[int] = []
    with serving(max_connections=16) as server:

        def scrape() -> None:
            for _ in range(20):
                with suppress(OSError):
                    statuses.append(get(server).status)

        threads = [threading.Thread(target=scrape) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert get(server).status == 200
        assert server.errors == 0
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > 24


def test_resets() -> None:
    """Clients that vanish with a reset at any moment leave nothing behind."""
    with serving() as server:
        before = threading.active_count()
        for request in (b"", b"GET /metr", SCRAPE, SCRAPE * 50):
            with connect(server) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(request)
        eventually(lambda: threading.active_count() == before)
        assert get(server).status == 200
        assert server.errors == 0
