"""Takes a web configuration file (the exporter-toolkit's format), gives what it asks for, typed, to `web`.

What the file asks for is done, or refused with one line; it is never done more weakly than asked. Where
Python's ssl differs from Go's, the rule is:

- `min_version: TLS10` or `TLS11` permits clients that old; none below TLS 1.2 is served. A
  `max_version` below TLS12 is an error.
- `cipher_suites` names suites up to TLS 1.2. The suites of TLS 1.3 cannot be chosen, as in Go; naming only
  those turns TLS 1.2 off, which is what it comes to in Go.
- `curve_preferences` takes one curve; a list needs a Python whose ssl can set one.
- `RequestClientCert` asks for nothing: the answer would neither be checked nor used. `RequireAnyClientCert`
  is an error: ssl cannot take a certificate that it does not verify.
- Certificates are verified only against `client_ca_file` (or `client_ca`), never against the system's roots.
- `http2` is read and has no effect: the server speaks HTTP/1.1.
- Basic authentication covers every path, `/-/healthy` and `/-/ready` too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")
CURVES = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
CLIENT_AUTH = ("NoClientCert", "RequestClientCert", "RequireAnyClientCert", "RequireClientCert",
               "VerifyClientCertIfGiven", "RequireAndVerifyClientCert")
TLS13_SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
# Go's name of a suite -> OpenSSL's: those of Go's tls.CipherSuites(), which leaves the insecure ones out.
SUITES = {
    f"TLS_ECDHE_{key}_WITH_{go}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for go, openssl in (
        ("AES_128_CBC_SHA", "AES128-SHA"), ("AES_256_CBC_SHA", "AES256-SHA"),
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"), ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"))
}
# Header -> the values it may have; an empty tuple: any.
HEADERS: dict[str, tuple[str, ...]] = {
    "Content-Security-Policy": (), "Strict-Transport-Security": (), "X-XSS-Protection": (),
    "X-Content-Type-Options": ("nosniff",), "X-Frame-Options": ("deny", "sameorigin"),
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")


class WebConfigError(ValueError):
    """The web configuration cannot be honoured. The message is one line that names the file."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """`tls_server_config`. A certificate, key or CA is a path, or PEM text, or (both empty) absent."""

    cert_file: Path | None = None
    key_file: Path | None = None
    client_ca_file: Path | None = None
    cert: str = ""
    key: str = field(default="", repr=False)
    client_ca: str = ""
    client_auth: str = "NoClientCert"
    allowed_sans: tuple[str, ...] | None = None
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True
    curves: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WebConfig:
    """A web configuration as read.

    `users` maps names to bcrypt hashes; `rate_limit` is (seconds between requests, burst); `notes` are
    sentences about what was accepted but has no effect, or another one than in Go.
    """

    path: Path
    tls: TlsConfig | None = None
    headers: tuple[tuple[str, str], ...] = ()
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    rate_limit: tuple[float, int] | None = None
    notes: tuple[str, ...] = ()

    def files(self) -> tuple[Path, ...]:
        """Every file whose change asks for a reload."""
        tls = self.tls
        named = (tls.cert_file, tls.key_file, tls.client_ca_file) if tls else ()
        return (self.path, *(path for path in named if path))


def load(path: Path) -> WebConfig:
    """Read a web configuration file; certificates and keys are read by `ssl_context`.

    Raises WebConfigError: unreadable, not YAML, unknown or duplicate keys, values that cannot be honoured.
    """
    try:
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise WebConfigError(f"{path}: {error.strerror}") from error
    except WebConfigError as error:
        raise WebConfigError(f"{path}: {error}") from error


def parse(content: bytes, path: Path) -> WebConfig:
    """As `load`, of the file's bytes; `path` is what relative file names are relative to."""
    top = _section(_yaml(content), "the file",
                   "tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
    notes: list[str] = []
    http = _section(top.get("http_server_config"), "http_server_config", "http2", "headers")
    if "http2" in http and _boolean(http, "http2"):
        notes.append("http2 has no effect: this server speaks HTTP/1.1")
    section = _section(top.get("tls_server_config"), "tls_server_config",
                       "cert", "key", "client_ca", "cert_file", "key_file", "client_ca_file",
                       "client_auth_type", "client_allowed_sans", "min_version", "max_version",
                       "cipher_suites", "prefer_server_cipher_suites", "curve_preferences")
    tls = _tls(section, path.parent, notes) if section else None
    return WebConfig(
        path, tls=tls, headers=_headers(http.get("headers")), users=_users(top.get("basic_auth_users")),
        rate_limit=_rate_limit(top.get("rate_limit")), notes=tuple(notes))


def _yaml(content: bytes) -> Any:
    import yaml  # noqa: PLC0415 - paid for only by those who have a web configuration

    def plain(node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            return [plain(item) for item in node.value]
        result: dict[str, Any] = {}
        for key, value in node.value:
            # PyYAML keeps the last of two equal keys: one of two passwords would vanish without a word.
            if not isinstance(key, yaml.ScalarNode) or key.value in result:
                raise WebConfigError(f"line {key.start_mark.line + 1}: a key is no text, or is there twice")
            result[key.value] = plain(value)
        return result

    try:
        # With BaseLoader every scalar is text: a user may be called `on` or `1234`, as in the toolkit.
        node = yaml.compose(content.decode(), Loader=yaml.BaseLoader)
        return plain(node) if node else {}
    except UnicodeDecodeError as error:
        raise WebConfigError("not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise WebConfigError(f"{line}not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise WebConfigError("not YAML that can be read") from error


def _section(value: Any, where: str, *known: str) -> dict[str, Any]:
    if value in (None, "", "~", "null"):
        return {}
    if not isinstance(value, dict):
        raise WebConfigError(f"{where} must be a mapping")
    if unknown := [key for key in value if known and key not in known]:
        raise WebConfigError(f"{where} has an unknown key: {unknown[0]!r}")
    return value


def _text(section: dict[str, Any], key: str, default: str = "") -> str:
    value = section.get(key, default)
    if not isinstance(value, str):
        raise WebConfigError(f"{key} must be text")
    return value or default


def _boolean(section: dict[str, Any], key: str) -> bool:
    value = _BOOLEANS.get(_text(section, key, "true").lower())
    if value is None:
        raise WebConfigError(f"{key} must be true or false")
    return value


def _choices(section: dict[str, Any], key: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    value = section.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WebConfigError(f"{key} must be a list of texts")
    if unknown := [item for item in value if known and item not in known]:
        raise WebConfigError(f"{key}: {unknown[0]!r} is not known; known are {', '.join(known)}")
    return tuple(value)


def _choice(section: dict[str, Any], key: str, known: tuple[str, ...], default: str) -> str:
    value = _text(section, key, default)
    if value not in known:
        raise WebConfigError(f"{key}: {value!r} is not known; known are {', '.join(known)}")
    return value


def _tls(section: dict[str, Any], directory: Path, notes: list[str]) -> TlsConfig:
    # The toolkit takes a section without certificate and client authentication for "no TLS". Whoever wrote
    # one wants TLS: here it is an error.
    pem: dict[str, str] = {}
    files: dict[str, Path | None] = {}
    for name in ("cert", "key", "client_ca"):
        pem[name], file = _text(section, name), _text(section, f"{name}_file")
        files[name] = directory / file if file else None
        if pem[name] and file:
            raise WebConfigError(f"{name} and {name}_file exclude each other")
        if not pem[name] and not file and name != "client_ca":
            raise WebConfigError(f"tls_server_config needs {name}_file (or {name})")
    low, high = _versions(section, notes)
    suites = _choices(section, "cipher_suites", (*SUITES, *TLS13_SUITES))
    chosen13 = set(suites) & set(TLS13_SUITES)
    if suites and not set(suites) - chosen13:
        if high < "TLS13":
            raise WebConfigError(f"cipher_suites names none that {high} could use")
        low = "TLS13"
    if 0 < len(chosen13) < len(TLS13_SUITES):
        notes.append("cipher_suites cannot choose among the suites of TLS 1.3: all three are on")
    auth, sans = _client_auth(section, notes, has_ca=bool(pem["client_ca"] or files["client_ca"]))
    return TlsConfig(
        cert_file=files["cert"], key_file=files["key"], client_ca_file=files["client_ca"],
        cert=pem["cert"], key=pem["key"], client_ca=pem["client_ca"], client_auth=auth, allowed_sans=sans,
        min_version=low, max_version=high, cipher_suites=suites,
        prefer_server_cipher_suites=_boolean(section, "prefer_server_cipher_suites"),
        curves=_choices(section, "curve_preferences", tuple(CURVES)))


def _versions(section: dict[str, Any], notes: list[str]) -> tuple[str, str]:
    low = _choice(section, "min_version", VERSIONS, "TLS12")
    high = _choice(section, "max_version", VERSIONS, "TLS13")
    if low < "TLS12":
        notes.append(f"min_version {low}: clients below TLS 1.2 are not served all the same")
        low = "TLS12"
    if high < low:
        raise WebConfigError(f"max_version {high} leaves no TLS version to serve (at least {low})")
    return low, high


def _client_auth(section: dict[str, Any], notes: list[str], *,
                 has_ca: bool) -> tuple[str, tuple[str, ...] | None]:
    auth = _choice(section, "client_auth_type", CLIENT_AUTH, "NoClientCert")
    if auth in {"RequireAnyClientCert", "RequireClientCert"}:
        raise WebConfigError(f"client_auth_type {auth} cannot be honoured: certificates that nobody verifies "
                             "are not accepted; use RequireAndVerifyClientCert with client_ca_file")
    if auth in {"VerifyClientCertIfGiven", "RequireAndVerifyClientCert"} and not has_ca:
        raise WebConfigError(f"client_auth_type {auth} needs client_ca_file (or client_ca)")
    if auth == "NoClientCert" and has_ca:
        raise WebConfigError("client_ca_file is given, but client_auth_type does not ask for certificates")
    if auth == "RequestClientCert":
        notes.append("client_auth_type RequestClientCert has no effect: the certificate would not be used")
    if "client_allowed_sans" not in section:
        return auth, None
    if auth != "RequireAndVerifyClientCert":
        raise WebConfigError("client_allowed_sans needs client_auth_type RequireAndVerifyClientCert")
    return auth, _choices(section, "client_allowed_sans")


def _headers(value: Any) -> tuple[tuple[str, str], ...]:
    section = _section(value, "headers", *HEADERS)
    for name in section:
        text, allowed = _text(section, name), HEADERS[name]
        if text and allowed and text not in allowed:
            raise WebConfigError(f"header {name}: {text!r} is not one of {', '.join(allowed)}")
        if not text.isascii() or not text.isprintable():
            raise WebConfigError(f"header {name} must be one line of printable ASCII")
    return tuple((name, text) for name, text in section.items() if text)


def _users(value: Any) -> dict[str, str]:
    users = _section(value, "basic_auth_users")
    for name in users:
        if not name or ":" in name:
            raise WebConfigError(f"basic_auth_users: {name!r} cannot be a user name (empty, or with a colon)")
        if not _BCRYPT.fullmatch(_text(users, name)):
            raise WebConfigError(f"basic_auth_users: the password of {name!r} is not a bcrypt hash")
    return users


def _rate_limit(value: Any) -> tuple[float, int] | None:
    section = _section(value, "rate_limit", "interval", "burst")
    interval, burst = _text(section, "interval", "0"), _text(section, "burst", "0")
    if not re.fullmatch(r"0|((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+", interval, re.ASCII):
        raise WebConfigError(f"rate_limit: interval {interval!r} is not a duration such as 100ms")
    if not re.fullmatch(r"\d{1,9}", burst, re.ASCII):
        raise WebConfigError(f"rate_limit: burst {burst!r} is not a whole number")
    seconds = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([a-zµ]+)", interval))
    if seconds == 0:
        return None
    if int(burst) == 0:
        raise WebConfigError("rate_limit: a burst of 0 would refuse every request")
    return seconds, int(burst)
