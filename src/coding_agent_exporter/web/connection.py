"""Takes an accepted socket from `server`, gives requests to the `App` and its replies to the client.

A connection runs in a thread of its own. The TLS handshake, the head of a request, and a reply each have one
deadline in total, however slowly the bytes trickle.
"""

from __future__ import annotations

import gzip
import logging
import math
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs

from coding_agent_exporter.web.access import Access, san_allowed
from coding_agent_exporter.web.request import (
    BadRequestError,
    Request,
    accepts_gzip,
    parse_request,
    split_head,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_TEXT = "text/plain; charset=utf-8"
_CHUNK = 64 * 1024
_LINGER = 1.0
_RESET = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. `sent` is called once, when all but the last byte of the body went to the kernel.

    It is not called for HEAD, whose body is left out, nor for a client that gave up before the reply was ready.
    """

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    sent: Callable[[], None] | None = None


class App(Protocol):
    """What is served. Called from many threads at once; an exception becomes a reply with status 500."""

    def metrics(self, accept: str, names: frozenset[str], timeout: float | None) -> Reply:
        """The exposition. `accept` is the Accept header, `names` the values of `?name[]=` (empty: all).

        `timeout`: seconds for which Prometheus says that it waits.
        """

    def landing(self) -> Reply:
        """The page at `/`."""

    def healthy(self) -> Reply:
        """200 while the process lives."""

    def ready(self) -> Reply:
        """200 once a scrape would be answered in full."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, each in total.

    `read`: for a handshake, for the first byte of the first request, and from the first byte of a request to
    the end of its headers. `write`: for a reply. `idle`: between requests.
    """

    read: float
    write: float
    idle: float


class Host(Protocol):
    """What a connection asks of the server that accepted it."""

    app: App
    telemetry_path: str
    limits: Limits
    stopping: bool

    def access(self) -> Access:
        """Who may connect, as of now."""

    def failed(self, what: str, error: Exception) -> None:
        """Count and log an exception that nobody else will see."""

    def begin(self, connection: Connection) -> bool:
        """A request has arrived; False when the connection was chosen to make room meanwhile."""

    def leave(self, connection: Connection) -> None:
        """The connection is over: close it and forget it."""


class Connection:
    """One client's connection, and the thread that serves it."""

    def __init__(self, server: Host, sock: socket.socket) -> None:
        self.waits_for_request = True
        self.waiting_since = time.monotonic()
        """Since when the client is waited for, to send or to take bytes; infinity while it is not."""
        self.is_cut = False
        self._server, self._sock = server, sock
        self._swap = threading.Lock()  # the socket is replaced for TLS; cut() may come at that very moment
        self._tls = False
        self._access = Access()
        self._buffer = b""

    def run(self) -> None:
        """Serve requests until either side has enough."""
        try:
            self._serve()
        except OSError as error:  # what clients do to connections: timeouts, resets, failed handshakes
            _log.debug("connection ended: %s", error)
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: counted and logged
            self._server.failed("a connection", error)
        finally:
            self._server.leave(self)

    def cut(self) -> None:
        """End the connection from another thread: whatever its own waits for ends at once."""
        with self._swap, suppress(OSError):
            self.is_cut = True
            # SSLSocket's own would take the TLS state away under the feet of the thread that uses it.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, saying so in TLS if that is possible without waiting."""
        with self._swap:
            with suppress(OSError, ValueError):
                self._sock.settimeout(0)
                if self._tls:
                    self._sock.unwrap()  # type: ignore[attr-defined] # an SSLSocket
            self._sock.close()

    def refuse(self, *, tls: bool) -> None:
        """Say that the server is full (not in TLS: that would take a handshake), wait for nothing, close."""
        with suppress(OSError):
            self._sock.settimeout(0)
            if not tls:
                with suppress(BlockingIOError):
                    self._sock.recv(_CHUNK)  # closing with bytes unread would take the reply back
                reply = _text(503, "too many connections", ("Retry-After", "5"))
                self._sock.send(self._head(reply, close=True) + reply.body)
                self._sock.shutdown(socket.SHUT_WR)
        self.close()

    def _serve(self) -> None:
        server = self._server
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._access = server.access()
        if self._access.tls and not self._handshake():
            return
        patience = server.limits.read
        while not server.stopping:
            try:
                head = self._read_head(patience)
                if head is None or not server.begin(self):
                    return
                request = parse_request(head)
            except BadRequestError as error:
                reply = _text(error.status, str(error))
                self._send(self._head(reply, close=True), reply.body)
                self._linger()
                return
            if not self._respond(request):
                return
            # In this order: stop() looks for connections that wait after it has set `stopping`.
            self.waiting_since = time.monotonic()
            self.waits_for_request = True
            patience = server.limits.idle

    def _handshake(self) -> bool:
        context, allowed = self._access.context, self._access.allowed_sans
        with self._swap:
            if context is None or self.is_cut:
                return False
            sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
            self._sock = sock
        sock.settimeout(self._server.limits.read)
        sock.do_handshake()
        self._tls = True
        if allowed is None or san_allowed(sock.getpeercert(), allowed):
            return True
        _log.info("connection refused: the client's certificate has no name of client_allowed_sans")
        return False

    def _read_head(self, patience: float) -> bytes | None:
        """Read up to the end of the next request's headers; None when the client has no further request."""
        started = bool(self._buffer)
        deadline = time.monotonic() + (self._server.limits.read if started else patience)
        while (found := split_head(self._buffer)) is None:
            left = deadline - time.monotonic()
            try:
                self._sock.settimeout(max(left, 0.001))
                data = self._sock.recv(_CHUNK) if left > 0 else None
            except TimeoutError:
                data = None
            if data is None and started:
                raise BadRequestError(408, "the request took too long")
            if not data:
                return None
            if not started:
                started, deadline = True, time.monotonic() + self._server.limits.read
            self._buffer += data
        head, self._buffer = found
        return head

    def _respond(self, request: Request) -> bool:
        """Answer; whether the connection can take another request."""
        self._access = access = self._server.access()
        if access.tls and not self._tls:
            return False  # the configuration asks for TLS since this connection was opened
        reply = self._answer(request)
        keep = request.keep_alive and not request.has_body and not self._server.stopping
        head_only = request.method == "HEAD"
        head = self._head(reply, close=not keep)
        # Asked before sending: a client that closes afterwards has what it wanted.
        if head_only or not reply.sent or self._has_gone():
            self._send(head, b"" if head_only else reply.body)
        else:
            # With a byte still to come: whoever has read this reply and asks again finds that it was noted.
            self._send(head, reply.body[:-1])
            self._note_sent(reply.sent, request.path)
            self._send(b"", reply.body[-1:])
        if request.has_body:
            self._linger()
        return keep

    def _note_sent(self, sent: Callable[[], None], path: str) -> None:
        try:
            sent()
        except Exception as error:  # noqa: BLE001 - the boundary to the app: counted and logged
            self._server.failed(f"after {path}", error)

    def _has_gone(self) -> bool:
        """Whether the client has closed its side: it stopped waiting for the reply."""
        gone = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
        poll = select.poll()
        poll.register(self._sock, gone)
        return bool(poll.poll(0))

    def _answer(self, request: Request) -> Reply:
        access = self._access
        if access.broken:
            return _text(500, "the web configuration is broken, see the exporter's log")
        if access.rate_limit and not access.rate_limit.allow():
            return _text(429, "too many requests")
        if access.authenticator:
            verdict = access.authenticator.check(request.headers.get("authorization", ""))
            if verdict == "busy":
                return _text(503, "too many passwords to check", ("Retry-After", "5"))
            if verdict == "denied":
                return _text(401, "unauthorized", ("WWW-Authenticate", 'Basic realm="coding-agent-exporter"'))
        if request.method not in {"GET", "HEAD"}:
            return _text(405, "method not allowed", ("Allow", "GET, HEAD"))
        try:
            return self._route(request)
        except Exception as error:  # noqa: BLE001 - the boundary to the app: counted and logged
            self._server.failed(request.path, error)
            return _text(500, "internal error, see the exporter's log")

    def _route(self, request: Request) -> Reply:
        app = self._server.app
        if request.path == self._server.telemetry_path:
            try:
                names = parse_qs(request.query, max_num_fields=1000).get("name[]", ())
            except ValueError:
                return _text(400, "malformed query")
            timeout = _seconds(request.headers.get("x-prometheus-scrape-timeout-seconds", ""))
            reply = app.metrics(request.headers.get("accept", ""), frozenset(names), timeout)
            if not accepts_gzip(request.headers.get("accept-encoding", "")):
                return reply
            body = gzip.compress(reply.body, compresslevel=5, mtime=0)
            return replace(reply, body=body, headers=(*reply.headers, ("Content-Encoding", "gzip")))
        pages = {"/": app.landing, "/-/healthy": app.healthy, "/-/ready": app.ready}
        page = pages.get(request.path)
        return page() if page else _text(404, "not found")

    def _head(self, reply: Reply, *, close: bool) -> bytes:
        configured = self._access.headers
        overruled = {name.lower() for name, _ in configured}
        headers = [("Server", "coding-agent-exporter"), ("Date", formatdate(usegmt=True)),
                   ("Content-Type", reply.content_type), ("Content-Length", str(len(reply.body))),
                   *configured, *(header for header in reply.headers if header[0].lower() not in overruled)]
        if close:
            headers.append(("Connection", "close"))
        lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
                 *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def _send(self, head: bytes, body: bytes) -> None:
        deadline = time.monotonic() + self._server.limits.write
        # One packet for a short reply, and no second copy of a long one.
        for part in (memoryview(head + body[:_CHUNK]), memoryview(body)[_CHUNK:]):
            self._send_part(part, deadline)

    def _send_part(self, rest: memoryview, deadline: float) -> None:
        try:
            while rest:
                self.waiting_since = now = time.monotonic()
                if now >= deadline:
                    raise TimeoutError("the client does not take its reply")
                self._sock.settimeout(deadline - now)
                rest = rest[self._sock.send(rest[:_CHUNK]):]
        except OSError:
            # Close with a reset: the kernel would keep megabytes for a client that takes none of them.
            with suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            raise

    def _linger(self) -> None:
        """Read on for a moment, and throw it away: closing with bytes unread would take the reply back."""
        self.waits_for_request = True
        with suppress(OSError):
            # Below TLS: what these bytes say matters to nobody any more.
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            deadline = time.monotonic() + _LINGER
            while (left := deadline - time.monotonic()) > 0:
                self._sock.settimeout(left)
                if not socket.socket.recv(self._sock, _CHUNK):
                    return


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def _text(status: int, text: str, *headers: tuple[str, str]) -> Reply:
    return Reply(status, _TEXT, f"{text}\n".encode(), headers)
