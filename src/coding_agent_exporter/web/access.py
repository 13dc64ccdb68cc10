"""Takes a `webconfig.WebConfig`, gives the TLS context, password check and rate limit it asks for.

`Watched` looks at the file, and at the certificates it names, whenever it is asked: a change counts from the
next request on, certificates from the next connection on. As in the exporter-toolkit a broken file fails
requests (500) and a broken certificate fails handshakes, until they are mended: serving on with what was
valid before would keep a revoked password alive. Taking TLS or all users out of the file needs a restart,
because a file that is being rewritten is empty for a moment, and must not open the door.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import logging
import os
import secrets
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coding_agent_exporter import webconfig
from coding_agent_exporter.webconfig import WebConfig, WebConfigError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Mapping

_log = logging.getLogger(__name__)


def ssl_context(config: WebConfig) -> ssl.SSLContext | None:
    """Build the TLS context that `config` asks for; None without TLS. Reads certificate, key and CA.

    Raises WebConfigError: a file cannot be read, certificate and key do not match, the key is encrypted, or
    this Python's ssl cannot do what is asked.
    """
    tls = config.tls
    if tls is None:
        return None
    import ssl  # noqa: PLC0415 - 2 MB that only those pay who serve TLS

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    versions = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
    context.minimum_version, context.maximum_version = versions[tls.min_version], versions[tls.max_version]
    # A resumed session would not show a client certificate that was revoked or left out of the CA meanwhile.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    if tls.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        _choose_suites(context, tls.cipher_suites)
        _choose_curves(context, [webconfig.CURVES[name] for name in tls.curves])
        with _as_file(tls.cert, tls.cert_file) as cert, _as_file(tls.key, tls.key_file) as key:
            # Without a password callback OpenSSL would ask for one on the terminal.
            context.load_cert_chain(cert, key, password=_no_password)
        if tls.client_ca_file or tls.client_ca:
            context.load_verify_locations(cafile=tls.client_ca_file, cadata=tls.client_ca or None)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise WebConfigError(f"{config.path}: certificate, key or CA cannot be used: {reason}") from error
    except OSError as error:
        names = ", ".join(str(path) for path in config.files()[1:])
        raise WebConfigError(f"{config.path}: cannot read one of {names}: {error.strerror}") from error
    except ValueError as error:
        raise WebConfigError(f"{config.path}: {error}") from error
    if tls.client_auth == "VerifyClientCertIfGiven":
        context.verify_mode = ssl.CERT_OPTIONAL
    elif tls.client_auth == "RequireAndVerifyClientCert":
        context.verify_mode = ssl.CERT_REQUIRED
    # As in Go, whatever is in the CA file is trusted, an intermediate authority too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; a key without a passphrase is needed")


def _choose_suites(context: ssl.SSLContext, names: tuple[str, ...]) -> None:
    suites = [webconfig.SUITES[name] for name in names if name in webconfig.SUITES]
    if not suites:
        return
    try:
        context.set_ciphers(":".join(suites))
    except OSError:  # none of them is known
        available: set[str] = set()
    else:
        available = {suite["name"] for suite in context.get_ciphers()}
    if missing := [suite for suite in suites if suite not in available]:
        raise ValueError(f"cipher_suites: this OpenSSL does not offer {', '.join(missing)}")


def _choose_curves(context: ssl.SSLContext, curves: list[str]) -> None:
    set_groups: Callable[[str], None] | None = getattr(context, "set_groups", None)  # Python 3.15
    if set_groups and curves:
        set_groups(":".join(curves))
    elif len(curves) > 1:
        raise ValueError("curve_preferences: this Python's ssl can be given one curve, not a list")
    elif curves:
        context.set_ecdh_curve(curves[0])


@contextmanager
def _as_file(pem: str, path: Path | None) -> Iterator[Path]:
    """Give `path`, or a file with the text `pem` while the context lasts: OpenSSL reads from files."""
    if path:
        yield path
    elif hasattr(os, "memfd_create"):  # Linux: needs no writable disk, and no key ever lies on one
        with os.fdopen(os.memfd_create("pem"), "w") as file:
            file.write(pem)
            file.flush()
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile("w") as named:
            named.write(pem)
            named.flush()
            yield Path(named.name)


def san_allowed(certificate: Mapping[str, Any] | None, allowed: tuple[str, ...]) -> bool:
    """Whether a client certificate, as `SSLSocket.getpeercert()` gives it, has a name in `allowed`."""
    for kind, value in (certificate or {}).get("subjectAltName", ()):
        if kind == "IP Address":
            # OpenSSL writes 2001:DB8:0:0:0:0:0:1 where people, and Go, write 2001:db8::1.
            name = str(ipaddress.ip_address(value.strip()))
        elif kind in {"DNS", "email", "URI"}:
            name = value
        else:
            continue
        if name in allowed:
            return True
    return False


Verdict = Literal["ok", "denied", "busy"]


class Authenticator:
    """Checks HTTP basic authentication against bcrypt hashes.

    A name that does not exist costs a comparison too, with the hash of a user who does (always the same one
    for the same name), so that time does not tell which names exist. Passwords that were right are remembered
    as keyed digests: a scrape every 15 s costs no bcrypt. One comparison runs at a time, as in the toolkit:
    guessing passwords takes one core at most.
    """

    def __init__(self, users: Mapping[str, str], *, patience: float = 10.0, line: int = 16,
                 remembered: int = 64) -> None:
        """`users`: name -> bcrypt hash, not empty.

        At most `line` requests wait for a comparison, `patience` seconds at most; the others are told `busy`:
        a flood of wrong passwords must not take the places of all connections.
        """
        import bcrypt  # noqa: PLC0415 - paid for only by those who configured users

        self._compare = bcrypt.checkpw
        self._users = {name.encode(): digest.encode() for name, digest in users.items()}
        self._decoys = list(self._users.values())
        self._secret = secrets.token_bytes(32)
        self._patience = patience
        self._turn = threading.Semaphore()
        self._line = threading.Semaphore(line)
        self._remembered = remembered
        self._right: dict[bytes, None] = {}
        self.comparisons = 0
        """How many times bcrypt ran."""

    def check(self, authorization: str) -> Verdict:
        """Judge the value of an `Authorization` header; empty when there was none."""
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            return "denied"
        try:
            user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return "denied"
        if not colon:
            return "denied"
        # bcrypt looks at 72 bytes; Go's ignores what follows, Python's raises.
        password = password[:72]
        digest = self._digest(user, password)
        if digest in self._right:
            return "ok"
        if not self._line.acquire(blocking=False):
            return "busy"
        try:
            if not self._turn.acquire(timeout=self._patience):
                return "busy"
            try:
                return self._judge(user, password, digest)
            finally:
                self._turn.release()
        finally:
            self._line.release()

    def _judge(self, user: bytes, password: bytes, digest: bytes) -> Verdict:
        known = self._users.get(user)
        try:
            if digest in self._right:  # the one before in the queue had the same password
                return "ok"
            self.comparisons += 1
            decoy = self._decoys[int.from_bytes(self._digest(user, b"")[:8]) % len(self._decoys)]
            if not self._compare(password, known or decoy) or known is None:
                return "denied"
            if len(self._right) >= self._remembered:
                del self._right[next(iter(self._right))]
            self._right[digest] = None
        except ValueError:  # a password that this bcrypt refuses to look at cannot be right
            return "denied"
        return "ok"

    def _digest(self, user: bytes, password: bytes) -> bytes:
        text = len(user).to_bytes(8) + user + password
        return hashlib.blake2b(text, key=self._secret, digest_size=32).digest()


class RateLimit:
    """A token bucket: one request every `interval` seconds, and up to `burst` at once."""

    def __init__(self, interval: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._burst, self._clock = interval, burst, clock
        self._tokens, self._at = float(burst), clock()
        self._lock = threading.Lock()

    def allow(self) -> bool:
        """Take a token, if there is one."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) / self._interval)
            self._at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


@dataclass(frozen=True, slots=True)
class Access:
    """What holds for connections and requests now.

    While the file is `broken`, requests fail. `tls` without `context`: handshakes fail.
    """

    headers: tuple[tuple[str, str], ...] = ()
    allowed_sans: tuple[str, ...] | None = None
    context: ssl.SSLContext | None = None
    authenticator: Authenticator | None = None
    rate_limit: RateLimit | None = None
    tls: bool = False
    broken: bool = False


class Watched:
    """The `Access` of a web configuration file that may change at any time, for many threads."""

    def __init__(self, path: Path) -> None:
        """Raises WebConfigError when the file, or a certificate that it names, is broken."""
        self._path = path
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[int, ...] | None] = {}
        self._problem = ""
        self._last: WebConfig | None = None
        self._authenticator: Authenticator | None = None
        self._rate_limit: RateLimit | None = None
        self._access = Access()
        self._reload()
        if self._problem:
            raise WebConfigError(self._problem)

    @property
    def tls(self) -> bool:
        """Whether connections are TLS, as of the last look."""
        return self._access.tls

    def access(self) -> Access:
        """Look at the files, read them again if one has changed, and give what holds now. Never raises."""
        with self._lock:
            if any(_stamp(path) != stamp for path, stamp in self._seen.items()):
                before = self._problem
                self._reload()
                if self._problem and self._problem != before:
                    _log.error("web configuration refused, clients are until it is mended: %s", self._problem)
                elif not self._problem:
                    _log.info("web configuration read again: %s", self._path)
            return self._access

    def _reload(self) -> None:
        # Stamps are taken before reading: a write in between then shows as a change at the next look.
        seen = {self._path: _stamp(self._path)}
        try:
            config = webconfig.load(self._path)
            self._must_not_open(config)
        except WebConfigError as error:
            self._seen |= seen
            self._problem = str(error)
            self._access = Access(tls=self._access.tls, broken=True)
            return
        self._seen = seen | {path: _stamp(path) for path in config.files()[1:]}
        self._problem, context = "", None
        try:
            context = ssl_context(config)
        except WebConfigError as error:
            self._problem = str(error)
        last, self._last = self._last, config
        if last is None or last.users != config.users:
            self._authenticator = Authenticator(config.users) if config.users else None
        if last is None or last.rate_limit != config.rate_limit:
            self._rate_limit = RateLimit(*config.rate_limit) if config.rate_limit else None
        for note in config.notes if last is None or last.notes != config.notes else ():
            _log.warning("%s: %s", self._path, note)
        self._access = Access(config.headers, config.tls.allowed_sans if config.tls else None, context,
                              self._authenticator, self._rate_limit, tls=config.tls is not None)

    def _must_not_open(self, config: WebConfig) -> None:
        if self._last and self._last.tls and not config.tls:
            raise WebConfigError(f"{self._path}: TLS was taken out: restart to serve without it")
        if self._last and self._last.users and not config.users:
            raise WebConfigError(f"{self._path}: all users were taken out: restart to serve everybody")


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev)
