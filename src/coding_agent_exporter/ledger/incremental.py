"""Takes messages of sessions whose cost is the sum of their messages, gives their changes to the book.

pi, oh-my-pi and OpenCode. A message counts with its freshest event; each event takes back what the one before it
had added.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from coding_agent_exporter.ledger.book import (
    CACHE_CREATION,
    CACHE_READ,
    ESTIMATED,
    INPUT,
    MESSAGES,
    OUTPUT,
    REPORTED,
    SESSIONS,
    UNPRICED,
    Book,
)
from coding_agent_exporter.model import PICO, SessionMessage, SourceFile, UsageEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coding_agent_exporter.ledger.book import Estimate

NOT_COUNTED = -1
"""Label set number of a record that carries no figures of its own: a compaction, a copy."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a message has added so far. Money in pico-USD; -1 means not known. `second` is its event's epoch second."""

    second: int
    number: int
    cost: int = -1
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    estimated: int = -1

    @property
    def figures(self) -> tuple[int, int, int, int, int]:
        return (self.cost, self.input, self.output, self.cache_read, self.cache_creation)


Figures = tuple[int, int, int, int, int]


class Session(msgspec.Struct, array_like=True, tag=1):
    """A session's account. Times are epoch seconds, but `copies`: milliseconds.

    `floor`: everything up to here has been counted and forgotten. `live`: a message was seen as it happened, so
    what follows is no copy. `copies`: start of the latest message that the session's own file copied from its
    parent. `figures` of forgotten messages stay, where a fork can bring them back under new names.
    """

    counted: bool = False
    live: bool = False
    floor: int = 0
    last: int = 0
    copies: int = 0
    mode: str = ""
    root: str = ""
    messages: dict[int | str, Record] = {}
    figures: list[tuple[int, Figures]] = []

    def size(self) -> int:
        return 1 + len(self.messages) + len(self.figures)

    def forget(self, before: int) -> None:
        """Drop the messages up to an epoch second: nothing can change them any more."""
        old = [name for name, record in self.messages.items() if record.second <= before]
        if not old:
            return
        for name in old:
            record = self.messages.pop(name)
            if self.live and record.number >= 0 and any(record.figures[1:]):
                self.figures.append((record.number, record.figures))
        self.floor = max(self.floor, before)


class SessionRules:
    """How messages are counted."""

    def __init__(self, book: Book, estimate: Estimate, sessions_of: Callable[[str], Iterable[Session]]) -> None:
        self._book = book
        self._estimate = estimate
        self._sessions_of = sessions_of
        self._index: dict[str, set[int]] = {}

    @property
    def indexed(self) -> int:
        return sum(len(figures) for figures in self._index.values())

    def forget_index(self) -> None:
        self._index.clear()

    def apply_event(
        self, session: Session, file: SourceFile, event: UsageEvent, first: UsageEvent, agent: str, *, by_time: bool
    ) -> str:
        """Count the freshest event of a message. `first` is the first event of it in the same batch.

        `by_time`: the message can turn up in a session file too; the start of the call identifies it in both.
        Returns "changed", "same", or the reason why it was not counted: "replayed", "copied".
        """
        at = event.timestamp
        second = int(at.timestamp())
        identity = _identity(file, event, second, by_time=by_time)
        known = session.messages.get(identity)
        if known is None and second <= session.floor:
            return "replayed"
        if known is not None and second < known.second:
            return "same"
        figures = _figures(event)
        session.mode = event.cost_mode or ("SUBSCRIPTION" if event.rate_limits else session.mode)
        session.root = session.root or file.root
        mode = "subscription" if session.mode == "SUBSCRIPTION" else "api_key"
        number = self._book.number(session.root, file.source, event.model, mode, agent)
        if file.source == "opencode":
            if known is None and not session.live:
                if self._is_copy(file.log, number, _figures(first), figures):
                    session.messages[identity] = Record(second, NOT_COUNTED, *figures)
                    session.last = max(session.last, second)
                    return "copied"
                session.live = True
            if file.log in self._index and any(figures):
                self._index[file.log].add(hash((number, figures)))
        return self._replace(session, identity, known, Record(second, number, *figures), at, shared=by_time)

    def apply_entry(self, session: Session, file: SourceFile, source: str, message: SessionMessage) -> bool:
        """Count an assistant message of a session file. Returns whether the account changed."""
        known = session.messages.get(message.started)
        session.root = session.root or file.root
        mode = "subscription" if session.mode == "SUBSCRIPTION" else "api_key"
        name = f"{message.provider}/{message.model}" if message.provider else message.model
        agent = file.agent if known is None else ""
        number = self._book.number(session.root, source, name, mode, agent)
        cost = -1 if message.cost is None else message.cost
        record = Record(message.started // 1000, number, cost, *(message.tokens or (0, 0, 0, 0)))
        at = datetime.fromtimestamp(message.started / 1000, UTC)
        return self._replace(session, message.started, known, record, at, shared=True) == "changed"

    def _replace(
        self, session: Session, identity: int | str, known: Record | None, record: Record, at: datetime, *, shared: bool
    ) -> str:
        # Two inputs may name the same message under different labels: the first one keeps it. So does a copy.
        keeps = known is not None and (shared or known.number in {record.number, NOT_COUNTED})
        if known is not None and keeps and known.figures == record.figures:
            if record.second == known.second:
                return "same"
            session.messages[identity] = msgspec.structs.replace(known, second=record.second)
            return "changed"
        if known is not None and known.number != NOT_COUNTED:
            self._add(known, -1)
        total = record.input + record.output + record.cache_read + record.cache_creation
        if record.cost < 0 and total:
            labels = self._book.keys[record.number]
            tokens = (record.input, record.output, record.cache_read, record.cache_creation)
            estimated = self._estimate(labels[2], labels[3], tokens, at)
            if estimated is not None:
                record = msgspec.structs.replace(record, estimated=estimated)
        self._add(record, 1)
        session.messages[identity] = record
        session.last = max(session.last, record.second)
        if not session.counted:
            session.counted = True
            self._book.row(record.number, record.second)[SESSIONS] += 1
        return "changed"

    def _add(self, record: Record, sign: int) -> None:
        row = self._book.row(record.number, record.second)
        row[MESSAGES] += sign
        row[INPUT] += sign * record.input
        row[OUTPUT] += sign * record.output
        row[CACHE_READ] += sign * record.cache_read
        row[CACHE_CREATION] += sign * record.cache_creation
        if record.cost >= 0:
            row[REPORTED] += sign * record.cost
        elif record.estimated >= 0:
            row[ESTIMATED] += sign * record.estimated
        else:
            row[UNPRICED] += sign * (record.input + record.output + record.cache_read + record.cache_creation)

    def _is_copy(self, log: str, number: int, first: Figures, figures: Figures) -> bool:
        """Whether a message at the start of a session is a fork's copy.

        A live message is written first with zeros; a copy comes at once with its final figures, and those are the
        figures of a message that the same log has already seen.
        """
        if not any(first[1:]) and first[0] <= 0:
            return False
        index = self._index.get(log)
        if index is None:
            index = self._index[log] = set()
            for session in self._sessions_of(log):
                index.update(hash((record.number, record.figures)) for record in session.messages.values())
                index.update(hash(pair) for pair in session.figures)
        return hash((number, figures)) in index


def _identity(file: SourceFile, event: UsageEvent, second: int, *, by_time: bool) -> int | str:
    if by_time and event.timestamp.microsecond:
        return round(event.timestamp.timestamp() * 1000)
    if event.message_id:
        return event.message_id
    if file.source == "opencode":
        return f"{file.agent}:{event.event_id}"
    return f"{file.agent}:{event.event_id}@{second}"


def _figures(event: UsageEvent) -> Figures:
    cost = -1 if event.cost is None or event.cost.total_cost_usd is None else round(event.cost.total_cost_usd * PICO)
    tokens = event.tokens
    if tokens is None:
        return (cost, 0, 0, 0, 0)
    return (cost, tokens.input or 0, tokens.output or 0, tokens.cache_read or 0, tokens.cache_creation or 0)
