"""Takes events of usage logs, gives the rate limits that a harness last reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coding_agent_exporter.ledger.book import clean
from coding_agent_exporter.model import MAX_COUNT, RateLimit

if TYPE_CHECKING:
    from coding_agent_exporter.ledger.book import Book
    from coding_agent_exporter.model import SourceFile, UsageEvent

MAX_WINDOWS = 100
"""So many rate-limit windows are shown; those that are over make room."""

Window = tuple[str, str, str]
"""(root, source, window)"""


class RateLimits:
    """What is known, by window."""

    def __init__(self, book: Book, known: dict[Window, RateLimit]) -> None:
        self.known = known
        self._book = book
        self._changed = False

    def note(self, file: SourceFile, events: list[UsageEvent], now: float) -> None:
        """The last event that reports any speaks for all of them. `now`: epoch seconds."""
        for event in reversed(events):
            if event.rate_limits:
                at = event.timestamp.timestamp()
                for window, value in event.rate_limits.items():
                    limit = _rate_limit(value, at)
                    if limit is not None:
                        self._note((file.root, file.source, clean(window)), limit, now)
                return

    def take_changed(self) -> dict[Window, RateLimit] | None:
        """All of them, once after each change."""
        changed, self._changed = self._changed, False
        return dict(self.known) if changed else None

    def _note(self, key: Window, limit: RateLimit, now: float) -> None:
        known = self.known.get(key)
        if known is None and len(self.known) >= MAX_WINDOWS:
            self.known = {
                key: limit for key, limit in self.known.items() if limit.resets_at is None or limit.resets_at > now
            }
            if len(self.known) >= MAX_WINDOWS:
                self._book.overflowed["rate_limit_windows"] += 1
                return
        if known is None or known.seen_at <= limit.seen_at:
            self._changed = self._changed or known != limit
            self.known[key] = limit


def _rate_limit(value: Any, at: float) -> RateLimit | None:
    if not isinstance(value, dict):
        return None

    def number(name: str) -> float | None:
        found = value.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= MAX_COUNT:
            return None
        return float(found)

    used = number("used_percentage")
    return None if used is None else RateLimit(used, number("resets_at"), number("window_seconds"), at)
