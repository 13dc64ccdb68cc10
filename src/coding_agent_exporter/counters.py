"""Takes exact deltas from the ledger, gives the values that may be shown: never decreasing, and zero first.

The logs correct themselves: a message's later reading can be lower. What nobody has seen yet may go down with it;
what a scrape has shown may not, and waits until new spend has caught up.

Prometheus sees a series from its first sample on: what a counter had already counted by then is in no increase().
So a series that turns up while the exporter runs is shown at 0 in one scrape before it shows its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.model import CounterKey, Delta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HIDDEN, FIRST, OPEN = range(3)
"""States of a series: never scraped; scraped at its first value; shows its value."""


@dataclass(slots=True)
class Series:
    """One counter series, in the family's integer unit.

    `exact` is what the input says, `shown` what scrapes see and may have seen, `first` the baseline: what is shown
    until a scrape was delivered. `since` is when that first scrape was, on the caller's clock; `number` the row in
    the state file, 0 until stored.
    """

    exact: int = 0
    shown: int = 0
    first: int = 0
    state: int = HIDDEN
    since: float = 0.0
    number: int = 0


class Counters:
    """All counter series.

    `hold`: seconds for which a new series stays at its first value after the scrape that saw it first, so that
    several Prometheus servers, each with its own interval, all see it there.
    """

    def __init__(self, *, hold: float = 0.0) -> None:
        self._hold = hold
        self._series: dict[CounterKey, Series] = {}
        self._waiting: set[CounterKey] = set()
        self._changed: dict[CounterKey, None] = {}
        self._unpinned: set[CounterKey] = set()
        self.overshoot = 0

    def __len__(self) -> int:
        return len(self._series)

    def load(self, rows: Iterable[tuple[CounterKey, Series]]) -> None:
        """Take over what an earlier run had stored."""
        for key, series in rows:
            self._series[key] = series
            if series.state != OPEN:
                self._waiting.add(key)
            self._unpinned.add(key)
            self._note_overshoot(key, series, 1)

    def preset(self, key: CounterKey) -> None:
        """Make a series exist at 0 before anything happened."""
        self.add({key: Delta()})

    def add(self, deltas: dict[CounterKey, Delta]) -> None:
        """Apply one batch. Only what stands at the next `pin` is ever shown; in between values may go down."""
        for key, delta in deltas.items():
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = Series()
                self._waiting.add(key)
            elif not delta.amount:
                continue
            self._note_overshoot(key, series, -1)
            series.exact += delta.amount
            if series.state == HIDDEN:
                series.first += delta.baseline
            self._note_overshoot(key, series, 1)
            self._unpinned.add(key)
            self._changed[key] = None

    def pin(self, now: float, *, at_once: bool = False, hidden: bool = True) -> bool:
        """A scrape is about to see the values as they are now: they must not fall below that any more.

        Returns whether any of them differs from what the last pin showed.

        Also lets series show their values that were held at their first one for long enough. Commit before showing:
        a crash must not bring back less than what was seen. `at_once` ends the hold (not the first scrape): the
        exporter is about to stop. Without `hidden`, series that were never scraped stay as they are.
        """
        differs = bool(self._unpinned)
        left = set()
        for key in self._unpinned:
            series = self._series[key]
            if series.state == HIDDEN and not hidden:
                left.add(key)
            else:
                self._raise(key, series)
        self._unpinned = left
        for key in list(self._waiting):
            series = self._series[key]
            # A clock that was set back must not make the hold last until it has caught up.
            if series.state == FIRST and (at_once or not 0 <= now - series.since < self._hold):
                series.state = OPEN
                self._waiting.discard(key)
                self._raise(key, series)
                self._changed[key] = None
                differs = True
        return differs

    def values(self, *, hidden: bool = True) -> Iterator[tuple[CounterKey, int]]:
        """What a scrape may see after a `pin`. Without `hidden`, only series that were scraped before."""
        for key, series in self._series.items():
            if series.state == HIDDEN and not hidden:
                continue
            yield key, series.shown

    def waiting(self) -> list[CounterKey]:
        """The series that do not show their value yet. Give back to `scraped` those that a scrape was shown."""
        return list(self._waiting)

    @property
    def pinned(self) -> bool:
        """Whether nothing has changed since the last `pin`."""
        return not self._unpinned

    def scraped(self, keys: Iterable[CounterKey], now: float) -> None:
        """A scrape that showed these was delivered."""
        for key in keys:
            series = self._series[key]
            if series.state == HIDDEN:
                series.state = FIRST
                series.since = now

    def take_changed(self) -> list[tuple[CounterKey, Series]]:
        """The series to store, once."""
        changed = [(key, self._series[key]) for key in self._changed]
        self._changed.clear()
        return changed

    def _raise(self, key: CounterKey, series: Series) -> None:
        """Let a series show what it may by now, never less than it has shown."""
        value = series.exact if series.state == OPEN else min(series.first, series.exact)
        if value > series.shown:
            self._note_overshoot(key, series, -1)
            series.shown = value
            self._note_overshoot(key, series, 1)
            self._changed[key] = None

    def _note_overshoot(self, key: CounterKey, series: Series, sign: int) -> None:
        if key[0] == families.COST.name:
            self.overshoot += sign * max(0, series.shown - series.exact)
