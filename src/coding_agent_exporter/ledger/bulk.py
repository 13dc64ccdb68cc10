"""Takes runs of events in their usual form, gives the book their sums: what `incremental` does, for many at once.

Counting one event by all the rules takes several times what it takes to decode it, and a log is millions of them,
nearly all alike: the next message of its session, of the same model as the one before, with all its figures. A run
ends at the first event that is anything else, and that one goes through `SessionRules.apply_event`. There is nothing
here that it would not do, and tests hold the two to each other.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from coding_agent_exporter.ledger.book import (
    CACHE_CREATION,
    CACHE_READ,
    INPUT,
    MESSAGES,
    OUTPUT,
    REPORTED,
    RUN,
    SESSIONS,
    Book,
)
from coding_agent_exporter.ledger.incremental import Record, Session, SessionRules
from coding_agent_exporter.ledger.times import EPOCH, FOREVER, milliseconds, moment, seconds
from coding_agent_exporter.model import PICO

if TYPE_CHECKING:
    from datetime import datetime

    from coding_agent_exporter.model import SourceFile, UsageEvent

APART = timedelta(milliseconds=2)
"""Between two calls of a session that surely have two identities, which are whole milliseconds."""

NOTHING = (0, 0, 0, 0, 0)

_SLOTS = (MESSAGES, REPORTED, INPUT, OUTPUT, CACHE_READ, CACHE_CREATION)


class Bulk:
    """Both methods give the place of the first event that is not of the run, which begins at `place` or not at all."""

    def __init__(self, book: Book, rules: SessionRules) -> None:
        self._book = book
        self._rules = rules

    def calls(
        self, key: str, session: Session, file: SourceFile, events: list[UsageEvent], place: int, agent: str
    ) -> int:
        """Messages that are named by the start of their call, each later than all that is known of its session.

        The caller knows that none of them is an orphan.
        """
        first, recent, start = events[place], session.recent, place
        model, hint = first.model, first.cost_mode
        number = self._number(session, file, model, hint, agent)
        if number is None:
            return place
        began = seconds(first.timestamp)
        # The end of a second is the next one's first millisecond.
        if not recent and self._rules.known(key, session, milliseconds(first.timestamp)) is not None:
            return place
        # Of what is known to the second nobody knows how late in that second it was.
        latest = recent[-1][0] if recent else moment(max(session.last, session.floor) + 1) - APART
        before = self._until(began)
        dollars = new = out = read = written = 0
        for event in events[place : place + RUN]:
            at, cost, tokens = event.timestamp, event.cost, event.tokens
            if event.model != model or event.cost_mode != hint or event.rate_limits or not event.event_id:
                break
            if cost is None or tokens is None or at - latest < APART or at >= before:
                break
            usd, a, b, c, d = cost.total_cost_usd, tokens.input, tokens.output, tokens.cache_read, tokens.cache_creation
            if usd is None or a is None or b is None or c is None or d is None:
                break
            pico = round(usd * PICO)
            recent.append((at, number, pico, a, b, c, d))
            dollars += pico
            new += a
            out += b
            read += c
            written += d
            latest = at
            place += 1
        if place > start:
            self._enter(session, file, hint, number, began, (place - start, dollars, new, out, read, written))
            session.last = max(session.last, seconds(latest))
        return place

    def messages(
        self, key: str, session: Session, file: SourceFile, events: list[UsageEvent], place: int, agent: str
    ) -> int:
        """Messages that have a name and are told of several times, in a session where none is a copy."""
        first, known = events[place], session.messages
        model, hint = first.model, first.cost_mode
        number = self._number(session, file, model, hint, agent)
        if number is None:
            return place
        began = seconds(first.timestamp)
        since = max(session.floor + 1, 0 if began < self._book.cutoff else self._book.cutoff)
        before = self._until(began)
        fresh = dollars = new = out = read = written = 0
        message, when, held = "", EPOCH, NOTHING  # the latest one, not stored yet: the next event may be its too
        latest = EPOCH
        for event in events[place : place + RUN]:
            at, cost, tokens, named = event.timestamp, event.cost, event.tokens, event.message_id
            if event.model != model or event.cost_mode != hint or event.rate_limits or not named:
                break
            if cost is None or tokens is None or at >= before:
                break
            usd, a, b, c, d = cost.total_cost_usd, tokens.input, tokens.output, tokens.cache_read, tokens.cache_creation
            if usd is None or a is None or b is None or c is None or d is None:
                break
            if named == message:
                if at < when:
                    break
            else:
                record, second = known.get(named), seconds(at)
                if record is None and session.archived:
                    record = self._rules.known(key, session, named)
                if second < since or (record is not None and (
                        record.number != number or record.cost < 0 or not since <= record.second <= second)):
                    break
                if message:
                    known[message] = Record(seconds(when), number, *held)
                message = named
                if record is None:
                    fresh += 1
                    held = NOTHING
                else:
                    held = record.figures
            when = at
            latest = max(latest, at)
            figures = (round(usd * PICO), a, b, c, d)
            if figures != held:
                dollars += figures[0] - held[0]
                new += a - held[1]
                out += b - held[2]
                read += c - held[3]
                written += d - held[4]
                held = figures
                if a or b or c or d:
                    self._rules.note(number, figures)
            place += 1
        if message:
            known[message] = Record(seconds(when), number, *held)
            self._enter(session, file, hint, number, began, (fresh, dollars, new, out, read, written))
            session.last = max(session.last, seconds(latest))
        return place

    def _number(
        self, session: Session, file: SourceFile, model: str | None, hint: str | None, agent: str
    ) -> int | None:
        """The label set, where there is one already: to make one is for an event that surely counts."""
        label = "subscription" if (hint or session.mode) == "SUBSCRIPTION" else "api_key"
        return self._book.known(session.root or file.root, file.source, model, label, agent)

    def _until(self, second: int) -> datetime:
        """The end of the time that is in the baseline as this second is, or is not as this one is not."""
        cutoff = self._book.cutoff
        return FOREVER if second >= cutoff else moment(cutoff)

    def _enter(
        self, session: Session, file: SourceFile, hint: str | None, number: int, second: int,
        sums: tuple[int, int, int, int, int, int],
    ) -> None:
        session.mode = hint or session.mode
        session.root = session.root or file.root
        row = self._book.row(number, second)
        for slot, amount in zip(_SLOTS, sums, strict=True):
            row[slot] += amount
        if not session.counted:
            session.counted = True
            row[SESSIONS] += 1

