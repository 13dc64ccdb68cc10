"""What a new line costs depends on the line, not on what was there before: counted in calls, statements and bytes."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from coding_agent_exporter.pipeline import Pipeline
from support import Clock, drain, exact, settings

if TYPE_CHECKING:
    from coding_agent_exporter.store import Batch


class Cost(NamedTuple):
    """What one step did: SQL statements, bytes of accounts, and calls that look at a file or list a directory."""

    statements: int
    stored: int
    looks: int


class Desk:
    """Usage logs, and an exporter that is told of every line that is appended to one."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.logs = home / "logs"
        self.pipeline = Pipeline(settings(home, f"--usage.root=logs={self.logs}"), clock=self.clock)
        self._patch = monkeypatch
        self._written = 0

    def path(self, agent: str, source: str = "pi-coding") -> Path:
        return self.logs / "agents" / agent / "events" / source / "usage" / "events.jsonl"

    def write(self, path: Path, session: str, first: int, count: int = 1) -> None:
        """So many messages, a second apart. No two have the same figures; all of them take the same space."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for number in range(first, first + count):
                self._written += 1
                at = datetime.fromtimestamp(self.clock.now - 5000 + number, UTC).isoformat()
                file.write(json.dumps({
                    "source": "x/usage", "type": "cost_snapshot", "event_id": f"{number:08d}", "timestamp": at,
                    "message_id": f"msg_{number:08d}" if path.parts[-3] == "opencode" else None, "session_id": session,
                    "cost": {"total_cost_usd": 0.25}, "model": "a/b",
                    "tokens": {"input": 100_000 + self._written, "output": 300},
                }) + "\n")

    def step(self, path: Path) -> Cost:
        """The cost of a step that is told of this path."""
        statements: list[str] = []
        looks: list[object] = []
        stored = 0
        commit, real = self.pipeline._store.commit, {name: getattr(os, name) for name in ("stat", "lstat", "scandir")}

        def counted(batch: Batch) -> None:
            nonlocal stored
            stored += sum(len(saved.blob) for saved in batch.changes.accounts.values())
            commit(batch)

        def looking(name: str) -> object:
            def call(*args: object, **options: object) -> object:
                looks.append(args[0])
                return real[name](*args, **options)
            return call

        self.clock.now += 1
        self.pipeline._store._db.set_trace_callback(statements.append)
        with self._patch.context() as patch:
            patch.setattr(self.pipeline._store, "commit", counted)
            for name in real:
                patch.setattr(os, name, looking(name))
            assert not self.pipeline.step(changes=frozenset([str(path)]))
        self.pipeline._store._db.set_trace_callback(None)
        return Cost(len(statements), stored, len(looks))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def messages(desk: Desk) -> int:
    return sum(count for (name, _), count in exact(desk.pipeline).items() if name == "coding_agent_messages_total")


@pytest.mark.parametrize("source", ["pi-coding", "opencode"])
def test_a_line_costs_the_same_beside_any_history(desk: Desk, source: str) -> None:
    """Statements, bytes stored and files looked at, with one log and no past, and with many logs and a long one."""
    own = desk.path("own", source)
    desk.write(own, "before", 0, 20)
    drain(desk.pipeline)
    desk.write(own, "small", 2000)
    desk.step(own)  # what is looked up, or made, once
    desk.write(own, "small", 2001)
    alone = desk.step(own)
    for agent in range(150):
        desk.write(desk.path(f"agent-{agent}", source), f"other-{agent}", 0, 20)
    drain(desk.pipeline)
    desk.write(own, "after", 2002)
    desk.step(own)
    desk.write(own, "after", 2003)
    assert desk.step(own) == alone
    assert messages(desk) == 20 + 2 + 150 * 20 + 2


@pytest.mark.parametrize("source", ["pi-coding", "opencode"])
def test_a_message_costs_the_same_in_a_session_of_any_length(desk: Desk, source: str) -> None:
    """Bytes stored for one more message, in a session that is long and in one that is three times as long."""
    own = desk.path("own", source)
    desk.write(own, "session", 0, 2500)
    drain(desk.pipeline)
    desk.write(own, "session", 2500)
    desk.step(own)  # what is put away at last
    desk.write(own, "session", 2501)
    short = desk.step(own)
    desk.write(own, "session", 2502, 5000)
    drain(desk.pipeline)
    desk.write(own, "session", 7502)
    desk.step(own)
    desk.write(own, "session", 7503)
    long = desk.step(own)
    assert long.stored < 2 * short.stored  # between one and two thousand messages are stored together
    assert messages(desk) == 7504


def written() -> int:
    """Bytes that this process has given to the system to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_commit_writes_little_more_than_it_stores(desk: Desk) -> None:
    """The pages that it changes, once: no copies in temporary files, for which a read-only system has no place."""
    own = desk.path("own")
    desk.write(own, "session", 0, 1500)
    drain(desk.pipeline)
    before, stored = written(), 0
    for number in range(1500, 1510):
        desk.write(own, "session", number)
        stored += desk.step(own).stored
    assert written() - before < 3 * stored
