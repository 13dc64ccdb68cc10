"""Takes the spans that the store holds, gives them to the export worker, and keeps their number and age bounded."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING

from coding_agent_exporter.logs import fields
from coding_agent_exporter.schema import UnusableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coding_agent_exporter.spanmodel import Span
    from coding_agent_exporter.store import Store

log = logging.getLogger(__name__)

BACKFILL_RATE = 1000
"""Spans per second."""
REPORT_EVERY = 10_000
LOOK_EVERY = 60.0
"""Seconds between two looks for spans that are too old."""


class Outbox:
    """What `export.Outbox` asks for, over the state file. `lock` is the pipeline's: the store is for one at a time.

    At most `most` spans wait, each for at most `oldest` seconds: a collector that is gone for good must not fill the
    disk. Spans that ended before epoch second `history` go out slowly.
    """

    def __init__(self, store: Store, lock: threading.RLock, *, most: int, oldest: float, history: float) -> None:
        self.dropped: Counter[str] = Counter({"overflow": 0, "expired": 0})
        self._store = store
        self._lock = lock
        self._most = most
        self._oldest = oldest
        self._history = round(history * 1e9)
        self._count = store.count_spans()
        self._looked = float("-inf")
        self._unusable: UnusableError | None = None
        """What the worker found; the next `bound`, by who can end the exporter, raises it."""
        self._stop = threading.Event()
        self._old = self._held = 0
        self._history_waits = self._count if history > 0 else 0
        self._taken: frozenset[int] = frozenset()

    def take(self, limit: int) -> list[tuple[int, Span]]:
        with self._lock:
            try:
                spans = self._store.spans(limit)
            except UnusableError as error:
                self._unusable = error
                return []
        # A collector is sized for what happens, not for what has happened in a year.
        self._taken = frozenset(number for number, span in spans if span.end < self._history)
        old = sum(number > self._held for number in self._taken)
        if old:
            self._held = spans[-1][0]
            before, self._old = self._old, self._old + old
            if before // REPORT_EVERY != self._old // REPORT_EVERY:
                log.info("backfill", extra=fields(sent=before, waiting=self._count))
            self._stop.wait(old / BACKFILL_RATE)
        return spans

    def done(self, numbers: Sequence[int]) -> None:
        with self._lock:
            self._count -= self._store.forget_spans(numbers)
            self._history_waits -= len(self._taken.intersection(numbers))
            # What was dropped was history too, and after a restart all that waits is taken for it.
            self._history_waits = max(0, min(self._history_waits, self._count))

    def drop(self, numbers: Sequence[int], reason: str) -> None:  # noqa: ARG002  the worker counts by reason
        self.done(numbers)

    def size(self) -> int:
        return self._count

    def added(self, spans: Sequence[Span]) -> None:
        """These were committed."""
        self._count += len(spans)
        self._history_waits += sum(span.end < self._history for span in spans)

    def stop(self) -> None:
        """The exporter is about to end: no more waiting."""
        self._stop.set()

    def bound(self, now: float) -> None:
        """Drop what is too old or too much. Raises StoreError.

        History is not too much: it comes in faster than it may go out, and its size is what was asked for.
        """
        if self._unusable is not None:
            raise self._unusable
        if self._count <= self._most and 0 <= now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        for reason, drop in (("expired", self._expire), ("overflow", self._cut)):
            gone = drop(now) if self._count else 0
            self._count -= gone
            self.dropped[reason] += gone
            if gone:
                log.error("spans dropped", extra=fields(count=gone, reason=reason))

    def _expire(self, now: float) -> int:
        return self._store.expire_spans(before=int(now - self._oldest))

    def _cut(self, _: float) -> int:
        surplus = self._count - self._history_waits - self._most
        # Some more at once: not a scan and a line in the log at every step.
        return 0 if surplus <= 0 else self._store.expire_spans(surplus=surplus + self._most // 100)
