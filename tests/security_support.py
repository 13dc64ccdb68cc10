"""Takes what an attacker has (files to write, a network to send to), gives the security tests the attacks."""

from __future__ import annotations

import datetime
import os
import random
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from otlp_receiver import HttpReceiver
from web_support import DEADLINE, Authority

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LONG = os.environ.get("ENDURANCE") == "1"
"""Whether the long form is asked for."""

_SWAPPER = """
import ctypes, os, random, sys

libc = ctypes.CDLL(None, use_errno=True)

def exchange(one, other):
    # AT_FDCWD, RENAME_EXCHANGE: at no instant is either name missing.
    try:
        if libc.renameat2(-100, one, -100, other, 2) == 0:
            return
    except AttributeError:
        pass
    beside = other + b".beside"
    for source, target in ((one, beside), (other, one), (beside, other)):
        os.rename(source, target)

names = [os.fsencode(name) for name in sys.argv[1:]]
pairs = list(zip(names[::2], names[1::2]))
chance = random.Random(7)
print("ready", flush=True)
while True:
    # An even number of times, so that what is where does not depend on when this ends.
    one, other = chance.choice(pairs)
    for _ in range(2 * chance.randrange(1, 20)):
        exchange(one, other)
        for _ in range(chance.randrange(300)):
            pass
"""


class Collector(HttpReceiver):
    """A collector that keeps what it is sent, spans or metrics, in `raw`, and asks no questions."""

    def decode(self, body: bytes) -> tuple[Any, list[Any], list[Any]]:
        return body, [], []


@contextmanager
def swapping(*pairs: tuple[Path, Path]) -> Iterator[None]:
    """Another process exchanges the two names of each pair, as fast as it can, until the block ends."""
    names = [str(name) for pair in pairs for name in pair]
    process = subprocess.Popen([sys.executable, "-c", _SWAPPER, *names], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.poll() is None, "the attack ended early"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Alert:
    """A TLS alert: what a server says when it refuses a handshake."""

    code: int

    def __str__(self) -> str:
        return f"alert {self.code}"


HANDSHAKE_FAILURE, PROTOCOL_VERSION, INAPPROPRIATE_FALLBACK = Alert(40), Alert(70), Alert(86)

FALLBACK_SCSV = 0x5600
"""The suite by which a client says that it has tried a higher version before."""

ECDHE_ECDSA_AES128_GCM = 0xC02B


def _vector(width: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return len(body).to_bytes(width) + body


def _extension(number: int, body: bytes) -> bytes:
    return number.to_bytes(2) + _vector(2, body)


def client_hello(version: int, suites: Sequence[int], *, compression: bytes = b"\0") -> bytes:
    """The record of a ClientHello up to TLS 1.2, written by hand: no library decides what it may offer.

    `version` is 0x0300 for SSL 3.0, 0x0301 for TLS 1.0 and so on.
    """
    extensions = b"".join((
        _extension(10, _vector(2, bytes.fromhex("001d00170018"))),  # groups: X25519, P-256, P-384
        _extension(11, _vector(1, b"\0")),  # points are not compressed
        # What the server's key can sign: ECDSA with SHA-256 and others, and with SHA-1 for old versions.
        _extension(13, _vector(2, bytes.fromhex("0403050306030203"))),
    ))
    body = b"".join((
        version.to_bytes(2), random.Random(version).randbytes(32), _vector(1),
        _vector(2, *(suite.to_bytes(2) for suite in suites)), _vector(1, compression), _vector(2, extensions)))
    return b"\x16" + min(version, 0x0301).to_bytes(2) + _vector(2, b"\x01" + _vector(3, body))


@dataclass(frozen=True)
class ServerHello:
    """What the server chose."""

    version: int
    random: bytes
    suite: int
    compression: int


def hello(port: int, record: bytes) -> ServerHello | Alert | None:
    """Send a ClientHello; what the server answers. None: it closed without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client, suppress(ConnectionResetError):
        client.sendall(record)
        with client.makefile("rb") as stream:
            head = stream.read(5)
            body = stream.read(int.from_bytes(head[3:])) if len(head) == 5 else b""
        if head[:1] == b"\x15" and len(body) == 2:
            return Alert(body[1])
        if head[:1] == b"\x16" and body[:1] == b"\x02":
            session = body[38]
            rest = body[39 + session:]
            return ServerHello(int.from_bytes(body[4:6]), body[6:38], int.from_bytes(rest[:2]), rest[2])
    return None


def certificate(authority: Authority, name: str, *, days: tuple[float, float] = (-1, 1),
                usage: x509.ObjectIdentifier | None = None, self_signed: bool = False) -> Path:
    """A client's certificate with its key, in one PEM file: as good as it is said to be here.

    `days`: from when to when it is valid, counted from now. `usage`: all that it may be used for. `self_signed`: it
    names the authority as its issuer, and is signed by the client.
    """
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    start, end = (now + datetime.timedelta(days=day) for day in days)
    builder = (x509.CertificateBuilder()
               .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
               .issuer_name(authority._subject).public_key(key.public_key())
               .serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
               .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
               .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False))
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = builder.sign(key if self_signed else authority._key, hashes.SHA256())
    path = authority.certificate.with_name(f"{name}.pem")
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path
