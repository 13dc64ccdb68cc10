"""Takes nothing, gives the web tests an app to serve, clients of several manners, and certificates."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coding_agent_exporter.web import Reply, Server

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE = 20.0
"""Seconds after which a test gives up; nothing that works takes nearly as long."""


@dataclass
class FakeApp:
    """Answers with `body`. While `gate` is closed, scrapes wait inside the app; `entered` counts them."""

    body: bytes = b"up 1\n"
    failure: Exception | None = None
    sent_failure: Exception | None = None
    seen: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sent: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.gate.set()

    def metrics(self, accept: str, names: frozenset[str], timeout: float | None) -> Reply:
        self.seen.append((accept, names))
        self.timeouts.append(timeout)
        self.entered.release()
        assert self.gate.wait(DEADLINE)
        if self.failure:
            raise self.failure
        return Reply(200, "text/plain; version=0.0.4", self.body, sent=self._sent)

    def _sent(self) -> None:
        self.sent.release()
        if self.sent_failure:
            raise self.sent_failure

    def landing(self) -> Reply:
        return Reply(200, "text/html; charset=utf-8", b"<!DOCTYPE html>", (("Content-Security-Policy", "own"),))

    def healthy(self) -> Reply:
        return Reply(200, "text/plain", b"healthy\n")

    def ready(self) -> Reply:
        return Reply(503, "text/plain", b"not yet\n")


@contextmanager
def serving(app: FakeApp | None = None, *, host: str = "127.0.0.1", telemetry_path: str = "/metrics",
            web_config: Path | None = None, max_connections: int = 128, read_timeout: float = DEADLINE,
            write_timeout: float = DEADLINE) -> Iterator[Server]:
    """A started server on a free port, stopped at the end."""
    server = Server([(host, 0)], app or FakeApp(), telemetry_path=telemetry_path, web_config=web_config,
                    max_connections=max_connections, read_timeout=read_timeout, write_timeout=write_timeout)
    server.start()
    try:
        yield server
    finally:
        server.stop(grace=1.0)


def connect(server: Server) -> socket.socket:
    host, port = server.addresses[0]
    return socket.create_connection((host, port), timeout=DEADLINE)


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes; a reset counts as closing."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def read_until(client: socket.socket, end: bytes) -> bytes:
    """What comes until it ends so; a reply may come in several pieces."""
    received = b""
    while not received.endswith(end) and (data := client.recv(65536)):
        received += data
    return received


def exchange(server: Server, request: bytes) -> bytes:
    """Send bytes on a connection of their own, and give everything that comes back until it is closed."""
    with connect(server) as client:
        client.sendall(request)
        return read_all(client)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def get(server: Server, path: str = "/metrics", *, method: str = "GET", tls: ssl.SSLContext | None = None,
        **headers: str) -> Answer:
    """One request on a connection of its own; underscores in header names stand for hyphens."""
    host, port = server.addresses[0]
    client = (http.client.HTTPSConnection(host, port, timeout=DEADLINE, context=tls) if tls
              else http.client.HTTPConnection(host, port, timeout=DEADLINE))
    try:
        return ask(client, path, method=method, **headers)
    finally:
        client.close()


def ask(client: http.client.HTTPConnection, path: str = "/metrics", *, method: str = "GET", **headers: str) -> Answer:
    """One request on an open connection."""
    client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = client.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.005)


class Authority:
    """A certificate authority that lives for one test run."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = directory / f"{name}.crt"
        self.certificate.write_bytes(self._pem(self._build(self._subject, self._key, [], ca=True)))

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """A certificate and its key, with `names` (IP addresses, URIs, else DNS names) as alternative names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, path = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        certificate.write_bytes(self._pem(self._build(subject, key, [_general_name(name) for name in names])))
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                           serialization.NoEncryption()))
        return certificate, path

    def _build(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName], *,
               ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject)
                   .public_key(key.public_key()).serial_number(x509.random_serial_number())
                   .not_valid_before(now - datetime.timedelta(hours=1))
                   .not_valid_after(now + datetime.timedelta(hours=1))
                   .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
                   .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                                  critical=False))
        if ca:
            builder = builder.add_extension(x509.KeyUsage(
                digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False),
                critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _pem(certificate: x509.Certificate) -> bytes:
        return certificate.public_bytes(serialization.Encoding.PEM)


def _general_name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
