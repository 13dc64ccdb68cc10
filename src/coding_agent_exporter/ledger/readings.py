"""Takes readings of running totals, gives their rises to the book.

Codex: one total per session. Claude Code and every harness this program does not know: one total per process, which
runs on across sessions and starts over, or is restored, in the next process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from coding_agent_exporter.ledger.book import (
    CACHE_CREATION,
    CACHE_READ,
    ESTIMATED,
    INPUT,
    OUTPUT,
    REPORTED,
    RUN,
    SESSIONS,
    UNPRICED,
    Book,
)
from coding_agent_exporter.ledger.times import EPOCH, seconds
from coding_agent_exporter.model import PICO, SourceFile, UsageEvent

if TYPE_CHECKING:
    from datetime import datetime

    from coding_agent_exporter.ledger.book import Estimate

MAX_READINGS = 4096
MAX_RECENT = 4096

_PARTS = (REPORTED, ESTIMATED, UNPRICED, INPUT, OUTPUT, CACHE_READ, CACHE_CREATION)

CLOCK_ERROR = 3600
"""Seconds by which an agent's clock may be ahead of the time by which its log was written.

What is older than the latest reading is a replay, so one reading from the future would make replays of all that follow.
How late it can have been is said by two clocks that do not depend on what the log says: the exporter's, and the file
system's that stamped the file's last change. `now` is the later of the two. If one of them is behind, the other is
right, and a true reading is never held to be from the future; an agent's reading is later than both only where its own
clock is wrong. Where the latest reading is later than both (a clock that was ahead has been put right) its time proves
nothing any more: what is a replay, the totals themselves then say.
"""


class Codex(msgspec.Struct, array_like=True, tag=2):
    """A session's freshest reading, and what each label set has been given of it.

    `parts`: label set number -> amounts in the order of `_PARTS`.
    `recent`: the ids of the events of the latest second, to tell a replay from news.
    """

    counted: bool = False
    last: int = -1
    mode: str = ""
    cost: int = 0
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)
    parts: dict[int, list[int]] = {}
    recent: list[str] = []

    def size(self) -> int:
        return 1 + len(self.parts) + len(self.recent) // 4


class Process(msgspec.Struct, array_like=True, tag=3):
    """The readings of one agent's log. Money in pico-USD, times in epoch seconds.

    `parts` is what the process that runs now has spent, by label set number: all of it changes its cost mode when
    the process turns out to be a subscription. `readings`: the totals seen, most recent last, each with a checksum of
    the session that showed it last. `recent`: what identifies the events of the latest second, to tell a replay from
    news. `writer` is the file that brought the latest event, `session` the checksum of its session.
    """

    reading: int = 0
    mode: str = ""
    limited: bool = False
    last: int = 0
    parts: dict[int, int] = {}
    readings: dict[int, int] = {}
    recent: list[str] = []
    writer: str = ""
    session: int = 0

    def size(self) -> int:
        return 1 + (len(self.readings) + len(self.parts) + len(self.recent)) // 4


class CodexRules:
    """A session is its freshest reading; a rise belongs to the model named by the event that brings it."""

    def __init__(self, book: Book, estimate: Estimate) -> None:
        self._book = book
        self._estimate = estimate

    def apply(self, session: Codex, file: SourceFile, event: UsageEvent, agent: str, *, now: float) -> bool:
        """Count one reading. Returns whether the account changed. `now`: see CLOCK_ERROR."""
        latest = now + CLOCK_ERROR
        second = int(min(event.timestamp.timestamp(), latest))
        name = event.event_id or repr(event.tokens)
        if session.last <= latest and (
            second < session.last or (second == session.last and name in session.recent)
        ):
            return False
        if second != session.last:
            session.recent = []
        if len(session.recent) < MAX_RECENT:
            session.recent.append(name)
        mode = event.cost_mode or ("SUBSCRIPTION" if event.rate_limits else session.mode)
        number = self._number(file, event.model, mode, agent)
        if mode != session.mode:
            self._move(session, file, mode, second, agent)
            session.mode = mode
        session.last = second
        if not session.counted:
            session.counted = True
            self._book.row(number, second)[SESSIONS] += 1
        if event.tokens is None and (event.cost is None or event.cost.total_cost_usd is None):
            return True
        counts = event.tokens
        tokens = session.tokens if counts is None else (
            counts.input or 0, counts.output or 0, counts.cache_read or 0, counts.cache_creation or 0
        )
        rises = tuple(now - before for now, before in zip(tokens, session.tokens, strict=True))
        row = self._book.row(number, second)
        part = session.parts.setdefault(number, [0] * 7)
        for place, (slot, rise) in enumerate(zip((INPUT, OUTPUT, CACHE_READ, CACHE_CREATION), rises, strict=True)):
            row[slot] += rise
            part[3 + place] += rise
        session.tokens = tokens
        if event.cost is not None and event.cost.total_cost_usd is not None:
            cost = round(event.cost.total_cost_usd * PICO)
            row[REPORTED] += cost - session.cost
            part[0] += cost - session.cost
            session.cost = cost
        elif any(rises):
            self._price(row, part, number, rises, event.timestamp)
        return True

    def _price(self, row: list[int], part: list[int], number: int, rises: tuple[int, ...], at: datetime) -> None:
        labels = self._book.keys[number]
        # A reading may be corrected downwards in one kind and upwards in another: each side has its price.
        prices = []
        for sign in (1, -1):
            new, output, read, created = (max(0, sign * rise) for rise in rises)
            counts = (new, output, read, created)
            prices.append(self._estimate(labels[2], labels[3], counts, at) if any(counts) else 0)
        up, down = prices
        if up is None or down is None:
            row[UNPRICED] += sum(rises)
            part[2] += sum(rises)
        else:
            row[ESTIMATED] += up - down
            part[1] += up - down

    def _number(self, file: SourceFile, model: str | None, mode: str, agent: str) -> int:
        label = "subscription" if mode == "SUBSCRIPTION" else "api_key"
        return self._book.number(file.root, file.source, model, label, agent)

    def _move(self, session: Codex, file: SourceFile, mode: str, second: int, agent: str) -> None:
        moved: dict[int, list[int]] = {}
        for number, part in session.parts.items():
            labels = self._book.keys[number]
            other = self._number(file, f"{labels[2]}/{labels[3]}", mode, agent)
            self._book.move(number, other, dict(zip(_PARTS, part, strict=True)), second)
            total = moved.setdefault(other, [0] * 7)
            for place, amount in enumerate(part):
                total[place] += amount
        session.parts = moved


class ProcessRules:
    """New spend is the rise over the reading before; a lower reading begins a new process."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def apply(
        self, process: Process, file: SourceFile, events: list[UsageEvent], agent: str, *, replay: bool, now: float
    ) -> tuple[bool, int, list[tuple[str, int, int]]]:
        """Count readings in the order of the log.

        Returns whether the file still replays what is known, how many events were skipped for that, and the
        sessions that were seen, each with its label set number and epoch second. `now`: see CLOCK_ERROR.
        """
        skipped, latest = 0, now + CLOCK_ERROR
        path = str(file.path)
        if process.writer not in {"", path}:
            # Another file of the same log: a copy of it on its way to another place, or what was rotated away.
            replay = True
        sessions: dict[str, tuple[int, int]] = {}
        place = 0
        while place < len(events):
            if not replay:
                end, number = self._apply_run(process, file, events, place, agent, latest)
                if end > place:
                    sessions.setdefault(events[place].session_id, (number, seconds(events[place].timestamp)))
                    place = end
                    continue
            event = events[place]
            place += 1
            second = seconds(event.timestamp)
            order = int(min(second, latest))
            name = event.event_id or f"{event.session_id}|{event.cost}"
            if replay:
                if process.last > latest:
                    reading = _reading(event)
                    seen = reading is None or reading in process.readings
                else:
                    seen = order < process.last or (order == process.last and name in process.recent)
                if seen:
                    skipped += 1
                    continue
                replay = False
            process.writer = path
            if order > process.last or process.last > latest:
                process.last = order
                process.recent = []
            if order == process.last and len(process.recent) < MAX_RECENT:
                process.recent.append(name)
            if (reading := _reading(event)) is not None:
                self._read(process, file, event, reading, second, agent)
            else:
                self._set_mode(process, file, event, second, agent)
            if event.session_id not in sessions:
                sessions[event.session_id] = (self._number(file, event.model, process, agent), second)
        return replay, skipped, [(name, number, second) for name, (number, second) in sessions.items()]

    def _apply_run(
        self, process: Process, file: SourceFile, events: list[UsageEvent], place: int, agent: str, latest: float
    ) -> tuple[int, int]:
        """Count readings of the process and the session that were read last, for as long as they neither fall nor go
        back in time: what the rules below would do, for many at once.

        Returns the place of the first event that is something else, and the number of the label set.
        """
        first, start = events[place], place
        name, model = first.session_id, first.model
        session = crc32(name.encode())
        number = self._book.known(file.root, file.source, model, _mode(process), agent) if self._book.bulk else None
        if number is None or session != process.session or process.writer != str(file.path):
            return place, 0
        began = seconds(first.timestamp)
        total, last, recent, readings = process.reading, process.last, process.recent, process.readings
        hint, limited, cutoff = process.mode, process.limited, self._book.cutoff
        rise = 0
        for event in events[place : place + RUN]:
            since, cost, named = event.timestamp - EPOCH, event.cost, event.event_id
            second = since.days * 86_400 + since.seconds
            if event.session_id != name or event.model != model or cost is None or not named:
                break
            if (event.cost_mode and event.cost_mode != hint) or (event.rate_limits and not limited):
                break
            if not last <= second <= latest or (second < cutoff) != (began < cutoff):
                break
            usd = cost.total_cost_usd
            reading = -1 if usd is None else round(usd * PICO)
            if reading < total:
                break
            if second > last:
                last, recent = second, [named]
            elif len(recent) < MAX_RECENT:
                recent.append(named)
            if reading > total:
                rise += reading - total
                total = reading
                readings.pop(total, None)
                readings[total] = session
                if len(readings) > MAX_READINGS:
                    del readings[next(iter(readings))]
            place += 1
        if place > start:
            process.reading, process.last, process.recent = total, last, recent
            self._book.row(number, began)[REPORTED] += rise
            process.parts[number] = process.parts.get(number, 0) + rise
        return place, number

    def _read(
        self, process: Process, file: SourceFile, event: UsageEvent, reading: int, second: int, agent: str
    ) -> None:
        rise = reading - process.reading
        session = crc32(event.session_id.encode())
        resumed = session != process.session and process.readings.get(reading) == session
        if rise < 0 or (rise > 0 and resumed):
            # The next process. It starts from nothing, or from a total that the harness restored: that one was
            # shown here before, and was spent then. Above the last reading only its own session can tell.
            process.parts, process.mode, process.limited = {}, "", False
            rise = 0 if reading in process.readings else reading
        process.reading = reading
        process.session = session
        process.readings.pop(reading, None)
        process.readings[reading] = session
        if len(process.readings) > MAX_READINGS:
            del process.readings[next(iter(process.readings))]
        self._set_mode(process, file, event, second, agent)
        number = self._number(file, event.model, process, agent)
        self._book.row(number, second)[REPORTED] += rise
        process.parts[number] = process.parts.get(number, 0) + rise

    def _set_mode(self, process: Process, file: SourceFile, event: UsageEvent, second: int, agent: str) -> None:
        """A hint, or rate limits, in any event make the whole process what they say."""
        before = _mode(process)
        process.mode = event.cost_mode or process.mode
        process.limited = process.limited or bool(event.rate_limits)
        if _mode(process) == before:
            return
        parts, process.parts = process.parts, {}
        for number, amount in parts.items():
            labels = self._book.keys[number]
            other = self._number(file, f"{labels[2]}/{labels[3]}", process, agent)
            self._book.move(number, other, {REPORTED: amount}, second)
            process.parts[other] = process.parts.get(other, 0) + amount

    def _number(self, file: SourceFile, model: str | None, process: Process, agent: str) -> int:
        return self._book.number(file.root, file.source, model, _mode(process), agent)


def _reading(event: UsageEvent) -> int | None:
    """The running total that an event shows, in pico-USD."""
    if event.cost is None or event.cost.total_cost_usd is None:
        return None
    return round(event.cost.total_cost_usd * PICO)


def _mode(process: Process) -> str:
    return "subscription" if process.mode == "SUBSCRIPTION" or (process.limited and not process.mode) else "api_key"
