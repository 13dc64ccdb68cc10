"""Takes messages of sessions whose cost is the sum of their messages, gives their changes to the book.

pi, oh-my-pi and OpenCode. A message counts with its freshest event; each event takes back what the one before it
had added. What nearly all lines are is counted a run at a time, in `ledger/bulk.py`; here is all of it, one by one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import blake2b
from struct import Struct
from typing import TYPE_CHECKING

import msgspec

from coding_agent_exporter import families
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
from coding_agent_exporter.ledger.times import milliseconds, seconds
from coding_agent_exporter.model import PICO, SessionCompaction, SessionMessage, SourceFile, UsageEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.ledger.book import Estimate

MAX_ORPHANS = 20_000

_signed = Struct(">q").unpack

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

    @property
    def total(self) -> int:
        return self.input + self.output + self.cache_read + self.cache_creation


Figures = tuple[int, int, int, int, int]


Recent = tuple[datetime, int, int, int, int, int, int]
"""When a call began, label set number, pico-USD, input, output, cache_read, cache_creation."""


class Session(msgspec.Struct, array_like=True, tag=1):
    """A session's account. Times are epoch seconds, but `copies`: milliseconds.

    `floor`: everything up to here has been counted and forgotten. `live`: a message was seen as it happened, so
    what follows is no copy. `copies`: start of the latest message that the session's own file copied from its
    parent. `last`: the latest second of all that is known of it. `recent`: the messages of pi that came after all of
    `messages`, in order: not looked up one by one while nothing but a later one comes. `archived`: the latest second
    of the messages that were put away, to be stored by themselves; 0: none.
    """

    counted: bool = False
    live: bool = False
    floor: int = 0
    last: int = 0
    copies: int = 0
    mode: str = ""
    root: str = ""
    messages: dict[int | str, Record] = {}
    recent: list[Recent] = []
    archived: int = 0

    def size(self) -> int:
        return 1 + len(self.messages) + len(self.recent)

    def merge(self) -> None:
        """Bring `recent` to where any message is looked up."""
        for at, number, cost, *tokens in self.recent:
            self.messages[milliseconds(at)] = Record(seconds(at), number, cost, *tokens)
        self.recent.clear()

    def forget(self, before: int) -> None:
        """Drop the messages up to an epoch second: nothing can change them any more."""
        self.merge()
        old = [name for name, record in self.messages.items() if record.second <= before]
        for name in old:
            del self.messages[name]
        if old or self.archived:
            self.floor = max(self.floor, before)
        if self.archived <= before:
            self.archived = 0

    def archive(self, keep: int) -> list[tuple[int | str, Record]]:
        """Put away the messages that were first known of, all but so many. Gives what to store."""
        self.merge()
        names = list(self.messages)[: max(0, len(self.messages) - keep)]
        away = [(name, self.messages.pop(name)) for name in names]
        self.archived = max([1, self.archived, *(record.second for _, record in away)])
        return away


class SessionRules:
    """How messages are counted.

    `seen` tells whether figures with a digest were ever stored; `figures` are those since the last flush. `archived`
    gives what a session put away: account, message -> Record.
    """

    def __init__(
        self, book: Book, estimate: Estimate, seen: Callable[[int], bool],
        archived: Callable[[str, int | str], Record | None],
    ) -> None:
        self.figures: set[int] = set()
        self._begun: dict[int, blake2b] = {}
        self._book = book
        self._estimate = estimate
        self._seen = seen
        self._archived = archived

    def known(self, key: str, session: Session, message: int | str) -> Record | None:
        """What is known of a message; from here on it is in `messages`."""
        if session.recent:
            session.merge()
        record = session.messages.get(message)
        # A message that is named by its time cannot be among those before.
        if record is None and session.archived and (
            isinstance(message, str) or message // 1000 <= session.archived + 1
        ):
            record = self._archived(key, message)
            if record is not None:
                session.messages[message] = record
        return record

    def apply_event(
        self, key: str, session: Session, orphans: Session | None, file: SourceFile, event: UsageEvent, agent: str
    ) -> str:
        """Count an event of a usage log, in place of what the events before it had said of the same message.

        `orphans`: the message can turn up in a session file too, where the start of the call identifies it; these
        were found there before. Returns "changed", "same", or the reason why it was not counted: "no_identity",
        "replayed", "copied".
        """
        if not (event.message_id or event.event_id):
            return "no_identity"
        message = identity(file, event, in_session_files=orphans is not None)
        second = seconds(event.timestamp)
        known = self.known(key, session, message)
        if known is None:
            if second <= session.floor:
                return "replayed"
        elif second < known.second:
            return "same"
        hinted = bool(event.cost_mode or event.rate_limits)
        before = session.mode
        session.mode = event.cost_mode or ("SUBSCRIPTION" if event.rate_limits else before)
        session.root = session.root or file.root
        mode = "subscription" if session.mode == "SUBSCRIPTION" else "api_key"
        record = _record(event, second, self._book.number(session.root, file.source, event.model, mode, agent))
        if file.source == "opencode":
            if self._is_copy(session, known, record):
                session.messages[message] = msgspec.structs.replace(record, number=NOT_COUNTED)
                session.last = max(session.last, second)
                return "copied"
        elif known is None and orphans and orphans.messages and _orphan(message, record) in orphans.messages:
            session.messages[message] = msgspec.structs.replace(record, number=NOT_COUNTED)
            session.last = max(session.last, second)
            return "copied"
        shared = orphans is not None
        outcome = self._replace(session, message, known, record, event.timestamp, shared=shared, hinted=hinted)
        if file.source == "opencode" and record.total and (known is None or known.figures != record.figures):
            self.note(record.number, record.figures)
        return outcome if session.mode == before else "changed"

    def apply_entry(
        self, key: str, session: Session, orphans: Session, file: SourceFile, source: str, message: SessionMessage,
        *, copied: bool,
    ) -> str:
        """Count an assistant message of a session file. Returns as `apply_event` does."""
        identity, second = message.started, message.started // 1000
        known = self.known(key, session, identity)
        if copied and known is not None:
            return "copied"
        if known is None and (second <= session.floor or (copied and identity <= session.copies)):
            return "copied" if copied else "replayed"
        session.root = session.root or file.root
        mode = "subscription" if session.mode == "SUBSCRIPTION" else "api_key"
        name = f"{message.provider}/{message.model}" if message.provider else message.model
        number = self._book.number(session.root, source, name, mode, file.agent)
        cost = -1 if message.cost is None else message.cost
        record = Record(second, number, cost, *(message.tokens or (0, 0, 0, 0)))
        if known is None and (copied or orphans.messages):
            orphan = _orphan(identity, record)
            if orphan in orphans.messages:
                if not copied:
                    session.messages[identity] = msgspec.structs.replace(record, number=NOT_COUNTED)
                    session.last = max(session.last, second)
                return "copied"
            if copied:
                orphans.messages[orphan] = Record(second, NOT_COUNTED)
                if len(orphans.messages) > MAX_ORPHANS:
                    del orphans.messages[next(iter(orphans.messages))]
        at = datetime.fromtimestamp(message.started / 1000, UTC)
        return self._replace(session, identity, known, record, at, shared=True, hinted=False)

    def apply_compaction(
        self, key: str, session: Session, file: SourceFile, compaction: SessionCompaction, *, copied: bool
    ) -> str:
        """Count a compaction entry of a session file. Returns as `apply_event` does."""
        identity, second = f"c{compaction.entry}", compaction.recorded // 1000
        if self.known(key, session, identity) is not None:
            return "copied" if copied else "same"
        if second <= session.floor or (copied and compaction.recorded <= session.copies):
            return "copied" if copied else "replayed"
        session.messages[identity] = Record(second, NOT_COUNTED)
        session.last = max(session.last, second)
        self._book.count((families.COMPACTIONS.name, (file.root,)), second)
        return "changed"

    def _replace(
        self, session: Session, identity: int | str, known: Record | None, record: Record, at: datetime,
        *, shared: bool, hinted: bool,
    ) -> str:
        if known is not None:
            keeps = known.number in {record.number, NOT_COUNTED}
            if not keeps:
                before, after = self._book.keys[known.number], self._book.keys[record.number]
                if before[1:5] == after[1:5]:
                    # Known under another root, or from before there was a label for the agent: that stays.
                    keeps, record = True, msgspec.structs.replace(record, number=known.number)
                else:
                    # Two inputs may name a message differently: the first one keeps it, but for what it cannot know.
                    keeps = shared and not (hinted and before[4] != after[4])
            if keeps and known.figures == record.figures:
                if record.second == known.second:
                    return "same"
                session.last = max(session.last, record.second)
                session.messages[identity] = msgspec.structs.replace(known, second=record.second)
                return "changed"
            if known.number != NOT_COUNTED:
                self._take_back(known)
        if record.cost < 0 and record.total:
            labels = self._book.keys[record.number]
            estimated = self._estimate(labels[2], labels[3], record.figures[1:], at)
            if estimated is not None:
                record = msgspec.structs.replace(record, estimated=estimated)
        self._add(record)
        session.messages[identity] = record
        session.last = max(session.last, record.second)
        if not session.counted:
            session.counted = True
            self._book.row(record.number, record.second)[SESSIONS] += 1
        return "changed"

    def _add(self, record: Record) -> None:
        row = self._book.row(record.number, record.second)
        row[MESSAGES] += 1
        row[INPUT] += record.input
        row[OUTPUT] += record.output
        row[CACHE_READ] += record.cache_read
        row[CACHE_CREATION] += record.cache_creation
        if record.cost >= 0:
            row[REPORTED] += record.cost
        elif record.estimated >= 0:
            row[ESTIMATED] += record.estimated
        else:
            row[UNPRICED] += record.total

    def _take_back(self, record: Record) -> None:
        row = self._book.row(record.number, record.second)
        row[MESSAGES] -= 1
        row[INPUT] -= record.input
        row[OUTPUT] -= record.output
        row[CACHE_READ] -= record.cache_read
        row[CACHE_CREATION] -= record.cache_creation
        if record.cost >= 0:
            row[REPORTED] -= record.cost
        elif record.estimated >= 0:
            row[ESTIMATED] -= record.estimated
        else:
            row[UNPRICED] -= record.total

    def _is_copy(self, session: Session, known: Record | None, record: Record) -> bool:
        """Whether an OpenCode message at the start of a session is a fork's copy; notes when the session is live.

        A live message is written first with zeros and grows; a copy comes at once with its final figures, and those
        are the figures of a message that was seen before. Zeros alone decide nothing: an interrupted message keeps
        them, also in a copy.
        """
        if session.live or (not record.total and record.cost <= 0):
            return False
        if known is not None:
            if known.number == NOT_COUNTED:
                return known.figures == record.figures
            session.live = True
            return False
        digest = self._digest(record.number, record.figures)
        if digest in self.figures or self._seen(digest):
            return True
        session.live = True
        return False

    def note(self, number: int, figures: Figures) -> None:
        """Remember the figures of an OpenCode message, by which a fork's copy of it is known."""
        self.figures.add(self._digest(number, figures))

    def _digest(self, number: int, figures: Figures) -> int:
        """64 bits of the model and the figures of a message, the same in every run and release: they are stored."""
        begun = self._begun.get(number)
        if begun is None:
            name = repr(self._book.keys[number][2:4]).encode()
            begun = self._begun[number] = blake2b(b"(%b, " % name, digest_size=8)
        hashed = begun.copy()
        hashed.update(("(%d, %d, %d, %d, %d))" % figures).encode())  # noqa: UP031  half the time of an f-string
        digest: int = _signed(hashed.digest())[0]
        return digest


def identity(file: SourceFile, event: UsageEvent, *, in_session_files: bool) -> int | str:
    """What names a message within its session.

    `in_session_files`: the message can turn up in one too, where the start of the call (epoch milliseconds) names it.
    """
    if in_session_files:
        return milliseconds(event.timestamp)
    if event.message_id:
        return event.message_id
    if file.source == "opencode":
        return f"{file.agent}:{event.event_id}"
    # pi's writer numbers its lines and starts over when it restarts: only with the time is that an identity.
    return f"{file.agent}:{event.event_id}@{seconds(event.timestamp)}"


def _orphan(identity: int | str, record: Record) -> str:
    """What identifies a copied message whose session is unknown: when it began, and its figures."""
    return f"{identity}:{record.figures}"


def _record(event: UsageEvent, second: int, number: int) -> Record:
    cost = -1 if event.cost is None or event.cost.total_cost_usd is None else round(event.cost.total_cost_usd * PICO)
    tokens = event.tokens
    if tokens is None:
        return Record(second, number, cost)
    return Record(
        second, number, cost,
        tokens.input or 0, tokens.output or 0, tokens.cache_read or 0, tokens.cache_creation or 0,
    )
