"""Clocks that are wrong, and logs that are rotated while they are read: every reading counts once all the same."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.model import PICO
from coding_agent_exporter.tail import Tail
from support import Clock, exact
from test_identity import COST, Failing, World, event, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOKENS = "coding_agent_tokens_total"
HOUR = 3600.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world that lives now: the file system stamps what is written with the very time of its clock."""
    made = World(tmp_path, clock=Clock(time.time()))
    made.step()
    yield made
    made.pipeline.close()


def reading(seconds: float, usd: float, **more: Any) -> dict[str, Any]:
    """Of Claude Code, so many seconds from now."""
    return event(seconds, usd, timestamp=_iso(seconds), **more)


def codex(seconds: float, count: int) -> dict[str, Any]:
    return event(seconds, tokens=tokens(count), timestamp=_iso(seconds))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()


# -- rotation


def once(does: Callable[[], None], method: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    """The method, with something that happens at its first call only."""
    left = [does]

    def call(*arguments: Any) -> Any:
        if before and left:
            left.pop()()
        result = method(*arguments)
        if left:
            left.pop()()
        return result

    return call


@pytest.mark.parametrize("when", ["before it is looked at", "before it is read"])
def test_a_log_that_is_rotated_after_it_was_listed_loses_nothing(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the old part is read before the new part, whose readings are later: none is taken for a replay."""
    world = World(tmp_path)
    world.write("claude", event(1, 2))
    world.step()
    world.write("claude", event(5, 5))
    log = world.log("claude")

    def rotate() -> None:
        log.rename(log.with_name("events.jsonl.1"))
        world.write("claude", event(6, 1), event(7, 3))  # the next process

    if when == "before it is looked at":
        monkeypatch.setattr(Discovery, "scan", once(rotate, Discovery.scan, before=False))
    else:
        monkeypatch.setattr(Tail, "read", once(rotate, Tail.read, before=True))
    assert world.counted() == 5 + 3
    world.pipeline.close()


def test_a_file_system_that_makes_up_its_inode_numbers_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one at each look: nothing is ever found as it was listed."""
    world, number, real = World(tmp_path), [10**6], os.fstat
    world.write("pi-coding", event(1, 2), event(2, 3))

    def made_up(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        if status.st_ino not in {path.stat().st_ino for path in tmp_path.rglob("*.jsonl")}:
            return status  # the state file lies elsewhere
        number[0] += 1
        times = {"st_mtime_ns": status.st_mtime_ns, "st_ctime_ns": status.st_ctime_ns}
        return os.stat_result((status.st_mode, number[0], *tuple(status)[2:10]), times)

    monkeypatch.setattr("coding_agent_exporter.tail.os.fstat", made_up)
    assert world.counted() == 5
    world.write("pi-coding", event(3, 4))
    assert world.counted() == 9
    world.pipeline.close()


# -- clocks


@pytest.mark.parametrize("hours", [-30, -3, 3, 30])
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_an_exporter_whose_clock_is_wrong_takes_no_reading_for_a_replay(
    hours: float, restarted: bool, world: World
) -> None:
    """It was right, then it jumped; agents go on by the right time, and their logs are rotated meanwhile."""
    world.write("claude", reading(-30, 1), reading(-20, 2))
    world.write("codex", codex(-30, 10), codex(-20, 20))
    world.step()
    world.clock.now += hours * HOUR
    if restarted:
        world.restart()
    log = world.log("claude")
    log.rename(log.with_name("events.jsonl.1"))
    world.write("claude", reading(-10, 5), reading(-9, 7))
    world.write("codex", codex(-10, 50))
    assert (world.counted(), world.counted(TOKENS)) == (7, 50)


@pytest.mark.parametrize("hours", [-30, -3, 3, 30])
def test_an_exporter_whose_clock_is_wrong_takes_no_replay_for_news(hours: float, world: World) -> None:
    """What was counted while the clock was wrong is written once more, all of it."""
    world.clock.now += hours * HOUR
    world.write("claude", *[reading(second, second + 100) for second in range(-60, 0)])
    world.write("codex", *[codex(second, second + 100) for second in range(-60, 0)])
    world.step()
    for source in ("claude", "codex"):
        log = world.log(source)
        content = log.read_bytes()
        os.truncate(log, 0)
        world.step()
        log.write_bytes(content)
    assert (world.counted(), world.counted(TOKENS)) == (99, 99)


def test_an_agent_whose_clock_was_ahead_for_a_while_is_counted_once(world: World) -> None:
    """Years ahead, put right, its log rotated and then replayed; the exporter's clock and the files' are right."""
    world.write("claude", reading(-60, 1), reading(9e7, 2))
    world.write("codex", codex(-60, 10), codex(9e7, 20))
    world.step()
    world.clock.now += 2 * HOUR
    log = world.log("claude")
    log.rename(log.with_name("events.jsonl.1"))
    later = 2 * HOUR
    world.write("claude", reading(later, 5), reading(later + 1, 7))
    world.write("codex", codex(later, 50))
    assert (world.counted(), world.counted(TOKENS)) == (7, 50)
    content = log.read_bytes()
    os.truncate(log, 0)
    world.step()
    log.write_bytes(content)
    assert world.counted() == 7


def test_a_machine_whose_clock_was_ahead_is_counted_once(world: World) -> None:
    """Agent, exporter and files were a day ahead, then all were put right: no clock vouches for the last reading."""
    world.write("claude", reading(24 * HOUR, 1), reading(24 * HOUR + 1, 2))
    world.write("codex", codex(24 * HOUR, 10), codex(24 * HOUR + 1, 20))
    world.clock.now += 24 * HOUR
    world.step()
    world.clock.now -= 24 * HOUR
    log = world.log("claude")
    log.rename(log.with_name("events.jsonl.1"))
    world.write("claude", reading(24 * HOUR, 1), reading(24 * HOUR + 1, 2), reading(-10, 5), reading(-9, 7))
    world.write("codex", codex(-10, 50))
    assert (world.counted(), world.counted(TOKENS)) == (7, 50)


def test_a_commit_that_fails_within_the_first_backlog_does_not_end_it(tmp_path: Path) -> None:
    """Told of one log afterwards, it still reads the others first: until then nobody knows what is old."""
    world = World(tmp_path)
    for agent in ("a1", "a2"):
        world.write("pi-coding", *(event(second, 1, event_id=f"e{second}") for second in range(3000)), agent=agent)
    world.pipeline._budget = 20_000
    assert world.pipeline.step()
    failing = Failing(world.pipeline._store, 2)
    while failing.left:
        world.pipeline.step()
    told = frozenset({str(world.log("pi-coding", "a1"))})
    while world.pipeline.step(changes=told):
        assert not world.pipeline.caught_up
    assert world.pipeline.caught_up
    assert sum(amount for (name, _), amount in exact(world.pipeline).items() if name == COST) == 6000 * PICO
    world.pipeline.close()
