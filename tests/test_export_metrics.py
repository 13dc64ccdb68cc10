"""Metrics over the real protocols: what is on the wire, that it is what /metrics says, and when it goes."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from prometheus_client.parser import text_string_to_metric_families

from agents_support import PiLog
from coding_agent_exporter import families
from coding_agent_exporter.counters import Counters
from coding_agent_exporter.export.metrics import MetricsExporter, Push, PushCounts, create_metrics
from coding_agent_exporter.export.metricwire import MetricEncoder, pack, points
from coding_agent_exporter.export.otlp_http import HttpTransport
from coding_agent_exporter.export.target import Target
from coding_agent_exporter.expose import Snapshot, SnapshotCollector, render
from coding_agent_exporter.model import Activity, CounterKey, Delta, Heartbeat, Instance, Mark, Pressure, RateLimit
from coding_agent_exporter.pipeline import Pipeline
from otlp_receiver import (
    Clock,
    GrpcReceiver,
    HttpReceiver,
    Receiver,
    Reply,
    eventually,
    free_port,
    grpc_receiver,
    http_receiver,
)
from support import drain, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from prometheus_client.core import Metric as Family

FIRST, PROCESS, NOW = 1_700_000_000.0, 1_700_000_500.0, 1_700_001_000.0
USAGE = ("main", "pi-coding", "anthropic", "opus", "api_key")
CALL = USAGE[:4]
COST: CounterKey = (families.COST.name, (*USAGE, "reported"))
RESOURCE = {"service.name": "test"}


# --- support

class _Metrics(Receiver):
    """Decodes metrics; `rule` is given the names of the families in a request."""

    def decode(self, body: bytes) -> tuple[Any, list[Any], list[Any]]:
        request = ExportMetricsServiceRequest.FromString(body)
        metrics = [metric for resource in request.resource_metrics for scope in resource.scope_metrics
                   for metric in scope.metrics]
        return request, metrics, [metric.name for metric in metrics]

    @property
    def stored(self) -> list[Metric]:
        return self.spans

    def values(self, name: str) -> list[float]:
        """What was stored of a counter with one series, in order."""
        return [point.as_double or point.as_int for metric in list(self.stored) if metric.name == name
                for point in metric.sum.data_points]


class MetricsOverHttp(_Metrics, HttpReceiver):
    pass


class MetricsOverGrpc(_Metrics, GrpcReceiver):
    pass


@pytest.fixture
def http() -> Iterator[MetricsOverHttp]:
    receiver = MetricsOverHttp()
    with http_receiver(receiver=receiver):
        yield receiver


@contextmanager
def metrics_over_grpc() -> Iterator[MetricsOverGrpc]:
    receiver = MetricsOverGrpc()
    with grpc_receiver(receiver=receiver, service="metrics.v1.MetricsService"):
        yield receiver


def present(snapshot: Snapshot) -> Iterator[Family]:
    return SnapshotCollector(snapshot).collect()


def snapshot(counters: Sequence[tuple[CounterKey, int]] = (), **changes: Any) -> Snapshot:
    return Snapshot(**{"now": NOW, "version": "1.2.3", "started": FIRST, "counters": counters, **changes})


def encode(view: Snapshot) -> dict[str, Metric]:
    """The messages by name, having been bytes in between."""
    encoder = MetricEncoder(RESOURCE, "1.2.3", PROCESS)
    request = ExportMetricsServiceRequest.FromString(encoder.request(encoder.messages(view, present(view))))
    found = request.resource_metrics[0].scope_metrics[0].metrics
    assert len({metric.name for metric in found}) == len(found)
    return {metric.name: metric for metric in found}


def observed(family: families.Family, labels: tuple[str, ...], *values: float) -> list[tuple[CounterKey, int]]:
    """A histogram as the counters that it is kept as."""
    counters: list[tuple[CounterKey, int]] = [
        ((f"{family.name}_bucket", (*labels, le)), sum(value <= float(le) for value in values))
        for le in families.bounds(family)]
    return [*counters, ((f"{family.name}_sum", labels), round(sum(values) * family.scale))]


def attributes(point: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in point.attributes}


class Agent:
    """A pipeline in small: real counters, which a delivered push lets go from zero to their value."""

    def __init__(self, hold: float = 0.0) -> None:
        self.counters = Counters(hold=hold)
        self.now = NOW
        self.collected = 0
        self.failure: Exception | None = None

    def spend(self, dollars: int, key: CounterKey = COST) -> None:
        self.counters.add({key: Delta(dollars * 10**12)})

    def collect(self) -> tuple[Snapshot, Callable[[], None]]:
        self.collected += 1
        if self.failure:
            raise self.failure
        self.counters.pin(self.now)
        held = self.counters.waiting()
        return snapshot(list(self.counters.values()), held=held), lambda: self.counters.scraped(held, self.now)


def pushing(receiver: MetricsOverHttp, agent: Agent, *, interval: float = 15.0, clock: Clock | None = None,
            present: Callable[[Snapshot], Iterator[Family]] = present) -> Push[Snapshot]:
    """Pushes over the real transport, without a thread. Delays are the longest that the jitter allows."""
    transport = HttpTransport(Target("metrics", "http/protobuf", f"{receiver.url}/v1/metrics", tls=False), "agent/1",
                              lambda: 0.0)
    receiver.clients.append(transport)
    return Push(agent.collect, present, MetricEncoder(RESOURCE, "1.2.3", PROCESS), transport, PushCounts(),
                interval=interval, timeout=20.0, clock=clock or Clock(), jitter=lambda low, high: high)


def exporting(receiver: MetricsOverHttp, agent: Agent, **settings: Any) -> MetricsExporter[Snapshot]:
    target = Target("metrics", "http/protobuf", f"{receiver.url}/v1/metrics", tls=False, timeout=60.0)
    return MetricsExporter(target, agent.collect, present, resource=RESOURCE, version="1.2.3", started=PROCESS,
                           **{"interval": 3600.0, **settings})


def full() -> Snapshot:
    """A snapshot with something of every kind."""
    heartbeat = Heartbeat(pid=7, started_at=NOW - 60, updated_at=NOW - 1, heartbeat_seconds=5.0, host="box",
                          activity=Activity.WORKING, has_pending_messages=False, last_event="", session_id="abc",
                          context_percent=97.5, context_tokens=195_000.0, pressure=Pressure.NEAR_LIMIT)
    return snapshot(
        [(COST, 1_250_000_000_000), ((families.TOKENS.name, (*USAGE[:5], "input")), 2**53 + 1),
         ((families.TOKENS.name, (*USAGE, "agent-1", "output")), 7), ((families.COMPACTIONS.name, ("main",)), 0),
         *observed(families.TURN_SECONDS, CALL, 0.05, 3.0, 3.5, 9000.0),
         *observed(families.GENAI_DURATION, (*CALL, ""), 1.0), *observed(families.GENAI_TOKENS, (*CALL, "input"), 5.0)],
        internal={(families.STEPS.name, ()): 3, (families.STEP_SECONDS.name, ()): 0.5},
        gauges={(families.SERIES.name, ()): 4},
        instances=[Instance("main", heartbeat, stale=False, activity=Activity.WORKING, activity_since=NOW - 9,
                            context_percent_peak=98.0)],
        activities={("main", Activity.WORKING): 1},
        rate_limits={("main", "claude", "five_hour"): RateLimit(40.0, NOW + 60, 18_000.0)},
        info_labels=frozenset({"session_id", "host"}),
        exemplars={(f"{families.TURN_SECONDS.name}_bucket", (*CALL, "5.0")):
                   Mark(3.5, NOW - 5, f"{9:032x}", f"{8:016x}")})


# --- what is on the wire

ATTRIBUTES = [{"key": key, "value": {"stringValue": value}}
              for key, value in zip(families.USAGE, USAGE, strict=True)]
CUMULATIVE = "AGGREGATION_TEMPORALITY_CUMULATIVE"
EXPECTED = {
    "resourceMetrics": [{
        "resource": {"attributes": [
            {"key": "service.name", "value": {"stringValue": "coding-agent-exporter"}},
            {"key": "service.version", "value": {"stringValue": "1.2.3"}},
            {"key": "service.instance.id", "value": {"stringValue": "abc"}},
            {"key": "host.name", "value": {"stringValue": "box"}},
            {"key": "k8s.pod.name", "value": {"stringValue": "pod-1"}}]},
        "scopeMetrics": [{
            "scope": {"name": "coding_agent_exporter", "version": "1.2.3"},
            "metrics": [
                {"name": "coding_agent_cost_usd_total", "description": families.COST.help, "sum": {
                    "isMonotonic": True, "aggregationTemporality": CUMULATIVE, "dataPoints": [{
                        "attributes": [*ATTRIBUTES, {"key": "provenance", "value": {"stringValue": "reported"}}],
                        "startTimeUnixNano": "1700000000000000000", "timeUnixNano": "1700001000000000000",
                        "asDouble": 1.25}]}},
                {"name": "coding_agent_messages_total", "description": families.MESSAGES.help, "sum": {
                    "isMonotonic": True, "aggregationTemporality": CUMULATIVE, "dataPoints": [{
                        "attributes": ATTRIBUTES, "startTimeUnixNano": "1700000000000000000",
                        "timeUnixNano": "1700001000000000000", "asInt": "12"}]}},
                {"name": "coding_agent_exporter_series", "description": families.SERIES.help, "gauge": {
                    "dataPoints": [{"timeUnixNano": "1700001000000000000", "asDouble": 4.0}]}},
                {"name": "gen_ai.client.token.usage", "description": families.GENAI_TOKENS.help, "unit": "{token}",
                 "histogram": {"aggregationTemporality": CUMULATIVE, "dataPoints": [{
                     "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in (
                         ("gen_ai.operation.name", "chat"), ("root", "main"), ("source", "pi-coding"),
                         ("gen_ai.provider.name", "anthropic"), ("gen_ai.request.model", "opus"),
                         ("gen_ai.token.type", "output"))],
                     "startTimeUnixNano": "1700000000000000000", "timeUnixNano": "1700001000000000000",
                     "count": "3", "sum": 90.0,
                     "bucketCounts": ["0", "1", "0", "1", "1", *["0"] * 10],
                     "explicitBounds": [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0,
                                        1048576.0, 4194304.0, 16777216.0, 67108864.0]}]}},
            ]}]}]}


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_snapshot_is_on_the_wire_as_it_is_and_nothing_else_is(
        protocol: str, compression: str, http: MetricsOverHttp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoded request holds the families, the resource and the scope, and no other field or attribute."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    view = snapshot([(COST, 1_250_000_000_000), ((families.MESSAGES.name, USAGE), 12),
                     *observed(families.GENAI_TOKENS, (*CALL, "output"), 3.0, 17.0, 70.0)],
                    gauges={(families.SERIES.name, ()): 4})
    delivered: list[bool] = []
    with metrics_over_grpc() as rpc:
        receiver: _Metrics = rpc if protocol == "grpc" else http
        exporter = create_metrics(
            lambda: (view, lambda: delivered.append(True)),
            lambda view: (metric for metric in present(view) if metric.type != "info"),
            {"SECRET": "hunter2", "POD_NAME": "pod-1", "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=a"}, version="1.2.3",
            instance="abc", host="box", started=PROCESS, protocol=protocol, compression=compression,
            endpoint=f"http://{rpc.address}" if protocol == "grpc" else http.url)
        assert exporter is not None
        exporter.start()
        eventually(lambda: exporter.counts.exported)
        exporter.stop(20)
    assert MessageToDict(receiver.requests[0]) == EXPECTED
    assert receiver.headers[0]["x-tenant"] == "a"
    assert receiver.headers[0].get(":path", "/v1/metrics") == "/v1/metrics"
    assert len(delivered) == exporter.counts.exported == len(receiver.requests)
    assert b"hunter2" not in b"".join(receiver.raw) + repr(receiver.headers).encode()


def test_converted_to_prometheus_it_is_what_a_scrape_shows() -> None:
    """Names, labels and values that a conversion by the book makes of a push are those of /metrics."""
    view = full()
    pushed: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for metric in encode(view).values():
        if metric.name.startswith("gen_ai."):
            continue
        assert not metric.unit
        for point in (*metric.gauge.data_points, *metric.sum.data_points):
            # "Append _total if it is not there yet."
            name = metric.name.removesuffix("_total") + "_total" if metric.HasField("sum") else metric.name
            value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
            pushed[name, frozenset(attributes(point).items())] = float(value)
        for bars in metric.histogram.data_points:
            labels, below = attributes(bars), 0
            for bound, count in zip([*bars.explicit_bounds, float("inf")], bars.bucket_counts, strict=True):
                below += count
                le = "+Inf" if bound == float("inf") else str(bound)
                pushed[f"{metric.name}_bucket", frozenset({**labels, "le": le}.items())] = below
            pushed[f"{metric.name}_sum", frozenset(labels.items())] = bars.sum
            pushed[f"{metric.name}_count", frozenset(labels.items())] = bars.count
    scraped = {(sample.name, frozenset((name, value) for name, value in sample.labels.items() if value)): sample.value
               for family in text_string_to_metric_families(render(view)[0].decode()) for sample in family.samples
               if not sample.name.startswith("process_")}
    assert pushed == scraped
    assert len(pushed) > 30


def test_types_and_start_times() -> None:
    """Counters are monotonic, cumulative, and count from the very first start; the exporter's own from the last."""
    found = encode(full())
    for name, metric in found.items():
        if name.endswith("_total"):
            assert (metric.sum.is_monotonic, metric.sum.aggregation_temporality) == (True, 2)
            start = PROCESS if name.startswith("coding_agent_exporter_") else FIRST
            assert {point.start_time_unix_nano for point in metric.sum.data_points} == {int(start * 1e9)}
        elif name in {"coding_agent_turn_duration_seconds", *(f.otlp for f in families.FAMILIES)}:
            assert {point.start_time_unix_nano for point in metric.histogram.data_points} == {int(FIRST * 1e9)}
        else:
            assert metric.WhichOneof("data") == "gauge"
    tokens = found[families.TOKENS.name].sum.data_points
    assert [point.as_int for point in tokens] == [2**53 + 1, 7]
    assert attributes(tokens[1])["agent"] == "agent-1"
    assert found[families.STEPS.name].sum.data_points[0].as_int == 3
    assert found[families.STEP_SECONDS.name].sum.data_points[0].as_double == 0.5
    assert found["coding_agent_exporter_build_info"].gauge.data_points[0].as_double == 1


def test_no_point_ends_before_it_begins() -> None:
    """A clock that was set back behind the first start does not make points that a collector has to refuse."""
    view = full()
    view.now = FIRST - 100
    spans = [(point.start_time_unix_nano, point.time_unix_nano) for metric in encode(view).values()
             for kind in (metric.sum.data_points, metric.histogram.data_points) for point in list[Any](kind)]
    assert len(spans) > 5
    assert all(start <= end for start, end in spans)


def test_an_exemplar_is_the_observation_with_its_span() -> None:
    """Value, time and ids are those of the mark, and there is no other exemplar."""
    [point] = encode(full())["coding_agent_turn_duration_seconds"].histogram.data_points
    [exemplar] = point.exemplars
    assert (exemplar.as_double, exemplar.time_unix_nano) == (3.5, int((NOW - 5) * 1e9))
    assert (int.from_bytes(exemplar.trace_id, "big"), int.from_bytes(exemplar.span_id, "big")) == (9, 8)
    assert (len(exemplar.trace_id), len(exemplar.span_id)) == (16, 8)


def test_a_histogram_that_is_still_shown_at_zero_has_no_exemplar() -> None:
    """An exemplar never tells of an observation that the counts do not hold."""
    key = (f"{families.TURN_SECONDS.name}_bucket", (*CALL, "5.0"))
    view = snapshot(observed(families.TURN_SECONDS, CALL), exemplars={key: Mark(3.5, NOW, f"{9:032x}", f"{8:016x}")})
    [point] = encode(view)["coding_agent_turn_duration_seconds"].histogram.data_points
    assert (point.count, point.sum, list(point.exemplars)) == (0, 0, [])


def test_a_failed_call_has_an_error_type_and_a_good_one_has_none() -> None:
    """`error.type` is left out of calls that went well, and the unit is seconds."""
    metric = encode(snapshot([*observed(families.GENAI_DURATION, (*CALL, ""), 1.0),
                              *observed(families.GENAI_DURATION, (*CALL, "overloaded"), 2.0)]))[
                                  "gen_ai.client.operation.duration"]
    good, bad = metric.histogram.data_points
    assert metric.unit == "s"
    assert "error.type" not in attributes(good)
    assert attributes(bad) == {**attributes(good), "error.type": "overloaded"}
    assert list(good.explicit_bounds)[:3] == [0.01, 0.02, 0.04]


@given(st.lists(st.floats(0, 10_000), max_size=40))
def test_buckets_hold_each_observation_once(values: list[float]) -> None:
    """De-cumulated, each bucket counts the observations between its bounds, and all of them make the count."""
    values = [round(value, 3) for value in values]
    view = snapshot(observed(families.TURN_SECONDS, CALL, *values))
    [point] = encode(view)["coding_agent_turn_duration_seconds"].histogram.data_points
    edges = [float("-inf"), *point.explicit_bounds, float("inf")]
    assert list(point.bucket_counts) == [
        sum(low < value <= high for value in values) for low, high in pairwise(edges)]
    assert sum(point.bucket_counts) == point.count == len(values)
    assert list(point.explicit_bounds) == list(families.TURN_SECONDS.buckets)
    assert point.sum == pytest.approx(sum(values))


@given(st.dictionaries(st.sampled_from([*map(str, families.TURN_SECONDS.buckets), families.INF]), st.integers(0, 99)))
def test_buckets_always_sum_to_the_count(numbers: dict[str, int]) -> None:
    """Whatever the counters hold (a bound that a later version added), the point is one the protocol allows."""
    name = f"{families.TURN_SECONDS.name}_bucket"
    view = snapshot([((name, (*CALL, le)), number) for le, number in numbers.items()])
    for metric in encode(view).values():
        for point in metric.histogram.data_points:
            assert sum(point.bucket_counts) == point.count == max(numbers.values())
            assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
            assert list(point.explicit_bounds) == sorted(point.explicit_bounds)


@given(st.integers(200, 20_000))
def test_pieces_hold_every_point_once_and_keep_to_the_limit(limit: int) -> None:
    """A snapshot of any size goes out in requests of any size; only a single point can be too large."""
    counters: list[tuple[CounterKey, int]] = [
        ((families.MESSAGES.name, ("main", "pi-coding", "p", f"model-{n}", "api_key")), n) for n in range(150)]
    view = snapshot([*counters, (COST, 1)])
    encoder = MetricEncoder({}, "1", PROCESS)
    messages = encoder.messages(view, present(view))
    pieces = pack(messages, limit)
    assert sum(points(message) for piece in pieces for message in piece) == sum(map(points, messages))
    sent = [attributes(point)["model"] for piece in pieces for message in piece
            if message.name == families.MESSAGES.name for point in message.sum.data_points]
    assert sent == [f"model-{n}" for n in range(150)]
    for piece in pieces:
        assert sum(message.ByteSize() + 8 for message in piece) <= limit or sum(map(points, piece)) == 1


# --- when it goes

def test_a_new_series_is_pushed_at_zero_before_its_value(http: MetricsOverHttp) -> None:
    """The collector stores 0 and then 5 of a counter that turned up with 5, as a Prometheus would."""
    agent = Agent()
    push = pushing(http, agent)
    push.step()
    agent.spend(5)
    push.step()
    push.step()
    agent.spend(1)
    push.step()
    assert http.values(COST[0]) == [0, 5, 6]


@pytest.mark.parametrize("reply", [Reply(503), Reply(400), Reply(200, body=b"<html>", content_type="text/html"),
                                   Reply(reset=True)])
def test_a_zero_that_was_not_taken_is_pushed_again(http: MetricsOverHttp, reply: Reply) -> None:
    """Only a push that the collector took counts as shown: an outage does not cost the first increment."""
    agent = Agent()
    agent.spend(5)
    push = pushing(http, agent)
    http.rule = lambda names: reply
    push.step()
    push.step()
    http.rule = lambda names: Reply()
    push.step()
    push.step()
    assert http.values(COST[0])[-2:] == [0, 5]
    assert push.counts.failed == 2
    assert push.counts.exported == 2


def test_a_zero_stands_for_an_interval_but_for_a_minute_at_most(http: MetricsOverHttp) -> None:
    """A collector that is itself scraped shows the zero; a long interval does not keep the value back for long."""
    for interval, first in ((15.0, 15.0), (600.0, 60.0)):
        agent = Agent()
        push = pushing(http, agent, interval=interval)
        agent.spend(5)
        assert push.step() == first
        assert push.step() == interval


def test_an_outage_is_one_warning_and_its_end_one_line(
        http: MetricsOverHttp, caplog: pytest.LogCaptureFixture) -> None:
    """Failures after the first are counted, not logged."""
    caplog.set_level(logging.INFO)
    push = pushing(http, Agent())
    http.replies = [Reply(503), Reply(502), Reply(reset=True)]
    for _ in range(5):
        push.step()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert (push.counts.failed, push.counts.exported, push.counts.consecutive) == (3, 2, 0)
    assert push.counts.last_error


def test_what_a_person_has_to_repair_is_an_error(http: MetricsOverHttp, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong token does not go away by itself."""
    http.replies = [Reply(401)]
    pushing(http, Agent()).step()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_retry_after_is_waited_for_and_a_short_interval_backs_off(http: MetricsOverHttp) -> None:
    """The next push is not before the collector wants it, nor ever later than ten minutes for that."""
    http.replies = [Reply(429, {"retry-after": "33"}), Reply(503, {"retry-after": "90000"}), Reply(503), Reply(503)]
    push = pushing(http, Agent(), interval=2.0)
    assert [push.step() for _ in range(5)] == [33.0, 600.0, 4.0, 8.0, 2.0]


def test_a_scrape_that_fails_does_not_end_export(http: MetricsOverHttp, caplog: pytest.LogCaptureFixture) -> None:
    """It is a failed push with one traceback, and the next one is made."""
    agent = Agent()
    agent.failure = RuntimeError("a step failed")
    push = pushing(http, agent)
    push.step()
    push.step()
    assert push.counts.failed == 2
    assert len([record for record in caplog.records if record.exc_info]) == 1
    agent.failure = None
    push.step()
    assert push.counts.exported == 1


def test_a_collector_with_a_small_limit_gets_small_requests(http: MetricsOverHttp) -> None:
    """413 makes requests smaller until they fit, for good, and every point arrives once."""
    limit = 30_000
    agent = Agent()
    names = [f"model-{n:04}" for n in range(900)]
    agent.counters.add({(families.MESSAGES.name, (*USAGE[:3], name, "api_key")): Delta() for name in names})

    def receive(body: bytes, headers: dict[str, str], raw: bytes) -> Reply:
        http.rule = lambda names: Reply(413) if len(raw) > limit else Reply()
        return MetricsOverHttp.receive(http, body, headers, raw)

    http.receive = receive  # type: ignore[method-assign]
    push = pushing(http, agent)
    push.step()
    assert push.counts.exported == 1
    models = [attributes(point)["model"] for metric in http.stored if metric.name == families.MESSAGES.name
              for point in metric.sum.data_points]
    assert sorted(models) == names
    before = len(http.raw)
    push.step()
    assert all(len(raw) <= limit for raw in http.raw[before:])


def test_a_family_that_is_refused_does_not_hold_up_the_others(
        http: MetricsOverHttp, caplog: pytest.LogCaptureFixture) -> None:
    """A collector that answers 400 over one family gets the others; it is told of once, and counted."""
    http.rule = lambda names: Reply(400) if families.COST.name in names else Reply()
    agent = Agent()
    agent.spend(5)
    agent.counters.add({(families.MESSAGES.name, USAGE): Delta(3), (families.SESSIONS.name, USAGE): Delta(1)})
    push = pushing(http, agent)
    push.step()
    push.step()
    assert http.values(families.MESSAGES.name) == [0, 3]
    assert http.values(families.SESSIONS.name) == [0, 1]
    assert http.values(COST[0]) == []
    assert (push.counts.exported, push.counts.rejected) == (2, 2)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_collector_that_refuses_everything_is_asked_little(http: MetricsOverHttp) -> None:
    """400 to everything is a failure, found out in a few requests, and nothing counts as shown."""
    http.rule = lambda names: Reply(400)
    delivered: list[bool] = []
    push = pushing(http, Agent())
    push._collect = lambda: (full(), lambda: delivered.append(True))
    push.step()
    assert push.counts.failed == 1
    assert not delivered
    assert len(http.requests) < 12


def test_rejected_points_are_counted_and_told_once(
        http: MetricsOverHttp, caplog: pytest.LogCaptureFixture) -> None:
    """A partial success is a success: repeating the push would change nothing."""
    http.rule = lambda names: Reply(rejected=2, message="too old")
    agent = Agent()
    agent.spend(1)
    push = pushing(http, agent)
    push.step()
    push.step()
    assert (push.counts.exported, push.counts.rejected, push.counts.last_error) == (2, 4, "too old")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_pipeline_pushes_what_the_logs_say_over_a_restart(http: MetricsOverHttp, tmp_path: Path) -> None:
    """Of a log: its zero, then its money, and after a restart the same start time, with more of it."""
    log = PiLog(tmp_path / "mngr", "agent-1")
    chosen = settings(tmp_path, "--usage.root", f"main={tmp_path / 'mngr'}")
    starts = set()
    for pico in (2 * 10**12, 10**12):
        pipeline = Pipeline(chosen)
        drain(pipeline)
        log.message("anthropic/opus", pico)
        push = pushing(http, Agent())
        push._collect = pipeline.scrape
        push.step()
        push.step()
        starts |= {point.start_time_unix_nano for metric in http.stored if metric.name == COST[0]
                   for point in metric.sum.data_points}
        assert push.counts.last_error == ""
        pipeline.close()
    assert http.values(COST[0]) == [0, 2, 3, 3]
    assert len(starts) == 1
    [cost, *_] = [metric for metric in http.stored if metric.name == COST[0]]
    assert attributes(cost.sum.data_points[0]) == dict(zip(families.COST.labels, (*USAGE, "reported"), strict=True))


# --- in the background

def test_pushes_follow_each_other_and_outlast_an_outage(http: MetricsOverHttp) -> None:
    """One at the start, one every interval; the totals after an outage are those without it."""
    agent = Agent()
    exporter = exporting(http, agent, interval=0.01)
    http.replies = [Reply(), Reply(503, {"retry-after": "0"})]
    exporter.start()
    eventually(lambda: exporter.counts.failed)
    agent.spend(5)
    eventually(lambda: 5 in http.values(COST[0]))
    exporter.stop(20)
    values = http.values(COST[0])
    assert values == sorted(values)
    assert values[0] == 0
    assert set(values) == {0, 5}
    assert http.connections <= 2


def test_a_stop_pushes_what_is_new_at_zero_and_then_its_value(http: MetricsOverHttp) -> None:
    """A short-lived pod's last turn arrives, and increase() sees it."""
    agent = Agent()
    exporter = exporting(http, agent)
    exporter.start()
    eventually(lambda: exporter.counts.exported)
    agent.spend(5)
    exporter.stop(20)
    assert http.values(COST[0]) == [0, 5]
    assert exporter.counts.exported == 3


def test_a_stop_ends_even_if_something_is_held_for_longer(http: MetricsOverHttp) -> None:
    """A hold for pairs of servers does not keep a stop going until its time is up."""
    agent = Agent(hold=3600.0)
    agent.spend(5)
    exporter = exporting(http, agent)
    exporter.start()
    eventually(lambda: exporter.counts.exported)
    exporter.stop(60)
    assert exporter.counts.exported == 3
    assert no_worker()


@pytest.mark.parametrize("reply", [Reply(hang=True), Reply(drip=True)])
def test_a_stop_cuts_off_a_request_that_hangs(http: MetricsOverHttp, reply: Reply) -> None:
    """The time to stop is kept, and there is no further scrape after it."""
    http.rule = lambda names: reply
    agent = Agent()
    exporter = exporting(http, agent)
    exporter.start()
    http.wait_for(lambda: http.requests)
    began = time.monotonic()
    exporter.stop(0.2)
    assert time.monotonic() - began < 9
    eventually(no_worker)
    assert agent.collected == 1


def test_a_stop_with_a_dead_collector_is_in_time() -> None:
    """Nobody listens: the thread ends, and each attempt is a failure."""
    receiver = MetricsOverHttp()
    receiver.url = f"http://127.0.0.1:{free_port()}"
    exporter = exporting(receiver, Agent())
    exporter.start()
    eventually(lambda: exporter.counts.failed)
    exporter.stop(0.3)
    eventually(no_worker)
    assert exporter.counts.exported == 0


def test_what_was_spent_during_a_push_is_in_the_last_one(http: MetricsOverHttp) -> None:
    """A stop that comes while a push is on its way is followed by another, at once: the first knew nothing of it."""
    http.replies = [Reply(late=True)]
    agent = Agent()
    exporter = exporting(http, agent)
    exporter.start()
    http.wait_for(lambda: http.requests)
    agent.spend(5)
    began = time.monotonic()
    stopping = threading.Thread(target=exporter.stop, args=(120.0,))
    stopping.start()
    eventually(lambda: exporter._deadline)
    http.release.set()
    stopping.join()
    assert http.values(COST[0]) == [0, 5]
    assert time.monotonic() - began < 50


def test_nothing_is_sent_when_no_time_is_left(http: MetricsOverHttp) -> None:
    """A scrape that takes all the time there is to stop is not followed by a request."""
    clock = Clock()
    push = pushing(http, Agent(), clock=clock)
    push.deadline = clock.now
    push.step()
    assert (push.counts.exported, push.counts.failed, http.requests) == (0, 1, [])


def no_worker() -> bool:
    return not any(thread.name == "otlp-metrics" for thread in threading.enumerate())


def test_a_stop_before_start_and_a_second_start(http: MetricsOverHttp) -> None:
    """Stopping what never ran is fine; starting twice is a mistake of the caller."""
    exporter = exporting(http, Agent())
    exporter.stop(0)
    exporter.start()
    with pytest.raises(RuntimeError, match="already started"):
        exporter.start()
    exporter.stop(5)


# --- settings

def create(environ: dict[str, str], **settings: Any) -> MetricsExporter[Snapshot] | None:
    return create_metrics(Agent().collect, present, environ, version="1", instance="a", started=PROCESS, **settings)


@pytest.mark.parametrize(("environ", "settings", "interval"), [
    ({}, {}, 60.0),
    ({"OTEL_METRIC_EXPORT_INTERVAL": "15000"}, {}, 15.0),
    ({"OTEL_METRIC_EXPORT_INTERVAL": " "}, {}, 60.0),
    ({"OTEL_METRIC_EXPORT_INTERVAL": "15000"}, {"interval": 5.0}, 5.0),
])
def test_the_interval(environ: dict[str, str], settings: dict[str, float], interval: float) -> None:
    """A minute, or the standard variable in milliseconds, or our setting in seconds, which wins."""
    exporter = create(environ, endpoint="http://127.0.0.1:4318", **settings)
    assert exporter is not None
    assert exporter.interval == interval
    assert exporter.target.url == "http://127.0.0.1:4318/v1/metrics"


@pytest.mark.parametrize(("environ", "settings", "origin"), [
    ({"OTEL_METRIC_EXPORT_INTERVAL": "soon"}, {}, "OTEL_METRIC_EXPORT_INTERVAL"),
    ({"OTEL_METRIC_EXPORT_INTERVAL": "nan"}, {}, "OTEL_METRIC_EXPORT_INTERVAL"),
    ({"OTEL_METRIC_EXPORT_INTERVAL": "10"}, {}, "OTEL_METRIC_EXPORT_INTERVAL"),
    ({}, {"interval": 0.0}, "otlp.metrics-interval"),
    ({}, {"interval": 1e6}, "otlp.metrics-interval"),
])
def test_a_bad_interval_is_one_line(environ: dict[str, str], settings: dict[str, float], origin: str) -> None:
    """The message opens with where the value was written."""
    with pytest.raises(ValueError, match=f"^{origin}: [^\n]+$"):
        create(environ, endpoint="http://127.0.0.1:4318", **settings)


@pytest.mark.parametrize("environ", [
    {}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_METRICS_EXPORTER": "none"}])
def test_nothing_is_pushed_unless_asked_for(environ: dict[str, str]) -> None:
    """No endpoint for metrics, or the standard switch: no exporter."""
    assert create(environ) is None


def test_another_temporality_is_a_remark(caplog: pytest.LogCaptureFixture) -> None:
    """Counters that never reset are pushed as they are; a pod's variable for other programs is no reason to fail."""
    environ = {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"}
    assert create(environ, endpoint="http://127.0.0.1:4318") is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_worker_loads_nothing_before_its_start() -> None:
    """An exporter that is not used costs neither protobuf nor gRPC."""
    import subprocess
    import sys

    code = ("import sys; from coding_agent_exporter.export import metrics; "
            "print(sorted({'google', 'grpc', 'opentelemetry'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
