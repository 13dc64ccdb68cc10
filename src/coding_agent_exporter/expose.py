"""Takes the snapshot that pipeline publishes, gives its exposition: the one user of prometheus_client."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import Exemplar, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from coding_agent_exporter import families
from coding_agent_exporter.model import Activity, CounterKey, Instance, Mark, Pressure, RateLimit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coding_agent_exporter.families import Family

GaugeKey = tuple[str, tuple[str, ...]]


@dataclass(slots=True)
class Snapshot:
    """All that one scrape shows. Nothing in it changes once it is published.

    `counters` are in the families' integer units. `held` are the counters that still show their first value.
    """

    now: float
    version: str
    counters: Sequence[tuple[CounterKey, int]] = ()
    held: Sequence[CounterKey] = ()
    internal: dict[CounterKey, float] = field(default_factory=dict)
    gauges: dict[GaugeKey, float] = field(default_factory=dict)
    instances: Sequence[Instance] = ()
    activities: dict[tuple[str, Activity], int] = field(default_factory=dict)
    rate_limits: dict[tuple[str, str, str], RateLimit] = field(default_factory=dict)
    info_labels: frozenset[str] = frozenset()
    exemplars: dict[CounterKey, Mark] = field(default_factory=dict)
    """The latest observation of a histogram's bucket, by the bucket's counter."""
    started: float = 0.0
    """Epoch seconds of the very first start: since then, counters have been counting."""


class SnapshotCollector(Collector):
    """Turns one snapshot into metric families, in the order of `families.FAMILIES`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        samples: dict[str, Metric] = {family.name: _metric(family) for family in families.FAMILIES}
        for key, number in snapshot.counters:
            name, values = key
            if name in families.HISTOGRAMS:
                _histogram(samples, key, number, snapshot.exemplars.get(key))
                continue
            family = families.BY_NAME[name]
            labels = family.labels
            if len(values) > len(labels):  # the agent's label, which a setting adds to usage
                labels = (*families.USAGE, "agent", *labels[len(families.USAGE) :])
            value = number / family.scale if family.scale != 1 else number
            samples[name].add_sample(name, dict(zip(labels, values, strict=True)), value)
        for (name, values), amount in (*snapshot.internal.items(), *snapshot.gauges.items()):
            samples[name].add_sample(name, dict(zip(families.BY_NAME[name].labels, values, strict=True)), amount)
        for instance in snapshot.instances:
            _instance(samples, instance, snapshot.info_labels)
        for (root, activity), count in snapshot.activities.items():
            _add(samples, families.INSTANCES, (root, activity.value), count)
        for window, limit in snapshot.rate_limits.items():
            if limit.resets_at is not None and limit.resets_at <= snapshot.now:
                continue  # The window is over: what was used of it says nothing of the next one.
            _add(samples, families.RATE_LIMIT_USED, window, limit.used_percent)
            if limit.resets_at is not None:
                _add(samples, families.RATE_LIMIT_RESETS, window, limit.resets_at)
            if limit.window_seconds is not None:
                _add(samples, families.RATE_LIMIT_WINDOW, window, limit.window_seconds)
        _add(samples, families.BUILD_INFO, (snapshot.version, platform.python_version()), 1)
        yield from (metric for metric in samples.values() if metric.samples)


class _Fixed:
    """A collector of nothing but what it was given: lets prometheus_client's encoders render some families."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


# None: register nowhere. The parameter's type does not allow for it, the code does.
_process = ProcessCollector(registry=None)


def render(snapshot: Snapshot, accept: str = "", names: frozenset[str] = frozenset()) -> tuple[bytes, str]:
    """The exposition of a snapshot and its content type.

    Classic text or OpenMetrics, as the Accept header asks. `names` restricts it to these sample names, as
    prometheus_client's `name[]` does.
    """
    encoder, content_type = choose_encoder(accept)
    metrics = [*SnapshotCollector(snapshot).collect(), *_process.collect()]
    if names:
        for metric in metrics:
            metric.samples = [sample for sample in metric.samples if sample.name in names]
        metrics = [metric for metric in metrics if metric.samples]
    if "escaping=dots" in content_type:  # the one scheme that changes our names
        return encoder(_Fixed(metrics)), content_type
    return _encode(metrics, openmetrics=content_type.startswith("application/openmetrics-text")), content_type


def _encode(metrics: Sequence[Metric], *, openmetrics: bool) -> bytes:
    """What prometheus_client's encoders give for gauges, counters and infos, in a fifth of the time.

    They look at every character of every name, on every line: 30 ms of a scrape of 4,000 lines.
    """
    lines: list[str] = []
    for metric in metrics:
        name, kind, text = metric.name, metric.type, metric.documentation
        if openmetrics:
            text = _escape(text)
        elif kind == "counter":
            name += "_total"
        elif kind == "info":
            name, kind = f"{name}_info", "gauge"
        lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
        for sample in metric.samples:
            labels = ",".join([f'{label}="{_escape(value)}"' for label, value in sorted(sample.labels.items())])
            value = floatToGoString(sample.value)  # type: ignore[no-untyped-call] # the library leaves it untyped
            mark = sample.exemplar if openmetrics else None
            tail = ""
            if mark is not None:
                marks = ",".join([f'{label}="{_escape(text)}"' for label, text in mark.labels.items()])
                tail = f" # {{{marks}}} {floatToGoString(mark.value)} {mark.timestamp}"  # type: ignore[no-untyped-call]
            lines.append(f"{sample.name}{{{labels}}} {value}{tail}\n" if labels else f"{sample.name} {value}\n")
    if openmetrics:
        lines.append("# EOF\n")
    return "".join(lines).encode()


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _metric(family: Family) -> Metric:
    name = family.name
    if family.type == "counter":
        return Metric(name.removesuffix("_total"), family.help, "counter")
    if family.type == "info":
        return Metric(name.removesuffix("_info"), family.help, "info")
    if family.type == "histogram":
        return Metric(name, family.help, "histogram")
    # OpenMetrics wants the label of a state set to bear the family's name; a gauge per state says the same.
    return Metric(name, family.help, "gauge")


def _histogram(samples: dict[str, Metric], key: CounterKey, number: int, mark: Mark | None) -> None:
    (name, values), (family, part) = key, families.HISTOGRAMS[key[0]]
    if family.otlp:
        return
    metric = samples[family.name]
    labels = dict(zip(family.labels, values, strict=False))
    if part == "sum":
        metric.add_sample(name, labels, number / family.scale)
        return
    exemplar = None
    if mark is not None:
        exemplar = Exemplar({"trace_id": mark.trace, "span_id": mark.span}, mark.value, mark.at)
    metric.add_sample(name, {**labels, "le": values[-1]}, number, exemplar=exemplar)
    if values[-1] == families.INF:
        metric.add_sample(f"{family.name}_count", labels, number)


def _add(samples: dict[str, Metric], family: Family, values: Sequence[str], value: float) -> None:
    samples[family.name].add_sample(family.name, dict(zip(family.labels, values, strict=True)), value)


def _instance(samples: dict[str, Metric], instance: Instance, info_labels: frozenset[str]) -> None:
    heartbeat = instance.heartbeat
    pid = (instance.root, str(heartbeat.pid))
    info = {"root": instance.root, "pid": pid[1]}
    for label in families.INSTANCE_INFO.labels[2:]:
        if label in info_labels:
            info[label] = getattr(heartbeat, label)
    samples[families.INSTANCE_INFO.name].add_sample(families.INSTANCE_INFO.name, info, 1)
    _add(samples, families.HEARTBEAT, pid, heartbeat.updated_at)
    if heartbeat.started_at is not None:
        _add(samples, families.START, pid, heartbeat.started_at)
    _add(samples, families.STALE, pid, instance.stale)
    if instance.stale:
        return
    for activity in Activity:
        _add(samples, families.ACTIVITY, (*pid, activity.value), activity is instance.activity)
    _add(samples, families.ACTIVITY_SINCE, pid, instance.activity_since)
    for family, value in (
        (families.CONTEXT_PERCENT, heartbeat.context_percent),
        (families.CONTEXT_PEAK, instance.context_percent_peak),
        (families.CONTEXT_TOKENS, heartbeat.context_tokens),
        (families.CONTEXT_WINDOW, heartbeat.context_window),
        (families.NEAR_LIMIT, _at_least(heartbeat.near_limit, heartbeat.pressure, Pressure.NEAR_LIMIT)),
        (families.CLOSE_TO_LIMIT, _at_least(heartbeat.close_to_limit, heartbeat.pressure, Pressure.APPROACHING_LIMIT)),
    ):
        if value is not None:
            _add(samples, family, pid, value)
    if heartbeat.pressure is not None:
        for pressure in Pressure:
            _add(samples, families.PRESSURE, (*pid, pressure.value), pressure is heartbeat.pressure)


def _at_least(reported: bool | None, pressure: Pressure | None, level: Pressure) -> bool | None:
    """What the agent reports, else what its pressure says."""
    if reported is not None or pressure is None:
        return reported
    levels = list(Pressure)
    return levels.index(pressure) >= levels.index(level)
