"""Takes settings and the standard OTEL variables, gives the transports one `Target`, and wire the resource.

A setting of ours wins over a variable, a variable for one signal over the one for all. An empty variable is an
unset one. Without an endpoint there is no target: nothing is sent anywhere by default.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

Signal = Literal["traces", "metrics"]
Protocol = Literal["http/protobuf", "grpc"]

DEFAULT_TIMEOUT = 10.0
_PREFIX = "OTEL_EXPORTER_OTLP_"
_MILLISECONDS_FROM = 1000
"""A timeout variable from here on is milliseconds, below it seconds. The specification says milliseconds, Python's
SDK reads seconds, and both kinds of value are in use: nobody means 10 ms, and nobody means three hours."""
_MAX_TIMEOUT = 300.0
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")
_TRUE = {"true": True, "false": False}

_KUBERNETES = {
    "k8s.cluster.name": ("K8S_CLUSTER_NAME",),
    "k8s.namespace.name": ("K8S_NAMESPACE_NAME", "POD_NAMESPACE"),
    "k8s.node.name": ("K8S_NODE_NAME", "NODE_NAME"),
    "k8s.pod.name": ("K8S_POD_NAME", "POD_NAME"),
    "k8s.pod.uid": ("K8S_POD_UID", "POD_UID"),
    "k8s.container.name": ("K8S_CONTAINER_NAME",),
    "k8s.deployment.name": ("K8S_DEPLOYMENT_NAME",),
    "k8s.statefulset.name": ("K8S_STATEFULSET_NAME",),
    "k8s.daemonset.name": ("K8S_DAEMONSET_NAME",),
    "k8s.job.name": ("K8S_JOB_NAME",),
    "k8s.cronjob.name": ("K8S_CRONJOB_NAME",),
}
"""Resource attribute to the variables that hold it: the conventions' spelling, then what pod manifests use."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where spans go, and how. `timeout` is seconds for one request, all of it.

    `url` is the whole URL for HTTP, `host:port` for gRPC. `ca_file` replaces the system's authorities. Headers and
    the proxy may hold credentials: neither is shown in a repr, and `hidden` takes them out of a text.
    """

    signal: Signal
    protocol: Protocol
    url: str
    tls: bool
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    gzip: bool = False
    timeout: float = DEFAULT_TIMEOUT
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    proxy: str = field(default="", repr=False)

    def hidden(self, text: str) -> str:
        """The text without header values that a server, or a library, repeats in its error message."""
        for value in self.headers.values():
            for secret in (value, value.rpartition(" ")[2]):
                if len(secret) > 5:
                    text = text.replace(secret, "***")
        return text


class _Given(NamedTuple):
    text: str
    origin: str


def resolve(environ: Mapping[str, str], *, signal: Signal = "traces", endpoint: str = "", protocol: str = "",
            headers: str = "", compression: str = "", timeout: float | None = None,
            insecure: bool | None = None) -> Target | None:
    """The target, or None when there is no endpoint or the standard variables switch export off.

    `endpoint` is a base as in OTEL_EXPORTER_OTLP_ENDPOINT: for HTTP `/v1/<signal>` is appended, unless it ends so.
    `headers` is `name=value,...` with percent-encoded values, as in the variable; it is merged over that. `timeout`
    is seconds. `insecure` decides for a gRPC endpoint without a scheme only. Raises ValueError, one line, which
    opens with where the value was written, and never repeats a header's value; also when gRPC is not installed.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip().lower() == "none":
        return None

    def pick(name: str, ours: str = "") -> _Given:
        if ours:
            return _Given(ours, f"otlp.{name.lower()}")
        for variable in (f"{_PREFIX}{signal.upper()}_{name}", _PREFIX + name):
            if text := environ.get(variable, "").strip():
                return _Given(text, variable)
        return _Given("", "")

    where = pick("ENDPOINT", endpoint.strip())
    if not where.text:
        return None
    kind = _one_of(pick("PROTOCOL", protocol), ("http/protobuf", "grpc"), "http/protobuf")
    if insecure is None:
        insecure = _one_of(pick("INSECURE"), tuple(_TRUE), "false") == "true"
    parts = _split(where, scheme="" if kind == "http/protobuf" else "http" if insecure else "https")
    certificate, key = _file(pick("CLIENT_CERTIFICATE")), _file(pick("CLIENT_KEY"))
    if key and not certificate:
        raise ValueError(f"{pick('CLIENT_KEY').origin}: a key needs its certificate, and there is none")
    tls = parts.scheme == "https"
    common = {**_headers(pick("HEADERS")), **_headers(_Given(headers, "otlp.headers"))}
    target = Target(
        signal, "grpc" if kind == "grpc" else "http/protobuf",
        _authority(parts) if kind == "grpc" else _url(parts, where, signal), tls, common,
        gzip=_one_of(pick("COMPRESSION", compression), ("none", "gzip"), "none") == "gzip",
        timeout=_timeout(pick("TIMEOUT")) if timeout is None else _bounded(timeout, "otlp.timeout"),
        ca_file=_file(pick("CERTIFICATE")), certificate_file=certificate, key_file=key,
        proxy=_proxy(parts, environ) if kind == "http/protobuf" else "")
    if target.protocol == "grpc" and importlib.util.find_spec("grpc") is None:
        raise ValueError("otlp.protocol: grpc is not installed: pip install 'coding-agent-exporter[grpc]'")
    return target


def resource(environ: Mapping[str, str], *, version: str, instance: str, host: str) -> dict[str, str]:
    """Attributes of the resource. `instance` has to stay the same over restarts. Raises ValueError, one line."""
    found = {"service.name": "coding-agent-exporter", "service.version": version, "service.instance.id": instance,
             "host.name": host}
    for attribute, variables in _KUBERNETES.items():
        found[attribute] = next((environ[name] for name in variables if environ.get(name)), "")
    found.update(_pairs(_Given(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""), "OTEL_RESOURCE_ATTRIBUTES")))
    found["service.name"] = environ.get("OTEL_SERVICE_NAME", "").strip() or found["service.name"]
    return {name: value for name, value in found.items() if value}


def _one_of(given: _Given, choices: tuple[str, ...], default: str) -> str:
    text = given.text.lower()
    if text and text not in choices:
        raise ValueError(f"{given.origin}: {given.text!r} is not one of {', '.join(choices)}")
    return text or default


def _split(given: _Given, *, scheme: str) -> SplitResult:
    """The parts of a URL; `scheme` is for one without, which is an error when there is none to assume."""
    text = given.text if "://" in given.text or not scheme else f"{scheme}://{given.text}"
    try:
        parts = urlsplit(text)
        complete = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    # Before the endpoint is repeated in a message, or sent: what stands in front of the @ is a password.
    if "@" in text:
        raise ValueError(f"{given.origin}: credentials belong into otlp.headers or OTEL_EXPORTER_OTLP_HEADERS")
    if not complete or not _VALUE.fullmatch(text) or " " in text:
        raise ValueError(f"{given.origin}: {given.text!r} is not an endpoint such as http://127.0.0.1:4318")
    return parts


def _authority(parts: SplitResult) -> str:
    return parts.netloc if parts.port else f"{parts.netloc.rstrip(':')}:{443 if parts.scheme == 'https' else 4317}"


def _url(parts: SplitResult, given: _Given, signal: Signal) -> str:
    path = parts.path
    if not given.origin.startswith(f"{_PREFIX}{signal.upper()}_"):
        path = path.rstrip("/")
        path = path if path.endswith(f"/v1/{signal}") else f"{path}/v1/{signal}"
    return parts._replace(path=path or "/", fragment="").geturl()


def _pairs(given: _Given) -> dict[str, str]:
    found = {}
    for number, item in enumerate(given.text.split(","), 1):
        name, equals, value = item.partition("=")
        if not item.strip():
            continue
        if not equals or not name.strip():
            raise ValueError(f"{given.origin}: item {number} is not name=value")
        found[unquote(name.strip())] = unquote(value.strip())
    return found


def _headers(given: _Given) -> dict[str, str]:
    found = {name.lower(): value for name, value in _pairs(given).items()}
    for number, (name, value) in enumerate(found.items(), 1):
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"{given.origin}: item {number} holds a character that no header can carry")
    return found


def _timeout(given: _Given) -> float:
    if not given.text:
        return DEFAULT_TIMEOUT
    try:
        number = float(given.text)
    except ValueError:
        number = 0.0
    return _bounded(number / 1000 if number >= _MILLISECONDS_FROM else number, given.origin)


def _bounded(seconds: float, origin: str) -> float:
    if not 0 < seconds <= _MAX_TIMEOUT:
        raise ValueError(f"{origin}: a timeout is more than 0 and at most {_MAX_TIMEOUT:.0f} seconds")
    return seconds


def _file(given: _Given) -> Path | None:
    if not given.text:
        return None
    path = Path(given.text)
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"{given.origin}: cannot read {given.text}: {error.strerror}") from error


def _proxy(parts: SplitResult, environ: Mapping[str, str]) -> str:
    """The proxy that the usual variables name for this URL, or "". gRPC reads them by itself."""
    def either(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name.upper()) or ""

    proxy = either(f"{parts.scheme}_proxy") or either("all_proxy")
    # In a CGI program, HTTP_PROXY is a header that a client sent.
    if not proxy or (parts.scheme == "http" and "REQUEST_METHOD" in environ):
        return ""
    host = (parts.hostname or "").lower()
    for entry in either("no_proxy").lower().split(","):
        name = entry.strip().lstrip(".")
        if name and (name in {"*", host} or host.endswith(f".{name}")):
            return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        usable = urlsplit(proxy).scheme == "http" and urlsplit(proxy).hostname and (urlsplit(proxy).port or True)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{parts.scheme}_proxy: only http:// proxies are supported")
    return proxy
