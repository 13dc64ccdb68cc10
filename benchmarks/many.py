"""Takes a work directory, gives the rows about very many log files, each in a directory of its own."""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.process import agents, exporter, total
from benchmarks.sections import WrongTotalError, line_of, milliseconds
from benchmarks.table import Row

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.process import Exporter

LINES = 20
"""In each log when the exporter starts."""


def many(work: Path, *, logs: int = 10_000, seconds: float = 15.0, count: int = 20) -> list[Row]:
    """So many agents' usage logs, all watched, while 20 agents write heartbeats."""
    root, home, telemetry = work / "tree", work / "home", work / "instances"
    home.mkdir()
    paths, usd = [], 0.0
    for number in range(logs):
        path = root / "agents" / f"agent-{number:05d}" / "events" / "pi-coding" / "usage" / "events.jsonl"
        path.parent.mkdir(parents=True)
        lines = [line_of(line, "bench/many", session=f"session-{number}") for line in range(LINES)]
        path.write_text("".join(lines))
        usd += sum(json.loads(line)["cost"]["total_cost_usd"] for line in lines)
        paths.append(path)
    flags = (f"--usage.root=bench={root}", f"--telemetry.dir=pi={telemetry}", f"--sessions.dir={work / 'none'}")
    with agents(telemetry, 20):
        with exporter(home, *flags) as running:
            cold = running.first(usd=usd)
            rows = _running(running, paths, seconds, count)
        with exporter(home, *flags) as running:
            again = running.first()
            if total(running.text(), "coding_agent_messages_total") != logs * LINES + 2 * count + 1:
                raise WrongTotalError("messages were lost, or counted twice")
    note = f"{logs:,} logs in {logs:,} directories, {LINES} messages each"
    return [
        Row("exec to first complete scrape, cold", f"{cold:.2f} s", "", note),
        Row("exec to first complete scrape, restart", f"{again:.2f} s"),
        *rows,
    ]


def _running(running: Exporter, paths: list[Path], seconds: float, count: int) -> list[Row]:
    chance = random.Random(1)  # noqa: S311  no secret, and the same every time
    number = LINES
    scrapes = []
    for path in chance.choices(paths, k=count):
        number += 1
        before = total(running.text(), "coding_agent_messages_total")
        _append(path, number)
        began = time.perf_counter()
        shown = running.text()
        scrapes.append(time.perf_counter() - began)
        if total(shown, "coding_agent_messages_total") != before + 1:
            raise WrongTotalError("a scrape did not show what had been appended before it")
    time.sleep(2)
    polling = total(running.text().replace("watch_polling ", "watch_polling{} "), "coding_agent_exporter_watch_polling")
    began, used = time.monotonic(), running.cpu()
    time.sleep(seconds)
    share = (running.cpu() - used) / (time.monotonic() - began) * 100
    committed, journal = [], running.state.with_name("state.db-wal")
    for path in chance.choices(paths, k=count):
        number += 1
        time.sleep(0.25)
        seen = journal.stat().st_mtime_ns
        _append(path, number)
        began = time.perf_counter()
        while journal.stat().st_mtime_ns == seen and time.perf_counter() - began < 15:
            time.sleep(0.0005)
        committed.append(time.perf_counter() - began)
    fresh = paths[0].parents[3].with_name("agent-new") / "events" / "pi-coding" / "usage" / "events.jsonl"
    seen = journal.stat().st_mtime_ns
    fresh.parent.mkdir(parents=True)
    began = time.perf_counter()
    _append(fresh, 0)
    while journal.stat().st_mtime_ns == seen and time.perf_counter() - began < 15:
        time.sleep(0.0005)
    found = time.perf_counter() - began
    return [
        Row("RSS", f"{running.memory():.0f} MB"),
        Row("scrape that shows what was just appended, median", milliseconds(statistics.median(scrapes)), "",
            f"of {count}; slowest {milliseconds(max(scrapes))}"),
        Row("append to its commit, nobody asking, median", milliseconds(statistics.median(committed)), "",
            f"of {count}; slowest {milliseconds(max(committed))}"),
        Row("first line of a new agent to its commit, nobody asking", milliseconds(found)),
        Row("CPU while nobody asks", f"{share:.1f} %", "",
            f"20 agents, heartbeats every 1.5 s; over {seconds:.0f} s; {'polled' if polling else 'notified'}"),
    ]


def _append(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write(line_of(number, "bench/many", session=f"{path}"))
