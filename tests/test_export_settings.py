"""Settings and standard variables of export: endpoints, precedence, the resource, and what an answer leads to."""

from __future__ import annotations

import datetime
import itertools
import re
from typing import Any

import pytest

from coding_agent_exporter import export
from coding_agent_exporter.export.answer import grpc_kind, http_kind, retry_after
from coding_agent_exporter.export.target import resolve, resource
from otlp_receiver import MemoryOutbox

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_without_an_endpoint_nothing_is_exported() -> None:
    """No endpoint, an empty one, or the standard switches: there is no exporter, and no default to localhost."""
    environments = [
        {}, {ENDPOINT: ""}, {"OTEL_EXPORTER_OTLP_HEADERS": "a=b"},
        {ENDPOINT: "http://c:1", "OTEL_SDK_DISABLED": "True"},
        {ENDPOINT: "http://c:1", "OTEL_TRACES_EXPORTER": "none"}]
    assert [export.create(MemoryOutbox(), environ, version="1", instance="i") for environ in environments] == [None] * 5


@pytest.mark.parametrize(("environ", "settings", "url"), [
    ({ENDPOINT: "http://c:4318"}, {}, "http://c:4318/v1/traces"),
    ({ENDPOINT: "http://c:4318/base/"}, {}, "http://c:4318/base/v1/traces"),
    ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://t/otlp"}, {}, "https://t/otlp"),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://t:1"}, {}, "https://t:1/"),
    ({ENDPOINT: "http://c"}, {"endpoint": "http://[::1]:4318"}, "http://[::1]:4318/v1/traces"),
    ({}, {"endpoint": "http://c/v1/traces"}, "http://c/v1/traces"),
    ({ENDPOINT: "http://c:4317"}, {"protocol": "grpc"}, "c:4317"),
    ({}, {"protocol": "grpc", "endpoint": "https://api.example.com"}, "api.example.com:443"),
    ({}, {"protocol": "grpc", "endpoint": "c:4317"}, "c:4317"),
    ({}, {"endpoint": "http://c", "signal": "metrics"}, "http://c/v1/metrics"),
])
def test_endpoints(environ: dict[str, str], settings: dict[str, Any], url: str) -> None:
    """A base gets the signal's path, a signal's own endpoint is taken as it is, and a setting of ours wins."""
    target = resolve(environ, **settings)
    assert target is not None
    assert target.url == url


def test_a_setting_wins_over_a_variable_and_a_signal_over_all() -> None:
    """Protocol, compression, timeout, headers: ours, then the TRACES variable, then the common one."""
    environ = {
        ENDPOINT: "c:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_EXPORTER_OTLP_TIMEOUT": "7",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "A=1,b=x%2Cy", "OTEL_EXPORTER_OTLP_HEADERS": "c=3",
        "OTEL_EXPORTER_OTLP_INSECURE": "true"}
    target = resolve(environ, headers="b=mine")
    assert target is not None
    assert (target.protocol, target.gzip, target.timeout, target.tls) == ("grpc", True, 7.0, False)
    assert target.headers == {"a": "1", "b": "mine"}
    target = resolve(environ, insecure=False, compression="none", timeout=3.0)
    assert target is not None
    assert (target.gzip, target.timeout, target.tls) == (False, 3.0, True)


@pytest.mark.parametrize(("text", "seconds"), [("10", 10), ("0.5", 0.5), ("1000", 1), ("10000", 10), ("250", 250)])
def test_a_timeout_variable_is_read_as_its_writer_meant_it(text: str, seconds: float) -> None:
    """Milliseconds as specified, seconds as Python's SDK has them: the size tells."""
    target = resolve({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_TIMEOUT": text})
    assert target is not None
    assert target.timeout == seconds


@pytest.mark.parametrize(("environ", "settings", "message"), [
    ({}, {"endpoint": "collector:4318"},
     "otlp.endpoint: 'collector:4318' is not an endpoint such as http://127.0.0.1:4318"),
    ({ENDPOINT: "ftp://c"}, {}, f"{ENDPOINT}: 'ftp://c' is not an endpoint"),
    ({ENDPOINT: "http://c:99999"}, {}, f"{ENDPOINT}: 'http://c:99999' is not"),
    ({ENDPOINT: "http://"}, {}, "is not an endpoint"),
    ({ENDPOINT: "http://me:sesame@c"}, {}, "credentials belong into otlp.headers"),
    ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, {},
     "OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json' is not one of http/protobuf, grpc"),
    ({}, {"endpoint": "http://c", "compression": "zstd"}, "otlp.compression: 'zstd' is not one of none, gzip"),
    ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, {}, "OTEL_EXPORTER_OTLP_TIMEOUT: a timeout is"),
    ({}, {"endpoint": "http://c", "timeout": 0.0}, "otlp.timeout: a timeout is more than 0"),
    ({}, {"endpoint": "http://c", "headers": "a=1,sesame"}, "otlp.headers: item 2 is not name=value"),
    ({}, {"endpoint": "http://c", "headers": "a=sesame%0d%0ab"}, "otlp.headers: item 1 holds a character"),
    ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/such.pem"}, {},
     "OTEL_EXPORTER_OTLP_CERTIFICATE: cannot read /no/such.pem: No such file or directory"),
    ({ENDPOINT: "http://c", "OTEL_RESOURCE_ATTRIBUTES": "a"}, {}, "OTEL_RESOURCE_ATTRIBUTES: item 1 is not name=value"),
    ({ENDPOINT: "http://c", "http_proxy": "socks5://p:1"}, {}, "http_proxy: only http:// proxies are supported"),
])
def test_a_bad_value_is_one_clear_line(environ: dict[str, str], settings: dict[str, Any], message: str) -> None:
    """The line opens with where the value was written, and repeats no secret."""
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        export.create(MemoryOutbox(), environ, version="1", instance="i", **settings)
    assert "\n" not in str(raised.value)
    assert "sesame" not in str(raised.value)


def test_grpc_that_is_not_installed_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'coding-agent-exporter\[grpc\]'"):
        export.create(MemoryOutbox(), {}, version="1", instance="i", endpoint="http://c:4317", protocol="grpc")


def test_the_resource_comes_from_settings_and_the_environment() -> None:
    """Names from the pod's variables; OTEL_RESOURCE_ATTRIBUTES wins over them, OTEL_SERVICE_NAME over all."""
    environ = {"K8S_POD_NAME": "pod-1", "POD_NAMESPACE": "ns", "NODE_NAME": "n", "K8S_NODE_NAME": "node", "PWD": "/x",
               "OTEL_RESOURCE_ATTRIBUTES": "service.name=x,deployment.environment.name=a%20b,host.name=h,",
               "OTEL_SERVICE_NAME": "mine"}
    assert resource(environ, version="1", instance="i", host="box") == {
        "service.name": "mine", "service.version": "1", "service.instance.id": "i", "host.name": "h",
        "k8s.namespace.name": "ns", "k8s.node.name": "node", "k8s.pod.name": "pod-1",
        "deployment.environment.name": "a b"}


# --- answers

def test_every_http_status_has_a_consequence() -> None:
    """OTLP's retryable codes are retried; only 400, 413 and 422 accuse the spans."""
    kinds = {status: http_kind(status).name for status in itertools.chain(range(300, 309), range(400, 600))}
    assert {status for status, kind in kinds.items() if kind == "AGAIN"} == {408, 425, 429, 502, 503, 504}
    assert {status for status, kind in kinds.items() if kind in {"REFUSED", "TOO_LARGE"}} == {400, 413, 422}
    assert {kinds[status] for status in (301, 401, 403, 404, 407, 415)} == {"HOLD"}
    assert {kinds[status] for status in (500, 501, 505)} == {"BROKEN"}


def test_resource_exhausted_has_three_meanings() -> None:
    """With RetryInfo, later; about the size, less; otherwise later as well."""
    assert grpc_kind("RESOURCE_EXHAUSTED", "quota", retry_info=True).name == "AGAIN"
    assert grpc_kind("RESOURCE_EXHAUSTED", "quota", retry_info=False).name == "AGAIN"
    assert grpc_kind("RESOURCE_EXHAUSTED", "received message larger than max", retry_info=False).name == "TOO_LARGE"


def test_a_retry_date_is_read_by_the_servers_clock() -> None:
    """Where the server sends its own date, a wrong clock on this side does not matter."""
    until = "Sat, 21 Nov 2026 10:00:30 GMT"
    now = datetime.datetime(2026, 11, 21, 10, 0, 10, tzinfo=datetime.UTC).timestamp()
    assert retry_after({"retry-after": until, "date": "Sat, 21 Nov 2026 10:00:00 GMT"}, 0.0) == 30
    assert retry_after({"retry-after": until}, now) == 20
    assert retry_after({"retry-after": until}, now + 100) == 0
