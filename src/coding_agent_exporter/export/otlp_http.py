"""Takes request bytes from delivery, gives them to a collector over HTTP, and its answer back.

The official exporter is not used: export() sleeps and retries inside (in each version differently), and tells
neither the status, nor Retry-After, nor a partial success; it also takes a redirect for delivery. The client is
the standard library's, which this process has loaded anyway: requests would cost 6 MB, and neither it nor urllib3
can end a request in time that a server feeds a byte at a time.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import select
import socket
import ssl
import threading
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from coding_agent_exporter.export import wire
from coding_agent_exporter.export.answer import Answer, Kind, http_kind, one_line, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.export.target import Target

MAX_ANSWER = 1024 * 1024
"""Bytes of an answer that are read. One that is longer is not an OTLP response."""


class HttpTransport:
    """One connection, kept alive between requests. `wall` gives epoch seconds."""

    def __init__(self, target: Target, agent: str, wall: Callable[[], float]) -> None:
        self._target, self._wall = target, wall
        self._parts = urlsplit(target.url)
        self._headers = {**target.headers, "content-type": "application/x-protobuf", "user-agent": agent}
        if target.gzip:
            self._headers["content-encoding"] = "gzip"
        self._connection: http.client.HTTPConnection | None = None
        self._cut = False

    def send(self, body: bytes, timeout: float) -> Answer:
        """One request, answered or given up within about `timeout` seconds. Raises nothing that a network can cause."""
        if self._target.gzip:
            body = gzip.compress(body, 6)
        self._cut = False
        # A socket's timeout starts again with each byte. This one does not.
        watchdog = threading.Timer(timeout, self.cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            answer = self._exchange(body, timeout)
        except ssl.SSLCertVerificationError as error:
            answer = Answer(Kind.HOLD, f"TLS: {error.verify_message}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer = Answer(Kind.AGAIN, self._reason(error))
        finally:
            watchdog.cancel()
        if answer.kind is not Kind.ACCEPTED:
            # Also for a plain refusal: whoever repairs it may do so behind another address or certificate.
            self.close()
        return answer

    def cut(self) -> None:
        """End a request that another thread is in."""
        self._cut = True
        connection = self._connection
        sock = connection.sock if connection else None
        if sock is not None:
            # It may be closed already, which is what was wanted.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Drop the connection; the next request opens another, and reads the certificate files again."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def _exchange(self, body: bytes, timeout: float) -> Answer:
        connection, path = self._ready(timeout)
        if connection.sock is None:
            connection.connect()
        if self._cut:
            raise TimeoutError
        connection.request("POST", path, body, self._headers)
        response = connection.getresponse()
        data = response.read(MAX_ANSWER)
        if self._cut:
            raise TimeoutError
        # http.client takes a connection that ends early for the end of the headers, and read(n) for that of the body.
        framed = response.status == 204 or response.chunked or "content-length" in response.headers
        complete = framed and not response.length
        if response.will_close or not response.isclosed():
            self.close()
        if not 200 <= response.status < 300:
            said = self._said(data)
            return Answer(http_kind(response.status), f"HTTP {response.status}{': ' if said else ''}{said}",
                          retry_after=retry_after({name.lower(): value for name, value in response.getheaders()},
                                                  self._wall()))
        if not complete:
            return Answer(Kind.AGAIN, "the answer is incomplete")
        return self._accepted(data, response.headers.get_content_type() if response.headers["content-type"] else "")

    def _accepted(self, data: bytes, content_type: str) -> Answer:
        """A success is believed when its body could be a collector's: a log-in page says 200 as well."""
        if not data:
            return Answer(Kind.ACCEPTED)
        try:
            if content_type == "application/json":
                rejected, message = _json_partial_success(data)
            elif content_type in {"application/x-protobuf", "application/protobuf", ""}:
                rejected, message = wire.partial_success(data)
            elif content_type == "text/html":
                return Answer(Kind.HOLD, "a web page answers at the endpoint, not a collector")
            else:
                return Answer(Kind.ACCEPTED)
        except ValueError:
            return Answer(Kind.AGAIN, "a success whose body is no OTLP response")
        return Answer(Kind.ACCEPTED, self._said(message), rejected)

    def _ready(self, timeout: float) -> tuple[http.client.HTTPConnection, str]:
        path = self._parts._replace(scheme="", netloc="").geturl()
        proxy = urlsplit(self._target.proxy) if self._target.proxy else None
        if proxy and not self._target.tls:
            path = self._target.url
        if self._connection and (self._connection.sock is None or _hung_up(self._connection.sock)):
            self.close()
        if self._connection and self._connection.sock:
            self._connection.sock.settimeout(timeout)
            return self._connection, path
        host, port = self._parts.hostname or "", self._parts.port
        reached, at = (proxy.hostname or "", proxy.port or 80) if proxy else (host, port)
        credentials = {}
        if proxy and proxy.username:
            pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
            credentials = {"proxy-authorization": f"Basic {base64.b64encode(pair).decode()}"}
        if self._target.tls:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                reached, at, timeout=timeout, context=self._context())
            if proxy:
                connection.set_tunnel(host, port or 443, credentials)
        else:
            connection = http.client.HTTPConnection(reached, at, timeout=timeout)
            self._headers.update(credentials)
        self._connection = connection
        return connection, path

    def _context(self) -> ssl.SSLContext:
        target = self._target
        context = ssl.create_default_context(cafile=target.ca_file)
        if target.certificate_file:
            # The password is for a key that has one: without it OpenSSL asks on the terminal.
            context.load_cert_chain(target.certificate_file, target.key_file, password="")
        return context

    def _reason(self, error: Exception) -> str:
        if self._cut or isinstance(error, TimeoutError):
            return "no answer in time"
        if isinstance(error, http.client.HTTPException):
            return f"no HTTP answer: {type(error).__name__}"
        return self._said((error.strerror if isinstance(error, OSError) else None) or str(error) or
                          type(error).__name__)

    def _said(self, text: str | bytes) -> str:
        return self._target.hidden(one_line(text))


def _hung_up(sock: socket.socket) -> bool:
    """The server has closed an idle connection, or sent something that nobody asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _json_partial_success(data: bytes) -> tuple[int, str]:
    """The same in JSON, where a 64-bit number may be a string. Raises ValueError."""
    document = json.loads(data)
    partial = document.get("partialSuccess") if isinstance(document, dict) else None
    if not isinstance(partial, dict):
        return 0, ""
    rejected = next((partial[name] for name in ("rejectedSpans", "rejectedDataPoints") if name in partial), 0)
    return int(rejected) if isinstance(rejected, int | str) else 0, str(partial.get("errorMessage", ""))
