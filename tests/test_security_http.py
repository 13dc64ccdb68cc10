"""The web port of the real program under clients that mean harm: one answer to one request, and scrapes go on."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from process_support import DEADLINE, Exporter, wait_for
from security_support import LONG, client_hello
from web_support import Authority, connect, get, read_all, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

SMUGGLED = b"GET /metrics?smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
CONNECTIONS = 2000 if LONG else 500


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    """The program without TLS."""
    with Exporter(tmp_path_factory.mktemp("http")) as exporter:
        yield exporter


def exchange(exporter: Exporter, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=DEADLINE) as client:
        client.sendall(request)
        return read_all(client)


@pytest.mark.parametrize("head", [
    b"Content-Length: %d\r\n" % len(SMUGGLED),
    b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(SMUGGLED),
    b"Content-Length: %d\r\nContent-Length: 0\r\n" % len(SMUGGLED),
    b"Content-Length: +0\r\n", b"Content-Length: 0x0\r\n", b"Content-Length: 0, 0\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: \r\n",
    b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
    b"Transfer-Encoding: identity\r\n", b"transfer-encoding:\tCHUNKED\r\n", b"Transfer-Encoding: x\r\n",
    b"Transfer-Encoding : chunked\r\n", b" Transfer-Encoding: chunked\r\n", b"X: y\r\n Content-Length: 0\r\n",
    b"X: y\rContent-Length: 0\r\n", b"X: y\0\r\n", b"Transfer\xadEncoding: chunked\r\n",
])
def test_nothing_behind_a_doubtful_head_is_a_request(plain: Exporter, head: bytes) -> None:
    """A proxy may see other borders between requests: where a body is announced in any way, or a header can be read in
    two, there is one answer and the end of the connection, and what follows is nobody's request."""
    answer = exchange(plain, HEAD + head + b"\r\n" + SMUGGLED)
    assert len(re.findall(rb"^HTTP/1\.1 ", answer, re.MULTILINE)) == 1
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 405 "))
    assert b"\r\nConnection: close\r\n" in answer
    assert b"coding_agent_" not in answer


@pytest.mark.parametrize("target", [
    "/marker", "/metrics/../marker", "/%2e%2e/marker", "//marker/metrics", "/marker\\..\\", "/metrics%00marker",
    "http://marker/marker", "/?marker=<script>marker</script>", "/metrics?name[]=marker", "/" + "marker" * 2000,
])
def test_what_was_asked_for_is_not_repeated(plain: Exporter, target: str) -> None:
    """No answer, and no line of the log, holds what a client sent: nothing to inject into a page or a log."""
    request = f"GET {target} HTTP/1.1\r\nHost: marker\r\nX-Marker: marker\r\nConnection: close\r\n\r\n"
    answer = exchange(plain, request.encode())
    assert re.match(rb"HTTP/1\.1 (200|404) ", answer)
    assert b"marker" not in answer.lower()
    assert not plain.logged("marker")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_nothing_can_be_changed_from_the_network(plain: Exporter, method: str) -> None:
    """Only GET and HEAD are served: there is no reload, no shutdown, no profile."""
    for path in ("/metrics", "/-/reload", "/-/quit", "/debug/pprof/"):
        assert exchange(plain, f"{method} {path} HTTP/1.0\r\n\r\n".encode()).startswith(b"HTTP/1.1 405 ")


def test_a_scrape_is_served_beside_500_clients_that_hold_on(tmp_path: Path) -> None:
    """Clients that say nothing, or stop in the middle of a handshake, of a head or of a body, in any order: scrapes
    over TLS are answered all the while, with a bounded number of threads and descriptors, and nothing stays behind."""
    authority = Authority(tmp_path, "ca")
    authority.issue("server", "127.0.0.1")
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    context = ssl.create_default_context(cafile=authority.certificate)
    # The first two before the handshake has ended, the others within TLS.
    unfinished = (b"", client_hello(0x0303, [0xC02B])[:-1], b"GET / HTTP/1.1\r\nX: ",
                  HEAD + b"Content-Length: 9\r\n\r\n1")

    with Exporter(tmp_path, f"--web.config.file={config}") as exporter, ExitStack() as held:

        def connected(*, tls: bool = False) -> socket.socket:
            raw = socket.create_connection(("127.0.0.1", exporter.port), timeout=DEADLINE)
            return context.wrap_socket(raw, server_hostname="127.0.0.1") if tls else raw

        def scraped() -> bool:
            with connected(tls=True) as client:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                return client.recv(15) == b"HTTP/1.1 200 OK"

        def used() -> tuple[int, int]:
            """Threads and descriptors of the program."""
            of = Path(f"/proc/{exporter.pid}")
            return len(list((of / "task").iterdir())), len(list((of / "fd").iterdir()))

        assert scraped()
        threads, descriptors = used()
        for number in range(CONNECTIONS):
            client = held.enter_context(connected(tls=number % 4 > 1))
            with suppress(OSError):
                client.sendall(unfinished[number % 4])
            if number % 50 == 0:
                assert scraped()
                most = used()
                assert most[0] <= threads + 130
                assert most[1] <= descriptors + 135
        assert scraped()
        held.close()
        wait_for(lambda: used()[0] <= threads, "the threads of clients that have gone to end")
        assert not exporter.logged("level=error")


def dripping(data: bytes, client: socket.socket) -> bytes:
    """Send a byte now and then until the server has enough; what it says."""
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            for byte in data:
                client.sendall(bytes([byte]))
                if stop.wait(0.02):
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        return read_all(client)
    finally:
        stop.set()
        thread.join(DEADLINE)


@pytest.fixture
def tls_config(tmp_path: Path) -> Path:
    Authority(tmp_path, "ca").issue("server", "127.0.0.1")
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    return config


def test_a_handshake_has_one_deadline(tls_config: Path) -> None:
    """A hello that comes a byte at a time is not waited for longer because it goes on coming."""
    record = client_hello(0x0303, [0xC02B])
    record = record[:3] + (16_000).to_bytes(2) + record[5:6] + (15_996).to_bytes(3) + record[9:] + bytes(16_000)
    with serving(web_config=tls_config, read_timeout=0.5) as server, connect(server) as client:
        assert dripping(record, client) == b""
        assert server.errors == 0


def test_a_body_is_not_waited_for() -> None:
    """A body is nothing that is served here: the answer comes at once, and who goes on sending is cut off."""
    with serving() as server, connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        assert dripping(b"x" * 100_000, client).startswith(b"HTTP/1.1 405 ")
        assert get(server).status == 200
        assert server.errors == 0
