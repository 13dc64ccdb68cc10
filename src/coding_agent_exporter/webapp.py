"""Takes the pipeline, gives the web server its answers: the exposition, the landing page, health and readiness."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.export import DROP_REASONS
from coding_agent_exporter.expose import Snapshot, render
from coding_agent_exporter.landing import CONTENT_SECURITY_POLICY, InstanceRow, Page, RootRow, SpendRow
from coding_agent_exporter.landing import render as render_page
from coding_agent_exporter.model import PICO, Instance
from coding_agent_exporter.pipeline import SCRAPE_PATIENCE
from coding_agent_exporter.web import Reply, Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.export import Exporter
    from coding_agent_exporter.pipeline import Pipeline
    from coding_agent_exporter.watch import Waker

TEXT = "text/plain; charset=utf-8"

MAX_ROWS = 200
"""The page is for people: more agents or models than this belong in a dashboard."""


class App:
    """What is served. Thread-safe, as the pipeline is."""

    def __init__(self, pipeline: Pipeline, waker: Waker) -> None:
        self._pipeline = pipeline
        self._waker = waker
        self.server: Server | None = None
        """Set once there is one: its own counts are shown with the rest."""
        self.exporter: Exporter | None = None
        """As `server`."""

    def metrics(self, accept: str, names: frozenset[str], timeout: float | None) -> Reply:
        began = time.monotonic()
        snapshot, delivered = self.collect(timeout)
        body, content_type = render(snapshot, accept, names)
        self._pipeline.scrape_seconds = time.monotonic() - began
        # A scrape of a few chosen metrics has not seen the others at zero.
        return Reply(200, content_type, body, sent=None if names else delivered)

    def healthy(self) -> Reply:
        if self._pipeline.broken:
            return Reply(503, TEXT, b"A step failed; the exporter is about to stop.\n")
        return Reply(200, TEXT, b"Healthy.\n")

    def ready(self) -> Reply:
        if not self._pipeline.caught_up:
            return Reply(503, TEXT, b"Reading what is there.\n")
        if self._pipeline.stuck > SCRAPE_PATIENCE:
            return Reply(503, TEXT, b"A step takes long: is there a disk that does not answer?\n")
        if self._pipeline.pending_commit:
            return Reply(503, TEXT, b"The state file cannot be written: counters stand still.\n")
        return Reply(200, TEXT, b"Ready.\n")

    def landing(self) -> Reply:
        snapshot, _ = self.collect()
        headers = (("Content-Security-Policy", CONTENT_SECURITY_POLICY),)
        body = render_page(page(self._pipeline, snapshot)).encode()
        return Reply(200, "text/html; charset=utf-8", body, headers)

    def collect(self, timeout: float | None = None) -> tuple[Snapshot, Callable[[], None]]:
        """What a scrape that arrives now is shown, and what to call once it was delivered."""
        # Rendering and sending take their part of the time for which the client waits.
        patience = SCRAPE_PATIENCE if timeout is None else min(SCRAPE_PATIENCE, 0.7 * timeout)
        snapshot, delivered = self._pipeline.scrape(patience)
        snapshot.gauges[families.WATCH_FALLBACK.name, ()] = self._waker.polling
        if self.server is not None:
            snapshot.internal[families.WEB_ERRORS.name, ()] = self.server.errors
            snapshot.internal[families.WEB_REFUSED.name, ()] = self.server.refused
        counts = None if self.exporter is None else self.exporter.counts
        snapshot.internal[families.SPANS_EXPORTED.name, ()] = 0 if counts is None else counts.exported
        snapshot.internal[families.SPANS_FAILED.name, ()] = 0 if counts is None else counts.failed
        for reason in DROP_REASONS:
            dropped = 0 if counts is None else counts.dropped[reason]
            snapshot.internal[families.SPANS_DROPPED.name, (reason,)] = dropped
        return snapshot, delivered


def page(pipeline: Pipeline, snapshot: Snapshot) -> Page:
    """The landing page of a snapshot."""
    notes = []
    if not pipeline.caught_up:
        notes.append("Still reading what is there; usage that is new is shown once that is done.")
    if pipeline.pending_commit:
        notes.append("The state file cannot be written: counters stand still until it can. Nothing is lost.")
    return Page(
        title="coding-agent-exporter",
        version=snapshot.version,
        telemetry_path=pipeline.settings.web_telemetry_path,
        uptime=duration(snapshot.now - pipeline.started),
        links=(("/-/healthy", "Health"), ("/-/ready", "Readiness")),
        roots=_roots(pipeline, snapshot),
        instances=tuple(
            _instance(instance, snapshot) for instance in snapshot.instances[:MAX_ROWS]
        ),
        spend=_spend(snapshot),
        notes=tuple(notes),
    )


def _instance(instance: Instance, snapshot: Snapshot) -> InstanceRow:
    heartbeat, stale, now = instance.heartbeat, instance.stale, snapshot.now
    # The page shows no more than the metrics do.
    shown = {label: getattr(heartbeat, label) for label in snapshot.info_labels}
    return InstanceRow(
        pid=heartbeat.pid,
        root=instance.root,
        activity="stale" if stale else instance.activity.value,
        since=duration(now - (heartbeat.updated_at if stale else instance.activity_since)),
        context_percent=None if stale else heartbeat.context_percent,
        model="/".join(filter(None, (shown.get("provider"), shown.get("model")))),
        session=shown.get("session_name") or shown.get("session_id") or "",
    )


def _roots(pipeline: Pipeline, snapshot: Snapshot) -> tuple[RootRow, ...]:
    rows = []
    for root in pipeline.settings.roots:
        states = {
            state: int(snapshot.gauges.get((families.SOURCE_FILES.name, (root.alias, root.kind, state)), 0))
            for state in families.FILE_STATES
        }
        problems = [f"{states[state]} {state}" for state in families.FILE_STATES[1:] if states[state]]
        files = "file" if states["ok"] == 1 else "files"
        rows.append(RootRow(
            root.kind, root.alias, str(root.path), root.path.is_dir(), f"{states['ok']} {files}", ", ".join(problems)
        ))
    return tuple(rows)


def _spend(snapshot: Snapshot) -> tuple[SpendRow, ...]:
    usd: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    tokens: dict[tuple[str, str], int] = defaultdict(int)
    for (name, labels), value in snapshot.counters:
        if name in (families.COST.name, families.TOKENS.name):
            where = (labels[1], f"{labels[2]}/{labels[3]}")
            if name == families.COST.name:
                usd[where][labels[4]] += value
            else:
                tokens[where] += value
    rows = sorted(tokens.keys() | usd.keys(), key=lambda where: (-sum(usd[where].values()), where))
    return tuple(
        SpendRow(
            source, model,
            _money(usd[source, model].get("api_key")), _money(usd[source, model].get("subscription")),
            f"{tokens[source, model]:,}" if tokens[source, model] else "",
        )
        for source, model in rows[:MAX_ROWS]
    )


def _money(pico: int | None) -> str:
    return "" if pico is None else f"${pico / PICO:,.4f}"


def duration(seconds: float) -> str:
    """A span of time for people: "42 s", "3 min", "5 h 12 min", "2 d 3 h"."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
