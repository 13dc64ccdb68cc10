"""Takes listen addresses and an `App`, gives connections their threads, and takes their places away again.

One thread accepts, and never waits on a client. Connections are bounded: when all places are taken, the one
that has waited on its client longest makes room (waiting for a request, or `STALLED` seconds without taking a
byte of its reply). One that works on a reply is left alone; if all do, the newcomer gets 503.
"""

from __future__ import annotations

import errno
import logging
import math
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING

from coding_agent_exporter.web.access import Access, Watched
from coding_agent_exporter.web.connection import App, Connection, Limits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

STALLED = 2.0
"""Seconds without progress after which a reply's place may be given to another client."""
_STACK = 1024 * 1024
_BACKLOG = 512


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen. An empty host, or `::`, is every interface, IPv6 and IPv4 where the system has both.

    Raises OSError with the address in its message.
    """
    try:
        if host in {"", "::"} and socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("::", port), family=socket.AF_INET6, backlog=_BACKLOG,
                                            dualstack_ipv6=True)
            except OSError as error:
                if host or error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
        if not host:
            return socket.create_server(("", port), backlog=_BACKLOG)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        reason = getattr(error, "strerror", None) or str(error)
        number = getattr(error, "errno", None) or errno.EINVAL
        raise OSError(number, f"cannot listen on {shown}: {reason}") from error


class Server:
    """An HTTP server over one `App`. `addresses` are the bound ones, with real ports, once it is started."""

    def __init__(self, addresses: Sequence[tuple[str, int]], app: App, *, telemetry_path: str = "/metrics",
                 web_config: Path | None = None, max_connections: int = 128, read_timeout: float = 10.0,
                 write_timeout: float = 30.0, idle_timeout: float = 300.0) -> None:
        """Timeouts are seconds, see `Limits`. Raises webconfig.WebConfigError."""
        self.app: App = app
        self.telemetry_path = telemetry_path
        self.limits = Limits(read_timeout, write_timeout, idle_timeout)
        self.addresses: list[tuple[str, int]] = []
        self.errors = 0
        """Exceptions that the app, or a `sent`, or this server itself did not catch."""
        self.refused = 0
        """Connections turned away because every place was busy."""
        self.stopping = False
        self._wanted, self._max = list(addresses), max_connections
        self._watched = Watched(web_config) if web_config else None
        self._listeners: list[socket.socket] = []
        self._places = threading.Condition()
        self._connections: set[Connection] = set()
        self._acceptor: threading.Thread | None = None
        self._wake: socket.socket | None = None
        self._starved = False

    def start(self) -> None:
        """Bind every address, then accept in the background. Raises OSError with a message for people."""
        try:
            for host, port in self._wanted:
                listener = listen(host, port)
                listener.settimeout(0)
                self._listeners.append(listener)
        except OSError:
            for listener in self._listeners:
                listener.close()
            raise
        self.addresses = [listener.getsockname()[:2] for listener in self._listeners]
        waker, self._wake = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, args=(waker,), name="web-accept", daemon=True)
        self._acceptor.start()

    def stop(self, grace: float = 5.0) -> None:
        """Stop accepting, close what waits, give running replies `grace` seconds, cut off what is left."""
        self.stopping = True
        if self._wake and self._acceptor:
            self._wake.close()
            self._acceptor.join()
        with self._places:
            for connection in self._connections:
                if connection.waits_for_request:
                    connection.cut()
            self._places.wait_for(lambda: not self._connections, grace)
            for connection in self._connections:
                connection.cut()
            self._places.wait_for(lambda: not self._connections, 1.0)

    def access(self) -> Access:
        """What the web configuration says now; everything is open without one."""
        return self._watched.access() if self._watched else Access()

    def failed(self, what: str, error: Exception) -> None:
        """Count and log an exception that nobody else will see."""
        with self._places:
            self.errors += 1
        _log.error("%s failed: %s: %s", what, type(error).__name__, error)
        _log.debug("%s failed", what, exc_info=error)

    def leave(self, connection: Connection) -> None:
        """Give a connection's place back; it closes its socket."""
        with self._places:
            connection.close()
            self._connections.discard(connection)
            self._places.notify_all()

    def begin(self, connection: Connection) -> bool:
        """Mark a connection as working on a reply; False when it was chosen to make room meanwhile."""
        with self._places:
            connection.waits_for_request = False
            connection.waiting_since = math.inf
            return not connection.is_cut

    def _make_room(self) -> bool:
        """Cut the connection that has waited on its client longest, if there is one; the lock is held."""
        stalled = time.monotonic() - STALLED
        waiting = [one for one in self._connections if one.waits_for_request or one.waiting_since <= stalled]
        if not waiting:
            return False
        victim = min(waiting, key=lambda one: (not one.waits_for_request, one.waiting_since))
        victim.cut()
        self._connections.discard(victim)
        return True

    def _accept(self, waker: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, waker:
            selector.register(waker, selectors.EVENT_READ)  # readable once stop() has closed the other end
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            while not self.stopping:
                for key, _ in selector.select():
                    if key.data is None:
                        continue
                    try:
                        self._accept_one(key.data)
                    except Exception as error:  # noqa: BLE001 - no accident may end this thread: counted, logged
                        self.failed("accepting a connection", error)
        for listener in self._listeners:
            listener.close()

    def _accept_one(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                if not self._starved:  # one line, not ten a second
                    self.failed("accepting a connection", error)
                self._starved = True
                with self._places:
                    self._make_room()
                    # The newcomer stays in the system's queue: without a pause this loop would spin.
                    self._places.wait(0.1)
            return
        self._starved = False
        connection = Connection(self, sock)
        with self._places:
            admitted = len(self._connections) < self._max or self._make_room()
            if admitted:
                self._connections.add(connection)
            else:
                self.refused += 1
        if not admitted:
            connection.refuse(tls=self._watched is not None and self._watched.tls)
            return
        stack = threading.stack_size(_STACK)
        try:
            threading.Thread(target=connection.run, name="web-connection", daemon=True).start()
        except RuntimeError as error:  # the system's limit on threads
            self.failed("starting a thread", error)
            self.leave(connection)
        finally:
            threading.stack_size(stack)
