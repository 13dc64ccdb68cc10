"""The whole exposition, in both formats, against golden files; `UPDATE_GOLDEN=1` writes them anew."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from coding_agent_exporter import families
from coding_agent_exporter.expose import Snapshot, SnapshotCollector, render
from coding_agent_exporter.model import Activity, CounterKey, Heartbeat, Instance, Pressure, RateLimit
from support import DATA, parse

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
USAGE = ("pi", "pi-coding", "anthropic", "claude-opus-4-8", "api_key")


def heartbeat(pid: int, **more: Any) -> Heartbeat:
    plain = Heartbeat(
        pid=pid, started_at=1795225188.127, updated_at=1795225189.896, heartbeat_seconds=1.5,
        activity=Activity.WORKING, has_pending_messages=False, last_event="turn_start",
    )
    return replace(plain, **more)


def snapshot() -> Snapshot:
    """A little of everything."""
    counters: list[tuple[CounterKey, int]] = [
        ((families.COST.name, (*USAGE, "reported")), 1_234_500_000_000),
        ((families.COST.name, (*USAGE[:3], 'we"ird\n\\модель', USAGE[4], "estimated")), 5),
        ((families.COST.name, (*USAGE, "agent-1", "reported")), 10**12),
        ((families.TOKENS.name, (*USAGE, "cache_read")), 2**53),
        ((families.MESSAGES.name, USAGE), 3),
        ((families.UNPRICED.name, USAGE), 0),
        ((families.SESSIONS.name, USAGE), 1),
        ((families.CROSSINGS.name, ("pi", "near_limit")), 2),
        ((families.COMPACTIONS.name, ("pi",)), 1),
        ((families.LOST.name, ("pi",)), 0),
    ]
    busy = heartbeat(
        7, session_id="uuid", session_name="fix the bug", host="vm", cwd="/srv/project", git_branch="main",
        provider="anthropic", model="claude-opus-4-8", thinking_level="high", context_percent=97.2,
        context_tokens=194_400.0, context_window=200_000.0, pressure=Pressure.NEAR_LIMIT, close_to_limit=True,
        near_limit=True,
    )
    working = Instance("pi", busy, stale=False, activity=Activity.WORKING, activity_since=1795225180.5,
                       context_percent_peak=97.5)
    idle = heartbeat(8, started_at=None, pressure=Pressure.NORMAL)
    return Snapshot(
        now=1795225190.0,
        version="1.2.3",
        counters=counters,
        internal={
            (families.REJECTED.name, ("pi", "usage", "not_json")): 4, (families.COMMITS.name, ("ok",)): 9,
            (families.STEPS.name, ()): 12, (families.BYTES_READ.name, ("pi", "usage")): 1000,
        },
        gauges={(families.SERIES.name, ()): 10, (families.SOURCE_FILES.name, ("pi", "usage", "ok")): 1},
        instances=[
            working,
            Instance("pi", idle, stale=False, activity=Activity.WAITING_INPUT, activity_since=1795225181.0,
                     context_percent_peak=None),
            replace(working, heartbeat=replace(busy, pid=9), stale=True),
        ],
        activities={("pi", Activity.WORKING): 1, ("pi", Activity.WAITING_INPUT): 1, ("pi", Activity.UNKNOWN): 0},
        rate_limits={
            ("m", "claude", "five_hour"): RateLimit(45.5, 1795230000.0, 18000.0),
            ("m", "claude", "over"): RateLimit(99.0, 1795225189.0, 18000.0),
            ("m", "codex", "bare"): RateLimit(1.0),
        },
        info_labels=frozenset(families.INSTANCE_INFO.labels) - {"host"},
    )


@pytest.mark.parametrize(("name", "accept"), [("classic.txt", "text/plain"), ("openmetrics.txt", OPENMETRICS)])
def test_the_exposition_is_the_golden_one(name: str, accept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, types, labels, escapes, order and numbers. What the process measures of itself is left out."""
    monkeypatch.setattr(platform, "python_version", lambda: "3.x")
    monkeypatch.setattr("coding_agent_exporter.expose._process.collect", list)
    body, content_type = render(snapshot(), accept)
    golden = DATA / "golden" / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_bytes(body)
    assert content_type.startswith(accept.partition(";")[0])
    assert body.decode() == golden.read_text()


def test_both_formats_say_the_same() -> None:
    """And OpenMetrics is what its own parser takes."""
    classic = parse(render(snapshot())[0].decode())
    text = render(snapshot(), OPENMETRICS)[0].decode()
    open_metrics = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_openmetrics(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }
    own = {key: value for key, value in open_metrics.items() if key[0].startswith("coding_agent")}
    assert own == {key: value for key, value in classic.items() if key[0].startswith("coding_agent")}


def test_a_stale_instance_shows_only_that_it_is() -> None:
    """What a process did before it died would keep alerts firing."""
    shown = {name for name, labels in parse(render(snapshot())[0].decode()) if ("pid", "9") in labels}
    still = (families.INSTANCE_INFO, families.HEARTBEAT, families.START, families.STALE)
    assert shown == {family.name for family in still}


def test_what_is_not_known_is_absent() -> None:
    """No percent, no tokens, no start: no series, least of all a 0."""
    shown = {name for name, labels in parse(render(snapshot())[0].decode()) if ("pid", "8") in labels}
    context = (families.CONTEXT_PERCENT, families.CONTEXT_PEAK, families.CONTEXT_TOKENS, families.CONTEXT_WINDOW)
    assert not shown & {family.name for family in (*context, families.START)}
    assert families.ACTIVITY.name in shown


def test_a_restricted_scrape_shows_what_it_asks_for() -> None:
    """As prometheus_client's `name[]` parameter does."""
    body, _ = render(snapshot(), "", frozenset({families.MESSAGES.name}))
    assert {name for name, _ in parse(body.decode())} == {families.MESSAGES.name}


def test_every_family_can_be_shown() -> None:
    """The table and the collector know the same names, and every label of the table is used."""
    for family in families.FAMILIES:
        shown = Snapshot(now=0, version="v", gauges={(family.name, tuple("x" for _ in family.labels)): 1})
        metrics = [metric for metric in SnapshotCollector(shown).collect() if metric.samples]
        assert any(sample.name == family.name and set(sample.labels) == set(family.labels)
                   for metric in metrics for sample in metric.samples)


def test_the_metrics_document_is_generated_from_the_table() -> None:
    """`make docs` writes it."""
    document = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert document.read_text() == families.markdown()


@pytest.mark.parametrize(("library", "accept"), [(generate_latest, "text/plain"), (openmetrics_latest, OPENMETRICS)])
def test_the_encoder_gives_what_the_library_gives(
    library: Callable[[CollectorRegistry], bytes], accept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: ours is only faster."""
    monkeypatch.setattr("coding_agent_exporter.expose._process.collect", list)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(snapshot()))
    assert render(snapshot(), accept)[0] == library(registry)
