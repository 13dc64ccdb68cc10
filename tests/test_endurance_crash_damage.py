"""State files as broken disks, power cuts and people leave them: the right totals, or a refusal that says why."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from coding_agent_exporter import pipeline as pipeline_module
from coding_agent_exporter import schema
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.spanmodel import Span
from coding_agent_exporter.store import Store
from crash_support import Fleet, as_text, copy_state, settled, uninterrupted
from process_support import run
from support import drain, exact, settings

PAGE = 4096
Exact = dict[tuple[str, tuple[str, ...]], int]


@dataclass
class World:
    """A load that is over, what it comes to, and what a kill would have left of the state at many instants of it."""

    fleet: Fleet
    expected: Exact
    spans: dict[str, Span]
    copies: list[Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The exporter was restarted now and then, so that some of the copies have a write-ahead log and some have none."""
    home, chance = tmp_path_factory.mktemp("world"), random.Random(11)
    fleet = Fleet(home, 11)
    copies: list[Path] = []
    for run_number in range(3):
        pipeline = Pipeline(settings(home, *fleet.flags), spans=True)
        pipeline._store._db.execute(f"PRAGMA wal_autocheckpoint = {(60, 1000, 200)[run_number]}")
        for _ in range(8):
            for _ in range(chance.randrange(1, 12)):
                fleet.act()
            pipeline.step(scrape=chance.random() < 0.5)
            copies.append(home / "copies" / str(len(copies)))
            copy_state(home / "state.db", copies[-1])
        pipeline.close()
        copies.append(home / "copies" / str(len(copies)))
        copy_state(home / "state.db", copies[-1])
    fleet.finish()
    expected, _ = uninterrupted(fleet, home / "uninterrupted")
    return World(fleet, expected, fleet.spans(), copies)


def outcome(world: World, home: Path) -> str:
    """Go on from a state: right, or refused, and when. Fails where totals are wrong, or a refusal is unclear."""
    verdict, refusal, opened = "refused", "", ExitStack()

    def open_store(path: Path) -> Store:
        store = Store(path)
        opened.callback(store.close)
        return store

    with opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "Store", open_store)
        try:
            pipeline = Pipeline(settings(home, *world.fleet.flags), spans=True)
            drain(pipeline)
            found = settled(exact(pipeline))
            verdict = "refused, once spans are sent"
            waiting = pipeline._store.spans(10**6)
        except schema.UnusableError as error:
            refusal = str(error)
    if refusal:
        assert f"state file {home / 'state.db'} is damaged" in refusal or "newer version" in refusal
        assert "\n" not in refusal
        return verdict
    assert found == world.expected
    assert all(world.spans.get(span.span, span) == span for _, span in waiting)
    return "right"


def left(home: Path) -> list[bytes]:
    """What a person has to find a way on from."""
    found = [path.read_bytes() for path in (home / "state.db", home / "state.db-wal") if path.exists()]
    return [content for content in found if content]


def flipped(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def page_of(path: Path, chance: random.Random, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content) // PAGE) * PAGE
    content[place:place + PAGE] = value * PAGE
    path.write_bytes(content)


def cut(path: Path, chance: random.Random, unit: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:chance.randrange(len(content) // unit) * unit])


def torn(path: Path, chance: random.Random) -> None:
    """The last part of a file was made longer, and never written."""
    content = path.read_bytes()
    path.write_bytes(content[:chance.randrange(len(content))].ljust(len(content), b"\0"))


def damage(world: World, home: Path, chance: random.Random) -> str:
    """A copy of the state in `home`, with one of the things that can befall it. What it was."""
    source = chance.choice(world.copies)
    shutil.copytree(source, home)
    state, log = home / "state.db", home / "state.db-wal"
    other = chance.choice(world.copies)
    kinds: dict[str, Callable[[], object]] = {
        "a bit flipped": lambda: flipped(state, chance),
        "a page of zeros": lambda: page_of(state, chance, b"\0"),
        "a page of ones": lambda: page_of(state, chance, b"\xff"),
        "cut off at a page": lambda: cut(state, chance, PAGE),
        "cut off anywhere": lambda: cut(state, chance, 1),
        "an older or newer state.db": lambda: shutil.copyfile(other / "state.db", state),
        "a page from another time": lambda: _page_from(other / "state.db", state, chance),
    }
    if log.exists() and log.stat().st_size > 32:
        kinds |= {
            "a bit flipped in the log": lambda: flipped(log, chance),
            "the log cut off": lambda: cut(log, chance, 1),
            "the log torn": lambda: torn(log, chance),
            "no log": log.unlink,
        }
        if (other / "state.db-wal").exists():
            kinds["an older or newer log"] = lambda: shutil.copyfile(other / "state.db-wal", log)
    kind = chance.choice(list(kinds))
    kinds[kind]()
    (home / "state.db-shm").write_bytes(chance.randbytes(32768))  # left by somebody else: made anew
    return kind


def _page_from(other: Path, state: Path, chance: random.Random) -> None:
    """A write that the disk never made, or one that it made too often."""
    content, source = bytearray(state.read_bytes()), other.read_bytes()
    place = chance.randrange(min(len(content), len(source)) // PAGE) * PAGE
    content[place:place + PAGE] = source[place:place + PAGE]
    state.write_bytes(content)


@pytest.mark.parametrize("checked", ["as a whole", "when it is read"])
def test_damage_of_any_kind_is_refused_or_makes_no_difference(
    checked: str, amount: Callable[[int, int], int], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never other totals, never a span with other content, never another exception.

    Both as for small state files and as for large ones, of which not everything is looked at when they are opened.
    """
    seed, found = 12, Counter[str]()
    chance = random.Random(seed)
    if checked == "when it is read":
        monkeypatch.setattr(schema, "CHECKED_BYTES", 0)
    for number in range(amount(40, 1200)):
        home = tmp_path / str(number)
        kind = damage(world, home, chance)
        found[f"{kind}: {outcome(world, home)}"] += 1
        shutil.rmtree(home)
    print(f"seed {seed}, checked {checked}: {as_text(Counter(dict(sorted(found.items()))))}")
    assert any("refused" in what for what in found)
    assert any("right" in what for what in found)


def test_the_program_refuses_with_one_line(
    amount: Callable[[int, int], int], world: World, tmp_path: Path
) -> None:
    """Exit code 1, and no traceback; the state file and its log are left as they were."""
    chance, refused, tried = random.Random(13), 0, 0
    while refused < amount(2, 25):
        tried += 1
        home = tmp_path / str(tried)
        damage(world, home, chance)
        before = left(home)
        shutil.copytree(home, tmp_path / "tried")
        try:
            if outcome(world, tmp_path / "tried") != "refused":
                continue
            code, lines = run(home, *world.fleet.flags)
            if not any("listening" in line for line in lines):
                assert len(lines) == 1
                # A value that was changed is found only when both were taken to be one file.
                assert "was changed" in lines[0] or left(home) == before
            assert code == 1
            assert "cannot go on" in lines[-1]
            assert "is damaged" in lines[-1] or "newer version" in lines[-1]
            assert not any("Traceback" in line for line in lines)
            refused += 1
        finally:
            shutil.rmtree(tmp_path / "tried")
    print(f"{refused} of {tried} refused")
