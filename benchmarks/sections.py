"""Takes a work directory and sizes, gives the rows of each section of the report."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import ingest
from benchmarks.agents import write
from benchmarks.generate import generate
from benchmarks.process import agents, exporter, total
from benchmarks.table import Row
from coding_agent_exporter import expose
from coding_agent_exporter.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.process import Exporter

USAGE = ("coding_agent_cost_usd_total", "coding_agent_tokens_total", "coding_agent_messages_total",
         "coding_agent_sessions_total", "coding_agent_unpriced_tokens_total")

LABEL_SETS = 290
"""Each makes seven series: cost, four token types, messages, sessions."""


class Size(NamedTuple):
    """How much is generated. `events` is met within a few percent."""

    events: int
    sessions: int
    agents: int


class WrongTotalError(Exception):
    """What was counted is not what the tree holds: the speed of a wrong answer is no result."""


def speed(work: Path, *, size: Size, runs: int = 3) -> list[Row]:
    """The pipeline beside decoding alone, alternating in one process."""
    root = work / "tree"
    truth = generate(root, **size._asdict())
    full: list[ingest.Speed] = []
    references: dict[str, Callable[[], ingest.Speed]] = {
        "msgspec, line by line": partial(ingest.decode_each, root),
        "msgspec, line by line, all kept": partial(ingest.decode_each_and_keep, root),
        "msgspec, decode_lines": partial(ingest.decode_files, root),
    }
    stages: dict[str, Callable[[], ingest.Speed]] = {
        "reading and decoding alone, as the pipeline does": partial(ingest.without_commits, root, counting=False),
        "the same, and counting": partial(ingest.without_commits, root, counting=True),
    }
    measured: dict[str, list[ingest.Speed]] = {name: [] for name in (*references, *stages)}
    for _ in range(runs):
        for name, measure in (*references.items(), *stages.items()):
            measured[name].append(measure())
        got, spent = ingest.pipeline(root, work / "state", truth.lines)
        if spent != sum(truth.spent.values()):
            raise WrongTotalError(f"{ingest.dollars(spent)} USD instead of {truth.usd}")
        full.append(got)
    ours = max(one.cpu for one in full)
    note = f"{truth.lines:,} events, {truth.sessions:,} sessions, {size.agents} agents; best of {runs}, CPU time"
    rows = [
        Row("full pipeline with commits", _rate(ours), "", note),
        Row("full pipeline, wall time", _rate(max(one.wall for one in full)), "", "one thread"),
    ]
    best = {name: max(one.cpu for one in speeds) for name, speeds in measured.items()}
    for name in references:
        rate = best[name]
        target = "0.5" if name == "msgspec, line by line" else ""
        rows.append(Row(name, _rate(rate), "", "CPU time; reads the same files"))
        rows.append(Row("  pipeline / that", f"{ours / rate:.2f}", target))
    for name in stages:
        rows.append(Row(name, _rate(best[name]), "", "CPU time"))
        rows.append(Row("  that / msgspec, line by line", f"{best[name] / best['msgspec, line by line']:.2f}"))
    other = ingest.mtail(root, work)
    if other is not None:
        rows.append(Row("mtail, one regular expression a line", _rate(other.cpu), "", "CPU time; counts repeats again"))
        rows.append(Row("  pipeline / that", f"{ours / other.cpu:.2f}"))
    return rows


def memory(work: Path, *, size: Size) -> list[Row]:
    """The real process: idle, through a cold start, and when it starts again."""
    root, nothing, home = work / "tree", work / "none", work / "real"
    home.mkdir()
    with exporter(_made(work / "fresh"), *_roots(nothing)) as running:
        running.first()
        running.text()
        fresh = running.memory()
    truth = generate(root, **size._asdict())
    flags = _roots(nothing, usage=root)
    with exporter(home, *flags) as running:
        took = running.first(usd=truth.usd, every=0.05)
        peak, after = running.memory("VmHWM"), running.memory()
        stored = running.state.stat().st_size / 1e6
    restarts = []
    for _ in range(3):
        with exporter(home, *flags) as running:
            restarts.append(running.first(usd=truth.usd))
            restarted = running.memory()
    note = f"{truth.lines:,} events, {truth.sessions:,} sessions"
    return [
        Row("RSS, nothing to read", _mb(fresh), "45 MB", "after a scrape"),
        Row("RSS, highest while reading", _mb(peak), "64 MB" if size.events >= 5_000_000 else "", note),
        Row("RSS afterwards", _mb(after), "64 MB" if size.events >= 5_000_000 else ""),
        Row("state file", _mb(stored)),
        Row("exec to first complete scrape, cold", _seconds(took), "", note),
        Row("exec to first correct scrape, restart", _seconds(statistics.median(restarts)), "0.5 s", "median of 3"),
        Row("RSS after the restart", _mb(restarted)),
    ]


def scrapes(work: Path, *, instances: int = 100, label_sets: int = LABEL_SETS, count: int = 30) -> list[Row]:
    """A large exposition, from a real process over HTTP as Prometheus asks for it, and rendered alone."""
    root, telemetry, home = work / "wide", work / "instances", _made(work / "scraped")
    _wide(root, label_sets)
    flags = (f"--usage.root=bench={root}", f"--telemetry.dir=pi={telemetry}", f"--sessions.dir={work / 'none'}")
    with agents(telemetry, instances), exporter(home, *flags) as running:
        running.first()
        shown = running.text()
        usage = sum(line.startswith(USAGE) for line in shown.splitlines())
        found = int(total(shown, "coding_agent_instance_info"))
        times, bodies = [], []
        for _ in range(count):
            time.sleep(0.1)
            began = time.perf_counter()
            _, body = running.get("/metrics")
            times.append(time.perf_counter() - began)
            bodies.append(body)
        size = len(gzip.decompress(bodies[-1])) if bodies[-1][:2] == b"\x1f\x8b" else len(bodies[-1])
        pipeline = Pipeline(ingest.settings(_made(work / "rendered"), *flags[:2]))
        while pipeline.step():
            pass
        snapshot, _ = pipeline.scrape()
        rendered = []
        for _ in range(count):
            began = time.perf_counter()
            expose.render(snapshot)
            rendered.append(time.perf_counter() - began)
        pipeline.close()
    note = f"{found} instances with heartbeats every 1.5 s, {usage:,} usage series, {shown.count(chr(10)):,} lines"
    return [
        Row("scrape over HTTP, median", milliseconds(statistics.median(times)), "50 ms", note),
        Row("scrape over HTTP, 95th percentile", milliseconds(_p95(times)), "50 ms",
            f"of {count}; {size / 1e3:,.0f} kB of text"),
        Row("rendering alone, median", milliseconds(statistics.median(rendered))),
    ]


def freshness(work: Path, *, count: int = 20) -> list[Row]:
    """How soon an appended line is seen, by a scrape and without one."""
    root, home = work / "growing", _made(work / "followed")
    log = _log(root, "agent-growing")
    with exporter(home, *_roots(work / "none", usage=root)) as running:
        running.first()
        log.write_text(line_of(0, "bench/fresh"))
        running.text()  # The series at zero,
        before = total(running.text())  # and with its value.
        asked = []
        for number in range(1, count + 1):
            with log.open("a") as file:
                file.write(line_of(number, "bench/fresh"))
            began = time.perf_counter()
            after = total(running.text())
            asked.append(time.perf_counter() - began)
            if after <= before:
                raise WrongTotalError("a scrape did not show what had been appended before it")
            before = after
            time.sleep(0.1)
        committed, journal = [], running.state.with_name("state.db-wal")
        for number in range(count + 1, 2 * count + 1):
            time.sleep(0.25)
            seen = journal.stat().st_mtime_ns
            with log.open("a") as file:
                file.write(line_of(number, "bench/fresh"))
            began = time.perf_counter()
            while journal.stat().st_mtime_ns == seen and time.perf_counter() - began < 5:
                time.sleep(0.0005)
            committed.append(time.perf_counter() - began)
    return [
        Row("append to a scrape that shows it, median", milliseconds(statistics.median(asked)), "",
            f"of {count}; each showed it at once"),
        Row("append to its commit, nobody asking, median", milliseconds(statistics.median(committed)), "",
            f"of {count}; slowest {milliseconds(max(committed))}"),
    ]


def idle(
    work: Path, *, instances: int = 20, seconds: float = 15.0, sessions: int = 2000, peaks: int = 100,
) -> list[Row]:
    """CPU between scrapes, in percent of a core, and whether what is not read for its sake is missed."""
    rows = []
    folder = work / "sessions"
    for number in range(sessions):
        directory = folder / f"--srv-project-{number % 20}--"
        directory.mkdir(parents=True, exist_ok=True)
        uuid = f"00000000-0000-7000-8000-{number:012d}"
        header = {"type": "session", "version": 3, "id": uuid, "timestamp": "2025-01-01T00:00:00.000Z"}
        (directory / f"2025-01-01T00-00-00-000Z_{uuid}.jsonl").write_text(json.dumps(header) + "\n")
    for label, place in (("nothing else", work / "none"), (f"{sessions:,} old session files", folder)):
        home, telemetry = _made(work / f"idle-{place.name}"), work / f"instances-{place.name}"
        flags = (f"--usage.root={work / 'none'}", f"--telemetry.dir=pi={telemetry}", f"--sessions.dir=pi={place}")
        with agents(telemetry, instances), exporter(home, *flags) as running:
            running.first()
            running.text()
            time.sleep(2)
            began, before = time.monotonic(), running.cpu()
            time.sleep(seconds)
            share = (running.cpu() - before) / (time.monotonic() - began) * 100
            seen = _peaks(telemetry, instances, peaks, running) if place.name == "none" else 0
        target = "1 %" if place.name == "none" else ""
        note = f"{instances} agents, heartbeats every 1.5 s, and {label}; over {seconds:.0f} s"
        rows.append(Row("CPU while nobody asks", f"{share:.2f} %", target, note))
        if place.name == "none":
            rows.append(Row("peaks that were seen", f"{seen} of {peaks}", f"{peaks}",
                            "near the limit for 250 ms, between two scrapes, beside those agents"))
    return rows


def _peaks(telemetry: Path, number: int, count: int, running: Exporter) -> int:
    """How many of an agent's peaks were seen, each of which stands for 250 ms."""
    for peak in range(count):
        write(telemetry, number, time.time(), sequence=2 * peak, pressure="near_limit")
        time.sleep(0.25)
        write(telemetry, number, time.time(), sequence=2 * peak + 1)
        time.sleep(0.25 + 0.1 * (peak % 10) / 10)
    return int(sum(
        float(line.rpartition(" ")[2]) for line in running.text().splitlines()
        if line.startswith("coding_agent_context_limit_crossings_total{") and 'pressure="near_limit"' in line))


# -- trees and texts


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _roots(nothing: Path, *, usage: Path | None = None) -> tuple[str, str, str]:
    return (f"--usage.root=bench={usage or nothing}", f"--telemetry.dir={nothing}", f"--sessions.dir={nothing}")


def _log(root: Path, agent: str) -> Path:
    log = root / "agents" / agent / "events" / "pi-coding" / "usage" / "events.jsonl"
    log.parent.mkdir(parents=True)
    log.touch()
    return log


def _wide(root: Path, label_sets: int) -> None:
    with _log(root, "agent-wide").open("w") as file:
        for number in range(label_sets):
            file.write(line_of(number, f"provider-{number % 7}/model-{number}", session=f"session-{number}"))


def line_of(number: int, model: str, *, session: str = "session") -> str:
    return json.dumps({
        "source": "pi-coding/usage", "type": "cost_snapshot", "event_id": f"evt-pi-usage-{number}",
        "timestamp": datetime.fromtimestamp(1_760_000_000 + number, UTC).isoformat(), "session_id": session,
        "cost": {"total_cost_usd": 0.01 + number / 1000},
        "tokens": {"input": 1000 + number, "output": 200, "cache_read": 30_000, "cache_creation": 400},
        "model": model, "cost_mode": "API_KEY",
    }) + "\n"


def _rate(value: float) -> str:
    return f"{value / 1000:,.0f}k events/s"


def _mb(value: float) -> str:
    return f"{value:.0f} MB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def milliseconds(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def _p95(values: list[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]
