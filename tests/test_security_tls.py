"""TLS, client certificates and passwords of the real program, from outside.

The hellos of old and weak clients are written by hand: a modern library may refuse to offer what has to be refused.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import bcrypt
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from process_support import DEADLINE, Exporter
from security_support import (
    ECDHE_ECDSA_AES128_GCM,
    FALLBACK_SCSV,
    HANDSHAKE_FAILURE,
    INAPPROPRIATE_FALLBACK,
    PROTOCOL_VERSION,
    ServerHello,
    certificate,
    client_hello,
    hello,
)
from web_support import Authority, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COST = 11
"""Of the password hashes: some 100 ms each, so that comparing is most of what a request takes."""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: the server's, and clients' that are good, or bad in one way each."""
    directory = tmp_path_factory.mktemp("pki")
    authority, other = Authority(directory, "ca"), Authority(directory, "other")
    authority.issue("server", "127.0.0.1")
    certificate(authority, "good")
    certificate(authority, "expired", days=(-2, -1))
    certificate(authority, "early", days=(1, 2))
    certificate(authority, "forged", self_signed=True)
    certificate(authority, "of-a-server", usage=ExtendedKeyUsageOID.SERVER_AUTH)
    certificate(other, "stranger")
    return directory


@pytest.fixture(scope="module")
def secured(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    """The program with TLS and nothing else."""
    home = tmp_path_factory.mktemp("tls")
    with Exporter(home, f"--web.config.file={web_config(home, pki)}") as exporter:
        yield exporter


def web_config(home: Path, pki: Path, more: str = "") -> Path:
    path = home / "web.yml"
    path.write_text(f"tls_server_config:\n  cert_file: {pki}/server.crt\n  key_file: {pki}/server.key\n{more}")
    return path


def trusting(pki: Path, client: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ca.crt")
    if client:
        context.load_cert_chain(pki / f"{client}.pem")
    return context


def status(exporter: Exporter, context: ssl.SSLContext | None, authorization: str = "") -> int:
    """Of a scrape; 0: the connection was refused."""
    client = (http.client.HTTPSConnection("127.0.0.1", exporter.port, timeout=DEADLINE, context=context) if context
              else http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE))
    try:
        client.request("GET", "/metrics", headers={"Authorization": authorization} if authorization else {})
        return client.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        client.close()


@pytest.mark.parametrize("version", [0x0300, 0x0301, 0x0302], ids=["SSL 3.0", "TLS 1.0", "TLS 1.1"])
def test_old_versions_are_refused(secured: Exporter, pki: Path, version: int) -> None:
    """A client that speaks nothing newer is turned away, whatever suites it offers."""
    suites = [0xC009, 0xC00A, 0xC013, 0xC014, 0x002F, 0x0035, ECDHE_ECDSA_AES128_GCM]
    answers = {PROTOCOL_VERSION, HANDSHAKE_FAILURE} if version == 0x0300 else {PROTOCOL_VERSION}
    assert hello(secured.port, client_hello(version, suites)) in answers
    assert status(secured, trusting(pki)) == 200


def test_ssl_2_is_refused(secured: Exporter) -> None:
    """Its hello has another form; it gets no session either."""
    body = b"\x01\x00\x02" + b"\x00\x03\x00\x00\x00\x10" + b"\x07\x00\xc0" + b"c" * 16
    answer = hello(secured.port, (0x8000 | len(body)).to_bytes(2) + body)
    assert not isinstance(answer, ServerHello)


def test_a_downgrade_is_noticed(secured: Exporter) -> None:
    """A client that falls back to TLS 1.2 and says so is refused; one that does not say so can tell by the server's
    random number that both could have spoken TLS 1.3 (RFC 8446, 4.1.3)."""
    suites = [ECDHE_ECDSA_AES128_GCM]
    assert hello(secured.port, client_hello(0x0303, [*suites, FALLBACK_SCSV])) == INAPPROPRIATE_FALLBACK
    answer = hello(secured.port, client_hello(0x0303, suites))
    assert isinstance(answer, ServerHello)
    assert (answer.version, answer.suite) == (0x0303, ECDHE_ECDSA_AES128_GCM)
    assert answer.random.endswith(b"DOWNGRD\x01")


@pytest.mark.parametrize("suites", [
    [0x0005, 0xC007, 0xC011],  # RC4
    [0x000A, 0xC008, 0xC012],  # triple DES: blocks of 64 bits
    [0x0001, 0x0002, 0x003B, 0xC006, 0xC010],  # no encryption
    [0x0018, 0x001B, 0x0034, 0xC018, 0xC019],  # nobody is authenticated
    [0x0003, 0x0006, 0x0008, 0x0014],  # export grade
    [0xC009, 0xC00A],  # CBC with SHA-1
], ids=["RC4", "3DES", "NULL", "anonymous", "export", "CBC-SHA1"])
def test_weak_suites_are_refused(secured: Exporter, suites: list[int]) -> None:
    """A client of TLS 1.2 that offers nothing better gets no session."""
    assert hello(secured.port, client_hello(0x0303, suites)) == HANDSHAKE_FAILURE


def test_nothing_is_compressed(secured: Exporter) -> None:
    """Compression below encryption tells secrets by length: the server takes none where it is offered."""
    answer = hello(secured.port, client_hello(0x0303, [ECDHE_ECDSA_AES128_GCM], compression=b"\1\0"))
    assert isinstance(answer, ServerHello)
    assert answer.compression == 0


def test_a_session_is_not_renegotiated(secured: Exporter, pki: Path, tool: Callable[[str], str]) -> None:
    """A client of TLS 1.2 that asks for a new handshake within its session is refused, not served at our cost."""
    program = tool("openssl")
    # s_client renegotiates on a line that begins with R.
    done = subprocess.run(
        [program, "s_client", "-connect", f"127.0.0.1:{secured.port}", "-tls1_2", "-CAfile", pki / "ca.crt",
         "-verify_return_error", "-verify_ip", "127.0.0.1"],
        input=b"R\n", capture_output=True, timeout=DEADLINE, check=False)
    said = done.stdout + done.stderr
    assert b"Verify return code: 0 (ok)" in said, "there was a session"
    assert b"RENEGOTIATING" in said
    assert b"no renegotiation" in said


def test_a_session_is_not_resumed(secured: Exporter, pki: Path) -> None:
    """Each connection shows its certificate anew: one that is no longer allowed is not let in by its last session."""
    context = trusting(pki)
    session = None
    for _ in range(2):
        with (socket.create_connection(("127.0.0.1", secured.port), timeout=DEADLINE) as raw,
              context.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as client):
            client.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            while client.recv(4096):
                pass
            assert not client.session_reused
            session = client.session


def test_plain_http_gets_nothing(secured: Exporter) -> None:
    """On a port with TLS a plain request is answered by an alert or by silence, never by a page."""
    with socket.create_connection(("127.0.0.1", secured.port), timeout=DEADLINE) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_all(client)
    assert b"HTTP" not in answer
    assert b"coding_agent" not in answer
    assert len(answer) < 16


@pytest.mark.parametrize(("client", "let_in"), [
    ("good", True), ("", False), ("expired", False), ("early", False), ("forged", False), ("of-a-server", False),
    ("stranger", False)])
def test_client_certificates(tmp_path: Path, pki: Path, client: str, *, let_in: bool) -> None:
    """With RequireAndVerifyClientCert only a certificate that is valid now, of the right authority, and meant for
    clients opens the door."""
    config = web_config(tmp_path, pki, "  client_auth_type: RequireAndVerifyClientCert\n"
                                       f"  client_ca_file: {pki}/ca.crt\n")
    with Exporter(tmp_path, f"--web.config.file={config}") as exporter:
        assert status(exporter, trusting(pki, client)) == (200 if let_in else 0)
        assert status(exporter, trusting(pki, "good")) == 200
        assert not exporter.logged("level=error")


def test_a_certificate_is_taken_back_by_its_name(tmp_path: Path, pki: Path) -> None:
    """Revocation lists are not read; a name that is taken off client_allowed_sans is out with its next connection."""
    def allow(name: str) -> Path:
        return web_config(tmp_path, pki, "  client_auth_type: RequireAndVerifyClientCert\n"
                                         f"  client_ca_file: {pki}/ca.crt\n  client_allowed_sans: [{name}]\n")

    with Exporter(tmp_path, f"--web.config.file={allow('good')}") as exporter:
        assert status(exporter, trusting(pki, "good")) == 200
        allow("somebody-else")
        assert status(exporter, trusting(pki, "good")) == 0


def test_an_unknown_user_costs_what_a_wrong_password_costs(tmp_path: Path) -> None:
    """Counted in processor time of the program, not on a clock: who guesses names learns nothing from it."""
    digest = bcrypt.hashpw(b"right", bcrypt.gensalt(COST)).decode()
    config = tmp_path / "web.yml"
    config.write_text(f"basic_auth_users: {{prometheus: {digest}}}\n")
    with Exporter(tmp_path, f"--web.config.file={config}") as exporter:

        def cost(user: str, password: str, count: int = 8) -> float:
            """Seconds of processor time that such requests take, each with another password, all refused."""
            before = cpu_seconds(exporter.pid)
            for number in range(count):
                credentials = base64.b64encode(f"{user}:{password}{number}".encode()).decode()
                assert status(exporter, None, f"Basic {credentials}") == 401
            return cpu_seconds(exporter.pid) - before

        known, unknown, nothing = cost("prometheus", "wrong"), cost("nobody", "wrong"), cost("", "")
        assert known / 2 < unknown < known * 2
        assert known / 2 < nothing < known * 2, "an empty name is a name too"
        before = cpu_seconds(exporter.pid)
        for header in ("", "Basic !", "Bearer x", "Basic " + "A" * 8000):
            assert status(exporter, None, header) == 401
        assert cpu_seconds(exporter.pid) - before < known / 2, "what has no password costs no comparison"


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process so far, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
