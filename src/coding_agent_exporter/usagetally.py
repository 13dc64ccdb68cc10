"""Takes what the ledger counts, line by line, gives `usage` sums by whatever a table is asked to be by.

The ledger decides what counts, here as in the daemon: `Attributing` only tells, before each event, whose it is, and
`Tally` stands in for the book, with a finer place for each amount than a counter series has.
"""

from __future__ import annotations

import math
import sys
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from coding_agent_exporter.ledger import CUMULATIVE, INCREMENTAL, PI, PI_SOURCES, Book, Ledger, owner, pi_session
from coding_agent_exporter.ledger.book import MAX_LABEL, SLOTS, UNKNOWN
from coding_agent_exporter.model import CounterKey, SessionHeader, SessionMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coding_agent_exporter.ledger import SessionMeta, Storage
    from coding_agent_exporter.ledger.book import Estimate
    from coding_agent_exporter.model import SessionRecord, SourceFile, UsageEvent
    from coding_agent_exporter.usageperiod import Calendar, Period

Dimension = Literal["model", "day", "session", "agent", "source"]
DIMENSIONS: tuple[Dimension, ...] = ("model", "day", "session", "agent", "source")

API, SUBSCRIPTION = "api_key", "subscription"

MAX_TRAIL = 4096
"""So many changes of place are remembered of an account whose cost mode may yet turn out to be another one."""

_NOWHERE = ("", -1)
_session = attrgetter("session_id")


class Sum:
    """What one row of a table comes to: the book's slots by cost mode, and the sessions that have a part in it."""

    __slots__ = ("modes", "sessions")

    def __init__(self) -> None:
        self.modes: dict[str, list[int]] = {}
        self.sessions: set[int] = set()

    def add(self, mode: str, amounts: Iterable[tuple[int, int]]) -> None:
        slots = self.modes.get(mode)
        if slots is None:
            slots = self.modes[mode] = [0] * SLOTS
        for slot, amount in amounts:
            slots[slot] += amount

    def slot(self, number: int) -> int:
        """An amount that may be added over cost modes: anything but money."""
        return sum(slots[number] for slots in self.modes.values())

    def merge(self, other: Sum) -> None:
        for mode, slots in other.modes.items():
            self.add(mode, enumerate(slots))
        self.sessions |= other.sessions


class Move(NamedTuple):
    before: int
    after: int
    amounts: Mapping[int, int]


class _Step(NamedTuple):
    """What one account added to one place, for the case that it has to move. A place is a day and a session."""

    number: int
    place: tuple[str, int]
    amounts: dict[int, int]


class Tally(Book):
    """A book that knows, of each amount, the day, the session and the agent. Memory grows with rows, not with events.

    What lies outside of `period` is left out. Rows are by the values of `by`, in that order; a session is its number
    in `names`.
    """

    bulk = False

    def __init__(self, by: tuple[Dimension, ...], period: Period, calendar: Calendar) -> None:
        super().__init__(max_series=sys.maxsize, cutoff=-math.inf)
        self.rows: dict[tuple[Any, ...], Sum] = {}
        self.names: list[str] = []
        self._by = by
        self._daily = "day" in by
        self._period = period
        self._calendar = calendar
        self._known: dict[tuple[str, ...], int] = {}
        self._place = -1
        self._account = ""
        self._pending: list[tuple[int, int, list[int]] | tuple[int, int, Move]] = []
        self._trails: dict[str, list[_Step]] = {}

    def session(self, key: tuple[str, ...], name: str) -> int:
        """The number of the session that the ledger knows by `key`; of its names the longest one is shown."""
        name = name[:MAX_LABEL]
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self.names)
            self.names.append(name)
        elif len(name) > len(self.names[number]):
            self.names[number] = name
        return number

    def at(self, session: int, account: str = "") -> None:
        """What is counted from here on is of this session. `account`: where that may move to another cost mode."""
        self._place, self._account = session, account

    def settle(self) -> None:
        """Enter what was counted since `at`."""
        for number, second, what in self._pending:
            if isinstance(what, Move):
                self._move(what, second)
                continue
            place = self._where(second)
            amounts = [(slot, amount) for slot, amount in enumerate(what) if amount]
            self._enter(number, place, amounts)
            if self._account:
                self._follow(number, place, amounts)
        self._pending.clear()

    # -- as the ledger sees it

    def row(self, number: int, second: int) -> list[int]:
        """A blank row: it is entered, with what was added to it, when the event is through."""
        row = [0] * SLOTS
        self._pending.append((number, second, row))
        return row

    def move(self, before: int, after: int, amounts: Mapping[int, int], second: int) -> None:
        self._pending.append((before, second, Move(before, after, amounts)))

    def count(self, key: CounterKey, second: float, amount: int = 1) -> None:
        """Counters of other families are none of what was spent."""

    # -- places

    def _where(self, second: int) -> tuple[str, int]:
        if second not in self._period:
            return _NOWHERE
        return self._calendar.day(second) if self._daily else "", self._place

    def _enter(self, number: int, place: tuple[str, int], amounts: Iterable[tuple[int, int]]) -> None:
        if place is _NOWHERE:
            return
        labels = self.keys[number]
        row = tuple(self._value(dimension, labels, place) for dimension in self._by)
        found = self.rows.get(row)
        if found is None:
            found = self.rows[row] = Sum()
        found.add(labels[4], amounts)
        found.sessions.add(place[1])

    def _value(self, dimension: Dimension, labels: tuple[str, ...], place: tuple[str, int]) -> str | int:
        match dimension:
            case "model":
                return labels[3] if labels[2] == UNKNOWN else f"{labels[2]}/{labels[3]}"
            case "day":
                return place[0]
            case "session":
                return place[1]
            case "agent":
                return labels[5] if len(labels) > 5 else ""
            case "source":
                return labels[1]

    # -- changes of the cost mode

    def _follow(self, number: int, place: tuple[str, int], amounts: list[tuple[int, int]]) -> None:
        trail = self._trails.setdefault(self._account, [])
        if not trail or trail[-1][:2] != (number, place):
            trail.append(_Step(number, place, {}))
            if len(trail) > MAX_TRAIL:
                del trail[: MAX_TRAIL // 2]
        for slot, amount in amounts:
            trail[-1].amounts[slot] = trail[-1].amounts.get(slot, 0) + amount

    def _move(self, move: Move, second: int) -> None:
        """Move amounts where they are: to the other mode of the days and sessions that they were counted in.

        They are the latest that the account added under that label set, or all of it.
        """
        trail = self._trails.setdefault(self._account, [])
        left = {slot: amount for slot, amount in move.amounts.items() if amount}
        steps = [step for step in trail if step.number == move.before]
        held = {slot: sum(step.amounts.get(slot, 0) for step in steps) for slot in left}
        moved: list[_Step] = []
        for step in reversed(steps):
            taken = {}
            for slot, wanted in left.items():
                amount = step.amounts.get(slot, 0)
                taken[slot] = amount if held[slot] == move.amounts[slot] else min(amount, wanted)
                step.amounts[slot] = amount - taken[slot]
            left = {slot: wanted - taken[slot] for slot, wanted in left.items()}
            moved.append(_Step(move.after, step.place, taken))
        moved.append(_Step(move.after, self._where(second), left))
        for step in reversed(moved):
            amounts = [(slot, amount) for slot, amount in step.amounts.items() if amount]
            if amounts:
                self._enter(move.before, step.place, [(slot, -amount) for slot, amount in amounts])
                self._enter(move.after, step.place, amounts)
                trail.append(_Step(step.number, step.place, dict(amounts)))
        trail[:] = [step for step in trail if any(step.amounts.values())]


class Witness(Protocol):
    """Told of every line with a session, whether it counted or not: for what a sum does not show."""

    def event(self, file: SourceFile, session: int, event: UsageEvent) -> None: ...

    def message(self, source: str, session: int, message: SessionMessage) -> None: ...


class Attributing(Ledger):
    """The ledger, with a tally that is told whose events it counts. Sessions are told apart as accounts are."""

    def __init__(
        self, storage: Storage, estimate: Estimate, tally: Tally, witness: Witness | None = None
    ) -> None:
        super().__init__(storage, estimate, tally, agent_label=True)
        self._tally = tally
        self._witness = witness

    def apply_usage(self, file: SourceFile, events: list[UsageEvent], *, replay: bool) -> bool:
        if not events:
            return super().apply_usage(file, events, replay=replay)
        for name, run in groupby(events, _session):
            together = list(run)
            session, account = self._session_of(file, name)
            self._tally.at(session, account)
            replay = super().apply_usage(file, together, replay=replay)
            self._tally.settle()
            if self._witness is not None:
                for event in together:
                    self._witness.event(file, session, event)
        return replay

    def apply_session(
        self, file: SourceFile, source: str, meta: SessionMeta, records: list[SessionRecord], *, fallback: str = ""
    ) -> None:
        for record in records:
            if not isinstance(record, SessionHeader):
                name, copied, _ = owner(meta, record, fallback)
                shown = file.path.stem if not copied and file.path.stem.endswith(f"_{name}") else name
                session = self._tally.session((PI, name), shown)
                self._tally.at(session)
                if self._witness is not None and isinstance(record, SessionMessage):
                    self._witness.message(source, session, record)
            super().apply_session(file, source, meta, [record], fallback=fallback)
            self._tally.settle()

    def _session_of(self, file: SourceFile, name: str) -> tuple[int, str]:
        """The number of a usage log's session, and the account that may change its cost mode as a whole."""
        if file.source in PI_SOURCES:
            return self._tally.session((PI, pi_session(name) or name), name), ""
        if file.source in INCREMENTAL:
            return self._tally.session((file.source, name), name), ""
        if file.source in CUMULATIVE:
            return self._tally.session((file.source, name), name), f"{file.source}\n{name}"
        return self._tally.session((file.source, file.agent, name), name), f"{file.source}\n{file.agent}\n"
