"""Takes an open SQLite file, gives it the tables of this version; tells when it does not hold what was stored.

SQLite finds pages that make no sense, not values that were changed, nor pages that are older than the others. So
every row carries a checksum of its values, and `sums` has the sum of the checksums of each table, kept by triggers:
a row that was changed does not fit its own, one that was lost or is out of date is missing in the sum.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

CHECKED_BYTES = 64 << 20
"""A state file up to this size is checked as a whole when it is opened: half a second where nothing of it is cached.
Of a larger one what is read at the start is. Other damage is found when it is read, and ends the exporter then."""


class StoreError(OSError):
    """The state file cannot be used. The message is one line for an operator."""


class UnusableError(StoreError):
    """There is no going on with the state file as it is: the exporter has to end."""


def damaged(path: Path, what: object) -> UnusableError:
    return UnusableError(
        f"the state file {path} is damaged ({what}); restore a copy, or move it away, with {path.name}-wal if there is "
        "one, to start from a new baseline")


_encode = msgspec.msgpack.Encoder().encode


def seal(row: tuple[object, ...]) -> int:
    """The checksum of a row: CRC-32 of its values as msgpack. Values are as SQLite gives them back: no bool."""
    return crc32(_encode(row))


def account_seal(key: str, touched: int, settled: int, value: bytes) -> int:
    """The checksum of an account: above that of its row that of its key, which is looked for before the row is."""
    return seal((key,)) >> 1 << 32 | seal((key, touched, settled, value))


# Frozen once released: change a stored format by adding a step, never by editing one. Statements end with their line.
MIGRATIONS: tuple[str, ...] = (
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
    # Checksums. They are in the index of accounts: their sum is known without the values, which are most of the file.
    # Figures are their own. Spans have no sum: to send some twice is harmless, and they come and go fast.
    """
    CREATE TABLE sums (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE old_meta AS SELECT * FROM meta;
    DROP TABLE meta;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO meta SELECT key, value, seal(key, value) FROM old_meta;
    DROP TABLE old_meta;
    CREATE TABLE old_counters AS SELECT * FROM counters;
    DROP TABLE counters;
    CREATE TABLE counters (
        number INTEGER PRIMARY KEY, family TEXT NOT NULL, labels TEXT NOT NULL,
        exact TEXT NOT NULL, shown TEXT NOT NULL, first TEXT NOT NULL, open INTEGER NOT NULL, crc INTEGER NOT NULL,
        UNIQUE (family, labels));
    INSERT INTO counters SELECT *, seal(family, labels, exact, shown, first, open) FROM old_counters;
    DROP TABLE old_counters;
    CREATE TABLE old_labels AS SELECT * FROM labels;
    DROP TABLE labels;
    CREATE TABLE labels (number INTEGER PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL);
    INSERT INTO labels SELECT *, seal(number, value) FROM old_labels;
    DROP TABLE old_labels;
    CREATE TABLE old_accounts AS SELECT * FROM accounts;
    DROP TABLE accounts;
    CREATE TABLE accounts (
        number INTEGER PRIMARY KEY, key TEXT NOT NULL, touched INTEGER NOT NULL, settled INTEGER NOT NULL,
        crc INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE UNIQUE INDEX accounts_key ON accounts (key, crc);
    CREATE INDEX accounts_unsettled ON accounts (touched) WHERE settled = 0;
    INSERT INTO accounts (key, touched, settled, crc, value)
        SELECT key, touched, settled, account_seal(key, touched, settled, value), value FROM old_accounts;
    DROP TABLE old_accounts;
    CREATE TABLE old_outbox AS SELECT * FROM outbox;
    DROP TABLE outbox;
    CREATE TABLE outbox (
        number INTEGER PRIMARY KEY AUTOINCREMENT, created INTEGER NOT NULL, value BLOB NOT NULL, crc INTEGER NOT NULL);
    INSERT INTO outbox SELECT *, seal(created, value) FROM old_outbox;
    DROP TABLE old_outbox;
    CREATE TABLE old_files AS SELECT * FROM files;
    DROP TABLE files;
    CREATE TABLE files (
        number INTEGER PRIMARY KEY, kind TEXT NOT NULL, log TEXT NOT NULL, path TEXT NOT NULL,
        dev INTEGER NOT NULL, ino INTEGER NOT NULL, offset INTEGER NOT NULL, digest BLOB NOT NULL,
        exempt INTEGER NOT NULL, skipping INTEGER NOT NULL, changed INTEGER NOT NULL, source TEXT NOT NULL,
        meta TEXT NOT NULL, seen INTEGER NOT NULL, crc INTEGER NOT NULL);
    INSERT INTO files SELECT *, seal(kind, log, path, dev, ino, offset, digest, exempt, skipping, changed, source, meta,
        seen) FROM old_files;
    DROP TABLE old_files;
    INSERT INTO sums SELECT 'meta', coalesce(sum(crc), 0) FROM meta;
    INSERT INTO sums SELECT 'counters', coalesce(sum(crc), 0) FROM counters;
    INSERT INTO sums SELECT 'labels', coalesce(sum(crc), 0) FROM labels;
    INSERT INTO sums SELECT 'accounts', coalesce(sum(crc & 4294967295), 0) FROM accounts;
    INSERT INTO sums SELECT 'files', coalesce(sum(crc), 0) FROM files;
    INSERT INTO sums SELECT 'figures', coalesce(sum((digest & 4294967295) + (digest >> 32) + 1), 0) FROM figures;
    CREATE TRIGGER meta_insert AFTER INSERT ON meta BEGIN
        UPDATE sums SET value = value + new.crc WHERE name = 'meta'; END;
    CREATE TRIGGER meta_delete AFTER DELETE ON meta BEGIN
        UPDATE sums SET value = value - old.crc WHERE name = 'meta'; END;
    CREATE TRIGGER counters_insert AFTER INSERT ON counters BEGIN
        UPDATE sums SET value = value + new.crc WHERE name = 'counters'; END;
    CREATE TRIGGER counters_delete AFTER DELETE ON counters BEGIN
        UPDATE sums SET value = value - old.crc WHERE name = 'counters'; END;
    CREATE TRIGGER labels_insert AFTER INSERT ON labels BEGIN
        UPDATE sums SET value = value + new.crc WHERE name = 'labels'; END;
    CREATE TRIGGER labels_delete AFTER DELETE ON labels BEGIN
        UPDATE sums SET value = value - old.crc WHERE name = 'labels'; END;
    CREATE TRIGGER accounts_insert AFTER INSERT ON accounts BEGIN
        UPDATE sums SET value = value + (new.crc & 4294967295) WHERE name = 'accounts'; END;
    CREATE TRIGGER accounts_delete AFTER DELETE ON accounts BEGIN
        UPDATE sums SET value = value - (old.crc & 4294967295) WHERE name = 'accounts'; END;
    CREATE TRIGGER files_insert AFTER INSERT ON files BEGIN
        UPDATE sums SET value = value + new.crc WHERE name = 'files'; END;
    CREATE TRIGGER files_delete AFTER DELETE ON files BEGIN
        UPDATE sums SET value = value - old.crc WHERE name = 'files'; END;
    CREATE TRIGGER figures_insert AFTER INSERT ON figures BEGIN
        UPDATE sums SET value = value + (new.digest & 4294967295) + (new.digest >> 32) + 1 WHERE name = 'figures'; END;
    CREATE TRIGGER figures_delete AFTER DELETE ON figures BEGIN
        UPDATE sums SET value = value - (old.digest & 4294967295) - (old.digest >> 32) - 1 WHERE name = 'figures'; END;
    """,
    # Messages of long sessions. `account` is a digest of the account's key, `name` text or a number.
    """
    CREATE TABLE archive (
        account INTEGER NOT NULL, name NOT NULL, second INTEGER NOT NULL, value BLOB NOT NULL, crc INTEGER NOT NULL,
        PRIMARY KEY (account, name)) WITHOUT ROWID;
    INSERT INTO sums VALUES ('archive', 0);
    CREATE TRIGGER archive_insert AFTER INSERT ON archive BEGIN
        UPDATE sums SET value = value + new.crc WHERE name = 'archive'; END;
    CREATE TRIGGER archive_delete AFTER DELETE ON archive BEGIN
        UPDATE sums SET value = value - old.crc WHERE name = 'archive'; END;
    """,
)

_SUMS = {
    "meta": "SELECT sum(crc) FROM meta",
    "counters": "SELECT sum(crc) FROM counters",
    "labels": "SELECT sum(crc) FROM labels",
    "accounts": "SELECT sum(crc & 4294967295) FROM accounts INDEXED BY accounts_key",
    "files": "SELECT sum(crc) FROM files",
    "figures": "SELECT sum((digest & 4294967295) + (digest >> 32) + 1) FROM figures",
    "archive": "SELECT sum(crc) FROM archive",
}

_SINCE = {"archive": 3}
"""The version that a table came with, where it is not that of the sums."""

_ONLY_WHEN_WHOLE = frozenset({"figures", "archive"})
"""Nothing but its size keeps a large file's from being read at the start."""


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raises UnusableError when it is not what was stored, and sqlite3's errors. Changes nothing."""
    whole = path.stat().st_size <= CHECKED_BYTES
    if whole:
        found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise damaged(path, found.splitlines()[-1])  # below the name of the database
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise UnusableError(
            f"the state file {path} was written by a newer version (schema {version}, this one knows "
            f"{len(MIGRATIONS)}); upgrade, or choose another --state.path")
    _check_schema(db, path, version)
    if version > 1:
        _check_sums(db, path, version, whole=whole)


def migrate(db: sqlite3.Connection) -> None:
    """Bring what was checked to this version, each step in a transaction of its own. Raises sqlite3's errors."""
    _migrate(db, db.execute("PRAGMA user_version").fetchone()[0], len(MIGRATIONS))


def _check_schema(db: sqlite3.Connection, path: Path, version: int) -> None:
    """Tables and triggers are those of the version: a trigger that was changed would keep a wrong sum."""
    model = sqlite3.connect(":memory:", isolation_level=None)
    try:
        _migrate(model, 0, version)
        query = "SELECT type, name, sql FROM sqlite_master"
        wanted, found = (set(one.execute(query).fetchall()) for one in (model, db))
    finally:
        model.close()
    if not wanted <= found or (found and not wanted):
        raise damaged(path, "its tables are not those of its version")


def _check_sums(db: sqlite3.Connection, path: Path, version: int, *, whole: bool) -> None:
    sums = dict(db.execute("SELECT name, value FROM sums"))
    for table, query in _SUMS.items():
        if _SINCE.get(table, 0) > version or (table in _ONLY_WHEN_WHOLE and not whole):
            continue
        if (db.execute(query).fetchone()[0] or 0) != sums.get(table):
            raise damaged(path, f"rows of {table} are missing or out of date")
    if not whole:
        # An account whose key was changed would be one that was never there.
        for key, crc in db.execute("SELECT key, crc FROM accounts INDEXED BY accounts_key"):
            if seal((key,)) >> 1 != crc >> 32:
                raise damaged(path, "a row of accounts was changed")


def _migrate(db: sqlite3.Connection, version: int, target: int) -> None:
    db.create_function("seal", -1, lambda *row: seal(row))
    db.create_function("account_seal", 4, account_seal)
    for number, statements in enumerate(MIGRATIONS[version:target], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in filter(str.strip, statements.split(";\n")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # Ctrl-C can come right after the commit
                db.execute("ROLLBACK")
            raise
