"""What a crash leaves of the state file: at every commit and within it, in migrations, between commit and reply."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agents_support import OpenCodeLog
from coding_agent_exporter import schema
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.store import Store
from crash_support import CORRECTED, HISTORY, Fleet, copy_state, settled, stored, uninterrupted
from process_support import fallen
from support import drain, exact, scrape, settings, total

CORRECTIONS = "coding_agent_cost_usd_total"


class Copying(sqlite3.Connection):
    """A connection that tells `Copies` of every statement that was run."""

    watch: Callable[[str], None] = staticmethod(lambda _: None)

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        result = super().execute(sql, *parameters)
        type(self).watch(sql)
        return result

    def executemany(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        result = super().executemany(sql, *parameters)
        type(self).watch(sql)
        return result


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], None]], None]]:
    """Has a function called after every statement of every connection that is made from now on."""

    def watch(call: Callable[[str], None]) -> None:
        monkeypatch.setattr(Copying, "watch", staticmethod(call))
        monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Copying))

    connect = sqlite3.connect
    yield watch
    monkeypatch.undo()


def test_every_state_that_a_crash_can_leave_comes_to_the_same_end(
    amount: Callable[[int, int], int], watched: Callable[[Callable[[str], None]], None],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    """Copies after every commit and, of each kind of statement within one, of many: each goes on to the same totals.

    Each copy is what a kill leaves at that instant. All have the same spans to send as one run that nothing
    interrupts.
    """
    seed, steps = 3, amount(8, 100)
    chance, fleet, state = random.Random(seed), Fleet(tmp_path, seed), tmp_path / "state.db"
    copies: list[Path] = []

    def copy(sql: str) -> None:
        if sql == "COMMIT" or chance.random() < 0.08:
            copies.append(tmp_path / "copies" / f"{len(copies)}-{'commit' if sql == 'COMMIT' else 'within'}")
            copy_state(state, copies[-1])

    watched(copy)
    pipeline = Pipeline(settings(tmp_path, *fleet.flags), spans=True)
    pipeline._store._db.execute("PRAGMA wal_autocheckpoint = 40")  # the state file itself is written often, too
    for _ in range(steps):
        for _ in range(chance.randrange(6)):
            fleet.act()
        if chance.random() < 0.4:
            scrape(pipeline)
        else:
            pipeline.step()
    fleet.finish()
    drain(pipeline)
    pipeline.close()
    monkeypatch.undo()
    expected, ids = uninterrupted(fleet, tmp_path / "uninterrupted")
    assert stored(state) == expected
    commits = sum("commit" in home.name for home in copies)
    print(f"seed {seed}: {commits} commits and {len(copies) - commits} instants within or between them, "
          f"{fleet.actions} actions")
    assert commits > steps / 2
    truth = fleet.spans()
    for home in copies:
        pipeline = Pipeline(settings(home, *fleet.flags), spans=True)
        drain(pipeline)
        spans = {span.span: span for _, span in pipeline._store.spans(10**6)}
        assert settled(exact(pipeline)) == expected, home
        assert spans.keys() == ids, home
        assert {span: spans[span] for span in truth} == truth
        scrape(pipeline)
        assert fleet.differences(scrape(pipeline)) == []
        pipeline.close()


def test_what_a_scrape_is_about_to_show_outlasts_a_crash_before_its_reply(
    amount: Callable[[int, int], int], watched: Callable[[Callable[[str], None]], None], tmp_path: Path
) -> None:
    """A message is said to cost twice what it did, a scrape shows it, the log is corrected: no restart shows less."""
    rounds, log, copies = amount(10, 200), OpenCodeLog(tmp_path / ".mngr", "agent"), 0
    last = [tmp_path / "none"]

    def copy(sql: str) -> None:
        nonlocal copies
        if sql == "COMMIT":
            copies += 1
            last[0] = tmp_path / "copies" / str(copies)
            copy_state(tmp_path / "state.db", last[0])

    watched(copy)
    flags = [f"--usage.root=mngr={tmp_path / '.mngr'}", *HISTORY]
    pipeline = Pipeline(settings(tmp_path, *flags))
    log.message(CORRECTED, 10**9)
    scrape(pipeline)
    higher = 0
    for _ in range(rounds):
        first, double, final = log.corrected(CORRECTED, 10**9)
        log.append(first, double)
        shown = scrape(pipeline)
        home, before = last[0], copies
        log.append(final)
        restarted = Pipeline(settings(home, *flags))
        again = scrape(restarted)
        restarted.close()
        assert copies > before, "the copy is committed to, not the state that goes on"
        assert fallen(shown, again) == []
        higher += total(shown, CORRECTIONS) > log.truth.usd + 1e-9
    pipeline.close()
    print(f"{rounds} crashes between commit and reply, {higher} of them with a value that the logs took back")
    assert higher > rounds / 4


def test_a_power_cut_takes_nothing_back_that_was_shown(
    amount: Callable[[int, int], int], watched: Callable[[Callable[[str], None]], None], tmp_path: Path
) -> None:
    """All commits are gone but those that waited for the disk: what a scrape has shown was in one of them."""
    seed, cuts = 8, amount(6, 100)
    chance, fleet, state = random.Random(seed), Fleet(tmp_path, seed), tmp_path / "state.db"
    waits, commits, durable = True, 0, [tmp_path / "none"]

    def copy(sql: str) -> None:
        nonlocal waits, commits
        if sql.startswith("PRAGMA synchronous"):
            waits = sql.endswith("FULL")
        elif sql == "COMMIT":
            commits += 1
            if waits:
                durable[0] = tmp_path / "durable" / str(commits)
                copy_state(state, durable[0])

    watched(copy)
    pipeline = Pipeline(settings(tmp_path, *fleet.flags))
    shown = scrape(pipeline)
    lost = 0
    for number in range(cuts):
        for _ in range(chance.randrange(1, 8)):
            for _ in range(chance.randrange(5)):
                fleet.act()
            if chance.random() < 0.5:
                shown = scrape(pipeline)
            else:
                pipeline.step()
        home = tmp_path / str(number)
        shutil.copytree(durable[0], home)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Copying, "watch", staticmethod(lambda _: None))
            lost += stored(home / "state.db") != settled(exact(pipeline))
            restarted = Pipeline(settings(home, *fleet.flags))
            assert fallen({key: value for key, value in shown.items() if value}, scrape(restarted)) == []
            drain(restarted)
            assert settled(exact(restarted)) == uninterrupted(fleet, home / "uninterrupted")[0]
            restarted.close()
    pipeline.close()
    print(f"seed {seed}: {cuts} power cuts, {lost} of which lost commits")
    assert lost > 0


def test_a_crash_anywhere_in_a_migration_leaves_one_version_or_the_other(
    watched: Callable[[Callable[[str], None]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Copies after every statement that brings a state file of the first version up to date."""
    fleet = Fleet(tmp_path, 4)
    for _ in range(50):
        fleet.act()
    fleet.finish()
    expected, ids = uninterrupted(fleet, tmp_path / "new")
    old = tmp_path / "old" / "state.db"
    old.parent.mkdir()
    with closing(sqlite3.connect(old)) as db:
        db.executescript(f"PRAGMA journal_mode = WAL; {schema.MIGRATIONS[0]} PRAGMA user_version = 1")
        db.execute("ATTACH ? AS new", (str(tmp_path / "new" / "state.db"),))
        for (table,) in db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall():
            if table != "sqlite_sequence":
                names = ", ".join(row[1] for row in db.execute(f"PRAGMA main.table_info({table})"))
                db.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM new.{table}")
        db.commit()
    copies: list[Path] = []

    def copy(_: str) -> None:
        copies.append(tmp_path / "copies" / str(len(copies)))
        copy_state(old, copies[-1])

    watched(copy)
    Store(old).close()
    monkeypatch.undo()
    print(f"{len(copies)} instants in a migration")
    assert len(copies) > 50
    for home in copies:
        pipeline = Pipeline(settings(home, *fleet.flags), spans=True)
        drain(pipeline)
        assert settled(exact(pipeline)) == expected
        assert {span.span for _, span in pipeline._store.spans(10**6)} == ids
        pipeline.close()


def test_commits_that_break_off_anywhere_are_made_up_for(amount: Callable[[int, int], int], tmp_path: Path) -> None:
    """SQLite is interrupted after a random number of its instructions: nothing of that transaction is stored."""
    seed, steps = 5, amount(40, 600)
    chance, fleet = random.Random(seed), Fleet(tmp_path, seed)
    pipeline = Pipeline(settings(tmp_path, *fleet.flags), spans=True)
    commit, failed, before = pipeline._store.commit, 0, scrape(pipeline)

    def broken(batch: Any) -> None:
        nonlocal failed
        pipeline._store._db.set_progress_handler(lambda: 1, int(10 ** chance.uniform(0, 4.5)))
        try:
            commit(batch)
        except schema.StoreError:
            failed += 1
            raise
        finally:
            pipeline._store._db.set_progress_handler(None, 0)

    pipeline._store.commit = broken  # type: ignore[method-assign]
    for _ in range(steps):
        for _ in range(chance.randrange(4)):
            fleet.act()
        after = scrape(pipeline)
        assert fallen({key: value for key, value in before.items() if value}, after) == []
        before = after
    pipeline._store.commit = commit  # type: ignore[method-assign]
    fleet.finish()
    drain(pipeline)
    expected, ids = uninterrupted(fleet, tmp_path / "uninterrupted")
    assert settled(exact(pipeline)) == expected
    assert {span.span for _, span in pipeline._store.spans(10**6)} == ids
    print(f"seed {seed}: {failed} commits broken off in {steps} steps")
    assert failed > steps / 5
    pipeline.close()


def test_a_state_file_that_cannot_be_written_at_the_start_hides_no_counter(tmp_path: Path) -> None:
    """What was committed before is shown, and stands still until there is room."""
    fleet = Fleet(tmp_path, 1)
    for _ in range(100):
        fleet.act()
    pipeline = Pipeline(settings(tmp_path, *fleet.flags))
    drain(pipeline)
    scrape(pipeline)
    before = scrape(pipeline)
    pipeline.close()
    fleet.finish()
    pipeline = Pipeline(settings(tmp_path, *fleet.flags))
    pipeline._store._db.execute("PRAGMA query_only = ON")
    during = scrape(pipeline)
    assert pipeline.pending_commit
    assert fallen({key: value for key, value in before.items() if value}, during) == []
    pipeline._store._db.execute("PRAGMA query_only = OFF")
    scrape(pipeline)
    after = scrape(pipeline)
    assert fallen(during, after) == []
    assert fleet.differences(after) == []
    pipeline.close()
