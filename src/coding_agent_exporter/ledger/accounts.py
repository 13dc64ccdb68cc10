"""Takes typed events with the file they came from, gives them to the account that knows their past.

An account is what has to be remembered to count the next event right: a session's messages, a session's last
reading, or the readings of an agent's log. Accounts are stored as one unit each, loaded when an event asks for
them, and shrink to a few bytes once they are settled: their messages can no longer change.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from coding_agent_exporter import families
from coding_agent_exporter.ledger import book as slots
from coding_agent_exporter.ledger.incremental import Record, Session, SessionRules
from coding_agent_exporter.ledger.readings import Codex, CodexRules, Process, ProcessRules
from coding_agent_exporter.model import (
    CounterKey,
    Delta,
    RateLimit,
    SessionCompaction,
    SessionHeader,
    SessionRecord,
    SourceFile,
    UsageEvent,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from coding_agent_exporter.ledger.book import Book, Estimate, Labels

Account = Session | Codex | Process

_decoder = msgspec.msgpack.Decoder(Account)
_encode = msgspec.msgpack.Encoder().encode

MANY_MESSAGES = 2000
SWEEP = 200
"""So many quiet accounts are settled in one step: bounds what a step can take."""

INCREMENTAL = frozenset({"pi-coding", "opencode", "omp"})
CUMULATIVE = frozenset({"codex"})

_PI_SESSION = re.compile(r"_([0-9a-fA-F]{8}-[0-9a-fA-F-]{27})$")


class Storage(Protocol):
    """Where accounts rest while they are not in memory."""

    def account(self, key: str) -> bytes | None: ...

    def accounts(self, log: str) -> Iterable[tuple[str, bytes]]: ...

    def quiet(self, before: int, limit: int) -> list[str]:
        """Keys of accounts that are not settled and were last changed before an epoch second."""


@dataclass(slots=True)
class SessionMeta:
    """What a session file's header said; kept with the file's cursor."""

    session: str = ""
    created: int = 0
    parent: str = ""


@dataclass(slots=True)
class Saved:
    """One account to write. `touched` is the epoch second of this change; `settled` ones are not waited for."""

    blob: bytes
    log: str
    touched: int
    settled: bool


@dataclass(slots=True)
class Changes:
    """All that one step changed, to be committed together."""

    deltas: dict[CounterKey, Delta] = field(default_factory=dict)
    accounts: dict[str, Saved] = field(default_factory=dict)
    labels: list[tuple[int, Labels]] = field(default_factory=list)
    rate_limits: dict[tuple[str, str, str], RateLimit] | None = None

    @property
    def empty(self) -> bool:
        return not (self.deltas or self.accounts or self.labels or self.rate_limits)


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
        self.rejected: Counter[tuple[str, str, str]] = Counter()
        self.rate_limits = rate_limits or {}
        self._limits_changed = False
        self._storage = storage
        self._agent_label = agent_label
        self._settle_after = settle_after
        self._cache_messages = cache_messages
        self._cache: OrderedDict[str, Account] = OrderedDict()
        self._weights: dict[str, int] = {}
        self._cached = 0
        self._next_sweep = 0.0
        self._logs: dict[str, str] = {}
        self._dirty: set[str] = set()
        self._sessions = SessionRules(book, estimate, self._figures_of)
        self._codex = CodexRules(book, estimate)
        self._processes = ProcessRules(book)

    def apply_usage(self, file: SourceFile, events: list[UsageEvent], *, replay: bool) -> bool:
        """Count the events of a usage log.

        `replay` says that the file is read from its start although its log is known (rotated, moved, truncated,
        restored). Returns whether that is still so: false once an event came that was never seen.
        """
        agent = file.agent if self._agent_label else ""
        if file.source in INCREMENTAL:
            self._apply_incremental(file, events, agent)
        elif file.source in CUMULATIVE:
            for event in events:
                account = self._account(f"{file.source}:{event.session_id}", Codex, file.log)
                if self._codex.apply(account, file, event, agent):
                    self._touch(f"{file.source}:{event.session_id}")
        else:
            key = f"{file.source}:{file.agent}"
            process = self._account(key, Process, file.log)
            replay, skipped, sessions = self._processes.apply(process, file, events, agent, replay=replay)
            self._touch(key)
            if skipped:
                self.rejected[file.root, file.kind, "replayed"] += skipped
            for session, number, second in sessions:
                self._count_session(f"{key}:{session}", file.log, number, second)
        self._note_limits(file, events)
        return replay

    def apply_session(
        self, file: SourceFile, source: str, meta: SessionMeta, records: list[SessionRecord], *, fallback: str = ""
    ) -> None:
        """Count the records of a session file; `meta` is filled in when the header comes by.

        `fallback` names the session of a file whose header is not readable.

        A record that is older than the file's own header was copied from the session it was forked from. The
        parent's file held it too, so it is new only where the parent is unknown; then it is counted as the parent's.
        """
        for record in records:
            if isinstance(record, SessionHeader):
                if not meta.session:
                    meta.session, meta.created, meta.parent = record.session, record.created, record.parent
                continue
            at = record.recorded if isinstance(record, SessionCompaction) else record.started
            copied = at < meta.created
            session = meta.session or fallback
            own = self._account(f"{source}:{session}", Session, file.log)
            key = f"{source}:{meta.parent if copied and meta.parent else session}"
            account = self._account(key, Session, file.log)
            identity: int | str = f"c{record.entry}" if isinstance(record, SessionCompaction) else record.started
            if copied:
                own.copies = max(own.copies, at)
                self._touch(f"{source}:{session}")
            if identity in account.messages or at // 1000 <= account.floor or (copied and at <= account.copies):
                reason = "copied" if copied else "replayed"
                if identity not in account.messages or copied:
                    self.rejected[file.root, file.kind, reason] += 1
                    continue
            if isinstance(record, SessionCompaction):
                if identity not in account.messages:
                    account.messages[identity] = Record(at // 1000, -1)
                    account.last = max(account.last, at // 1000)
                    self.book.count((families.COMPACTIONS.name, (file.root,)), at / 1000)
                    self._touch(key)
                continue
            if self._sessions.apply_entry(account, file, source, record):
                self._touch(key)

    def flush(self, *, complete: bool, now: float) -> Changes:
        """Everything since the last flush. `complete` says that all input on disk has been read at least once:
        only then is it known which messages are old."""
        horizon = int(now) - self._settle_after
        changes = Changes()
        for key in self._dirty:
            account = self._cache[key]
            if complete and isinstance(account, Session) and len(account.messages) > MANY_MESSAGES:
                account.forget(account.last - 24 * 3600)
            changes.accounts[key] = self._saved(key, account, now)
        self._dirty.clear()
        if complete and now >= self._next_sweep:
            quiet = self._storage.quiet(horizon, SWEEP)
            self._next_sweep = now + (0 if len(quiet) == SWEEP else 60)
            for key in quiet:
                if key in changes.accounts:
                    continue
                account = self._account(key, Session, "")
                if isinstance(account, Session):
                    account.forget(account.last)
                changes.accounts[key] = self._saved(key, account, now, settled=True)
        changes.deltas, changes.labels = self.book.flush()
        if self._limits_changed:
            changes.rate_limits = dict(self.rate_limits)
            self._limits_changed = False
        return changes

    def trim(self) -> None:
        """Let go of accounts beyond the cache's size. Call after the commit: only then does the storage have them."""
        while self._cached > self._cache_messages and len(self._cache) > 1:
            key, _ = self._cache.popitem(last=False)
            self._logs.pop(key, None)
            self._cached -= self._weights.pop(key)
        if self._cached > self._cache_messages or self._sessions.indexed > self._cache_messages:
            self._sessions.forget_index()

    # -- accounts

    def _account(self, key: str, kind: type[Any], log: str) -> Any:
        account = self._cache.get(key)
        if account is None:
            blob = self._storage.account(key)
            account = kind() if blob is None else _decoder.decode(blob)
            self._cache[key] = account
            self._weigh(key, account)
        else:
            self._cache.move_to_end(key)
        if log:
            self._logs.setdefault(key, log)
        return account

    def _touch(self, key: str) -> None:
        self._dirty.add(key)

    def _weigh(self, key: str, account: Account) -> None:
        weight = account.size()
        self._cached += weight - self._weights.get(key, 0)
        self._weights[key] = weight

    def _saved(self, key: str, account: Account, now: float, *, settled: bool = False) -> Saved:
        self._weigh(key, account)
        settled = settled or not isinstance(account, Session)
        return Saved(_encode(account), self._logs.get(key, ""), int(now), settled)

    def _figures_of(self, log: str) -> Iterable[Session]:
        """Every session of a log, from memory where it is there."""
        seen = set()
        for key, name in list(self._logs.items()):
            if name == log and isinstance(account := self._cache.get(key), Session):
                seen.add(key)
                yield account
        for key, blob in self._storage.accounts(log):
            if key not in seen and isinstance(account := _decoder.decode(blob), Session):
                yield account

    # -- usage logs of sessions that are the sum of their messages

    def _apply_incremental(self, file: SourceFile, events: list[UsageEvent], agent: str) -> None:
        """Of each message only the freshest event of this batch matters, and whether its first one was empty."""
        is_pi = file.source == "pi-coding"
        latest: dict[Any, UsageEvent] = {}
        first: dict[Any, UsageEvent] = {}
        for event in events:
            name = event.message_id or event.event_id
            if not name:
                self.rejected[file.root, file.kind, "no_identity"] += 1
                continue
            # pi's writer numbers its lines and starts over when it restarts: only with the time is that an identity.
            identity: Any = (event.session_id, name, event.timestamp) if is_pi else (event.session_id, name)
            seen = latest.get(identity)
            if seen is None:
                latest[identity] = first[identity] = event
            elif event.timestamp >= seen.timestamp or _second(event.timestamp) == _second(seen.timestamp):
                latest[identity] = event
        session_id, key, session, by_time = None, "", Session(), False
        for identity, event in latest.items():
            if event.session_id != session_id:
                session_id = event.session_id
                found = _PI_SESSION.search(session_id) if is_pi else None
                key = f"{file.source}:{found.group(1) if found else session_id}"
                session = self._account(key, Session, file.log)
                by_time = found is not None
            outcome = self._sessions.apply_event(session, file, event, first[identity], agent, by_time=by_time)
            if outcome == "changed":
                self._touch(key)
            elif outcome != "same":
                self.rejected[file.root, file.kind, outcome] += 1
                self._touch(key)

    def _count_session(self, key: str, log: str, number: int, second: int) -> None:
        session: Session = self._account(key, Session, log)
        if not session.counted:
            session.counted = True
            session.last = second
            self.book.row(number, second)[slots.SESSIONS] += 1
            self._touch(key)

    def _note_limits(self, file: SourceFile, events: list[UsageEvent]) -> None:
        for event in reversed(events):
            if event.rate_limits:
                at = event.timestamp.timestamp()
                for window, value in event.rate_limits.items():
                    limit = _rate_limit(value, at)
                    key = (file.root, file.source, window[: slots.MAX_LABEL])
                    if limit is not None and (key in self.rate_limits or len(self.rate_limits) < 100):
                        known = self.rate_limits.get(key)
                        if known is None or known.seen_at <= at:
                            self._limits_changed = self._limits_changed or known != limit
                            self.rate_limits[key] = limit
                return


def _second(value: datetime) -> int:
    return int(value.timestamp())


def _rate_limit(value: Any, at: float) -> RateLimit | None:
    if not isinstance(value, dict):
        return None

    def number(name: str) -> float | None:
        found = value.get(name)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    used = number("used_percentage")
    return None if used is None else RateLimit(used, number("resets_at"), number("window_seconds"), at)
