"""Takes the settings, builds everything and runs it. The one file to read first.

    discover -> watch -> tail -> decode -> ledger -> store (commit) -> expose

One `step` takes what the files say now, commits it, and only then publishes it. A scrape makes a step first: it
reflects every byte that was on disk when it arrived. The waker only makes steps happen between scrapes.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.commits import Commits
from coding_agent_exporter.counters import Counters
from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.errand import within
from coding_agent_exporter.expose import Snapshot
from coding_agent_exporter.heartbeat import Heartbeats
from coding_agent_exporter.inputs import STEP_BYTES, Inputs
from coding_agent_exporter.instances import Instances
from coding_agent_exporter.ledger import PI_SOURCES, Book, Ledger
from coding_agent_exporter.logs import fields
from coding_agent_exporter.model import Pressure
from coding_agent_exporter.outbox import Outbox
from coding_agent_exporter.pricing import Prices
from coding_agent_exporter.runs import Runs
from coding_agent_exporter.schema import StoreError
from coding_agent_exporter.store import Batch, Store
from coding_agent_exporter.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.model import CounterKey, SourceFile, UsageEvent

log = logging.getLogger(__name__)

USAGE_SPANS = frozenset({"opencode"})
"""Sources whose sessions are in no file that is read: their spans come from usage logs."""

SCRAPE_PATIENCE = 8.0
"""Seconds for which a scrape waits for a backlog to be read; Prometheus gives up after 10 by default."""


GRACE = 1 / 8
"""Of that patience, added for a step that is about to end. After it a scrape shows what was known before."""

Scraped = tuple[Snapshot, "Callable[[], None]"]


class Pipeline:
    """All state of the exporter. Thread-safe; `clock` gives epoch seconds.

    `spans`: whether there is a collector to make spans for; `committed` is called when new ones are in the outbox.
    Raises StoreError when the state file cannot be used.
    """

    def __init__(
        self, settings: Settings, *, clock: Callable[[], float] = time.time, spans: bool = False,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.version = metadata.version("coding-agent-exporter")
        self.started = clock()
        self.scraped = threading.Condition()
        self._failure: BaseException | None = None
        self.scrape_seconds = 0.0
        """How long the latest scrape took, rendering included; whoever renders says so."""
        self._clock = clock
        self._lock = threading.RLock()
        self._store = store = Store(settings.state_path)
        self.caught_up = False
        """Whether all that was on disk when the process started has been read: no series is shown for the first time
        before that, as its first value is its baseline."""
        baseline = json.loads(store.meta("baseline") or b"null")
        self._new_baseline = None if baseline else {"started": self.started, "instance": ""}
        self.first_start = first_start = (baseline or {"started": self.started})["started"]
        self.instance: str = (baseline or {}).get("instance") or str(uuid.uuid4())
        """Stays the same over restarts."""
        cutoff = first_start - settings.counters_baseline_age
        book = Book(max_series=settings.counters_max_series, cutoff=cutoff, keys=store.labels())
        self._ledger = Ledger(
            store, Prices().estimate, book,
            agent_label=settings.usage_agent_label, rate_limits=store.rate_limits(),
        )
        self._runs = Runs(
            store, book, self._ledger.mode,
            wanted=spans,
            since=0.0 if settings.otlp_backfill else cutoff,
            usage_sources=USAGE_SPANS | (PI_SOURCES if settings.otlp_pi_spans == "usage" else frozenset()),
            max_models=max(10, settings.counters_max_series // 16),
        )
        if spans:
            self._ledger.observe = self._note_message
        self.inputs = Inputs(
            settings.roots, Discovery(settings.roots), Tail(max_line=settings.input_max_line_size),
            self._ledger, self._runs, store.files(), breathe=self._breathe,
        )
        self._committed = committed
        # A line can become several spans, which stay in memory until they are committed.
        self._budget = STEP_BYTES // 4 if spans else STEP_BYTES
        self.outbox = Outbox(
            store, self._lock, most=settings.otlp_max_queue, oldest=settings.otlp_max_age,
            history=first_start if settings.otlp_backfill else 0.0,
        )
        self._heartbeats = Heartbeats(settings.roots)
        self._instances = Instances(
            stale_after=settings.telemetry_stale_after,
            forget_after=settings.telemetry_forget_after,
            peak_window=settings.telemetry_peak_window,
        )
        self._counters = Counters(hold=settings.counters_zero_hold)
        self._counters.load(store.counters())
        # Where nothing can be committed, a scrape shows what was committed before.
        self._published = list(self._counters.values(hidden=False))
        self._runs.restore(key for key, _ in self._counters.values())
        self._load_instances()
        self._preset()
        self._states: Counter[tuple[str, str, str]] = Counter()
        self._stats: Counter[CounterKey] = Counter()
        self._commits = Commits(store, self._stats, self._stored)
        self._held: list[CounterKey] = []
        self._unpublished = False
        self._revision = 0
        self._delivered = -1
        self._stopping = False
        self._scrape_began = float("-inf")
        self._step_began = self._said_stuck = 0.0
        self._latest = self._snapshot()

    # -- one step

    def step(self, *, scrape: bool = False, changes: frozenset[str] | None = None) -> bool:
        """Take what the files say now and commit it; for a scrape, publish it. Returns whether more is left to read.

        `changes`: paths that are known to have changed since the last step; None: look at everything.

        An exception that nobody foresaw may have left half of a step in memory. The state file is whole: the only
        way on is a restart from there, so every later call raises too.
        """
        with self._lock:
            if isinstance(self._failure, StoreError):
                raise self._failure
            if self._failure is not None:
                raise RuntimeError("a step failed, and the exporter has to be restarted")
            self._step_began = time.monotonic()
            try:
                return self._step(scrape=scrape, changes=changes)
            except BaseException as error:
                self._failure = error
                raise
            finally:
                self._step_began = 0.0

    def _step(self, *, scrape: bool, changes: frozenset[str] | None) -> bool:
        began = time.monotonic()
        now = self._ledger.now = self._clock()
        if changes is not None and not self.inputs.knows(changes):
            changes = None  # what it is, only a look at all tells
        eventful = self._read_heartbeats(now, changes)
        calm = self.caught_up and not self._commits.pending and not (scrape or eventful)
        if calm and changes is not None and self.inputs.untouched(changes):
            more = False  # a heartbeat like the one before: nothing to read, nothing to commit
        elif self._commits.settle():
            more = self.inputs.step(now, changes=changes, budget=self._budget)
            if not more and not self.caught_up:
                self.caught_up = True
                log.info("caught up", extra=fields(files=len(self.inputs.found.files)))
            self._commit(now, scrape=scrape, more=more)
            if not self._commits.pending:
                self._commits.attempt(lambda: self.outbox.bound(now))
        else:
            more = False
            self.inputs.step(now, budget=0)
        self._stats[families.STEPS.name, ()] += 1
        self._stats[families.STEP_SECONDS.name, ()] += round((time.monotonic() - began) * 1e9)
        return more

    def scrape(self, patience: float = SCRAPE_PATIENCE) -> Scraped:
        """What a scrape that arrives now shall see, and what to call once it was delivered.

        After `patience` seconds, with a backlog, it shows what has been read by then; where a disk does not answer,
        what the scrape before has shown.
        """
        return within(patience * (1 + GRACE), partial(self._scrape, patience)) or self._outdated()

    def _outdated(self) -> Scraped:
        latest, began = self._latest, self._step_began
        if began not in {0.0, self._said_stuck}:
            self._said_stuck = began
            log.warning("a step takes long: is there a disk that does not answer?", extra=fields(seconds=self.stuck))
        gauges = {**latest.gauges, (families.STEP_RUNNING.name, ()): self.stuck}
        return replace(latest, now=self._clock(), gauges=gauges, internal={**latest.internal}), lambda: None

    def _scrape(self, patience: float) -> Scraped:
        arrived = time.monotonic()
        if not self._lock.acquire(timeout=patience):
            return self._outdated()
        try:
            # A scrape that waited here while another one, begun after it arrived, took its step has been served.
            more = self._scrape_began < arrived
            while more and time.monotonic() - arrived < patience:
                self._scrape_began = time.monotonic()
                more = self.step(scrape=True)
            snapshot, held, revision = self._snapshot(), self._held, self._revision
            viewed = self._instances.clock
            self._latest = snapshot
        finally:
            self._lock.release()

        def delivered() -> None:
            now = self._clock()
            with self._lock:
                self._counters.scraped(held, now)
                self._instances.scraped(viewed)
            with self.scraped:
                self._delivered = max(self._delivered, revision)
                self.scraped.notify_all()

        return snapshot, delivered

    def final(self) -> bool:
        """Whether a delivered scrape has shown all there is."""
        with self._lock:
            counters = self._counters
            seen = self._delivered >= self._revision
            return seen and not self._commits.pending and counters.pinned and not counters.waiting()

    def stop(self) -> None:
        """The exporter is about to stop: read what is there, and hold nothing back longer than one scrape."""
        self.outbox.stop()
        with self._lock:
            # A hold longer than the linger would outlast it; a shorter one lets a second Prometheus see what is new.
            self._stopping = self.settings.counters_zero_hold >= self.settings.shutdown_linger
            while self.step():
                pass

    def close(self) -> None:
        with self._lock:
            self._store.close()

    @property
    def broken(self) -> bool:
        """Whether a step failed, so that the exporter is about to end."""
        return self._failure is not None

    @property
    def stuck(self) -> float:
        """Seconds for which the step that runs now has been running."""
        return round(time.monotonic() - began, 1) if (began := self._step_began) else 0.0

    @property
    def pending_commit(self) -> bool:
        """Whether the state file could not be written, so that counters stand still."""
        return self._commits.pending

    def _note_message(
        self, file: SourceFile, session: str, message: str, event: UsageEvent, following: UsageEvent | None, first: bool
    ) -> None:
        if self._runs.wants_messages(file.source):
            # A backlog has arrived when its last line did; no call lasted into the next one of its session, though.
            arrived = self.inputs.arrived
            if following is not None:
                arrived = min(arrived, following.timestamp.timestamp())
            self._runs.apply_message(file, session, message, event, arrived, first=first)

    # -- parts of a step

    def _breathe(self) -> None:
        """Within a long step too: what they tell is stored at its end."""
        self._read_heartbeats(self._clock(), None)

    def _read_heartbeats(self, now: float, changes: frozenset[str] | None) -> bool:
        """Returns whether they told something that has to be stored."""
        self._states.clear()
        scans = self._heartbeats.read(
            self._instances, now, lambda heartbeat: not self.inputs.reads_session(heartbeat.session_id),
            changes=changes)
        for root, scan in scans:
            for state, count in scan.states.items():
                self._states[root, "telemetry", state] += count
            for path, rejected in zip(scan.paths, scan.rejected, strict=True):
                self.inputs.warn(path, rejected.reason)
                self._stats[families.REJECTED.name, (root, "telemetry", rejected.reason)] += rejected.count
        taken = self._instances.take()
        for key, amount in taken.items():
            self._ledger.book.count(key, now, amount)
        return bool(taken) or self._instances.dirty

    def _commit(self, now: float, *, scrape: bool, more: bool) -> None:
        if self.caught_up and not more:
            self._runs.tick(now)
        sessions, spans = self._runs.flush(now)
        changes = self._ledger.flush(complete=self.caught_up, now=now)
        changes.spans = spans
        changes.accounts.update(sessions)
        self._counters.add(changes.deltas)
        pinned = scrape and self._counters.pin(now, at_once=self._stopping, hidden=self.caught_up)
        self._unpublished = self._unpublished or pinned
        counters = self._counters.take_changed()
        rows, gone = self.inputs.take_changed(now)
        meta: dict[str, bytes] = {}
        if self._new_baseline is not None:
            meta["baseline"] = json.dumps({**self._new_baseline, "instance": self.instance}).encode()
            self._new_baseline = None
        if self._instances.dirty:
            meta["instances"] = self._instances.dump()
        batch = Batch(changes, counters, rows, gone, meta, int(now), durable=pinned)
        if self._commits.put(batch) and self._unpublished:
            self._unpublished = not self.caught_up
            self._published = list(self._counters.values(hidden=self.caught_up))
            self._held = self._counters.waiting() if self.caught_up else []
            self._revision += 1

    def _stored(self, batch: Batch) -> None:
        self._ledger.trim()
        self._runs.trim()
        self.outbox.added(batch.changes.spans)
        if batch.changes.spans:
            self._committed()

    def _snapshot(self) -> Snapshot:
        now = self._clock()
        internal: dict[CounterKey, float] = {}
        for (name, labels), amount in (*self._stats.items(), *self.inputs.stats.items()):
            internal[name, labels] = internal.get((name, labels), 0) + amount / families.BY_NAME[name].scale
        for labels, times in self._ledger.rejected.items():
            internal[families.REJECTED.name, labels] = internal.get((families.REJECTED.name, labels), 0) + times
        for what in families.LEFT_OUT:
            internal[families.SERIES_DROPPED.name, (what,)] = self._ledger.book.overflowed[what]
        for why, dropped in self.outbox.dropped.items():
            internal[families.SPANS_DROPPED.name, (why,)] = dropped
        gauges: dict[tuple[str, tuple[str, ...]], float] = {
            (families.SCRAPE_SECONDS.name, ()): self.scrape_seconds,
            (families.STEP_RUNNING.name, ()): 0.0,
            (families.STATE_BYTES.name, ()): self._store.size(),
            (families.SERIES.name, ()): len(self._counters),
            (families.SPANS_PENDING.name, ()): self.outbox.size(),
            (families.OVERSHOOT.name, ()): self._counters.overshoot / families.OVERSHOOT.scale,
        }
        files = {**self._states, **self.inputs.states}
        for root in self.settings.roots:
            for state in families.FILE_STATES if root.kind == "telemetry" else ("ok", "unreadable"):
                where = (root.alias, root.kind, state)
                gauges[families.SOURCE_FILES.name, where] = files.get(where, 0)
            if root.kind != "telemetry":
                gauges[families.LAG_BYTES.name, where[:2]] = self.inputs.lag.get(where[:2], 0)
        return Snapshot(
            now=now,
            version=self.version,
            counters=self._published,
            held=self._held,
            internal=internal,
            gauges=gauges,
            instances=self._instances.view(now),
            activities={
                (root.alias, activity): count
                for root in self.settings.roots if root.kind == "telemetry"
                for activity, count in self._instances.counts(root.alias).items()
            },
            rate_limits=self._ledger.limits.known,
            exemplars=dict(self._runs.exemplars),
            started=self.first_start,
            info_labels=frozenset(self.settings.telemetry_info_labels),
        )

    # -- building

    def _load_instances(self) -> None:
        if (stored := self._store.meta("instances")) is not None:
            try:
                self._instances.load(stored)
            except ValueError as error:  # only tells which agents were alive: worth a line, not a refusal
                log.warning("the remembered agents are unreadable", extra=fields(error=error))

    def _preset(self) -> None:
        """Counters whose label sets are known exist from the start, so that their first event is an increase."""
        for root in self.settings.roots:
            if root.kind != "usage":
                self._counters.preset((families.COMPACTIONS.name, (root.alias,)))
            if root.kind == "telemetry":
                self._counters.preset((families.LOST.name, (root.alias,)))
                for pressure in (Pressure.APPROACHING_LIMIT, Pressure.NEAR_LIMIT, Pressure.AT_LIMIT):
                    self._counters.preset((families.CROSSINGS.name, (root.alias, pressure.value)))
