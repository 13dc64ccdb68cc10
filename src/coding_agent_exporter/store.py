"""Takes what a step changed, commits it in one transaction; gives it back after a restart. The only user of sqlite3.

Cursors, accounts and counters move together or not at all: that is what makes every dollar count once across
crashes. One exporter per state file: a lock is held on the file beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from coding_agent_exporter.counters import HIDDEN, OPEN, Series
from coding_agent_exporter.model import CounterKey, Cursor, FileRow, RateLimit
from coding_agent_exporter.schema import StoreError, UnusableError, account_seal, check, damaged, migrate, seal
from coding_agent_exporter.spanmodel import Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coding_agent_exporter.ledger.changes import Changes

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
    durable: bool = False
    """Whether it has to outlast a power cut once it is committed, as what a scrape is about to show does."""

    @property
    def empty(self) -> bool:
        return self.changes.empty and not (self.counters or self.files or self.forgotten or self.meta)


class Store:
    """The state file.

    Raises StoreError when the file is not usable: locked by another exporter, corrupt, from a newer version, not
    writable. `commit` raises StoreError too (a full disk, say); then nothing of the batch was stored. UnusableError
    is the kind that trying again does not help.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _take_lock(path)
        try:
            self._file, self._db = _open(path)
        except BaseException:
            os.close(self._lock)
            raise
        self._version = self._data_version()

    def close(self) -> None:
        self._db.close()
        # Not before: closing any handle of a file ends all locks that the process has on it, SQLite's too.
        os.close(self._file)
        os.close(self._lock)

    def _require_hold(self) -> None:
        """What is stored now must be what the next start finds, and nobody else may count on it."""
        if not _is_at(self._file, self.path):
            raise StoreError(
                f"the state file {self.path} was moved or deleted while it was in use; put it back, or restart to go "
                "on from what is there now")
        if _is_at(self._lock, _lock_of(self.path)):
            return
        try:
            lock = _take_lock(self.path)
        except StoreError as error:
            raise UnusableError(str(error)) from error
        os.close(self._lock)
        self._lock = lock
        if self._data_version() != self._version:
            raise UnusableError(f"the state file {self.path} was used by another exporter meanwhile")

    def _data_version(self) -> int:
        """Changes with the first commit that is not ours."""
        version: int = self._db.execute("PRAGMA data_version").fetchone()[0]
        return version

    # -- reading back

    def meta(self, key: str) -> bytes | None:
        # All of them: a key that was changed would only be one that is not there.
        return dict(self._rows("meta", "SELECT crc, key, value FROM meta")).get(key)

    def labels(self) -> list[tuple[str, ...]]:
        rows = self._rows("labels", "SELECT crc, number, value FROM labels ORDER BY number")
        return [tuple(json.loads(value)) for _, value in rows]

    def counters(self) -> Iterator[tuple[CounterKey, Series]]:
        query = "SELECT crc, family, labels, exact, shown, first, open, number FROM counters"
        for family, labels, exact, shown, first, state, number in self._rows("counters", query, beside=1):
            yield (family, tuple(json.loads(labels))), Series(int(exact), int(shown), int(first), state, 0.0, number)

    def files(self) -> list[FileRow]:
        query = (
            "SELECT crc, kind, log, path, dev, ino, offset, digest, exempt, skipping, changed, source, meta, seen, "
            "number FROM files")
        found = []
        for (kind, log, path, dev, ino, offset, digest, exempt, skipping, changed, source, meta, seen,
             number) in self._rows("files", query, beside=1):
            session, created, parent, replay = json.loads(meta)
            cursor = Cursor(dev & _U64, ino & _U64, offset, digest, exempt, bool(skipping), changed)
            found.append(FileRow(kind, log, path, cursor, source, session, created, parent, replay, seen, number))
        return found

    def rate_limits(self) -> dict[tuple[str, str, str], RateLimit]:
        stored = self.meta("rate_limits")
        if stored is None:
            return {}
        return {(root, source, window): RateLimit(*limit) for root, source, window, limit in json.loads(stored)}

    def _rows(self, table: str, query: str, *parameters: int, beside: int = 0) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, whose first column is the checksum of the others, without it. The last ones, so many
        as stand `beside`, are not in it."""
        end = -beside or None
        with self._reading():
            for row in self._db.execute(query, parameters):
                if seal(row[1:end]) != row[0]:
                    raise damaged(self.path, f"a row of {table} was changed")
                yield row[1:]

    # -- the ledger's storage

    def account(self, key: str) -> bytes | None:
        # The checksum comes from the index, and so is not as old as a value that is out of date.
        found = self._one("SELECT crc, number FROM accounts INDEXED BY accounts_key WHERE key = ?", key)
        if found is None:
            return None
        row = self._one("SELECT key, touched, settled, value FROM accounts WHERE number = ?", found[1])
        if row is None or account_seal(*row) != found[0]:
            raise damaged(self.path, "a row of accounts was changed")
        value: bytes = row[3]
        return value

    def has_figures(self, digest: int) -> bool:
        return self._one("SELECT 1 FROM figures WHERE digest = ?", digest) is not None

    def archived(self, account: str, name: int | str) -> bytes | None:
        row = self._one(
            "SELECT account, name, second, value, crc FROM archive WHERE account = ? AND name = ?",
            _digest(account), name)
        if row is None:
            return None
        if seal(row[:4]) != row[4]:
            raise damaged(self.path, "a row of archive was changed")
        value: bytes = row[3]
        return value

    def _one(self, query: str, *parameters: str | int) -> tuple[Any, ...] | None:
        with self._reading():
            row: tuple[Any, ...] | None = self._db.execute(query, parameters).fetchone()
        return row

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _failure(self.path, error, "read") from error

    def quiet(self, kind: str, before: int, limit: int) -> list[str]:
        with self._reading():
            rows = self._db.execute(
                "SELECT key FROM accounts WHERE settled = 0 AND touched < ? AND key GLOB ? ORDER BY touched LIMIT ?",
                (before, f"{kind}\n*", limit),
            ).fetchall()
        return [key for (key,) in rows]

    # -- the outbox

    def spans(self, limit: int) -> list[tuple[int, Span]]:
        """The oldest spans with their row numbers."""
        query = "SELECT crc, created, value, number FROM outbox ORDER BY number LIMIT ?"
        rows = self._rows("outbox", query, limit, beside=1)
        return [(number, _span.decode(value)) for _, value, number in rows]

    def count_spans(self) -> int:
        with self._reading():
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
        oldest = next(self._rows("outbox", "SELECT crc, created, value FROM outbox ORDER BY number LIMIT 1"), None)
        if oldest is None or oldest[0] >= before:
            return 0
        return self._change("DELETE FROM outbox WHERE created < ?", [(before,)])

    def _change(self, statement: str, rows: list[tuple[int, ...]]) -> int:
        """Run a statement for each row, all or none. Returns how many rows it changed; raises StoreError."""
        with self._transaction():
            return max(0, self._db.executemany(statement, rows).rowcount)

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All of it or nothing. Raises StoreError."""
        try:
            self._require_hold()
            if self._db.in_transaction:  # the last one could not even be rolled back
                self._db.execute("ROLLBACK")
            # A crash of the program loses nothing. After a power cut the last commits may be missing, together, back
            # to the last durable one: what they had counted is read again.
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _failure(self.path, error, "write") from error

    # -- writing

    def commit(self, batch: Batch) -> None:
        """Store a batch, all of it or nothing."""
        with self._transaction(durable=batch.durable):
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
        meta = dict(batch.meta)
        if changes.rate_limits is not None:
            meta["rate_limits"] = json.dumps([
                (*key, (limit.used_percent, limit.resets_at, limit.window_seconds, limit.seen_at))
                for key, limit in changes.rate_limits.items()
            ]).encode()
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", [(*one, seal(one)) for one in meta.items()])
        labels = [(number, json.dumps(value)) for number, value in changes.labels]
        db.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", [(*one, seal(one)) for one in labels])
        accounts = [(key, saved.touched, int(saved.settled), saved.blob) for key, saved in changes.accounts.items()]
        db.executemany("DELETE FROM accounts WHERE key = ?", [(key,) for key in changes.accounts])
        db.executemany(
            "INSERT INTO accounts (key, touched, settled, value, crc) VALUES (?, ?, ?, ?, ?)",
            [(*one, account_seal(*one)) for one in accounts])
        db.executemany(
            "DELETE FROM archive WHERE account = ? AND second <= ?",
            [(_digest(key), before) for key, before in changes.expired.items()])
        archive = [(_digest(one.account), one.name, one.second, one.blob) for one in changes.archive]
        db.executemany("INSERT OR REPLACE INTO archive VALUES (?, ?, ?, ?, ?)", [(*one, seal(one)) for one in archive])
        # In order: each falls beside the one before.
        db.executemany("INSERT OR IGNORE INTO figures VALUES (?)", [(digest,) for digest in sorted(changes.figures)])
        spans = [(batch.now, _encode(span)) for span in changes.spans]
        db.executemany(
            "INSERT INTO outbox (created, value, crc) VALUES (?, ?, ?)", [(*one, seal(one)) for one in spans])
        for (family, of), series in batch.counters:
            amounts = str(series.exact), str(series.shown), str(series.first)
            values = (family, json.dumps(of), *amounts, OPEN if series.state == OPEN else HIDDEN)
            number = series.number or None
            cursor = db.execute(
                "INSERT OR REPLACE INTO counters VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (number, *values, seal(values)))
            numbers.append((series, number or cursor.lastrowid or 0))
        for file in batch.files:
            at = file.cursor
            assert at is not None, "a file is stored once it has been read"
            stored = (
                file.kind, file.log, file.path, _signed(at.dev), _signed(at.ino), at.offset, at.check, int(at.exempt),
                int(at.skipping), at.changed, file.source,
                json.dumps((file.session, file.created, file.parent, file.replay)), file.seen)
            number = file.number or None
            cursor = db.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (number, *stored, seal(stored)))
            numbers.append((file, number or cursor.lastrowid or 0))
        db.executemany("DELETE FROM files WHERE number = ?", [(file.number,) for file in batch.forgotten])
        return numbers


_U64 = 2**64 - 1


def _digest(account: str) -> int:
    """A number for the key of an account, which is long, and would stand in every row of the archive."""
    key = account.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big", signed=True)


def _signed(number: int) -> int:
    """Device and inode numbers have 64 bits without a sign, SQLite's integers have one."""
    return number - 2**64 if number >= 2**63 else number


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that lies there."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _take_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = f"cannot write the state file {path}: {error.strerror}; choose another --state.path"
        raise StoreError(reason) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise StoreError(f"the state file {path} is in use by another exporter") from error
    return handle


def _open(path: Path) -> tuple[int, sqlite3.Connection]:
    """A handle of the file, and the database in it."""
    # It names sessions, paths and models. What SQLite puts beside it gets its mode.
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"cannot use the state file {path}: {error.strerror}") from error
    db = None
    try:
        if path.with_name(f"{path.name}-journal").exists():  # of the very first start, which was killed
            sqlite3.connect(path).execute("PRAGMA user_version").connection.close()
        # A connection that may write would, when it is closed, mix a damaged file with the write-ahead log beside it.
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
        check(db, path)
        db.close()
        # The pipeline's lock keeps to one thread at a time.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        db.execute("PRAGMA cell_size_check = ON")  # damage is found where it is, not in what follows from it
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA cache_size = -2048")
        db.execute("PRAGMA temp_store = MEMORY")  # else pages are copied to a file first, where none may be written
        db.execute("PRAGMA wal_autocheckpoint = 1000")
        db.execute("PRAGMA recursive_triggers = ON")  # what REPLACE removes counts in the sums
        migrate(db)
    except BaseException as error:
        if db is not None:
            db.close()
        os.close(handle)
        if isinstance(error, sqlite3.Error):
            raise _failure(path, error, "use") from error
        raise
    return handle, db


def _failure(path: Path, error: sqlite3.Error, doing: str) -> StoreError:
    # Text that is none is an OperationalError too.
    if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
        return StoreError(f"cannot {doing} the state file {path}: {error}")
    return damaged(path, error)
