"""Every dollar once, through the whole pipeline: what files, writers, forks and crashes do to identity."""

from __future__ import annotations

import json
import os
import random
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter import families
from coding_agent_exporter.counters import Counters
from coding_agent_exporter.decode import usage as usage_logs
from coding_agent_exporter.ledger import Changes
from coding_agent_exporter.model import PICO, CounterKey, Cursor, Delta, FileRow, SourceFile
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.registry import FORGET_AFTER, Registry
from coding_agent_exporter.schema import StoreError
from coding_agent_exporter.store import Batch, Store
from support import Clock, Samples, drain, exact, scrape, settings, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COST = "coding_agent_cost_usd_total"
MESSAGES = "coding_agent_messages_total"
NOW = Clock().now
BEGIN = NOW - 500
DAY = 86_400
UUID = "01a1fbc2-74e7-70f3-8236-1cf90229f35d"
OTHER_UUID = "01a1fbd4-af17-7256-98fe-fe2bde52fc98"


class World:
    """A machine with one usage root and one root of session files, and an exporter that can die at any time."""

    def __init__(self, home: Path, *flags: str, clock: Clock | None = None) -> None:
        self.home = home
        self.clock = clock or Clock()
        self.usage, self.sessions = home / "mngr", home / "sessions"
        self.flags = ("--usage.root", f"m={self.usage}", "--sessions.dir", f"s={self.sessions}", *flags)
        self.pipeline = Pipeline(settings(home, *self.flags), clock=self.clock)

    def restart(self, *more: str) -> None:
        """As after `kill -9`: nothing is flushed, the lock goes with the process."""
        self.kill()
        self.pipeline = Pipeline(settings(self.home, *self.flags, *more), clock=self.clock)

    def kill(self) -> None:
        os.close(self.pipeline._store._lock)
        self.pipeline._store._db.close()

    def log(self, source: str, agent: str = "a1", name: str = "events.jsonl") -> Path:
        path = self.usage / "agents" / agent / "events" / source / "usage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, source: str, *events: dict[str, Any], agent: str = "a1") -> None:
        append(self.log(source, agent), *events)

    def session(self, name: str, *entries: dict[str, Any], project: str = "--p--") -> Path:
        path = self.sessions / project / f"{name}.jsonl"
        append(path, *entries)
        return path

    def step(self) -> None:
        drain(self.pipeline)

    def settle(self) -> None:
        """Let seven quiet hours pass, so that sessions are taken to be over."""
        self.step()
        self.clock.now += 7 * 3600
        self.step()

    def counted(self, name: str = COST, **labels: str) -> float:
        """Exact totals, in the family's unit."""
        self.step()
        family = families.BY_NAME[name]
        return sum(
            amount for (found, values), amount in exact(self.pipeline).items()
            if found == name and labels.items() <= dict(zip(family.labels, values, strict=False)).items()
        ) / family.scale


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.step()
    yield made
    made.pipeline.close()


def append(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records))


def at(seconds: float) -> str:
    """A time shortly before the exporter's first start, as pi and OpenCode write it; later than its baseline."""
    return datetime.fromtimestamp(BEGIN + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def event(seconds: float, usd: float | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "cost_snapshot", "event_id": f"e{seconds}", "timestamp": at(seconds), "session_id": "s1",
        "model": "p/m",
    }
    if usd is not None:
        made["cost"] = {"total_cost_usd": usd}
    return {**made, **more}


def tokens(count: int) -> dict[str, int]:
    return {"input": count, "output": 0, "cache_read": 0, "cache_creation": 0}


def opencode(session: str, message: str, seconds: float, usd: float) -> list[dict[str, Any]]:
    """A live message: zeros when it starts, then twice its final figures."""
    about = {"session_id": session, "message_id": message}
    final = {**about, "tokens": tokens(round(usd * 1000))}
    return [
        event(seconds, 0, **about, tokens=tokens(0)),
        event(seconds + 0.5, usd, **final), event(seconds + 0.6, usd, **final),
    ]


def copied(session: str, message: str, seconds: float, usd: float) -> dict[str, Any]:
    """A fork's copy: at once with its final figures."""
    return event(seconds, usd, session_id=session, message_id=message, tokens=tokens(round(usd * 1000)))


def header(session: str, seconds: float, parent: str = "") -> dict[str, Any]:
    made = {"type": "session", "version": 3, "id": session, "timestamp": at(seconds)}
    return {**made, "parentSession": f"/home/dev/.pi/x_{parent}.jsonl"} if parent else made


def entry(name: str, seconds: float, usd: float, **more: Any) -> dict[str, Any]:
    usage = {"input": 1, "output": 1, "cacheRead": 0, "cacheWrite": 0, "cost": {"total": usd}}
    message = {
        "role": "assistant", "provider": "p", "model": "m", "usage": usage,
        "timestamp": round((BEGIN + seconds) * 1000), **more,
    }
    return {"type": "message", "id": name, "parentId": None, "timestamp": at(seconds + 1), "message": message}


TITLE = {"type": "title", "title": "x", "pad": " " * 100}


# -- files whose content must not stop the exporter


HOSTILE = {
    "lone surrogate in a session id": event(1, 1, session_id="\ud800"),
    "lone surrogate in an event id": event(1, 1, event_id="\ud83d"),
    "lone surrogate in a model": event(1, 1, model="\ud83d/\ud83d"),
    "lone surrogate in a rate-limit window": event(1, 1, rate_limits={"\ud83d": {"used_percentage": 1}}),
    "a percentage that no float holds": event(1, 1, rate_limits={"w": {"used_percentage": 10**400}}),
    "a NUL in a session id": event(1, 1, session_id="a\0b"),
    "a line separator in a session id": event(1, 1, session_id="a\u2028b"),
    "an empty event id": event(1, 1, event_id=""),
    "the first year, ahead of UTC": event(1, 1, timestamp="0001-01-01T00:00:00+14:00"),
    "the last year, behind UTC": event(1, 1, timestamp="9999-12-31T23:59:59.999-12:00"),
    "a very long session id": event(1, 1, session_id="x" * 100_000),
    "a deep rate limit": event(1, 1, rate_limits={"w": json.loads("[" * 200 + "]" * 200)}),
    "a model that is a list": event(1, 1, model=["p/m"]),
}


@pytest.mark.parametrize("source", ["pi-coding", "opencode", "claude", "codex"])
@pytest.mark.parametrize("what", HOSTILE)
def test_no_line_of_a_usage_log_stops_the_exporter(what: str, source: str, world: World) -> None:
    """A crash here would repeat at every restart. The line before and the line after count."""
    world.write(source, event(0, 1, session_id="before"))
    world.write(source, HOSTILE[what])
    world.write(source, event(2, 3, session_id="after"))
    world.step()
    scrape(world.pipeline)
    world.restart()
    scrape(world.pipeline)
    assert world.counted() >= 3


ODD = {
    "before the first year": entry("e", 1, 1, timestamp=None) | {"timestamp": "0001-01-01T00:00:00+14:00"},
    "after the last year": entry("e", 1, 1, timestamp=None) | {"timestamp": "9999-12-31T23:59:59-12:00"},
    "the last millisecond there is": entry("e", 1, 1, timestamp=253_402_300_799_999.9),
    "the first millisecond there is": entry("e", 1, 1, timestamp=0.5),
    "lone surrogate in an id": entry("\ud800", 1, 1),
    "lone surrogates in labels": entry("e", 1, 1, provider="\ud800", model="\ud800"),
    "a model that is an object": entry("e", 1, 1, model={}),
    "lone surrogate in a session": header("\ud800", 1),
    "lone surrogate in a parent": header("S", 1) | {"parentSession": "/x/\ud800.jsonl"},
    "a header before the first year": header("S", 1) | {"timestamp": "0001-01-01T00:00:00+14:00"},
    "lone surrogate in a compaction": {"type": "compaction", "id": "\ud800", "timestamp": at(1)},
    "a compaction before the first year": {"type": "compaction", "id": "c", "timestamp": "0001-01-01T00:00:00+14:00"},
    "numbers that no float holds": entry("e", 1, 1) | {
        "message": {"role": "assistant", "usage": {"cost": {"total": 10**400}}, "timestamp": 10**400}},
}


@pytest.mark.parametrize("what", ODD)
def test_no_line_of_a_session_file_stops_the_exporter(what: str, world: World) -> None:
    """A crash here would repeat at every restart."""
    world.session("odd", ODD[what], entry("f1", 5, 4))
    world.session("good", header(UUID, 0), entry("e1", 2, 2))
    world.step()
    scrape(world.pipeline)
    world.restart()
    scrape(world.pipeline)
    assert world.counted() >= 2


def test_two_objects_on_one_line_come_to_the_same_whatever_else_is_in_the_chunk(world: World) -> None:
    """A writer died before its newline, the next one appended: the neighbours of a line must not decide over it."""
    glued = b"".join(json.dumps(event(n, 1, message_id=f"m{n}")).encode() for n in (1, 2)) + b"\n"
    alone, _ = usage_logs.decode(glued)
    beside_junk, _ = usage_logs.decode(glued + b"junk\n")
    assert len(alone) == len(beside_junk)


def test_an_inode_number_beyond_63_bits_is_stored(tmp_path: Path) -> None:
    """Union and network file systems hash their inode numbers into 64 bits."""
    store = Store(tmp_path / "state.db")
    row = FileRow("usage", "a/b", "/x", Cursor(2**64 - 1, 2**63 + 7, 3, b"digest"))
    store.commit(Batch(Changes(), files=[row]))
    (loaded,) = store.files()
    assert loaded.cursor == row.cursor
    store.close()


# -- moves, copies, rotation, inodes


def test_a_preserved_copy_beside_the_live_log_counts_readings_once(world: World) -> None:
    """While an agent is moved across file systems both are there, with readings that nobody has read yet."""
    world.write("claude", event(1, 1), event(2, 2))
    world.step()
    world.write("claude", event(3, 3), event(4, 5), event(5, 9))
    home = world.usage / "agents" / "a1"
    shutil.copytree(home, world.usage / "preserved" / "name--a1")
    assert world.counted() == 9
    shutil.rmtree(home)
    assert world.counted() == 9


def test_copytruncate_between_two_steps_counts_readings_once(world: World) -> None:
    """The copy and the log are both there, with readings that nobody has read yet; then the log is emptied."""
    world.write("claude", event(1, 1), event(2, 2))
    world.step()
    world.write("claude", event(3, 3), event(4, 5), event(5, 9))
    log = world.log("claude")
    shutil.copy(log, log.with_name("events.jsonl.1"))
    assert world.counted() == 9
    os.truncate(log, 0)
    assert world.counted() == 9
    world.write("claude", event(6, 10))
    assert world.counted() == 10


@pytest.mark.parametrize("source", ["claude", "codex", "opencode", "pi-coding"])
def test_the_same_agent_below_two_roots_counts_once(source: str, tmp_path: Path) -> None:
    """A synchronised copy of a tree, configured as a root of its own, sometimes behind and sometimes ahead."""
    first, second = tmp_path / "one", tmp_path / "two"
    clock = Clock()
    pipeline = Pipeline(settings(tmp_path, "--usage.root", f"x={first}", "--usage.root", f"y={second}"), clock=clock)
    for batch in range(6):
        logs = [root / "agents" / "a" / "events" / source / "usage" / "events.jsonl" for root in (first, second)]
        lines = [event(10 * batch + n, 3 * batch + n + 1) for n in range(3)]
        for log in logs if batch % 2 else reversed(logs):
            append(log, *lines)
            if batch % 3 == 2:
                drain(pipeline)
        drain(pipeline)
    usd = sum(amount for (name, _), amount in exact(pipeline).items() if name == COST) / PICO
    wanted = sum(range(1, 19)) if source in {"opencode", "pi-coding"} else 18
    assert usd == wanted
    pipeline.close()


def test_several_rotations_between_two_steps_lose_nothing(world: World) -> None:
    """Three rotations while nobody looked, the first in the middle of a line whose rest the writer still appends."""
    log = world.log("opencode")
    world.write("opencode", *opencode("s", "m0", 0, 1))
    line = json.dumps(copied("s", "m1", 10, 2)).encode()
    world.step()
    with log.open("ab") as writer:
        writer.write(line[:40])
        writer.flush()
        world.step()
        log.rename(log.with_name("events.jsonl.1"))
        writer.write(line[40:] + b"\n")
    world.write("opencode", *opencode("s", "m2", 20, 4))
    for m, usd in (("m3", 8), ("m4", 16)):
        for number in (2, 1, 0):
            old = log.with_name(f"events.jsonl.{number}") if number else log
            if old.exists():
                old.rename(log.with_name(f"events.jsonl.{number + 1}"))
        world.write("opencode", *opencode("s", m, 10 * usd, usd))
    assert world.counted() == 31


def test_a_file_that_takes_over_the_inode_of_a_deleted_log_has_its_own_source() -> None:
    """The row of a usage log says nothing about a session file that happens to get its inode number."""
    registry = Registry([FileRow("usage", "a/claude", "/m/log", Cursor(1, 7, 100, b"x"), "claude", seen=int(NOW))])
    file = SourceFile("sessions", "s", Path("/s/x.jsonl"), "x.jsonl")
    (row,) = registry.resolve([(file, (1, 7))])
    assert (row.kind, row.source) == ("sessions", "")


def test_an_inode_that_a_row_has_left_is_not_its_own_any_more() -> None:
    """A log replaced by a rename, then a new file with the old number: each keeps its own row."""
    registry = Registry()
    log, new = (SourceFile("usage", "r", Path(f"/{name}"), name) for name in "ab")
    (row,) = registry.resolve([(log, (1, 1))])
    row.cursor = Cursor(1, 1)
    registry.read(row)
    (row,) = registry.resolve([(log, (1, 2))])
    row.cursor = Cursor(1, 2)
    registry.read(row)
    both = registry.resolve([(log, (1, 2)), (new, (1, 1))])
    assert both[0] is row
    assert both[1] is not row


def test_the_row_of_a_vanished_file_expires_once() -> None:
    """Whatever inodes it has had; a row that expires again at every step would be a commit at every step."""
    registry = Registry()
    log = SourceFile("usage", "r", Path("/a"), "a")
    for inode in (1, 2):
        (row,) = registry.resolve([(log, (1, inode))])
        row.cursor, row.seen = Cursor(1, inode), int(NOW)
        registry.read(row)
    assert registry.expire(NOW + FORGET_AFTER + DAY) == [row]
    assert registry.expire(NOW + FORGET_AFTER + DAY) == []


# -- pi and oh-my-pi


@pytest.mark.parametrize("order", ["log first", "session first"])
def test_a_call_that_began_on_a_whole_second_is_one_message_in_both_inputs(order: str, world: World) -> None:
    """One in a thousand does; its time has no milliseconds to tell it by."""
    lines: list[Callable[[], object]] = [
        lambda: world.write("pi-coding", event(5, 2, session_id=f"2026-11-21T01-39-47-559Z_{UUID}",
                                               tokens={"input": 1, "output": 1})),
        lambda: world.session(f"2026-11-21T01-39-47-559Z_{UUID}", header(UUID, 0), entry("e1", 5, 2)),
    ]
    for line in lines if order == "log first" else reversed(lines):
        line()
        world.step()
    assert (world.counted(), world.counted(MESSAGES)) == (2, 1)


@pytest.mark.parametrize("order", ["log first", "session first"])
def test_a_usage_log_of_oh_my_pi_and_its_session_file_are_one_message(order: str, world: World) -> None:
    """A driver writes both kinds of files for omp as it does for pi."""
    name = f"2026-11-21T01-39-47-559Z_{UUID}"
    lines: list[Callable[[], object]] = [
        lambda: world.write("omp", event(5.25, 2, session_id=name, tokens={"input": 1, "output": 1})),
        lambda: world.session(name, TITLE, header(UUID, 0), entry("e1", 5.25, 2)),
    ]
    for line in lines if order == "log first" else reversed(lines):
        line()
        world.step()
    assert (world.counted(), world.counted(MESSAGES)) == (2, 1)


def test_a_title_that_is_read_before_the_header_hides_nothing(world: World) -> None:
    """The file is seen when only its first line is there; the header still says what was copied."""
    world.session("2026-11-21T01-00-00-000Z_P", TITLE, header("P", 0), entry("e1", 1, 1))
    fork = "2026-11-21T01-00-10-000Z_F"
    world.session(fork, TITLE)
    world.step()
    world.session(fork, header("F", 10, "P"), entry("e1", 1, 1), entry("f1", 11, 4))
    assert world.counted() == 5


def test_sub_agents_of_one_name_are_sessions_of_their_own(world: World) -> None:
    """Each session has its SubOne; their calls can begin in the same millisecond."""
    for number, parent in enumerate("PQ"):
        project = f"--p--/2026_{parent}"
        world.session("SubOne", TITLE, project=project)
        world.step()
        world.session("SubOne", header(f"sub{number}", 0, parent), entry(f"e{number}", 1, 1), project=project)
    assert world.counted() == 2


def test_a_message_that_began_before_its_own_sessions_header_counts(world: World) -> None:
    """The clock was set back after the session began: there is no parent that could have held it."""
    world.session("x", header(UUID, 10), entry("e1", 5, 2), entry("e2", 6, 4), entry("e3", 12, 8))
    assert world.counted() == 14


@pytest.mark.xfail(strict=True, reason="known limit: nothing tells where a deleted session had its messages from")
def test_a_fork_of_a_fork_whose_middle_is_gone_counts_nothing_again(world: World) -> None:
    """The session it was forked from was deleted before the exporter came; where that had it from still is there."""
    world.session("2026-11-21T01-00-00-000Z_P", header("P", 0), entry("e1", 1, 1))
    world.session("2026-11-21T01-00-20-000Z_G", header("G", 20, "F"), entry("e1", 1, 1), entry("g1", 21, 8))
    assert world.counted() == 9


def test_a_fork_that_is_read_before_its_parents_counts_once(world: World) -> None:
    """The parents' directory was mounted late."""
    world.session("2026-11-21T01-00-20-000Z_G", header("G", 20, "F"), entry("e1", 1, 1), entry("f1", 11, 4))
    world.step()
    world.session("2026-11-21T01-00-10-000Z_F", header("F", 10, "P"), entry("e1", 1, 1), entry("f1", 11, 4))
    world.step()
    world.session("2026-11-21T01-00-00-000Z_P", header("P", 0), entry("e1", 1, 1))
    assert world.counted() == 5


def test_a_session_in_its_old_and_its_new_dialect_is_one(world: World) -> None:
    """A parent without a title record, written by an older oh-my-pi, and a fork with one."""
    world.session("2026-11-21T01-00-00-000Z_P", header("P", 0), entry("e1", 1, 1))
    world.session("2026-11-21T01-00-10-000Z_F", TITLE, header("F", 10, "P"), entry("e1", 1, 1), entry("f1", 11, 4))
    assert world.counted() == 5


def test_a_subscription_is_one_whichever_input_is_read_first(world: World) -> None:
    """Imputed money must not stand as billed because the session file's line was there first."""
    name = f"2026-11-21T01-39-47-559Z_{UUID}"
    world.session(name, header(UUID, 0), entry("e1", 5.25, 2))
    world.step()
    world.write("pi-coding", event(5.25, 2, session_id=name, tokens={"input": 1, "output": 1},
                                   cost_mode="SUBSCRIPTION"))
    assert (world.counted(cost_mode="api_key"), world.counted(cost_mode="subscription")) == (0, 2)


@pytest.mark.xfail(strict=True, reason="known limit: the start of the call is the whole identity")
def test_two_messages_that_began_in_the_same_millisecond_are_two(world: World) -> None:
    """Two processes append to one session; entry ids tell them apart."""
    world.session("x", header(UUID, 0), entry("e1", 5, 2), entry("e2", 5, 4))
    assert world.counted() == 6


def test_a_message_from_the_future_does_not_hide_those_that_follow(world: World) -> None:
    """A clock that was wrong for a moment: once the session is settled, its floor must not lie ahead."""
    world.write("pi-coding", event(1, 1), event(40 * DAY, 2))
    world.settle()
    world.clock.now += 3600
    world.write("pi-coding", event(8 * 3600, 4))
    assert world.counted() == 7


def test_a_codex_reading_from_the_future_does_not_hide_those_that_follow(world: World) -> None:
    """A clock that was wrong for a moment: later readings are not older for ever."""
    world.write("codex", event(1, tokens=tokens(1)), event(40 * DAY, tokens=tokens(2)))
    world.step()
    world.clock.now += 8 * 3600
    world.write("codex", event(8 * 3600, tokens=tokens(7)))
    assert world.counted("coding_agent_tokens_total") == 7


# -- OpenCode


def test_a_fork_with_a_killed_message_in_it_is_still_a_fork(world: World) -> None:
    """The copy of a message that was killed before it cost anything has zeros, as a live message's first event has."""
    world.write("opencode", *opencode("A", "m1", 1, 1), event(2, 0, session_id="A", message_id="k", tokens=tokens(0)),
                *opencode("A", "m2", 3, 2))
    world.step()
    world.write("opencode", copied("F", "c1", 10, 1),
                event(10, 0, session_id="F", message_id="ck", tokens=tokens(0)), copied("F", "c2", 10, 2))
    world.write("opencode", *opencode("F", "m3", 20, 4))
    assert world.counted() == 7


def test_a_fork_that_begins_with_a_killed_message_is_still_a_fork(world: World) -> None:
    """The first prompt was interrupted, the second one answered; then the session was forked."""
    world.write("opencode", event(1, 0, session_id="A", message_id="k", tokens=tokens(0)),
                *opencode("A", "m1", 3, 2), *opencode("A", "m2", 5, 4))
    world.step()
    world.write("opencode", event(10, 0, session_id="F", message_id="ck", tokens=tokens(0)),
                copied("F", "c1", 10, 2), copied("F", "c2", 10, 4))
    assert world.counted() == 6


def test_a_fork_of_a_fork_counts_nothing_again(world: World) -> None:
    """Also across restarts."""
    world.write("opencode", *opencode("A", "m1", 1, 1), *opencode("A", "m2", 3, 2))
    world.step()
    world.restart()
    world.write("opencode", copied("F", "c1", 10, 1), copied("F", "c2", 10, 2), *opencode("F", "m3", 11, 4))
    world.step()
    world.restart()
    world.write("opencode", copied("G", "d1", 20, 1), copied("G", "d2", 20, 2), copied("G", "d3", 20, 4))
    world.write("opencode", *opencode("G", "m4", 21, 8))
    assert world.counted() == 15


def test_a_copy_that_fires_again_after_its_fork_was_settled_is_still_a_copy(world: World) -> None:
    """Somebody comes back to the fork next morning; OpenCode fires an old message once more."""
    world.write("opencode", *opencode("A", "m1", 1, 1))
    world.write("opencode", copied("F", "c1", 10, 1), *opencode("F", "m2", 20, 2))
    world.settle()
    world.write("opencode", copied("F", "c1", 7 * 3600, 1))
    assert world.counted() == 3


def test_a_message_that_fires_again_after_its_session_was_settled_is_the_same(world: World) -> None:
    """Somebody comes back to the session next morning; OpenCode fires an old message once more."""
    world.write("opencode", *opencode("A", "m1", 1, 1), *opencode("A", "m2", 5, 2))
    world.settle()
    world.write("opencode", copied("A", "m1", 7 * 3600, 1), copied("A", "m2", 7 * 3600 + 1, 2))
    assert world.counted() == 3


def test_a_message_that_was_running_when_the_machine_went_to_sleep_is_one(world: World) -> None:
    """Its zeros came before seven hours of sleep, its figures after."""
    live = opencode("A", "m1", 1, 1)
    world.write("opencode", live[0])
    world.settle()
    for n in (0, 1):
        world.write("opencode", copied("A", "m1", 7 * 3600 + n, 1))
    assert (world.counted(), world.counted(MESSAGES)) == (1, 1)


def test_a_fork_in_another_agents_log_counts_nothing_again(world: World) -> None:
    """Two agents of one user share OpenCode's storage; the second forks a session of the first."""
    world.write("opencode", *opencode("A", "m1", 1, 1), *opencode("A", "m2", 3, 2), agent="a1")
    world.step()
    world.write("opencode", copied("F", "c1", 10, 1), copied("F", "c2", 10, 2), agent="a2")
    assert world.counted() == 3


def test_a_fork_is_known_after_the_agents_label_was_switched_on(world: World) -> None:
    """The labels of the original changed, its figures did not."""
    world.write("opencode", *opencode("A", "m1", 1, 1), *opencode("A", "m2", 3, 2))
    world.step()
    world.restart("--usage.agent-label")
    world.write("opencode", copied("F", "c1", 10, 1), copied("F", "c2", 10, 2))
    assert world.counted() == 3


def test_a_hint_counts_the_same_in_one_batch_and_in_several(tmp_path: Path) -> None:
    """Message a fires again after b told that the session is a subscription."""
    lines = [
        event(1, 1, message_id="a"), event(2, 2, message_id="b", rate_limits={"w": {"used_percentage": 1}}),
        event(3, 1, message_id="a"),
    ]
    found = []
    for name, batches in (("one", [lines]), ("three", [[line] for line in lines])):
        world = World(tmp_path / name)
        for batch in batches:
            world.write("opencode", *batch)
            world.step()
        found.append((world.counted(cost_mode="api_key"), world.counted(cost_mode="subscription")))
        world.pipeline.close()
    assert found[0] == found[1]


# -- Claude Code


def test_a_restored_total_above_the_last_reading_is_not_spent_again(world: World) -> None:
    """Session 1 ends at 5, session 2 is killed at 2, session 1 is resumed and shows its 5 again."""
    world.write("claude", event(1, 3), event(2, 5), event(10, 0, session_id="s2"), event(11, 2, session_id="s2"))
    world.write("claude", event(20, 5), event(21, 6))
    assert world.counted() == 8


def test_a_replayed_log_without_event_ids_adds_nothing(world: World) -> None:
    """A harness nobody knows writes several readings a second and numbers nothing; its log is restored."""
    lines = [event(n // 4, n + 1) for n in range(8)]
    for line in lines:
        del line["event_id"]
    world.write("unheard-of", *lines)
    world.step()
    log = world.log("unheard-of")
    content = log.read_bytes()
    os.truncate(log, 0)
    world.step()
    log.write_bytes(content)
    assert world.counted() == 8


def test_a_clock_that_goes_back_loses_no_reading(world: World) -> None:
    """The log's order counts, and its rotation at that moment changes nothing."""
    world.write("claude", event(100, 1), event(101, 2))
    world.step()
    log = world.log("claude")
    log.rename(log.with_name("events.jsonl.1"))
    world.write("claude", event(50, 3), event(51, 4), event(102, 7))
    assert world.counted() == 7


def test_agents_whose_names_contain_the_sessions_of_others_are_kept_apart(world: World) -> None:
    """An account's key must not depend on what a directory is called."""
    world.write("claude", event(1, 1, session_id="x"), agent="a")
    world.write("claude", event(1, 2, session_id="y"), agent="a:x")
    assert world.counted() == 3


# -- Codex


def test_codex_readings_that_are_lower_in_one_kind_price_what_changed(world: World) -> None:
    """A correction moves tokens from input to cache: what was priced as input is taken back."""
    def reading(seconds: float, new: int, cached: int) -> dict[str, Any]:
        counts = {"input": new, "output": 0, "cache_read": cached, "cache_creation": 0}
        return event(seconds, tokens=counts, model="anthropic/claude-sonnet-4-5")
    world.write("codex", reading(1, 100_000, 0))
    world.step()
    world.write("codex", reading(2, 0, 100_000))
    world.write("codex", reading(3, 0, 100_000) | {"session_id": "fresh"}, agent="b")
    world.step()
    assert world.counted(provenance="estimated") == pytest.approx(2 * 0.03)


def test_codex_replays_in_the_last_second_move_nothing_between_models(world: World) -> None:
    """A log that is read again leaves each model what it had."""
    world.write("codex", event(1, tokens=tokens(100), model="p/x"), event(1.5, tokens=tokens(150), model="p/y"))
    world.step()
    log = world.log("codex")
    content = log.read_bytes()
    os.truncate(log, 0)
    world.step()
    log.write_bytes(content)
    assert world.counted("coding_agent_tokens_total", model="x") == 100


# -- baseline


def spent(before: Samples, after: Samples) -> float:
    return total(after, COST) - total(before, COST)


def test_old_spend_below_a_root_that_appears_late_is_baseline(world: World) -> None:
    """The home directory was mounted a minute after the exporter's first start."""
    first = scrape(world.pipeline)
    world.clock.now += 60
    old = event(1, 100, message_id="m") | {"timestamp": "2020-01-01T00:00:00.000Z"}
    world.write("opencode", old, event(3700, 1, message_id="new"))
    shown = [scrape(world.pipeline) for _ in range(3)]
    assert total(first, COST) == 0
    assert spent(shown[0], shown[-1]) == 1


def test_old_spend_below_a_root_that_was_added_later_is_baseline(world: World, tmp_path: Path) -> None:
    """The second start has one more directory configured, with a year of sessions in it."""
    scrape(world.pipeline)
    old = tmp_path / "more" / "agents" / "z" / "events" / "opencode" / "usage" / "events.jsonl"
    append(old, event(1, 100, message_id="m") | {"timestamp": "2020-01-01T00:00:00.000Z"})
    world.restart("--usage.root", f"more={tmp_path / 'more'}")
    shown = [scrape(world.pipeline) for _ in range(3)]
    assert spent(shown[0], shown[-1]) == 0


def test_a_first_pass_that_is_killed_leaves_the_baseline_what_it_was(tmp_path: Path) -> None:
    """Half of the old logs were read, then the exporter died; old stays old, new stays new."""
    world = World(tmp_path)
    world.write("opencode", *(
        event(n, 1, message_id=f"m{n}", pad="x" * 100_000) | {"timestamp": "2020-01-01T00:00:00.000Z"}
        for n in range(100)
    ))
    assert world.pipeline.step()
    world.restart()
    world.clock.now += 3600
    world.write("opencode", event(7000, 5, message_id="new"))
    shown = [scrape(world.pipeline) for _ in range(3)]
    assert (total(shown[0], COST), total(shown[-1], COST)) == (100, 105)
    world.pipeline.close()


# -- commits


class Failing:
    """A disk that is full for the next `times` commits."""

    def __init__(self, store: Store, times: int) -> None:
        self._commit, self.left = store.commit, times
        store.commit = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch) -> None:
        if self.left:
            self.left -= 1
            raise StoreError("full")
        self._commit(batch)


@pytest.mark.parametrize("then", ["success", "crash"])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_commits_that_fail_lose_nothing_and_repeat_nothing(times: int, then: str, world: World) -> None:
    """At every step of a log's life, scraped meanwhile; nothing is shown that was not committed."""
    highest = 0.0
    for n in range(8):
        world.write("opencode", *opencode("s", f"m{n}", 10 * n, 1))
        world.write("claude", event(10 * n, n + 1))
        failing = Failing(world.pipeline._store, times)
        for _ in range(times):
            now = total(scrape(world.pipeline), COST)
            assert now >= highest
            highest = now
        if then == "crash":
            world.restart()
        else:
            while failing.left:
                world.pipeline.step()
        now = total(scrape(world.pipeline), COST)
        assert now >= highest
        highest = now
    scrape(world.pipeline)
    assert total(scrape(world.pipeline), COST) == 16
    assert world.counted() == 16


def test_a_step_that_broke_off_is_never_finished_in_memory(world: World) -> None:
    """Whatever raised, the next process goes on from what was committed."""
    world.write("opencode", *opencode("s", "m", 1, 1))
    world.step()
    world.write("opencode", *opencode("s", "n", 2, 2))

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    world.pipeline._ledger.flush = out_of_memory  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryError):
        world.pipeline.step()
    with pytest.raises(RuntimeError, match="restarted"):
        world.pipeline.step()
    world.restart()
    assert world.counted() == 3


# -- two scrapers


KEY: CounterKey = (COST, ("r", "s", "p", "m", "api_key", "reported"))


def test_callbacks_that_come_late_and_out_of_order_open_nothing_early() -> None:
    """Two scrapes are on their way when a series turns up; only the one that showed its zero counts."""
    counters = Counters()
    counters.pin(0)
    empty = counters.waiting()
    counters.add({KEY: Delta(5)})
    counters.scraped(empty, 1)
    counters.pin(2)
    assert dict(counters.values())[KEY] == 0
    shown = counters.waiting()
    counters.pin(3)
    assert dict(counters.values())[KEY] == 0
    counters.scraped(shown, 4)
    counters.scraped(shown, 5)
    counters.pin(6)
    assert dict(counters.values())[KEY] == 5
    counters.scraped(shown, 7)
    counters.pin(8)
    assert dict(counters.values())[KEY] == 5


def test_what_was_corrected_before_anybody_saw_it_leaves_nothing_behind() -> None:
    """The series was shown at its zero only; then its money turned out to belong to another one."""
    counters = Counters()
    counters.add({KEY: Delta(5)})
    counters.pin(0)
    assert dict(counters.values())[KEY] == 0
    counters.scraped(counters.waiting(), 0)
    counters.add({KEY: Delta(-5)})
    counters.pin(1)
    assert dict(counters.values())[KEY] == 0
    counters.add({KEY: Delta(1)})
    counters.pin(2)
    assert dict(counters.values())[KEY] == 1


def test_what_a_first_pass_corrects_leaves_nothing_behind(tmp_path: Path) -> None:
    """A scrape came in the middle of the backlog; rate limits further on made the process a subscription."""
    world = World(tmp_path)
    pad = {"pad": "x" * 100_000}
    world.write("claude", *(event(n, 1, **pad) for n in range(100)))
    world.write("claude", event(100, 2, rate_limits={"w": {"used_percentage": 1}}))
    assert world.pipeline.step(scrape=True)
    for _ in range(3):
        samples = scrape(world.pipeline)
    assert total(samples, COST, cost_mode="api_key") == 0
    assert total(samples, COST, cost_mode="subscription") == 2
    world.pipeline.close()


def test_a_hold_ends_though_the_clock_was_set_back() -> None:
    """By a day, right after the first scrape: the series must not stand at zero for a day."""
    counters = Counters(hold=60)
    counters.add({KEY: Delta(5)})
    counters.pin(1_000_000)
    counters.scraped(counters.waiting(), 1_000_000)
    for second in range(0, 200, 20):
        counters.pin(1_000_000 - DAY + second)
    assert dict(counters.values())[KEY] == 5


def test_final_values_are_seen_before_the_end(world: World) -> None:
    """Linger ends only after a delivered scrape has shown the value of a series that was new."""
    world.write("opencode", *opencode("s", "m", 1, 1))
    world.pipeline.stop()
    finals = []
    for _ in range(3):
        snapshot, delivered = world.pipeline.scrape()
        value = sum(amount for (name, _), amount in snapshot.counters if name == COST)
        before = world.pipeline.final()
        delivered()
        world.pipeline.step()
        finals.append((value, before, world.pipeline.final()))
    assert finals == [(0, False, False), (PICO, False, True), (PICO, True, True)]


# -- labels


def test_a_lower_cap_keeps_the_series_that_exist(world: World) -> None:
    """Known models go on under their names, new ones are `other`; nothing is lost."""
    for n in range(10):
        world.write("opencode", *opencode("s", f"m{n}", n, 1), )
        world.write("claude", event(n, n + 1, model=f"p/m{n}"))
    world.step()
    before = exact(world.pipeline)
    world.restart("--counters.max-series=3")
    world.write("claude", event(100, 11, model="p/m4"), event(101, 12, model="p/new"))
    assert world.counted() == 22
    assert world.counted(model="other") == 1
    assert all(exact(world.pipeline)[key] >= amount for key, amount in before.items())


def test_providers_of_a_model_called_other_are_capped_too(tmp_path: Path) -> None:
    """The name alone must not let a log make series without end."""
    world = World(tmp_path, "--counters.max-series=5")
    world.write("opencode", *(event(n, 1, message_id=f"m{n}", model=f"p{n}/other") for n in range(100)))
    assert world.counted() == 100
    assert len(world.pipeline._ledger.book.keys) <= 7
    world.pipeline.close()


def test_switching_the_agents_label_moves_nothing(world: World) -> None:
    """A message that fires again stays where it was counted: its old series cannot go down."""
    world.write("opencode", *opencode("s", "m", 1, 1))
    scrape(world.pipeline)
    scrape(world.pipeline)
    world.restart("--usage.agent-label")
    world.write("opencode", copied("s", "m", 5, 1))
    scrape(world.pipeline)
    assert total(scrape(world.pipeline), COST) == 1


# -- everything at once


def mishap(world: World, chance: random.Random, *, quiet: bool = True) -> None:
    """Steps, crashes, full disks, quiet hours; half of the time what was written last stays unread."""
    match chance.randrange(14):
        case 0:
            world.restart()
        case 1:
            world.pipeline.step()
            world.restart()
        case 2:
            Failing(world.pipeline._store, chance.randrange(1, 3))
            world.pipeline.step()
        case 3 if quiet:
            world.settle()
        case 4 | 5 | 6 | 7:
            scrape(world.pipeline)
        case _:
            pass


@pytest.mark.parametrize("seed", range(10))
def test_pi_sessions_their_forks_and_their_logs_come_to_each_message_once(seed: int, tmp_path: Path) -> None:
    """Every message in a session file, in an agent's log or in both, either one first; forks of forks copy them."""
    chance, world, seconds = random.Random(seed), World(tmp_path), 0.0
    sessions: list[tuple[str, str, list[dict[str, Any]], bool]] = []  # uuid, name, entries, whether in a file
    spent = []
    for number in range(60):
        seconds += chance.randrange(1, 20)
        files = [session for session in sessions if session[3] and session[2]]
        if not sessions or chance.random() < 0.15:
            uuid = f"{UUID[:-2]}{number:02d}"
            parent = chance.choice(files) if files and chance.random() < 0.7 else ("", "", [], True)
            inherited = parent[2][: chance.randrange(len(parent[2]) + 1)]
            name = f"2026-11-21T{number:02d}-00-00-000Z_{uuid}"
            in_file = bool(parent[0]) or chance.random() < 0.7
            if in_file:
                world.session(name, header(uuid, seconds, parent[0]), *inherited)
            sessions.append((uuid, name, [*inherited], in_file))
            continue
        _, name, entries, in_file = chance.choice(sessions)
        began, usd = seconds + chance.randrange(1, 1000) / 1000, chance.randrange(1, 1000)
        line = entry(f"x{number}", began, usd / 1000)
        logged = event(began, usd / 1000, session_id=name, event_id=f"evt-pi-usage-{chance.randrange(3)}",
                       tokens={"input": 1, "output": 1})
        entries.append(line)
        spent.append(usd)
        if in_file and (log_first := chance.random() < 0.5):
            world.session(name, line)
            mishap(world, chance)
        if not in_file or chance.random() < 0.7:
            world.write("pi-coding", logged, agent=chance.choice(["a1", "a2"]))
            mishap(world, chance)
        if in_file and not log_first:
            world.session(name, line)
        mishap(world, chance)
    world.restart()
    assert world.counted() == pytest.approx(sum(spent) / 1000, abs=1e-9)
    assert world.counted(MESSAGES) == len(spent)
    world.pipeline.close()


@pytest.mark.parametrize("seed", range(10))
def test_opencode_sessions_and_their_forks_come_to_each_message_once(seed: int, tmp_path: Path) -> None:
    """Live, killed and fired-again messages among forks of forks, while the log is rotated and the exporter killed."""
    chance, world, seconds = random.Random(seed), World(tmp_path), 0.0
    sessions: list[list[tuple[str, float]]] = []
    spent = []
    for number in range(60):
        seconds += chance.randrange(1, 20)
        index = chance.randrange(max(1, len(sessions)))
        if not sessions or chance.random() < 0.2:
            parent = chance.choice(sessions) if sessions else []
            copies = parent[: chance.randrange(len(parent) + 1)]
            sessions.append([(f"c{number}-{place}", usd) for place, (_, usd) in enumerate(copies)])
            world.write("opencode", *(copied(f"S{len(sessions)}", name, seconds, usd) for name, usd in sessions[-1]))
        elif sessions[index] and chance.random() < 0.2:
            name, usd = chance.choice(sessions[index])
            world.write("opencode", copied(f"S{index + 1}", name, seconds, usd))
        else:
            usd = chance.choice([0, chance.randrange(1, 1000) / 1000])
            for line in opencode(f"S{index + 1}", f"m{number}", seconds, usd)[: None if usd else 1]:
                world.write("opencode", line)
                mishap(world, chance, quiet=False)
            sessions[index].append((f"m{number}", usd))
            spent.append(usd)
        if chance.random() < 0.2:
            rotate(world.log("opencode"))
        mishap(world, chance)
    world.restart()
    assert world.counted() == pytest.approx(sum(spent), abs=1e-9)
    world.pipeline.close()


def rotate(log: Path) -> None:
    """Numbers grow, as with logrotate."""
    for number in range(9, -1, -1):
        old = log.with_name(f"events.jsonl.{number}") if number else log
        if old.exists():
            old.rename(log.with_name(f"events.jsonl.{number + 1}"))


@pytest.mark.parametrize("seed", range(10))
def test_readings_of_claude_come_to_what_each_process_spent(seed: int, tmp_path: Path) -> None:
    """Several readings a second, while the log is copied, truncated, rotated and restored, and the exporter killed."""
    chance, world = random.Random(seed), World(tmp_path)
    log, second, reading, spent = world.log("claude"), 0, 0.0, 0.0
    for number in range(80):
        second += chance.choice([0, 0, 1, 30])
        if number and chance.random() < 0.1:
            reading = 0.0
        else:
            rise = chance.randrange(1, 10**6) / 10**6
            reading, spent = round(reading + rise, 6), spent + rise
        world.write("claude", event(second, reading, event_id=f"e{number}", session_id=f"s{number // 7}"))
        match chance.randrange(12):
            case 0:
                rotate(log)
            case 1:
                shutil.copy2(log, log.with_name(f"events.jsonl.{1000 + number}"))
                mishap(world, chance)
                os.truncate(log, 0)
                world.step()  # what is appended before anybody looks is told from the old content by its bytes
            case 2:
                kept = world.usage / "preserved" / "x--a1"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(world.usage / "agents" / "a1", kept)
            case 3:
                world.step()
                content = log.read_bytes() if log.exists() else b""
                os.truncate(log, 0)
                world.step()
                log.write_bytes(content)
            case _:
                pass
        if not log.exists():
            log.touch()
        mishap(world, chance)
    world.restart()
    assert world.counted() == pytest.approx(spent, abs=1e-9)
    world.pipeline.close()


# -- inode numbers that are used again


def rewrite(file: Path, content: bytes) -> None:
    """Other bytes on the same inode, as many as before."""
    assert len(content) == file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(content)


def line(seconds: float, usd: int) -> bytes:
    return json.dumps(event(seconds, usd, event_id=f"e{usd}")).encode() + b"\n"


def test_a_new_file_of_the_old_ones_size_and_inode_is_read(world: World) -> None:
    """An agent is deleted, another one begins: its first line is as long as the other's, on the same inode number."""
    log = world.log("pi-coding", "a1")
    log.write_bytes(line(1, 1))
    assert world.counted() == 1
    world.restart()
    new = log.rename(world.log("pi-coding", "a2"))
    rewrite(new, line(2, 2))
    assert world.counted() == 3


def test_a_row_that_moves_to_another_path_is_proved_by_its_bytes() -> None:
    """On file systems that do not reuse numbers at once, the rule itself: no time of change matches."""
    registry = Registry()
    one, two = (SourceFile("usage", "r", Path(f"/{name}"), name) for name in "ab")
    (row,) = registry.resolve([(one, (1, 1))])
    row.cursor = Cursor(1, 1, 100, b"digest", changed=5)
    registry.read(row)
    assert registry.resolve([(two, (1, 1))]) == [row]
    assert row.cursor.changed == -1


def test_a_file_that_was_replaced_while_the_exporter_was_down_is_read(world: World) -> None:
    """Rewritten in place to the very size it had: only the time of its change tells."""
    log = world.log("pi-coding")
    log.write_bytes(line(1, 1))
    assert world.counted() == 1
    world.kill()
    rewrite(log, line(2, 2))
    world.pipeline = Pipeline(settings(world.home, *world.flags), clock=world.clock)
    assert world.counted() == 3
