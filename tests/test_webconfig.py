"""The exporter-toolkit's web configuration format: what is read, what is refused and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from coding_agent_exporter.web.access import ssl_context
from coding_agent_exporter.webconfig import SUITES, TlsConfig, WebConfig, WebConfigError, load, parse

HASH = "$2y$10$" + "a" * 53
PATH = Path("/etc/exporter/web.yml")
FILES = "cert_file: s.crt, key_file: s.key"


def tls(more: str = "") -> WebConfig:
    return parse(f"tls_server_config: {{{FILES}{', ' if more else ''}{more}}}".encode(), PATH)


def test_full() -> None:
    """Every section is read; names of files are relative to the configuration, absolute ones stay."""
    config = parse(f"""
# A comment.
tls_server_config:
  cert_file: server.crt
  key_file: /keys/server.key
  client_ca_file: ../ca.crt
  client_auth_type: RequireAndVerifyClientCert
  client_allowed_sans: [agent.example, 10.0.0.1]
  min_version: TLS12
  max_version: TLS13
  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]
  prefer_server_cipher_suites: false
  curve_preferences: [X25519]
http_server_config:
  http2: false
  headers:
    Strict-Transport-Security: max-age=1
    X-Frame-Options: sameorigin
    X-XSS-Protection: ""
basic_auth_users:
  prometheus: {HASH}
  on: {HASH}
  1234: {HASH}
rate_limit:
  interval: 1m30.5s
  burst: 3
""".encode(), PATH)
    assert config == WebConfig(
        PATH,
        tls=TlsConfig(
            cert_file=Path("/etc/exporter/server.crt"), key_file=Path("/keys/server.key"),
            client_ca_file=Path("/etc/exporter/../ca.crt"), client_auth="RequireAndVerifyClientCert",
            allowed_sans=("agent.example", "10.0.0.1"), cipher_suites=("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",),
            prefer_server_cipher_suites=False, curves=("X25519",)),
        headers=(("Strict-Transport-Security", "max-age=1"), ("X-Frame-Options", "sameorigin")),
        users={"prometheus": HASH, "on": HASH, "1234": HASH},
        rate_limit=(90.5, 3))
    assert config.files() == (PATH, Path("/etc/exporter/server.crt"), Path("/keys/server.key"),
                              Path("/etc/exporter/../ca.crt"))


@pytest.mark.parametrize("content", [
    "", "# nothing\n", "{}", "tls_server_config:\nbasic_auth_users:\nhttp_server_config: {}\nrate_limit: ~\n",
    "rate_limit: {interval: 0}", "rate_limit: {interval: 0s, burst: 0}"])
def test_empty(content: str) -> None:
    """An empty file, or empty sections, ask for nothing."""
    assert parse(content.encode(), PATH) == WebConfig(PATH)


def test_secrets_are_not_shown() -> None:
    """Neither the key nor the password hashes appear where a configuration is printed."""
    config = parse(f"tls_server_config: {{cert: c, key: my-secret}}\nbasic_auth_users: {{a: {HASH}}}".encode(), PATH)
    assert "my-secret" not in repr(config)
    assert HASH not in repr(config)


@pytest.mark.parametrize(("content", "message"), [
    ("tls_server_config: [", "line 1: not YAML"),
    ("a: b: c", "line 1: not YAML"),
    ("\x00", "not YAML"),
    ("[]", "the file must be a mapping"),
    ("text", "the file must be a mapping"),
    ("tls_config: {}", "the file has an unknown key: 'tls_config'"),
    ("tls_server_config: {cert_fil: a}", "tls_server_config has an unknown key: 'cert_fil'"),
    ("http_server_config: {http3: true}", "http_server_config has an unknown key: 'http3'"),
    ("http_server_config: {http2: maybe}", "http2 must be true or false"),
    ("http_server_config: {headers: {X-Other: a}}", "headers has an unknown key: 'X-Other'"),
    ("http_server_config: {headers: {X-Frame-Options: allow}}", "'allow' is not one of deny, sameorigin"),
    ('http_server_config: {headers: {Content-Security-Policy: "a\\r\\nSet-Cookie: b"}}', "one line of printable"),
    ("basic_auth_users: {a: plain}", "the password of 'a' is not a bcrypt hash"),
    ("basic_auth_users: {a: [b]}", "a must be text"),
    (f"basic_auth_users: {{'a:b': {HASH}}}", "'a:b' cannot be a user name"),
    (f"basic_auth_users: {{a: {HASH}, a: {HASH}}}", "line 1: a key is no text, or is there twice"),
    (f"basic_auth_users:\n  ? [a]\n  : {HASH}", "line 2: a key is no text"),
    ("a: &x [*x]", "not YAML that can be read"),
    ("rate_limit: {interval: 5}", "'5' is not a duration"),
    ("rate_limit: {interval: -1s, burst: 1}", "'-1s' is not a duration"),
    ("rate_limit: {interval: 1s, burst: many}", "'many' is not a whole number"),
    ("rate_limit: {interval: 1s}", "a burst of 0 would refuse every request"),
    ("tls_server_config: {min_version: TLS12}", "tls_server_config needs cert_file"),
    ("tls_server_config: {cert_file: a}", "tls_server_config needs key_file"),
    ("tls_server_config: {cert_file: a, cert: b, key: c}", "cert and cert_file exclude each other"),
])
def test_refused(content: str, message: str) -> None:
    """What cannot be honoured is refused, with what is wrong in one line."""
    with pytest.raises(WebConfigError) as caught:
        parse(content.encode(), PATH)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("more", "message"), [
    ("min_version: SSL3", "min_version: 'SSL3' is not known"),
    ("max_version: TLS11", "max_version TLS11 leaves no TLS version to serve"),
    ("min_version: TLS13, max_version: TLS12", "max_version TLS12 leaves no TLS version to serve (at least TLS13)"),
    ("cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]", "'TLS_RSA_WITH_RC4_128_SHA' is not known"),
    ("cipher_suites: TLS_AES_128_GCM_SHA256", "cipher_suites must be a list of texts"),
    ("cipher_suites: [TLS_AES_128_GCM_SHA256], max_version: TLS12", "names none that TLS12 could use"),
    ("curve_preferences: [Curve25519]", "'Curve25519' is not known"),
    ("prefer_server_cipher_suites: 2", "prefer_server_cipher_suites must be true or false"),
    ("client_auth_type: Always", "'Always' is not known"),
    ("client_auth_type: RequireAnyClientCert", "cannot be honoured"),
    ("client_auth_type: RequireClientCert, client_ca_file: a", "cannot be honoured"),
    ("client_auth_type: RequireAndVerifyClientCert", "needs client_ca_file"),
    ("client_auth_type: VerifyClientCertIfGiven", "needs client_ca_file"),
    ("client_ca_file: a", "client_auth_type does not ask for certificates"),
    ("client_allowed_sans: [a]", "client_allowed_sans needs client_auth_type RequireAndVerifyClientCert"),
    ("client_allowed_sans: [a], client_auth_type: VerifyClientCertIfGiven, client_ca: x", "client_allowed_sans needs"),
])
def test_tls_refused(more: str, message: str) -> None:
    """TLS that would be weaker than asked, or is not known, is refused."""
    with pytest.raises(WebConfigError) as caught:
        tls(more)
    assert message in str(caught.value)


@pytest.mark.parametrize(("more", "low", "note"), [
    ("", "TLS12", ""),
    ("min_version: TLS10", "TLS12", "min_version TLS10: clients below TLS 1.2 are not served all the same"),
    ("cipher_suites: [TLS_AES_128_GCM_SHA256]", "TLS13", "cipher_suites cannot choose among the suites of TLS 1.3"),
    ("client_auth_type: RequestClientCert", "TLS12", "RequestClientCert has no effect"),
])
def test_notes(more: str, low: str, note: str) -> None:
    """What is accepted without the effect it has in Go is said, and is never the weaker choice."""
    config = tls(more)
    assert config.tls
    assert config.tls.min_version == low
    assert [note in text for text in config.notes] == ([True] if note else [])


def test_http2_note() -> None:
    """Only who asks for HTTP/2 is told that it has no effect."""
    assert parse(b"http_server_config: {http2: true}", PATH).notes
    assert not parse(b"http_server_config: {http2: false}", PATH).notes


def test_load_names_the_file(tmp_path: Path) -> None:
    """Errors of a file begin with its name."""
    path = tmp_path / "web.yml"
    with pytest.raises(WebConfigError, match=r"web\.yml: No such file or directory$"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WebConfigError, match=r"web\.yml: not UTF-8$"):
        load(path)


def test_no_tls() -> None:
    """Without a TLS section there is no context."""
    assert ssl_context(WebConfig(PATH)) is None


def test_suites_exist() -> None:
    """Every suite that may be named is known to OpenSSL under the name that it is mapped to."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(":".join(SUITES.values()))
    assert set(SUITES.values()) <= {suite["name"] for suite in context.get_ciphers()}
