"""Damaged files through the whole program: good lines beside bad ones count exactly, however the reads fall."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from coding_agent_exporter import families
from coding_agent_exporter.decode import usage
from coding_agent_exporter.expose import render
from coding_agent_exporter.landing import render as render_page
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.webapp import page
from fuzz_support import (
    Mutator,
    good_entry,
    good_event,
    heartbeat_corpus,
    lines_in,
    session_corpus,
    usage_corpus,
    watchdog,
)
from process_support import Exporter
from support import CAPTURES, Clock, Samples, drain, exact, parse, scrape, settings, total

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.model import CounterKey

SEED = 20261130
READ, ACCEPTED = "coding_agent_exporter_read_lines_total", "coding_agent_exporter_accepted_lines_total"
REJECTED = "coding_agent_exporter_rejected_total"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OF_LINES = ("not_json", "not_object", "other_type", "no_session", "bad_timestamp", "bad_usage", "oversized")
"""Reasons for which a line is no event, and in which it is rejected whole."""

SOURCES = ("opencode", "pi-coding", "codex", "claude", "made-up")
MESSAGES = ("opencode", "pi-coding")
"""Sources whose lines stand for themselves; elsewhere a damaged line can be a legal reading of the same total."""


class Page(HTMLParser):
    """Notes the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


class World:
    """Files with good lines among damaged ones; `good` are the numbers of the good ones."""

    def __init__(self, seed: int, lines: int) -> None:
        self.chance = random.Random(seed)
        logs, sessions = Mutator(usage_corpus(), seed), Mutator(session_corpus(), seed)
        self.files: dict[str, bytes] = {}
        self.good: list[int] = []
        for source in SOURCES:
            damaged = [logs.line() for _ in range(lines // 7)]
            good = self._numbers(lines // 50 if source in MESSAGES else 0)
            self._add(f"mngr/agents/a/events/{source}/usage/events.jsonl", [*damaged, *map(good_event, good)])
        for number in range(2):
            damaged = [sessions.line() for _ in range(lines // 7)]
            good = self._numbers(lines // 50)
            name = f"2026-12-0{number + 1}T00-00-00-000Z_0000000{number}-0000-4000-8000-000000000000"
            header = json.dumps({"type": "session", "id": name[25:], "timestamp": "2026-12-01T00:00:00Z"}).encode()
            self._add(f"sessions/--p--/{name}.jsonl", [*damaged, *map(good_entry, good)], header)

    def _numbers(self, count: int) -> list[int]:
        numbers = [*range(len(self.good) + 1, len(self.good) + 1 + count)]
        self.good += numbers
        return numbers

    def _add(self, path: str, lines: list[bytes], *first: bytes) -> None:
        self.chance.shuffle(lines)
        self.files[path] = b"\n".join([*first, *lines]) + b"\n"

    def write(self, home: Path) -> None:
        for name, data in self.files.items():
            append(home / name, data)

    def slices(self, home: Path) -> list[tuple[Path, bytes]]:
        """The same bytes in pieces, each file's in their order."""
        left = {home / name: pieces(data, self.chance) for name, data in self.files.items()}
        found = []
        while left:
            path = self.chance.choice(sorted(left))
            found.append((path, left[path].pop(0)))
            if not left[path]:
                del left[path]
        return found


def pieces(data: bytes, chance: random.Random) -> list[bytes]:
    """Cut anywhere, and often right between two objects of one line: there the first is whole for a while."""
    found = []
    at = 0
    while at < len(data):
        end = at + chance.choice((1, 50, 300, 2_000, 20_000, 200_000))
        glued = data.find(b"}{", at, end)
        if glued >= 0 and chance.random() < 0.7:
            end = glued + 1
        found.append(data[at:end])
        at = end
    return found


def append(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)


def configured(home: Path) -> Settings:
    home.mkdir(exist_ok=True)
    return settings(home, f"--usage.root=u={home / 'mngr'}", f"--sessions.dir=s={home / 'sessions'}",
                    f"--telemetry.dir=t={home / 'instances'}")


def accounted(samples: Samples) -> dict[str, tuple[float, float]]:
    """Lines by kind of input: those read, and those accepted and rejected."""
    return {
        kind: (total(samples, READ, kind=kind), total(samples, ACCEPTED, kind=kind) + sum(
            total(samples, REJECTED, kind=kind, reason=reason) for reason in OF_LINES))
        for kind in ("usage", "sessions")
    }


def check_good(samples: Samples, numbers: list[int]) -> None:
    """Each good line is there once, whatever was beside it."""
    count = len(numbers)
    assert total(samples, "coding_agent_tokens_total", provider="good", token_type="input") == sum(numbers)
    assert total(samples, "coding_agent_messages_total", provider="good") == count
    assert total(samples, "coding_agent_cost_usd_total", provider="good", provenance="reported") == count / 4
    for place, kind in enumerate(("output", "cache_read", "cache_creation"), start=2):
        assert total(samples, "coding_agent_tokens_total", provider="good", token_type=kind) == place * count


def spent(pipeline: Pipeline) -> dict[CounterKey, int]:
    """What is counted of messages. Turns of one session that is in several files come in the order of reading."""
    names = {family.name for family in (
        families.COST, families.TOKENS, families.MESSAGES, families.UNPRICED, families.SESSIONS, families.COMPACTIONS)}
    return {key: amount for key, amount in exact(pipeline).items() if key[0] in names and amount}


def test_damaged_files_come_to_the_same_however_they_are_read(
    amount: Callable[[int, int], int], tmp_path: Path
) -> None:
    """In one go, and in slices with restarts in between: exact totals and the account of lines are the same."""
    rounds, lines = amount(2, 60), amount(1_500, 5_000)
    read = rejected = 0.0
    with watchdog():
        for seed in range(SEED, SEED + rounds):
            world = World(seed, lines)
            home = tmp_path / "whole"
            world.write(home)
            whole = Pipeline(configured(home), clock=Clock())
            drain(whole)
            seen = scrape(whole)
            check_good(seen, world.good)
            account = accounted(seen)
            for kind, (of_all, apart) in account.items():
                assert of_all == apart, (seed, kind)
            taken = sum(of_all for of_all, _ in account.values())
            assert taken >= sum(len(lines_in(data)) for data in world.files.values())
            read += taken
            rejected += sum(total(seen, REJECTED, reason=reason) for reason in OF_LINES)
            snapshot, _ = whole.scrape(0)
            assert parse(render(snapshot)[0].decode())
            body, _ = render(snapshot, OPENMETRICS)
            assert list(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]  # theirs
            assert Page(render_page(page(whole, snapshot))).tags.isdisjoint({"script", "img", "iframe"})

            apart_home = tmp_path / "slices"
            sliced = Pipeline(configured(apart_home), clock=Clock())
            for path, data in world.slices(apart_home):
                append(path, data)
                if world.chance.random() < 0.02:
                    sliced.close()
                    sliced = Pipeline(configured(apart_home), clock=Clock())
                if world.chance.random() < 0.3:
                    sliced.step()
            drain(sliced)
            check_good(scrape(sliced), world.good)
            assert spent(sliced) == spent(whole), seed
            whole.close()
            sliced.close()
            shutil.rmtree(home)
            shutil.rmtree(apart_home)
    print(f"{rounds} worlds of {lines} lines: {read:.0f} lines read, {rejected:.0f} rejected, seeds from {SEED}")


def test_a_damaged_session_comes_to_the_same_turns_however_it_is_read(
    amount: Callable[[int, int], int], tmp_path: Path
) -> None:
    """Every fifth line of a recording is damaged; turns, tools and their times as histograms are the same."""
    recordings = sorted(path for path in CAPTURES.rglob("sessions/**/*.jsonl"))
    mutator = Mutator(session_corpus(), SEED)
    chance = mutator.chance
    turns = 0
    for number in range(amount(6, 600)):
        recording = chance.choice(recordings)
        data = b"".join(
            (mutator.line() if chance.random() < 0.2 else line) + b"\n" for line in lines_in(recording.read_bytes()))
        found: list[dict[CounterKey, int]] = []
        for slices in ([data], pieces(data, chance)):
            home = tmp_path / f"{number}-{len(found)}"
            # So early that no silence can finish a turn: a slice that comes late would be another story.
            pipeline = Pipeline(configured(home), clock=Clock(100.0))
            for piece in slices:
                append(home / "sessions/--p--" / recording.name, piece)
                pipeline.step()
            drain(pipeline)
            found.append(exact(pipeline))
            pipeline.close()
            shutil.rmtree(home)
        assert found[0] == found[1], (SEED, number)
        turns += sum(count for (name, _), count in found[0].items() if name == families.TURNS.name)
    assert turns > 10
    print(f"{number + 1} damaged sessions with {turns} turns left, seed {SEED}")


def test_good_readings_count_beside_lines_that_are_none(amount: Callable[[int, int], int], tmp_path: Path) -> None:
    """Running totals: only what is no event at all may stand beside them, and then they are what they are alone."""
    mutator = Mutator(usage_corpus(), SEED)
    count = amount(60, 2_000)
    for source in ("codex", "claude", "made-up"):
        lines = []
        for reading in range(1, count + 1):
            event = {**json.loads(good_event(1)), "session_id": "s", "event_id": f"e{reading}"}
            event.update(cost={"total_cost_usd": reading / 4}, tokens={"input": reading})
            event["timestamp"] = f"2026-12-01T{reading // 3600:02d}:{reading // 60 % 60:02d}:{reading % 60:02d}Z"
            del event["message_id"]
            lines.append(json.dumps(event).encode())
            lines += [line for line in (mutator.line() for _ in range(10)) if not usage.decode(line)[0]]
        append(tmp_path / f"mngr/agents/a/events/{source}/usage/events.jsonl", b"\n".join(lines) + b"\n")
    pipeline = Pipeline(configured(tmp_path), clock=Clock())
    drain(pipeline)
    seen = scrape(pipeline)
    for source in ("codex", "claude", "made-up"):
        assert total(seen, "coding_agent_cost_usd_total", source=source) == count / 4
    assert total(seen, "coding_agent_tokens_total", source="codex") == count
    pipeline.close()


def test_damaged_instance_files_leave_the_good_ones_alone(amount: Callable[[int, int], int], tmp_path: Path) -> None:
    """Hundreds at a time, changing under the exporter's eyes; each is ok, invalid or unreadable."""
    mutator = Mutator(heartbeat_corpus(), SEED)
    rounds, files = amount(4, 60), 200
    clock = Clock(1_795_225_190.0)
    pipeline = Pipeline(configured(tmp_path), clock=clock)
    directory = tmp_path / "instances"
    directory.mkdir()
    good = json.loads(heartbeat_corpus()[0])
    with watchdog():
        for turn in range(rounds):
            for pid in range(1, files + 1):
                (directory / f"{pid}.json").write_bytes(mutator.document(pid))
            clock.now += 1
            good["process"].update(pid=9999, updatedAt=int(clock.now * 1000))
            good["context"]["percent"] = 10 + turn % 70
            (directory / "9999.json").write_text(json.dumps(good))
            snapshot, delivered = pipeline.scrape()
            delivered()
            body, _ = render(snapshot, OPENMETRICS)
            assert list(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]  # theirs
            seen = scrape(pipeline)
            states = {state: total(seen, "coding_agent_exporter_files", kind="telemetry", state=state)
                      for state in ("ok", "unreadable", "invalid", "ignored")}
            assert sum(states.values()) == files + 1
            assert states["ok"] > 1
            assert total(seen, "coding_agent_context_percent", pid="9999") == 10 + turn % 70
            assert Page(render_page(page(pipeline, snapshot))).tags.isdisjoint({"script", "img", "iframe"})
    pipeline.close()
    print(f"{rounds * files} damaged instance files, the last of them {states}, seed {SEED}")


def test_the_program_accounts_for_every_line(
    amount: Callable[[int, int], int], tmp_path: Path, tool: Callable[[str], str]
) -> None:
    """The real one: lines read are lines accepted and rejected, good lines count, its memory stays in bounds."""
    lines = amount(3_000, 200_000)
    world = World(SEED - 1, lines)
    mutator = Mutator(heartbeat_corpus(), SEED)
    instances = tmp_path / "instances"
    instances.mkdir()
    for pid in range(1, 300):
        (instances / f"{pid}.json").write_bytes(mutator.document(pid))
    flags = [f"--usage.root=u={tmp_path / 'mngr'}", f"--sessions.dir=s={tmp_path / 'sessions'}",
             f"--telemetry.dir=t={instances}"]
    with watchdog(), Exporter(tmp_path, *flags) as exporter:
        slices = world.slices(tmp_path)
        for number, (path, data) in enumerate(slices):
            append(path, data)
            if number % (len(slices) // 10 + 1) == 0:
                exporter.scrape()
        while total(seen := exporter.scrape(), "coding_agent_exporter_lag_bytes"):
            pass
        seen = exporter.scrape()  # series that had to be shown at their first value show theirs now
        check_good(seen, world.good)
        account = accounted(seen)
        for kind, (of_all, apart) in account.items():
            assert of_all == apart, kind
        physical = sum(len(lines_in(data)) for data in world.files.values())
        read = sum(of_all for of_all, _ in account.values())
        assert physical <= read <= physical * 1.3  # glued objects are lines of their own
        reply = exporter.get(headers={"Accept": OPENMETRICS})
        assert list(parse_openmetrics(reply.text))  # type: ignore[no-untyped-call]  # theirs
        assert Page(exporter.get("/").text).tags.isdisjoint({"script", "img", "iframe"})
        assert exporter.get("/-/healthy").status == 200
        checked = subprocess.run([tool("promtool"), "check", "metrics"], input=exporter.get().body, capture_output=True,
                                 check=False)
        assert checked.returncode == 0, checked.stdout.decode() + checked.stderr.decode()
        memory = exporter.peak_memory()
        assert exporter.terminate() == 0
        assert not exporter.logged("level=error")
    print(f"{read:.0f} lines through the program, peak memory {memory >> 20} MB, seed {SEED - 1}")
