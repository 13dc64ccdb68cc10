"""Takes a snapshot and its metric families, gives the bytes of OTLP metrics requests.

What is served at /metrics goes out under the same names, `_total` included. Every conversion to Prometheus appends
that to a monotonic sum which lacks it, and leaves it alone where it is; those that are told to change no names, and
backends that never do, would make another name of `coding_agent_tokens`. For the same reason units are empty: they
are in the names already. Label names are attribute keys; an empty label is an absent one, in Prometheus as here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Protocol

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    Exemplar,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from coding_agent_exporter import families
from coding_agent_exporter.export.wire import SCOPE
from coding_agent_exporter.spans import ERROR, MODEL, OPERATION, PROVIDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from coding_agent_exporter.families import Family
    from coding_agent_exporter.model import CounterKey, Mark

TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - an attribute's name

# Root and source have no attribute in the conventions. Without them, two of them would share one series.
_ATTRIBUTES = {"provider": PROVIDER, "model": MODEL, "token_type": TOKEN_TYPE, "error": ERROR}
_UNITS = {families.GENAI_DURATION.name: "s", families.GENAI_TOKENS.name: "{token}"}


class Sample(Protocol):
    """One sample of a family that is no histogram; `name` is the family's in the catalogue."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def value(self) -> float: ...


class Shown(Protocol):
    """One family as a scrape shows it."""

    @property
    def type(self) -> str: ...
    @property
    def samples(self) -> Sequence[Sample]: ...


class View(Protocol):
    """What is needed of the snapshot that /metrics is made from. Times are epoch seconds."""

    @property
    def now(self) -> float: ...
    @property
    def started(self) -> float:
        """The very first start, since which counters count."""
        ...
    @property
    def counters(self) -> Sequence[tuple[CounterKey, int]]: ...
    @property
    def held(self) -> Sequence[CounterKey]:
        """Counters that do not show their value yet."""
        ...
    @property
    def internal(self) -> Mapping[CounterKey, float]:
        """Counters that start over with the process."""
        ...
    @property
    def exemplars(self) -> Mapping[CounterKey, Mark]: ...


class MetricEncoder:
    """Builds requests for one resource. `version` is the scope's; `started` this process's start, epoch seconds."""

    def __init__(self, resource: Mapping[str, str], version: str, started: float) -> None:
        self._resource = Resource(attributes=_attributes(resource))
        self._scope = InstrumentationScope(name=SCOPE, version=version)
        self._started = started

    def messages(self, view: View, shown: Iterable[Shown]) -> list[Metric]:
        """One message for each family that has samples. `shown` are the families of the same snapshot.

        Raises ValueError when the protocol cannot carry something, which takes a text that is not Unicode.
        """
        now = _nanoseconds(view.now)
        internal = {name for name, _ in view.internal}
        found = []
        for metric in shown:
            if metric.type == "histogram" or not metric.samples:
                continue
            family = families.BY_NAME[metric.samples[0].name]
            if metric.type == "counter":
                # Of a clock that was set back: a point must not end before it begins.
                start = min(now, _nanoseconds(self._started if family.name in internal else view.started))
                found.append(_sum(family, metric.samples, start, now))
            else:
                # Always doubles: a metric whose points change their type is two metrics to some backends.
                found.append(Metric(name=family.name, description=family.help, gauge=Gauge(data_points=[
                    NumberDataPoint(attributes=_attributes(sample.labels), time_unix_nano=now,
                                    as_double=sample.value) for sample in metric.samples])))
        found += _histograms(view, min(now, _nanoseconds(view.started)), now)
        return found

    def request(self, messages: Iterable[Metric]) -> bytes:
        """The bytes of one request."""
        return ExportMetricsServiceRequest(resource_metrics=[ResourceMetrics(
            resource=self._resource, scope_metrics=[ScopeMetrics(scope=self._scope, metrics=messages)],
        )]).SerializeToString()


def pack(messages: Iterable[Metric], limit: int) -> list[list[Metric]]:
    """The messages in pieces of about `limit` bytes each. One that is larger is cut, down to a single point."""
    pieces: list[list[Metric]] = []
    room = 0
    todo = list(messages)[::-1]
    while todo:
        message = todo.pop()
        size = message.ByteSize() + 8
        if size > limit and points(message) > 1:
            todo += reversed(_halves(message))
        elif size > room:
            pieces.append([message])
            room = limit - size
        else:
            pieces[-1].append(message)
            room -= size
    return pieces


def points(message: Metric) -> int:
    """How many data points a message holds."""
    return len(getattr(message, message.WhichOneof("data") or "gauge").data_points)


def _halves(message: Metric) -> tuple[Metric, Metric]:
    half = points(message) // 2
    first, second = Metric(), Metric()
    first.CopyFrom(message)
    second.CopyFrom(message)
    kind = message.WhichOneof("data") or "gauge"
    del getattr(first, kind).data_points[half:]
    del getattr(second, kind).data_points[:half]
    return first, second


def _sum(family: Family, samples: Iterable[Sample], start: int, now: int) -> Metric:
    found = []
    for sample in samples:
        point = NumberDataPoint(attributes=_attributes(sample.labels), start_time_unix_nano=start, time_unix_nano=now)
        if family.scale == 1:
            point.as_int = int(sample.value)
        else:
            point.as_double = sample.value
        found.append(point)
    return Metric(name=family.name, description=family.help, sum=Sum(
        data_points=found, is_monotonic=True, aggregation_temporality=AGGREGATION_TEMPORALITY_CUMULATIVE))


def _histograms(view: View, start: int, now: int) -> Iterator[Metric]:
    """The histograms, from the counters that they are kept as (see `families.HISTOGRAMS`)."""
    buckets: dict[str, dict[tuple[str, ...], dict[float, CounterKey]]] = defaultdict(lambda: defaultdict(dict))
    numbers: dict[CounterKey, int] = {}
    for key, number in view.counters:
        name, values = key
        if name in families.HISTOGRAMS:
            family, part = families.HISTOGRAMS[name]
            numbers[key] = number
            if part == "bucket":
                buckets[family.name][values[:-1]][float(values[-1])] = key
    for family in families.FAMILIES:
        if family.name not in buckets:
            continue
        found = []
        for values, bounds in buckets[family.name].items():
            point = HistogramDataPoint(
                attributes=_attributes(_labels(family, values)), start_time_unix_nano=start, time_unix_nano=now,
                sum=numbers.get((f"{family.name}_sum", values), 0) / family.scale)
            _fill(point, bounds, numbers, view.exemplars)
            found.append(point)
        yield Metric(name=family.otlp or family.name, description=family.help, unit=_UNITS.get(family.name, ""),
                     histogram=Histogram(data_points=found, aggregation_temporality=AGGREGATION_TEMPORALITY_CUMULATIVE))


def _fill(point: HistogramDataPoint, bounds: Mapping[float, CounterKey], numbers: Mapping[CounterKey, int],
          exemplars: Mapping[CounterKey, Mark]) -> None:
    """Buckets, count and exemplars of one point. The counters are cumulative, the protocol's buckets are not."""
    below = 0
    for bound in sorted(bounds.keys() | {float("inf")}):
        key = bounds.get(bound)
        # A bound that a later version added has counted less than the one below it.
        total = below if key is None else max(below, numbers[key])
        point.bucket_counts.append(total - below)
        if bound != float("inf"):
            point.explicit_bounds.append(bound)
        mark = exemplars.get(key) if key else None
        if mark is not None and total > below:  # not of an observation that a new series does not show yet
            point.exemplars.append(Exemplar(
                as_double=mark.value, time_unix_nano=_nanoseconds(mark.at),
                trace_id=bytes.fromhex(mark.trace), span_id=bytes.fromhex(mark.span)))
        below = total
    point.count = below


def _labels(family: Family, values: Sequence[str]) -> dict[str, str]:
    labels = dict(zip(family.labels, values, strict=True))
    if not family.otlp:
        return labels
    return {OPERATION: "chat", **{_ATTRIBUTES.get(label, label): value for label, value in labels.items()}}


def _attributes(labels: Mapping[str, str]) -> list[KeyValue]:
    return [KeyValue(key=name, value=AnyValue(string_value=value)) for name, value in labels.items() if value]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
