"""Logs that arrive in slices, while everything happens to them that happens to files: the totals stay the same."""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.pipeline import Pipeline
from support import CAPTURES, Clock, Samples, differences, drain, exact, expected, scrape, settings, total

if TYPE_CHECKING:
    from pathlib import Path


class Tree:
    """A copy of a tree of usage logs that grows slice by slice."""

    def __init__(self, source: Path, target: Path, chance: random.Random) -> None:
        self.root = target
        self._chance = chance
        self._left: dict[tuple[str, str], bytes] = {}
        self._home: dict[str, Path] = {}
        for log in sorted(source.glob("agents/*/events/*/usage/events.jsonl")):
            agent, harness = log.parts[-5], log.parts[-3]
            self._left[agent, harness] = log.read_bytes()
            self._home[agent] = target / "agents" / agent

    def unfinished(self) -> list[tuple[str, str]]:
        return [log for log, left in self._left.items() if left]

    def path(self, log: tuple[str, str]) -> Path:
        return self._home[log[0]] / "events" / log[1] / "usage" / "events.jsonl"

    def append(self, log: tuple[str, str]) -> None:
        left = self._left[log]
        size = self._chance.choice([1, 30, 400, 5000, len(left)])
        path = self.path(log)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(left[:size])
        self._left[log] = left[size:]

    def rotate(self, log: tuple[str, str]) -> None:
        """As logrotate does, between two lines."""
        path = self.path(log)
        if not path.exists() or not path.read_bytes().endswith(b"\n"):
            return
        for number in range(8, 0, -1):
            old = path.with_name(f"events.jsonl.{number}")
            if old.exists():
                old.rename(path.with_name(f"events.jsonl.{number + 1}"))
        path.rename(path.with_name("events.jsonl.1"))

    def preserve(self, log: tuple[str, str]) -> None:
        """As mngr does when an agent is destroyed; across file systems a move is a copy."""
        agent = log[0]
        home, target = self._home[agent], self.root / "preserved" / f"my-agent--{agent}"
        if home == target or not home.exists():
            return
        target.parent.mkdir(exist_ok=True)
        if self._chance.random() < 0.5:
            home.rename(target)
        else:
            shutil.copytree(home, target)
            shutil.rmtree(home)
        self._home[agent] = target

    def rewrite(self, log: tuple[str, str]) -> None:
        """The same bytes again, in a new file: a restored backup."""
        path = self.path(log)
        if path.exists():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)

    def truncate_and_replay(self, log: tuple[str, str], pipeline: Pipeline) -> None:
        """Emptied, noticed, and filled again with what it held."""
        path = self.path(log)
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, 0)
            drain(pipeline)
            path.write_bytes(content[: len(content) // 2])
            drain(pipeline)
            path.write_bytes(content)

    def remove(self, log: tuple[str, str], pipeline: Pipeline) -> None:
        """Gone for good, once everything in it has been read."""
        if not self._left[log]:
            drain(pipeline)
            for path in self.path(log).parent.glob("events.jsonl*"):
                path.unlink()


def kill(pipeline: Pipeline) -> None:
    """What `kill -9` leaves: no last step, nothing flushed, the lock gone with the process."""
    os.close(pipeline._store._lock)
    pipeline._store._db.close()


def never_falls(before: Samples, after: Samples) -> bool:
    return all(
        after.get(key, -1.0) >= value
        for key, value in before.items()
        if key[0].endswith("_total") and not key[0].startswith("coding_agent_exporter")
        and key[0].startswith("coding_agent")
    )


@pytest.mark.parametrize("seed", range(24))
def test_slices_restarts_kills_rotations_and_moves_change_no_total(
    seed: int, adversarial: Path, tmp_path: Path
) -> None:
    """Every tree twice, under other mishaps each time."""
    chance = random.Random(seed)
    source = adversarial / str(seed % 12 + 1)
    tree = Tree(source, tmp_path / "mngr", chance)
    clock = Clock()
    chosen = settings(tmp_path, "--usage.root", f"m={tree.root}")
    pipeline = Pipeline(chosen, clock=clock)
    while unfinished := tree.unfinished():
        log = chance.choice(unfinished)
        tree.append(log)
        clock.now += chance.choice([0.01, 1, 60])
        match chance.randrange(16):
            case 0:
                pipeline.close()
                pipeline = Pipeline(chosen, clock=clock)
            case 1:
                pipeline.step()
                kill(pipeline)
                pipeline = Pipeline(chosen, clock=clock)
            case 2:
                tree.rotate(log)
            case 3:
                tree.preserve(log)
            case 4:
                tree.rewrite(log)
            case 5:
                tree.truncate_and_replay(log, pipeline)
            case 6:
                tree.remove(chance.choice(list(tree._left)), pipeline)
            case _:
                pipeline.step()
    drain(pipeline)
    assert differences(exact(pipeline), expected(source)) == []
    pipeline.close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("capture", "usd"), [("opencode", 0.185294525), ("claude-code", 0.2556029), ("pi", 0.0535543)]
)
def test_what_scrapes_see_never_falls_and_ends_at_the_truth(
    seed: int, capture: str, usd: float, tmp_path: Path
) -> None:
    """Real logs, a scrape after each slice, and the mishaps of above."""
    chance = random.Random(seed)
    tree = Tree(CAPTURES / capture, tmp_path / "mngr", chance)
    clock = Clock()
    chosen = settings(tmp_path, "--usage.root", f"m={tree.root}")
    pipeline = Pipeline(chosen, clock=clock)
    seen: Samples = {}
    while unfinished := tree.unfinished():
        log = chance.choice(unfinished)
        tree.append(log)
        clock.now += 1
        match chance.randrange(12):
            case 0:
                kill(pipeline)
                pipeline = Pipeline(chosen, clock=clock)
            case 1:
                tree.rotate(log)
            case 2:
                tree.preserve(log)
            case 3:
                tree.truncate_and_replay(log, pipeline)
            case _:
                pass
        now = scrape(pipeline)
        assert never_falls(seen, now)
        seen = now
    scrape(pipeline)
    final = scrape(pipeline)
    assert never_falls(seen, final)
    assert total(final, "coding_agent_cost_usd_total") == pytest.approx(usd, abs=1e-9)
    pipeline.close()
