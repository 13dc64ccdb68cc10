"""Takes a home directory, gives endurance tests a made-up fleet to whose files and processes everything happens.

The agents of the demo, so many times as fast. Beside what they do by themselves (forks, compactions, kills, sessions
and processes that come and go), their logs are rotated, their pids are used again at once, and new models appear.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import time
import tracemalloc
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter import config
from coding_agent_exporter.demo.agents import Role
from coding_agent_exporter.demo.cast import CAST, FIRST_PID, PLAYERS, Part
from coding_agent_exporter.demo.simulation import Fleet
from coding_agent_exporter.demo.work import CODEX, GPT, HAIKU, OPUS, SONNET
from coding_agent_exporter.demo.writers import Instance, UsageLog
from coding_agent_exporter.model import PICO
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.store import Store
from support import Clock, Samples, scrape, settings, total

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coding_agent_exporter.demo.writers import Truth, Usage
    from coding_agent_exporter.spanmodel import Span
    from process_support import Exporter

COST, TOKENS = "coding_agent_cost_usd_total", "coding_agent_tokens_total"
GONE = 15.0
"""Seconds after which a killed process has been found to be lost, whatever else happens."""

VISITORS = 40
"""Agents that come once and go soon, each with a model that nobody has used before."""


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes, file descriptors, threads."""

    rss: int
    descriptors: int
    threads: int

    @classmethod
    def by(cls, exporter: Exporter) -> Held:
        proc = Path(f"/proc/{exporter.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        descriptors, threads = (sum(1 for _ in (proc / name).iterdir()) for name in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads)


class Soak:
    """The agents, for so many `seconds` by the real clock. What they do follows from `seed`."""

    def __init__(self, home: Path, *, seed: int, speed: float, seconds: float) -> None:
        self.seconds = seconds
        cast = [
            replace(part, pace=part.pace * speed, enters=part.enters / speed, stays=part.stays / speed,
                    away=part.away / speed)
            for part in CAST
        ]
        cast += [
            Part("pi", f"visitor-{number}", (replace(HAIKU, name=f"claude-haiku-{number}"),), turns=3, pace=4 * speed,
                 enters=seconds * number / VISITORS, stays=0.001, away=10 * seconds)
            for number in range(VISITORS)
        ]
        self.chance = random.Random(seed)
        self.started = time.time()
        self.rotated = self.pids = 0
        self.killed: list[float] = []
        """When, epoch seconds."""
        self.fleet = Fleet(home, seed, start=self.started, cast=cast, host="soak", kinds=PLAYERS)
        self._host = self.fleet._host
        self._instances = home / ".pi" / "agent" / "telemetry" / "instances"
        self._host.tell = self._note
        vars(self._host)["pid"] = self._pid  # in place of the method

    @property
    def truth(self) -> Truth:
        return self.fleet.truth

    def run(self) -> Iterator[float]:
        """Let the time pass; gives how many seconds have, about once in each."""
        began = rotate = looked = time.monotonic()
        while (now := time.monotonic()) < began + self.seconds:
            self.fleet.advance(time.time())
            if now >= rotate:
                self._rotate()
                rotate = now + self.chance.uniform(0.3, 1.5)
            if now >= looked:
                looked += 1
                yield now - began
            time.sleep(0.03)

    def _rotate(self) -> None:
        logs = sorted(file.path for file in self._host.files if isinstance(file, UsageLog) and file.path.exists())
        if logs:
            path = self.chance.choice(logs)
            path.rename(path.with_name(f"{path.name}.{time.time_ns() // 1000}"))
            self.rotated += 1

    def _note(self, at: int, _: str, what: str) -> None:
        if what.startswith("is killed"):
            self.killed.append(at / 1000)

    def _pid(self) -> int:
        """The first one that is free: what a killed process leaves behind is overwritten once it has gone stale."""
        self.pids += 1
        taken = {int(file.path.stem) for file in self._host.files if isinstance(file, Instance) and not file.ended}
        for path in self._instances.glob("*.json"):
            if path.stat().st_mtime > time.time() - GONE:
                taken.add(int(path.stem))
        return next(pid for pid in itertools.count(FIRST_PID) if pid not in taken)


def differences(truth: Truth, shown: Samples) -> list[str]:
    """Where a scrape says something else than what was spent: money to the pico-USD, tokens by type.

    A message of pi that a usage log and a session file know goes by the directory of whichever was seen first.
    """
    spent: Counter[frozenset[tuple[str, str]]] = Counter()
    used: Counter[frozenset[tuple[str, str]]] = Counter()
    for usage, pico in truth.pico().items():
        spent[_labels(usage)] += pico
    for (usage, kind), count in truth.tokens().items():
        used[_labels(usage) | {("token_type", kind)}] += count
    return [
        f"{name} {dict(labels)}: {got} instead of {amount}"
        for name, scale, wanted, provenance in (
            (COST, PICO, spent, {"provenance": "reported"}), (TOKENS, 1, used, {}))
        for labels, amount in wanted.items()
        if (got := round(total(shown, name, **dict(labels), **provenance) * scale)) != amount
    ]


def _labels(usage: Usage) -> frozenset[tuple[str, str]]:
    return frozenset((name, value) for name, value in usage._asdict().items()
                     if not (name == "root" and usage.source == "pi-coding"))


def stored(path: Path) -> int:
    """The reported pico-USD of a state file, as the integers that they are in there."""
    store = Store(path)
    try:
        return sum(series.exact for (name, labels), series in store.counters()
                   if name == COST and labels[-1] == "reported")
    finally:
        store.close()


def rows(path: Path) -> dict[str, int]:
    """How many rows the tables of a state file have."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return {table: db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
                for table in ("files", "accounts", "figures", "counters", "outbox", "labels", "meta")}


def expected_spans(soak: Soak, home: Path, scratch: Path) -> tuple[set[str], set[str], int]:
    """Ids of the spans that all files together make: by what they say; with what only silence finishes; and how many
    of the latter are model calls, without those that had just begun when all ended."""
    scratch.mkdir()
    clock = Clock(soak.started)
    flags = (f"--telemetry.dir={home / '.pi/agent/telemetry/instances'}", f"--usage.root=mngr={home / '.mngr'}",
             f"--sessions.dir=pi={home / '.pi/agent/sessions'}", f"--sessions.dir=omp={home / '.omp/agent/sessions'}")
    pipeline = Pipeline(settings(scratch, *flags), clock=clock, spans=True)
    clock.now = time.time()
    while pipeline.step():
        pass
    said = {span.span for _, span in pipeline._store.spans(10**9)}
    while clock.now < time.time() + 86_400:
        clock.now += 600
        pipeline.step()
    spans = [span for _, span in pipeline._store.spans(10**9)]
    pipeline.close()
    calls = sum(span.kind == "client" and not just_begun(span) for span in spans)
    return said, {span.span for span in spans}, calls


def just_begun(span: Span) -> bool:
    """OpenCode writes a call with zeros when it begins, and nobody has spent anything yet."""
    used = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
    opencode = str(span.attributes["gen_ai.conversation.id"]).startswith("ses_")
    return opencode and not any(span.attributes.get(name) for name in used)


WEEK = 7 * 86_400
MONDAY = 1_767_571_200.0
"""Midnight, UTC."""
TEAM = (
    Role("pi", "plain", (SONNET,), turns=2, think=12, crash=1),
    Role("pi", "logged", (HAIKU, OPUS), turns=2, think=15, logged=True, fork=2),
    Role("omp", "omp", (SONNET,), turns=2, think=15),
    Role("opencode", "opencode", (GPT,), turns=2, think=15, fork=1),
    Role("claude", "claude", (OPUS,), turns=2, think=15, subscription=True),
    Role("codex", "codex", (CODEX,), turns=2, think=15),
)
KEPT = 2 * 86_400
"""Somebody tidies up: session files and heartbeats of the dead lie about for so many seconds."""


class Weeks:
    """A team in its hours, with an exporter beside it that is looked at every hour and scraped every six."""

    def __init__(self, home: Path, *, seed: int, cache: int) -> None:
        self.home, self.clock = home, Clock(MONDAY)
        self.fleet = Fleet(home, seed, start=MONDAY, cast=TEAM)
        self.pipeline = Pipeline(
            config.load(["--state.path", str(home / "state.db")], {}, home=home, cwd=home), clock=self.clock)
        # What rests in memory for speed has a size of its own, which such a team needs months to fill.
        self.pipeline._ledger._cache_messages = cache
        self._hours = 0

    @property
    def truth(self) -> Truth:
        return self.fleet.truth

    def week(self) -> None:
        for _ in range(7 * 24):
            self._hours += 1
            now = MONDAY + 3600 * self._hours
            self.fleet.advance(now, self._look)
            self.clock.now = now
            if self._hours % 6:
                self.pipeline.step()
            else:
                scrape(self.pipeline)
            if self._hours % 24 == 0:
                self._tidy(now)

    def held(self) -> dict[str, int]:
        """What is remembered in memory, in numbers of things; logs and instance files that are there are not."""
        inputs, instances, ledger = self.pipeline.inputs, self.pipeline._instances, self.pipeline._ledger
        return {
            "sessions": len(inputs._sessions), "rows": sum(1 for _ in inputs._registry._rows()),
            "inodes": len(inputs._registry._inodes),
            "places": sum(len(tree._units) for tree in inputs._discovery._trees),
            "messages": ledger._cached, "turns": len(self.pipeline._runs._open),
            "instances": len(instances._files) + len(instances._memory), "series": len(self.pipeline._counters),
            "marks": len(self.pipeline._runs.exemplars), "warned": len(inputs._warned),
        }

    def _look(self, at: float) -> None:
        self.clock.now = at
        self.pipeline.step()

    def _tidy(self, now: float) -> None:
        for pattern in (".pi/agent/**/*.json*", ".omp/agent/**/*.jsonl"):
            for path in self.home.glob(pattern):
                if path.stat().st_mtime < now - KEPT:
                    path.unlink()


def by_kind(path: Path) -> dict[str, tuple[int, int]]:
    """Kind of account -> how many a state file has, and their bytes."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        found = db.execute(
            "SELECT substr(key, 1, instr(key, char(10)) - 1), COUNT(*), SUM(length(key) + length(value)) "
            "FROM accounts GROUP BY 1")
        return {kind: (count, size) for kind, count, size in found}


def traced_memory() -> int:
    """Bytes that the exporter's own code holds; what the made-up agents remember of themselves is not."""
    ours, made_up = "*/coding_agent_exporter/*", "*/demo/*"
    mine = [tracemalloc.Filter(inclusive=True, filename_pattern=ours),
            tracemalloc.Filter(inclusive=False, filename_pattern=made_up)]
    traces = tracemalloc.take_snapshot().filter_traces(mine)
    return sum(statistic.size for statistic in traces.statistics("filename"))
