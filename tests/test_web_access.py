"""TLS, client certificates and their reload, over real sockets."""

from __future__ import annotations

import http.client
import logging
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.web.access import san_allowed
from coding_agent_exporter.webconfig import WebConfigError
from web_support import DEADLINE, Authority, ask, connect, exchange, get, read_all, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coding_agent_exporter.web import Server


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: ca, server (and server2), client, stranger (of another authority)."""
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority(directory, "ca")
    for name in ("server", "server2"):
        authority.issue(name, "127.0.0.1")
    authority.issue("client", "agent.example", "2001:db8::1", "spiffe://example/agent")
    Authority(directory, "other").issue("stranger", "agent.example")
    return directory


def client_tls(pki: Path, name: str = "", **options: object) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ca.crt")
    for option, value in options.items():
        setattr(context, option, value)
    if name:
        context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    return context


@contextmanager
def tls_serving(tmp_path: Path, pki: Path, more: str = "", *, read_timeout: float = DEADLINE,
                max_connections: int = 128) -> Iterator[Server]:
    config = tmp_path / "web.yml"
    config.write_text(f"tls_server_config:\n  cert_file: {pki}/server.crt\n  key_file: {pki}/server.key\n{more}")
    with serving(web_config=config, read_timeout=read_timeout, max_connections=max_connections) as server:
        yield server


def serial(server: Server, context: ssl.SSLContext) -> str:
    """The serial number of the certificate that the server shows."""
    with connect(server) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as client:
        certificate = client.getpeercert()
        assert certificate
        return str(certificate["serialNumber"])


def refused(server: Server, context: ssl.SSLContext) -> bool:
    """Whether a client with these certificates gets no answer. With TLS 1.3 it learns that when it reads."""
    try:
        get(server, tls=context)
    except (OSError, http.client.HTTPException):
        return True
    return False


def test_tls(tmp_path: Path, pki: Path) -> None:
    """With a certificate the server speaks TLS, 1.2 and 1.3; one who does not gets no page."""
    with tls_serving(tmp_path, pki) as server:
        assert get(server, tls=client_tls(pki)).body == b"up 1\n"
        assert get(server, tls=client_tls(pki, maximum_version=ssl.TLSVersion.TLSv1_2)).status == 200
        assert b"HTTP/1.1 200" not in exchange(server, b"GET /metrics HTTP/1.0\r\n\r\n")
        assert server.errors == 0


def test_downgrade(tmp_path: Path, pki: Path) -> None:
    """A client that offers less than TLS 1.2, or than `min_version`, is refused."""
    old = client_tls(pki)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with tls_serving(tmp_path, pki, "  min_version: TLS10\n") as server:
        assert refused(server, old)
        assert get(server, tls=client_tls(pki)).status == 200
    with tls_serving(tmp_path, pki, "  min_version: TLS13\n") as server:
        assert refused(server, client_tls(pki, maximum_version=ssl.TLSVersion.TLSv1_2))
        assert get(server, tls=client_tls(pki)).status == 200


def test_cipher_suites_and_curve(tmp_path: Path, pki: Path) -> None:
    """The suite of TLS 1.2 and the curve that are configured are those that are used."""
    with tls_serving(tmp_path, pki, "  cipher_suites: [TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256]\n"
                                    "  curve_preferences: [CurveP384]\n  max_version: TLS12\n") as server:
        with connect(server) as raw, client_tls(pki).wrap_socket(raw, server_hostname="127.0.0.1") as client:
            assert client.cipher() == ("ECDHE-ECDSA-CHACHA20-POLY1305", "TLSv1.2", 256)
        other = client_tls(pki)
        other.set_ecdh_curve("prime256v1")
        assert refused(server, other)


def test_unfinished_handshake(tmp_path: Path, pki: Path) -> None:
    """A client that never finishes its handshake holds nobody up, and is closed when its time is over."""
    with tls_serving(tmp_path, pki, read_timeout=0.5) as server, connect(server) as silent, connect(server) as half:
        half.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
        assert get(server, tls=client_tls(pki)).status == 200
        assert read_all(silent) == read_all(half) == b""
        assert server.errors == 0


def test_unfinished_handshakes_make_room(tmp_path: Path, pki: Path) -> None:
    """However many clients do not finish their handshake, the next one is served."""
    with tls_serving(tmp_path, pki, max_connections=4) as server:
        silent = [connect(server) for _ in range(20)]
        assert get(server, tls=client_tls(pki)).status == 200
        for client in silent:
            client.close()


@pytest.mark.parametrize(("policy", "nobody", "client", "stranger"), [
    ("NoClientCert", True, True, True),
    ("RequestClientCert", True, True, True),
    ("VerifyClientCertIfGiven", True, True, False),
    ("RequireAndVerifyClientCert", False, True, False),
])
def test_client_certificates(tmp_path: Path, pki: Path, policy: str, *, nobody: bool, client: bool,
                             stranger: bool) -> None:
    """Each policy lets in whom it should: without a certificate, with a good one, with a stranger's."""
    more = f"  client_auth_type: {policy}\n" + (f"  client_ca_file: {pki}/ca.crt\n" if policy != "NoClientCert" else "")
    with tls_serving(tmp_path, pki, more) as server:
        assert refused(server, client_tls(pki)) is not nobody
        assert refused(server, client_tls(pki, "client")) is not client
        assert refused(server, client_tls(pki, "stranger")) is not stranger
        assert server.errors == 0


@pytest.mark.parametrize(("sans", "allowed"), [
    ("agent.example", True), ('"2001:db8::1"', True), ("spiffe://example/agent", True),
    ("nobody, agent.example", True), ("nobody", False), ("", False)])
def test_client_names(tmp_path: Path, pki: Path, sans: str, *, allowed: bool) -> None:
    """With `client_allowed_sans` the certificate needs one of these names; an empty list lets nobody in."""
    more = (f"  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: {pki}/ca.crt\n"
            f"  client_allowed_sans: [{sans}]\n")
    with tls_serving(tmp_path, pki, more) as server:
        assert refused(server, client_tls(pki, "client")) is not allowed


def test_san_allowed() -> None:
    """Names are compared exactly, addresses in their usual form; a certificate without names has none."""
    assert san_allowed({"subjectAltName": (("IP Address", "10.0.0.1\n"),)}, ("10.0.0.1",))
    assert not san_allowed({"subjectAltName": (("DNS", "a.b"),)}, ("b", "A.B"))
    assert not san_allowed({"subjectAltName": (("Registered ID", "1.2"),)}, ("1.2",))
    assert not san_allowed({}, ("",))
    assert not san_allowed(None, ("",))


def test_inline(tmp_path: Path, pki: Path) -> None:
    """Certificate, key and client CA may stand in the file itself."""
    lines = ["tls_server_config:", "  client_auth_type: RequireAndVerifyClientCert"]
    for key, file in (("cert", "server.crt"), ("key", "server.key"), ("client_ca", "ca.crt")):
        lines += [f"  {key}: |", *(f"    {line}" for line in (pki / file).read_text().splitlines())]
    config = tmp_path / "web.yml"
    config.write_text("\n".join(lines))
    with serving(web_config=config) as server:
        assert get(server, tls=client_tls(pki, "client")).status == 200
        assert refused(server, client_tls(pki))


def test_certificate_reload(tmp_path: Path, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new certificate is shown to the next connection. One that does not fit its key fails handshakes and is
    reported once, while open connections go on; mended, all is well. No restart is needed."""
    for suffix in ("crt", "key"):
        (tmp_path / f"server.{suffix}").write_bytes((pki / f"server.{suffix}").read_bytes())
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    with serving(web_config=config) as server:
        host, port = server.addresses[0]
        old = http.client.HTTPSConnection(host, port, timeout=DEADLINE, context=client_tls(pki))
        assert ask(old).status == 200
        first = serial(server, client_tls(pki))
        (tmp_path / "server.crt").write_bytes((pki / "server2.crt").read_bytes())
        with caplog.at_level(logging.INFO):
            assert refused(server, client_tls(pki))
            assert refused(server, client_tls(pki))
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "key values mismatch" in caplog.text
        assert ask(old).status == 200
        (tmp_path / "server.key").write_bytes((pki / "server2.key").read_bytes())
        assert serial(server, client_tls(pki)) != first
        assert ask(old).status == 200
        old.close()


def test_tls_stays(tmp_path: Path, pki: Path) -> None:
    """A file that is empty for a moment, or has lost its TLS, opens nothing: handshakes fail until it is back."""
    with tls_serving(tmp_path, pki) as server:
        config = tmp_path / "web.yml"
        text = config.read_text()
        host, port = server.addresses[0]
        old = http.client.HTTPSConnection(host, port, timeout=DEADLINE, context=client_tls(pki))
        assert ask(old).status == 200
        config.write_text("")
        assert ask(old).status == 500
        assert refused(server, client_tls(pki))
        assert exchange(server, b"GET /metrics HTTP/1.0\r\n\r\n") == b""
        config.write_text(text)
        assert ask(old).status == 200
        assert get(server, tls=client_tls(pki)).status == 200
        old.close()


def test_tls_added(tmp_path: Path, pki: Path) -> None:
    """TLS that is added later holds for the next connection; a plain one that is still open is closed."""
    config = tmp_path / "web.yml"
    config.write_text("")
    with serving(web_config=config) as server, connect(server) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert plain.recv(65536).startswith(b"HTTP/1.1 200 ")
        config.write_text(f"tls_server_config: {{cert_file: {pki}/server.crt, key_file: {pki}/server.key}}\n")
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(plain) == b""
        assert get(server, tls=client_tls(pki)).status == 200


def test_encrypted_key(tmp_path: Path, pki: Path) -> None:
    """A key with a passphrase is an error in one line, not a question on the terminal."""
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key((pki / "server.key").read_bytes(), None)
    (tmp_path / "k").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8,
                                                   s.BestAvailableEncryption(b"secret")))
    config = tmp_path / "web.yml"
    config.write_text(f"tls_server_config: {{cert_file: {pki}/server.crt, key_file: k}}\n")
    with pytest.raises(WebConfigError, match="the key is encrypted"), serving(web_config=config):
        pass


@pytest.mark.parametrize(("more", "message"), [
    ("client_ca_file: missing.crt, client_auth_type: VerifyClientCertIfGiven", "missing.crt: No such file"),
    ("client_ca_file: web.yml, client_auth_type: VerifyClientCertIfGiven", "cannot be used: no certificate or crl"),
    ("curve_preferences: [X25519, CurveP256]", "can be given one curve, not a list"),
])
def test_refused_by_ssl(tmp_path: Path, pki: Path, more: str, message: str) -> None:
    """What ssl cannot do, or read, is an error at the start, with the file that asked for it."""
    config = tmp_path / "web.yml"
    config.write_text(f"tls_server_config: {{cert_file: {pki}/server.crt, key_file: {pki}/server.key, {more}}}\n")
    if hasattr(ssl.SSLContext, "set_groups") and "curve" in more:
        pytest.skip("this Python can set a list")
    with pytest.raises(WebConfigError, match=message) as caught, serving(web_config=config):
        pass
    assert str(config) in str(caught.value)
    assert "\n" not in str(caught.value)
