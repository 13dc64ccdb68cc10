"""Takes what a step changed, commits it in one transaction; gives it back after a restart. The only user of sqlite3.

Cursors, accounts and counters move together or not at all: that is what makes every dollar count once across
crashes. One exporter per state file: a lock is held on the file beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from coding_agent_exporter.counters import HIDDEN, OPEN, Series
from coding_agent_exporter.model import CounterKey, Cursor, FileRow, RateLimit
from coding_agent_exporter.spanmodel import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coding_agent_exporter.ledger.accounts import Changes

# Frozen once released: change a stored format by adding a step, never by editing one.
_MIGRATIONS: tuple[str, ...] = (
    # Counters are text: a sum of hostile counts can exceed SQLite's 64 bits. Accounts have row ids: their values
    # fill pages, and as part of the key's index they would make it slow and a third larger.
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE counters (
        number INTEGER PRIMARY KEY, family TEXT NOT NULL, labels TEXT NOT NULL,
        exact TEXT NOT NULL, shown TEXT NOT NULL, first TEXT NOT NULL, open INTEGER NOT NULL,
        UNIQUE (family, labels));
    CREATE TABLE labels (number INTEGER PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE accounts (
        key TEXT PRIMARY KEY, touched INTEGER NOT NULL, settled INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE INDEX accounts_unsettled ON accounts (touched) WHERE settled = 0;
    CREATE TABLE figures (digest INTEGER PRIMARY KEY);
    CREATE TABLE outbox (number INTEGER PRIMARY KEY AUTOINCREMENT, created INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE TABLE files (
        number INTEGER PRIMARY KEY, kind TEXT NOT NULL, log TEXT NOT NULL, path TEXT NOT NULL,
        dev INTEGER NOT NULL, ino INTEGER NOT NULL, offset INTEGER NOT NULL, digest BLOB NOT NULL,
        exempt INTEGER NOT NULL, skipping INTEGER NOT NULL, changed INTEGER NOT NULL, source TEXT NOT NULL,
        meta TEXT NOT NULL, seen INTEGER NOT NULL);
    """,
)


CHECKED_BYTES = 64 << 20
"""A state file up to this size is checked as a whole when it is opened: half a second where nothing of it is cached.
Damage in a larger one is found when the damaged page is read, and ends the exporter then."""


class StoreError(OSError):
    """The state file cannot be used. The message is one line for an operator."""


_span = msgspec.msgpack.Decoder(Span)
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Batch:
    """One transaction."""

    changes: Changes
    counters: list[tuple[CounterKey, Series]] = field(default_factory=list)
    files: list[FileRow] = field(default_factory=list)
    forgotten: list[FileRow] = field(default_factory=list)
    meta: dict[str, bytes] = field(default_factory=dict)
    now: int = 0
    """Epoch seconds; the age of spans counts from here."""

    @property
    def empty(self) -> bool:
        return self.changes.empty and not (self.counters or self.files or self.forgotten or self.meta)


class Store:
    """The state file.

    Raises StoreError when the file is not usable: locked by another exporter, corrupt, from a newer version, not
    writable. `commit` raises StoreError too (a full disk, say); then nothing of the batch was stored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = self._take_lock(path)
        try:
            self._db = self._open(path)
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def _take_lock(path: Path) -> int:
        lock = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = f"cannot write the state file {path}: {error.strerror}; choose another --state.path"
            raise StoreError(reason) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise StoreError(f"the state file {path} is in use by another exporter") from error
        return handle

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = None
        try:
            # It names sessions, paths and models. What SQLite puts beside it gets its mode.
            with suppress(OSError):  # SQLite says what is wrong
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # The pipeline's lock keeps to one thread at a time.
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
            db.execute("PRAGMA journal_mode = WAL")
            # A crash of the program loses nothing. After a power cut the last commits may be missing, together:
            # what they had counted is read again.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA cache_size = -2048")
            db.execute("PRAGMA wal_autocheckpoint = 1000")
            if path.stat().st_size <= CHECKED_BYTES:
                check = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if check != "ok":
                    raise sqlite3.DatabaseError(check)
            _migrate(db, path)
        except StoreError:
            if db is not None:
                db.close()
            raise
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise StoreError(f"cannot use the state file {path}: {error}") from error
            raise StoreError(
                f"the state file {path} is damaged ({error}); move it away to start from a new baseline"
            ) from error
        return db

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    # -- reading back

    def meta(self, key: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def labels(self) -> list[tuple[str, ...]]:
        return [tuple(json.loads(value)) for (value,) in self._db.execute("SELECT value FROM labels ORDER BY number")]

    def counters(self) -> Iterator[tuple[CounterKey, Series]]:
        rows = self._db.execute("SELECT number, family, labels, exact, shown, first, open FROM counters")
        for number, family, labels, exact, shown, first, state in rows:
            yield (family, tuple(json.loads(labels))), Series(int(exact), int(shown), int(first), state, 0.0, number)

    def files(self) -> list[FileRow]:
        rows = self._db.execute(
            "SELECT number, kind, log, path, dev, ino, offset, digest, exempt, skipping, changed, source, meta, seen "
            "FROM files"
        )
        found = []
        for number, kind, log, path, dev, ino, offset, digest, exempt, skipping, changed, source, meta, seen in rows:
            session, created, parent, replay = json.loads(meta)
            cursor = Cursor(dev & _U64, ino & _U64, offset, digest, exempt, bool(skipping), changed)
            found.append(FileRow(kind, log, path, cursor, source, session, created, parent, replay, seen, number))
        return found

    def rate_limits(self) -> dict[tuple[str, str, str], RateLimit]:
        stored = self.meta("rate_limits")
        if stored is None:
            return {}
        return {(root, source, window): RateLimit(*limit) for root, source, window, limit in json.loads(stored)}

    # -- the ledger's storage

    def account(self, key: str) -> bytes | None:
        row = self._one("SELECT value FROM accounts WHERE key = ?", key)
        return None if row is None else row[0]

    def has_figures(self, digest: int) -> bool:
        return self._one("SELECT 1 FROM figures WHERE digest = ?", digest) is not None

    def _one(self, query: str, parameter: str | int) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._db.execute(query, (parameter,)).fetchone()
        except sqlite3.Error as error:
            raise StoreError(f"cannot read the state file {self.path}: {error}") from error
        return row

    def quiet(self, kind: str, before: int, limit: int) -> list[str]:
        rows = self._db.execute(
            "SELECT key FROM accounts WHERE settled = 0 AND touched < ? AND key GLOB ? ORDER BY touched LIMIT ?",
            (before, f"{kind}\n*", limit),
        )
        return [key for (key,) in rows]

    # -- the outbox

    def spans(self, limit: int) -> list[tuple[int, Span]]:
        """The oldest spans with their row numbers."""
        rows = self._db.execute("SELECT number, value FROM outbox ORDER BY number LIMIT ?", (limit,))
        return [(number, _span.decode(value)) for number, value in rows]

    def count_spans(self) -> int:
        count: int = self._db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0]
        return count

    def forget_spans(self, numbers: Sequence[int]) -> int:
        """Remove spans; returns how many of them were still there. Raises StoreError; then all of them are."""
        return self._change("DELETE FROM outbox WHERE number = ?", [(number,) for number in numbers])

    def expire_spans(self, *, before: int = 0, surplus: int = 0) -> int:
        """Remove the spans that were stored before an epoch second, or the oldest ones. Returns how many."""
        if surplus > 0:
            return self._change(
                "DELETE FROM outbox WHERE number IN (SELECT number FROM outbox ORDER BY number LIMIT ?)", [(surplus,)])
        oldest = self._one("SELECT created FROM outbox ORDER BY number LIMIT ?", 1)
        if oldest is None or oldest[0] >= before:
            return 0
        return self._change("DELETE FROM outbox WHERE created < ?", [(before,)])

    def _change(self, statement: str, rows: list[tuple[int, ...]]) -> int:
        """Run a statement for each row, all or none. Returns how many rows it changed; raises StoreError."""
        with self._transaction():
            return max(0, self._db.executemany(statement, rows).rowcount)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing. Raises StoreError."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"cannot write the state file {self.path}: {error}") from error

    # -- writing

    def commit(self, batch: Batch) -> None:
        """Store a batch, all of it or nothing."""
        with self._transaction():
            numbers = self._write(batch)
        for item, number in numbers:
            item.number = number

    def size(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        total = 0
        for suffix in ("", "-wal"):
            try:
                total += Path(f"{self.path}{suffix}").stat().st_size
            except OSError:
                continue
        return total

    def _write(self, batch: Batch) -> list[tuple[Series | FileRow, int]]:
        db, changes = self._db, batch.changes
        numbers: list[tuple[Series | FileRow, int]] = []
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", batch.meta.items())
        if changes.rate_limits is not None:
            limits = [
                (*key, (limit.used_percent, limit.resets_at, limit.window_seconds, limit.seen_at))
                for key, limit in changes.rate_limits.items()
            ]
            db.execute("INSERT OR REPLACE INTO meta VALUES ('rate_limits', ?)", (json.dumps(limits).encode(),))
        db.executemany(
            "INSERT OR REPLACE INTO labels VALUES (?, ?)",
            [(number, json.dumps(labels)) for number, labels in changes.labels],
        )
        db.executemany(
            "INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?)",
            [(key, saved.touched, saved.settled, saved.blob) for key, saved in changes.accounts.items()],
        )
        db.executemany("INSERT OR IGNORE INTO figures VALUES (?)", [(digest,) for digest in changes.figures])
        db.executemany(
            "INSERT INTO outbox (created, value) VALUES (?, ?)",
            [(batch.now, _encode(span)) for span in changes.spans],
        )
        for (family, labels), series in batch.counters:
            state = OPEN if series.state == OPEN else HIDDEN
            values = (str(series.exact), str(series.shown), str(series.first), state)
            number = series.number or None
            cursor = db.execute(
                "INSERT OR REPLACE INTO counters VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, family, json.dumps(labels), *values),
            )
            numbers.append((series, number or cursor.lastrowid or 0))
        for row in batch.files:
            at = row.cursor
            assert at is not None, "a file is stored once it has been read"
            meta = json.dumps((row.session, row.created, row.parent, row.replay))
            number = row.number or None
            cursor = db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (number, row.kind, row.log, row.path, _signed(at.dev), _signed(at.ino), at.offset, at.check,
                 at.exempt, at.skipping, at.changed, row.source, meta, row.seen),
            )
            numbers.append((row, number or cursor.lastrowid or 0))
        db.executemany("DELETE FROM files WHERE number = ?", [(row.number,) for row in batch.forgotten])
        return numbers


_U64 = 2**64 - 1


def _signed(number: int) -> int:
    """Device and inode numbers have 64 bits without a sign, SQLite's integers have one."""
    return number - 2**64 if number >= 2**63 else number


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_MIGRATIONS):
        raise StoreError(
            f"the state file {path} was written by a newer version (schema {version}, this one knows "
            f"{len(_MIGRATIONS)}); upgrade, or choose another --state.path"
        )
    for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in filter(str.strip, statements.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # Ctrl-C can come right after the commit
                db.execute("ROLLBACK")
            raise
