"""Takes typed events with the file they came from, gives them to the account that knows their past.

An account is what has to be remembered to count the next event right: a session's messages, a session's last
reading, or the readings of an agent's log. Accounts are stored as one unit each, loaded when an event asks for
them, and shrink to a few bytes once they are settled: their messages can no longer change.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from coding_agent_exporter.ledger import book as slots
from coding_agent_exporter.ledger.bulk import Bulk
from coding_agent_exporter.ledger.changes import Archived, Changes, Saved, SessionMeta, Storage
from coding_agent_exporter.ledger.incremental import Record, Session, SessionRules, identity
from coding_agent_exporter.ledger.limits import RateLimits
from coding_agent_exporter.ledger.readings import Codex, CodexRules, Process, ProcessRules
from coding_agent_exporter.model import (
    RateLimit,
    SessionCompaction,
    SessionHeader,
    SessionMessage,
    SessionRecord,
    SourceFile,
    UsageEvent,
)

if TYPE_CHECKING:

    from coding_agent_exporter.ledger.book import Book, Estimate

Account = Session | Codex | Process

_decoder = msgspec.msgpack.Decoder(Account)
_record = msgspec.msgpack.Decoder(Record)
_encode = msgspec.msgpack.Encoder().encode

MANY_MESSAGES = 2000
"""A session that knows more puts half of them away, so that the next message does not cost more than the first.
Where messages may be forgotten, those a day behind its last event are, before that."""

SWEEP = 200
"""So many quiet accounts are settled in one step: bounds what a step can take."""

INCREMENTAL = frozenset({"pi-coding", "opencode", "omp"})
CUMULATIVE = frozenset({"codex"})
PI_SOURCES = frozenset({"pi-coding", "omp"})

PI = "pi"
"""Both write sessions of one kind, each with an id that is unique: one account, whoever wrote what of it."""

ORPHANS = "orphans"
SESSION = "session\n"

Observer = Callable[[SourceFile, str, str, UsageEvent, UsageEvent | None, bool], None]
"""File, session, message, event, the session's next event if it is known, and whether it is the message's first."""

_session = attrgetter("session_id")

_PI_SESSION = re.compile(r"_([0-9a-fA-F]{8}-[0-9a-fA-F-]{27})$")


@dataclass(frozen=True, slots=True)
class _Opened:
    """The account that a usage log's session has. `orphans`: where its messages can be in session files too."""

    key: str
    session: Session
    orphans: Session | None

    @property
    def alone(self) -> bool:
        """Whether what becomes of its next event depends on no other session: none of its messages is a copy."""
        return self.session.live if self.orphans is None else not self.orphans.messages


class Ledger:
    """Counts every dollar once.

    A session that was quiet for `settle_after` seconds is settled: its messages are taken to be final and forgotten,
    and what is older than its last event and turns up again is a replay. The same goes, a day behind its last
    event, for the messages of a session that has very many.
    """

    def __init__(
        self,
        storage: Storage,
        estimate: Estimate,
        book: Book,
        *,
        agent_label: bool = False,
        settle_after: int = 6 * 3600,
        cache_messages: int = 20_000,
        rate_limits: dict[tuple[str, str, str], RateLimit] | None = None,
    ) -> None:
        self.book = book
        self.observe: Observer | None = None
        """Told of every event of a message that is neither a copy nor a replay, where spans are made of them."""
        self.now = math.inf
        """Epoch seconds; whoever applies events says what time it is."""
        self.written = 0.0
        """Epoch seconds, by the file system's clock, at which the file that is being applied last changed."""
        self.rejected: Counter[tuple[str, str, str]] = Counter()
        self.limits = RateLimits(book, rate_limits or {})
        self._storage = storage
        self._agent_label = agent_label
        self._settle_after = settle_after
        self._cache_messages = cache_messages
        self._cache: OrderedDict[str, Account] = OrderedDict()
        self._weights: dict[str, int] = {}
        self._cached = 0
        self._next_sweep = 0.0
        self._dirty: set[str] = set()
        self._sessions = SessionRules(book, estimate, storage.has_figures, self._archived)
        self._bulk = Bulk(book, self._sessions)
        self._codex = CodexRules(book, estimate)
        self._processes = ProcessRules(book)

    def apply_usage(self, file: SourceFile, events: list[UsageEvent], *, replay: bool) -> bool:
        """Count the events of a usage log.

        `replay` says that the file is read from its start although its log is known (rotated, moved, truncated,
        restored). Returns whether that is still so: false once an event came that was never seen.
        """
        agent = file.agent if self._agent_label else ""
        now = max(self.now, self.written)
        if file.source in INCREMENTAL:
            self._apply_messages(file, events, agent)
        elif file.source in CUMULATIVE:
            for event in events:
                key = _key("codex", file.source, event.session_id)
                if self._codex.apply(self._account(key, Codex), file, event, agent, now=now):
                    self._dirty.add(key)
        else:
            key = _key("process", file.source, file.agent)
            process = self._account(key, Process)
            replay, skipped, sessions = self._processes.apply(process, file, events, agent, replay=replay, now=now)
            self._dirty.add(key)
            if skipped:
                self.rejected[file.root, file.kind, "replayed"] += skipped
            for session, number, second in sessions:
                self._count_session(_key("named", file.source, file.agent, session), number, second)
        self.limits.note(file, events, now)
        return replay

    def apply_session(
        self, file: SourceFile, source: str, meta: SessionMeta, records: list[SessionRecord], *, fallback: str = ""
    ) -> None:
        """Count the records of a session file; `meta` is filled in when the header comes by.

        `fallback` names the session of a file whose header is not readable.

        A record that is older than the header of a fork was copied from its parent. The parent's file held it too,
        so it is new only where the parent is unknown: then it is counted as the parent's, and remembered as an
        orphan in case that it turns up where it was first written.
        """
        orphans = _key(ORPHANS, PI)
        for record in records:
            if isinstance(record, SessionHeader):
                if not meta.session:
                    meta.session, meta.created, meta.parent = record.session, record.created, record.parent
                continue
            session, copied, at = owner(meta, record, fallback)
            key = _key("session", PI, session)
            if copied:
                own = _key("session", PI, meta.session or fallback)
                forked = self._account(own, Session)
                if at > forked.copies:
                    forked.copies = at
                    self._dirty.add(own)
            account = self._account(key, Session)
            if isinstance(record, SessionCompaction):
                outcome = self._sessions.apply_compaction(key, account, file, record, copied=copied)
            else:
                lost = self._account(orphans, Session)
                outcome = self._sessions.apply_entry(key, account, lost, file, source, record, copied=copied)
            if outcome == "changed":
                self._dirty.add(key)
                if copied:
                    self._dirty.add(orphans)
            elif outcome != "same":
                self.rejected[file.root, file.kind, outcome] += 1
                self._dirty.add(key)

    def flush(self, *, complete: bool, now: float) -> Changes:
        """Everything since the last flush. `complete` says that all input on disk has been read at least once:
        only then is it known which messages are old."""
        changes = Changes()
        for key in self._dirty:
            account = self._cache[key]
            if isinstance(account, Session) and account.size() > MANY_MESSAGES and key.startswith(SESSION):
                if complete and _forgets(key):
                    self._forget(key, account, min(account.last, int(now)) - 24 * 3600, changes)
                if account.size() > MANY_MESSAGES:
                    changes.archive += [
                        Archived(key, name, record.second, _encode(record))
                        for name, record in account.archive(keep=MANY_MESSAGES // 2)
                    ]
            changes.accounts[key] = self._saved(key, account, now, settled=not _forgets(key))
        self._dirty.clear()
        if complete and now >= self._next_sweep:
            quiet = self._storage.quiet("session", int(now) - self._settle_after, SWEEP)
            self._next_sweep = now + (0 if len(quiet) == SWEEP else 60)
            for key in quiet:
                if key not in changes.accounts:
                    account = self._account(key, Session)
                    # A clock that was wrong once must not make replays of all that is yet to come.
                    # What came in the latest second stays: where the clock jumped, the session goes on in that second.
                    self._forget(key, account, min(account.last - 1, int(now) - self._settle_after), changes)
                    changes.accounts[key] = self._saved(key, account, now, settled=True)
        changes.deltas, changes.labels = self.book.flush()
        changes.figures, self._sessions.figures = self._sessions.figures, set()
        changes.rate_limits = self.limits.take_changed()
        return changes

    def trim(self) -> None:
        """Let go of accounts beyond the cache's size. Call after the commit: only then does the storage have them."""
        while self._cached > self._cache_messages and len(self._cache) > 1:
            key, _ = self._cache.popitem(last=False)
            self._cached -= self._weights.pop(key)

    def mode(self, session: str) -> str:
        """The cost mode that is known of a pi or oh-my-pi session, as a label."""
        account = self._account(_key("session", PI, session), Session)
        return "subscription" if account.mode == "SUBSCRIPTION" else "api_key"

    # -- accounts

    def _forget(self, key: str, account: Session, before: int, changes: Changes) -> None:
        if account.archived:
            changes.expired[key] = before
        account.forget(before)

    def _archived(self, key: str, name: int | str) -> Record | None:
        blob = self._storage.archived(key, name)
        return None if blob is None else _record.decode(blob)

    def _account(self, key: str, kind: type[Any]) -> Any:
        account = self._cache.get(key)
        if account is None:
            blob = self._storage.account(key)
            account = kind() if blob is None else _decoder.decode(blob)
            self._cache[key] = account
            self._weigh(key, account)
        else:
            self._cache.move_to_end(key)
        return account

    def _weigh(self, key: str, account: Account) -> None:
        weight = account.size()
        self._cached += weight - self._weights.get(key, 0)
        self._weights[key] = weight

    def _saved(self, key: str, account: Account, now: float, *, settled: bool) -> Saved:
        self._weigh(key, account)
        return Saved(_encode(account), int(now), settled)

    # -- usage logs of sessions that are the sum of their messages

    def _apply_messages(self, file: SourceFile, events: list[UsageEvent], agent: str) -> None:
        opened: dict[str, _Opened] = {}
        if self.observe is not None or not self.book.bulk:
            for event, following in zip(events, _followers(events), strict=True):
                found = opened.get(event.session_id)
                if found is None:
                    found = opened[event.session_id] = self._open(file, event.session_id)
                self._apply_message(found, file, event, agent, following)
            return
        # What only its own session has a say in may wait until all of the session's events are together.
        together: dict[str, tuple[_Opened, list[UsageEvent]]] = {}
        for name, run in groupby(events, _session):
            found = opened.get(name)
            if found is None:
                found = opened[name] = self._open(file, name)
            if found.alone:
                if found.key not in together:  # two names can have one account
                    together[found.key] = found, []
                together[found.key][1].extend(run)
            else:
                # What the others wait with came before: it may hold what these are copies of.
                self._apply_together(together, file, agent)
                self._apply_run(found, list(run), file, agent)
        self._apply_together(together, file, agent)

    def _apply_together(
        self, together: dict[str, tuple[_Opened, list[UsageEvent]]], file: SourceFile, agent: str
    ) -> None:
        for found, events in together.values():
            self._apply_run(found, events, file, agent)
        together.clear()

    def _apply_run(self, found: _Opened, events: list[UsageEvent], file: SourceFile, agent: str) -> None:
        """Events of one session: as many at once as are usual."""
        place = 0
        while place < len(events):
            end = place
            if found.alone:
                count = self._bulk.messages if found.orphans is None else self._bulk.calls
                end = count(found.key, found.session, file, events, place, agent)
            if end > place:
                self._dirty.add(found.key)
                place = end
            else:
                self._apply_message(found, file, events[place], agent, None)
                place += 1

    def _apply_message(
        self, found: _Opened, file: SourceFile, event: UsageEvent, agent: str, following: UsageEvent | None
    ) -> None:
        session = found.session
        if self.observe is not None:
            name = identity(file, event, in_session_files=found.orphans is not None)
            first = self._sessions.known(found.key, session, name) is None
        outcome = self._sessions.apply_event(found.key, session, found.orphans, file, event, agent)
        if self.observe is not None and outcome in {"changed", "same"}:
            self.observe(file, found.key.rpartition("\n")[2], str(name), event, following, first)
        if outcome == "changed":
            self._dirty.add(found.key)
        elif outcome != "same":
            self.rejected[file.root, file.kind, outcome] += 1
            self._dirty.add(found.key)

    def _open(self, file: SourceFile, name: str) -> _Opened:
        is_pi = file.source in PI_SOURCES
        uuid = pi_session(name) if is_pi else ""
        key = _key("session", PI if is_pi else file.source, uuid or name)
        orphans = self._account(_key(ORPHANS, PI), Session) if uuid else None
        return _Opened(key, self._account(key, Session), orphans)

    def _count_session(self, key: str, number: int, second: int) -> None:
        session: Session = self._account(key, Session)
        if not session.counted:
            session.counted = True
            session.last = second
            self.book.row(number, second)[slots.SESSIONS] += 1
            self._dirty.add(key)


def pi_session(name: str) -> str:
    """The uuid of the session that a usage log of pi names by its file, `<start>_<uuid>`; empty where it names none."""
    found = _PI_SESSION.search(name)
    return found.group(1) if found else ""


def owner(meta: SessionMeta, record: SessionMessage | SessionCompaction, fallback: str) -> tuple[str, bool, int]:
    """The session that a record of a session file counts for, whether that is the one it was copied from, and the
    record's time (epoch ms). `fallback` as in `Ledger.apply_session`."""
    at = record.recorded if isinstance(record, SessionCompaction) else record.started
    if at < meta.created and meta.parent not in {"", meta.session}:
        return meta.parent, True, at
    return meta.session or fallback, False, at


def _followers(events: list[UsageEvent]) -> list[UsageEvent | None]:
    """Of each event, the next one of its session."""
    found: list[UsageEvent | None] = []
    upcoming: dict[str, UsageEvent] = {}
    for event in reversed(events):
        found.append(upcoming.get(event.session_id))
        upcoming[event.session_id] = event
    return found[::-1]


def _key(*parts: str) -> str:
    """The key of an account: its kind, then what names it."""
    return "\n".join(parts)


def _forgets(key: str) -> bool:
    """Whether an account grows with its messages, and may forget old ones.

    OpenCode fires a message again whenever anything about it changes, also weeks later: what it counted stays known.
    """
    kind, source = key.split("\n", 2)[:2]
    return kind == "session" and source != "opencode"
