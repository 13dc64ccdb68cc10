"""The state file: what it keeps, and that it is refused where it cannot be trusted."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from coding_agent_exporter import schema
from coding_agent_exporter.counters import HIDDEN, OPEN, Series
from coding_agent_exporter.ledger import Archived, Changes, Saved
from coding_agent_exporter.model import CounterKey, Cursor, FileRow, RateLimit
from coding_agent_exporter.schema import MIGRATIONS, StoreError, UnusableError, account_seal, seal
from coding_agent_exporter.spanmodel import Span
from coding_agent_exporter.store import Batch, Store

KEY: CounterKey = ("coding_agent_messages_total", ("r", "s", "p", 'a "quoted"\nmodel', "api_key"))


def batch() -> Batch:
    changes = Changes(
        accounts={"session\nopencode\n1": Saved(b"blob", 1000, settled=False)},
        labels=[(0, KEY[1])],
        figures={-5, 2**62},
        archive=[Archived("session\nopencode\n1", "m", 50, b"away"), Archived("session\npi\n2", 1234567, 60, b"named")],
        rate_limits={("r", "claude", "five_hour"): RateLimit(45.5, 2000.0, 18000.0, 1000.0)},
    )
    cursor = Cursor(1, 2, 3, b"digest", 4, skipping=True)
    row = FileRow("sessions", "log", "/a/b", cursor, "omp", "uuid", 5, "parent", replay=True, seen=7)
    return Batch(changes, [(KEY, Series(2**70, 2**71, -3, OPEN))], [row], [], {"baseline": b"{}"})


def test_everything_that_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    """Integers beyond 64 bits, odd label values and all parts of a cursor included."""
    store = Store(tmp_path / "deep" / "state.db")
    stored = batch()
    store.commit(stored)
    store.close()
    store = Store(tmp_path / "deep" / "state.db")
    assert dict(store.counters()) == {KEY: Series(2**70, 2**71, -3, OPEN, number=1)}
    assert store.labels() == [KEY[1]]
    assert store.account("session\nopencode\n1") == b"blob"
    assert [store.has_figures(digest) for digest in (-5, 2**62, 5)] == [True, True, False]
    assert store.archived("session\nopencode\n1", "m") == b"away"
    assert store.archived("session\npi\n2", 1234567) == b"named"
    assert store.archived("session\npi\n2", "1234567") is None
    assert store.archived("session\npi\n1", 1234567) is None
    assert store.quiet("session", 1001, 10) == ["session\nopencode\n1"]
    assert store.quiet("session", 1000, 10) == []
    assert store.rate_limits() == stored.changes.rate_limits
    assert store.meta("baseline") == b"{}"
    (row,) = store.files()
    (wanted,) = stored.files
    assert row.number == 1
    assert (row.path, row.cursor, row.source, row.session, row.created, row.parent, row.replay, row.seen) == (
        wanted.path, wanted.cursor, wanted.source, wanted.session, wanted.created, wanted.parent, True, 7)
    store.close()


def test_what_is_archived_expires_by_account_and_time(tmp_path: Path) -> None:
    """What is put away in the same commit stays."""
    store = Store(tmp_path / "state.db")
    store.commit(batch())
    key = "session\npi\n2"
    store.commit(Batch(Changes(archive=[Archived(key, 2, 55, b"x")], expired={key: 60, "session\nopencode\n1": 49})))
    assert [store.archived(key, name) for name in (1234567, 2)] == [None, b"x"]
    assert store.archived("session\nopencode\n1", "m") == b"away"
    store.close()
    Store(tmp_path / "state.db").close()


def test_a_series_at_its_first_value_is_stored_as_never_scraped(tmp_path: Path) -> None:
    """After a crash it shows its first value once more, which is no step back."""
    store = Store(tmp_path / "state.db")
    store.commit(Batch(Changes(), [(KEY, Series(5, 5, 0, 1))]))
    assert dict(store.counters())[KEY].state == HIDDEN
    store.close()


def test_a_second_commit_changes_the_same_rows(tmp_path: Path) -> None:
    """A series or a file is one row, however often it is stored."""
    store = Store(tmp_path / "state.db")
    stored = batch()
    store.commit(stored)
    stored.counters[0][1].exact = 1
    stored.files[0].path = "/moved"
    store.commit(stored)
    assert [series.exact for _, series in store.counters()] == [1]
    assert [row.path for row in store.files()] == ["/moved"]
    store.commit(Batch(Changes(), forgotten=stored.files))
    assert store.files() == []
    store.close()


def test_a_settled_account_is_not_quiet_any_more(tmp_path: Path) -> None:
    """It is done with once."""
    store = Store(tmp_path / "state.db")
    store.commit(batch())
    store.commit(Batch(Changes(accounts={"session\nopencode\n1": Saved(b"small", 2000, settled=True)})))
    assert store.account("session\nopencode\n1") == b"small"
    assert store.quiet("session", 5000, 10) == []
    store.close()


def test_inode_numbers_of_64_bits_survive(tmp_path: Path) -> None:
    """Some file systems use them all."""
    store = Store(tmp_path / "state.db")
    cursor = Cursor(2**64 - 1, 2**63, 5, b"")
    store.commit(Batch(Changes(), files=[FileRow("usage", "log", "/a", cursor)]))
    assert [row.cursor for row in store.files()] == [cursor]
    store.close()


def test_a_failed_commit_stores_nothing_of_its_batch(tmp_path: Path) -> None:
    """A full disk: the size limit of the database stands in for it."""
    store = Store(tmp_path / "state.db")
    store.commit(batch())
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    big = batch()
    big.meta["baseline"] = b"changed"
    big.changes.accounts["session\nopencode\n2"] = Saved(b"x" * 100_000, 0, settled=False)
    with pytest.raises(StoreError, match="full"):
        store.commit(big)
    assert store.meta("baseline") == b"{}"
    assert store.account("session\nopencode\n2") is None
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.commit(big)
    assert store.meta("baseline") == b"changed"
    store.close()


def test_a_second_exporter_is_refused(tmp_path: Path) -> None:
    """Two would count the same dollars twice. The lock goes with the process."""
    store = Store(tmp_path / "state.db")
    with pytest.raises(StoreError, match="in use by another exporter"):
        Store(tmp_path / "state.db")
    store.close()
    Store(tmp_path / "state.db").close()


def test_a_state_file_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    """What an older program does not know it cannot keep right."""
    Store(tmp_path / "state.db").close()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    with pytest.raises(StoreError, match="newer version"):
        Store(tmp_path / "state.db")


@pytest.mark.parametrize("damage", ["garbage", "cut off", "overwritten"])
def test_a_damaged_state_file_is_refused(damage: str, tmp_path: Path) -> None:
    """Never silent wrong numbers: the message says what to do, and the lock is free again."""
    path = tmp_path / "state.db"
    if damage == "garbage":
        path.write_bytes(b"this is no database" * 100)
    else:
        store = Store(path)
        many = Changes(accounts={f"k{n}": Saved(b"x" * 3000, 0, settled=False) for n in range(100)})
        store.commit(Batch(many))
        store.close()
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] if damage == "cut off" else content[:half] + b"\xff" * half)
    with pytest.raises(StoreError, match="damaged"):
        Store(path)
    with pytest.raises(StoreError, match="damaged"):
        Store(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where a directory is needed."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write the state file .*--state\.path"):
        Store(tmp_path / "file" / "state.db")


def a_span(number: int) -> Span:
    return Span(f"{number:032x}", f"{number:016x}", "", "chat m", "client", number, number + 1, {"a": ["x"], "b": 1.5})


def test_spans_wait_in_the_order_in_which_they_were_committed(tmp_path: Path) -> None:
    """In the transaction of the lines they came from; numbers are never used again."""
    store = Store(tmp_path / "state.db")
    for now in (100, 200):
        store.commit(Batch(Changes(spans=[a_span(now), a_span(now + 1)]), now=now))
    store.close()
    store = Store(tmp_path / "state.db")
    assert store.spans(3) == [(1, a_span(100)), (2, a_span(101)), (3, a_span(200))]
    assert store.forget_spans([1, 4, 99]) == 2
    store.commit(Batch(Changes(spans=[a_span(300)]), now=300))
    assert [number for number, _ in store.spans(10)] == [2, 3, 5]
    assert store.expire_spans(before=150) == 1
    assert store.expire_spans(surplus=1) == 1
    assert [number for number, _ in store.spans(10)] == [5]
    assert store.count_spans() == 1
    store.close()


FROZEN_V1 = {
    "meta": ["key TEXT", "value BLOB"],
    "counters": [
        "number INTEGER", "family TEXT", "labels TEXT", "exact TEXT", "shown TEXT", "first TEXT", "open INTEGER",
    ],
    "labels": ["number INTEGER", "value TEXT"],
    "figures": ["digest INTEGER"],
    "outbox": ["number INTEGER", "created INTEGER", "value BLOB"],
    "accounts": ["key TEXT", "touched INTEGER", "settled INTEGER", "value BLOB"],
    "files": [
        "number INTEGER", "kind TEXT", "log TEXT", "path TEXT", "dev INTEGER", "ino INTEGER", "offset INTEGER",
        "digest BLOB", "exempt INTEGER", "skipping INTEGER", "changed INTEGER", "source TEXT", "meta TEXT",
        "seen INTEGER",
    ],
}
FROZEN_V2 = {
    "sums": ["name TEXT", "value INTEGER"],
    "meta": [*FROZEN_V1["meta"], "crc INTEGER"],
    "counters": [*FROZEN_V1["counters"], "crc INTEGER"],
    "labels": [*FROZEN_V1["labels"], "crc INTEGER"],
    "figures": FROZEN_V1["figures"],
    "outbox": [*FROZEN_V1["outbox"], "crc INTEGER"],
    "accounts": ["number INTEGER", "key TEXT", "touched INTEGER", "settled INTEGER", "crc INTEGER", "value BLOB"],
    "files": [*FROZEN_V1["files"], "crc INTEGER"],
}
FROZEN_V3 = {
    **FROZEN_V2,
    "archive": ["account INTEGER", "name ", "second INTEGER", "value BLOB", "crc INTEGER"],
}


def test_the_stored_format_is_the_one_that_was_released(tmp_path: Path) -> None:
    """Changing it takes a migration, and a new entry here."""
    Store(tmp_path / "state.db").close()
    assert schema_of(tmp_path / "state.db") == (3, FROZEN_V3)


def schema_of(path: Path) -> tuple[int, dict[str, list[str]]]:
    with closing(sqlite3.connect(path)) as db:
        tables = [
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("sqlite_")
        ]
        found = {name: [f"{row[1]} {row[2]}" for row in db.execute(f"PRAGMA table_info({name})")] for name in tables}
        return db.execute("PRAGMA user_version").fetchone()[0], found


def test_checksums_are_those_that_were_released() -> None:
    """Another way to make them would make all state files damaged ones."""
    assert seal(("a", "é", b"\x00\xff", 0, -1, 2**62, -2**63)) == 537035450
    assert account_seal("a", 1, 0, b"x") == 5124229793291681316


def read_all(store: Store) -> list[object]:
    """All that a state file holds, as the exporter reads it."""
    return [
        [store.meta(key) for key in ("baseline", "instances")], store.rate_limits(), store.labels(),
        dict(store.counters()), [(row.path, row.cursor, row.session, row.number) for row in store.files()],
        store.account("session\nopencode\n1"), store.archived("session\nopencode\n1", "m"), store.spans(9),
    ]


def filled(path: Path) -> list[object]:
    """A state file with something in every table; what is in it."""
    store = Store(path)
    stored = batch()
    stored.changes.spans, stored.now, stored.meta["instances"] = [a_span(1)], 100, b"agents"
    store.commit(stored)
    found = read_all(store)
    store.close()
    return found


def test_a_state_file_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    """With all that is in it; what is written next fits what was there."""
    found = filled(tmp_path / "new.db")
    old = sqlite3.connect(tmp_path / "old.db")
    old.executescript(MIGRATIONS[0])
    old.execute("ATTACH ? AS new", (str(tmp_path / "new.db"),))
    found[-2] = None  # there was no archive then
    for table, columns in FROZEN_V1.items():
        names = ", ".join(column.split()[0] for column in columns)
        old.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM new.{table}")
    old.execute("PRAGMA main.user_version = 1")
    old.commit()
    old.close()
    for _ in range(2):
        store = Store(tmp_path / "old.db")
        assert read_all(store) == found
        assert store.has_figures(2**62)
        store.close()
    assert schema_of(tmp_path / "old.db") == (3, FROZEN_V3)
    store = Store(tmp_path / "old.db")
    store.commit(batch())
    store.close()
    Store(tmp_path / "old.db").close()


@pytest.mark.parametrize("value", [
    b"instances", b"agents", b"five_hour", b"session\nopencode\n1", b"blob", b"1180591620717411303424", b"[\"r\", \"s",
    b"digest", b"/a/b", b"uuid", b"chat m", b"coding_agent_messages_total", b"baseline",
    b"away",
])
def test_a_bit_that_was_flipped_in_a_row_is_found(value: bytes, tmp_path: Path) -> None:
    """In names, amounts, cursors, accounts, spans: SQLite sees nothing wrong with any of them."""
    state = tmp_path / "state.db"
    found = filled(state)
    content = state.read_bytes()
    refused = 0
    for place in [place for place in range(len(content)) if content.startswith(value, place)]:
        flipped = bytearray(content)
        flipped[place + len(value) // 2] ^= 1
        state.write_bytes(flipped)
        try:
            store = Store(state)
        except UnusableError:
            refused += 1
            continue
        try:
            assert read_all(store) == found, "it was in no row, but in what an older one has left"
        except UnusableError:
            refused += 1
        finally:
            store.close()
    assert refused > 0


@pytest.mark.parametrize("statement", [
    "DELETE FROM accounts", "DELETE FROM figures WHERE digest > 0", "DELETE FROM counters", "DELETE FROM files",
    "DELETE FROM labels", "DELETE FROM archive", "DELETE FROM meta WHERE key = 'baseline'", "DELETE FROM sums",
    "DROP TABLE labels", "PRAGMA user_version = 0", "UPDATE sums SET value = value + 1",
])
def test_rows_that_are_missing_are_found(statement: str, tmp_path: Path) -> None:
    """As a page from before would leave it: each row that is there is right."""
    filled(tmp_path / "state.db")
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as db:
        kept = db.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.execute(statement)
        for (trigger,) in kept if "DROP" not in statement else ():
            db.execute(trigger)
    with pytest.raises(UnusableError, match="damaged"):
        Store(tmp_path / "state.db")


def test_an_account_that_is_out_of_date_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is too large to be checked as a whole: the row is right by itself, but older than the index."""
    state = tmp_path / "state.db"
    filled(state)
    with closing(sqlite3.connect(state)) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'accounts'").fetchone()[0] - 1
    before = state.read_bytes()
    store = Store(state)
    store.commit(Batch(Changes(accounts={"session\nopencode\n1": Saved(b"newer", 2000, settled=False)})))
    store.close()
    after = bytearray(state.read_bytes())
    after[page * 4096:(page + 1) * 4096] = before[page * 4096:(page + 1) * 4096]
    state.write_bytes(after)
    monkeypatch.setattr(schema, "CHECKED_BYTES", 0)
    store = Store(state)
    with pytest.raises(UnusableError, match="damaged"):
        store.account("session\nopencode\n1")
    store.close()
    monkeypatch.undo()
    with pytest.raises(UnusableError, match="damaged"):
        Store(state)


def test_a_state_file_that_is_moved_while_it_is_used_takes_no_more(tmp_path: Path) -> None:
    """What would be stored in it the next start would not find. It goes on when the file is back."""
    store = Store(tmp_path / "a" / "state.db")
    (tmp_path / "a").rename(tmp_path / "b")
    for _ in range(2):
        with pytest.raises(StoreError, match="moved or deleted") as failure:
            store.commit(batch())
        assert not isinstance(failure.value, UnusableError)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").rename(tmp_path / "a")
    store.commit(batch())
    store.close()
    store = Store(tmp_path / "a" / "state.db")
    assert store.meta("baseline") == b"{}"
    store.close()


def test_a_lock_file_that_was_deleted_is_taken_again(tmp_path: Path) -> None:
    """Somebody tidied up: the next commit makes a new one, and a second exporter is refused as before."""
    store = Store(tmp_path / "state.db")
    (tmp_path / "state.db.lock").unlink()
    store.commit(batch())
    with pytest.raises(StoreError, match="in use by another exporter"):
        Store(tmp_path / "state.db")
    store.commit(batch())
    store.close()


def test_the_first_exporter_gives_way_when_its_lock_file_was_deleted_and_a_second_one_began(tmp_path: Path) -> None:
    """What it remembers is out of date as soon as another one may write; also when that one is gone again."""
    first = Store(tmp_path / "state.db")
    (tmp_path / "state.db.lock").unlink()
    second = Store(tmp_path / "state.db")
    second.commit(batch())
    with pytest.raises(UnusableError, match="in use by another exporter"):
        first.commit(Batch(Changes(), meta={"baseline": b"stale"}))
    second.close()
    (tmp_path / "state.db.lock").unlink()
    with pytest.raises(UnusableError, match="used by another exporter meanwhile"):
        first.commit(Batch(Changes(), meta={"baseline": b"stale"}))
    assert first.meta("baseline") == b"{}"
    first.close()


class Stubborn(sqlite3.Connection):
    """Fails to roll back, once, after something has failed."""

    failures = 0

    def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:
        if sql == "ROLLBACK" and Stubborn.failures:
            Stubborn.failures -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *parameters)  # type: ignore[arg-type]


def test_a_transaction_that_cannot_be_rolled_back_keeps_no_later_one_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done with before the next one; nothing of it is stored."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Stubborn))
    store = Store(tmp_path / "state.db")
    store._db.create_function("seal", -1, lambda *_: 1 / 0)
    Stubborn.failures = 1

    def fail() -> None:
        with store._transaction():
            store._db.execute("INSERT INTO meta VALUES ('lost', x'', 0)")
            store._db.execute("SELECT seal(1)").fetchone()

    with pytest.raises(StoreError):
        fail()
    assert store._db.in_transaction
    store.commit(batch())
    assert store.meta("baseline") == b"{}"
    assert store.meta("lost") is None
    store.close()
