"""Takes a work directory and sizes, gives the rows of the report about session files and the spans made of them."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks import conversations, ingest
from benchmarks.collector import collector
from benchmarks.ingest import Timer
from benchmarks.process import exporter
from benchmarks.table import Row
from coding_agent_exporter.decode.turns import decode
from coding_agent_exporter.export import create
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.serve import relax_gc
from coding_agent_exporter.spans import spans as made_of
from coding_agent_exporter.turns import Turns

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.collector import Arrival, Client
    from benchmarks.conversations import Truth

START = 1_790_000_000
"""Epoch seconds at which the generated sessions begin; the exporters that read them started before."""

PATIENCE = 60.0


class LostSpansError(Exception):
    """Not every span arrived, or one arrived twice: the speed of losing spans is no result."""


def spans(work: Path, *, sessions: int = 400, count: int = 20, runs: int = 3) -> list[Row]:
    """From session files to a collector."""
    root = work / "sessions"
    truth = conversations.generate(root, sessions=sessions, start=START * 1000)
    note = (f"{truth.messages:,} messages, {truth.size / 1e6:.0f} MB, {truth.files:,} sessions; "
            f"best of {runs}, CPU time")
    passes = min((turn_pass(root, truth) for _ in range(runs)), key=lambda timer: timer.cpu)
    plain = min((read(root, work / "plain")[0] for _ in range(runs)), key=lambda timer: timer.cpu)
    full, drained, sizes = min((through(root, work / "full", truth) for _ in range(runs)),
                               key=lambda found: found[1].wall)
    return [
        *_speeds("session files, full pipeline without a collector", plain, truth, note),
        *_speeds("session files, full pipeline with spans", full, truth, f"{truth.spans:,} spans into the outbox"),
        *_speeds("  turns and spans alone", passes, truth, "decoding, turns, spans; no files, no commits"),
        Row("outbox to collector", f"{truth.spans / drained.wall:,.0f} spans/s", "",
            f"wall time; {truth.spans / drained.cpu:,.0f} spans/s of CPU; {sizes / truth.spans:.0f} bytes a span"),
        *delay(work / "delay", count=count),
    ]


def turn_pass(root: Path, truth: Truth) -> Timer:
    """What turns and spans cost on top of money: lines in memory to spans in memory."""
    timer, found = Timer(), 0
    for path in sorted(root.rglob("*.jsonl")):
        data = path.read_bytes()
        with timer:
            records, _ = decode(data)
            turns = Turns(path.stem)
            found += sum(len(made_of(each, source="pi-coding")) for each in turns.apply(records, START))
    _check(found, truth.spans)
    return timer


def read(root: Path, home: Path, *, wanted: bool = False) -> tuple[Timer, Pipeline]:
    """A cold start with session files that are all new."""
    running = Pipeline(
        ingest.settings(ingest.emptied(home), f"--sessions.dir=pi={root}"), clock=lambda: START - 1.0, spans=wanted)
    timer = Timer()
    relax_gc()
    with timer:
        while running.step():
            pass
    if not wanted:
        running.close()
    return timer, running


def through(root: Path, home: Path, truth: Truth) -> tuple[Timer, Timer, int]:
    """Read, then drain the outbox with the real worker. Both times, and how many bytes were sent."""
    with collector() as receiver:
        read_in, running = read(root, home, wanted=True)
        _check(running.outbox.size(), truth.spans)
        worker = create(running.outbox, {}, version=running.version, instance="bench", endpoint=receiver.url)
        assert worker is not None, "an endpoint was given"
        timer = Timer()
        with timer:
            worker.start()
            deadline = time.monotonic() + PATIENCE
            while running.outbox.size() and time.monotonic() < deadline:
                time.sleep(0.002)
        worker.stop(1)
        running.close()
        arrivals = receiver.arrivals()
    found = [span for arrival in arrivals for span, _ in arrival.spans]
    _check(len(found), truth.spans)
    _check(len(set(found)), truth.spans)
    return read_in, timer, sum(arrival.size for arrival in arrivals)


def delay(home: Path, *, count: int) -> list[Row]:
    """From the append of a turn's last line to the arrival of its span, one turn at a time."""
    root = home / "sessions" / "--srv-project--"
    root.mkdir(parents=True)
    nothing = home / "none"
    with collector() as receiver, exporter(
        home, f"--otlp.endpoint={receiver.url}", f"--sessions.dir=pi={root.parent}", f"--usage.root={nothing}",
        f"--telemetry.dir={nothing}",
    ) as running:
        running.first()
        session = conversations.Session(random.Random(1), int(time.time() * 1000))  # noqa: S311  no secret
        appended = []
        with (root / session.name).open("ab", buffering=0) as file:
            for _ in range(count):
                session.now = int(time.time() * 1000)
                session.user()
                file.write(session.take())
                # Longer than the least time between two steps: the turn's end is not read with its prompt.
                time.sleep(0.25)
                session.turn(0)
                file.write(session.take())
                appended.append(time.monotonic())
            arrived = _turns(receiver, count)
        taken = [there - here for here, there in zip(appended, arrived, strict=True)]
        memory = running.memory()
    return [
        Row("turn's last line to its span's arrival, median", f"{statistics.median(taken) * 1000:.0f} ms", "1 s",
            f"of {count}; slowest {max(taken) * 1000:.0f} ms"),
        Row("RSS with OTLP over HTTP", f"{memory:.0f} MB", "45 MB", f"after {count} turns were sent"),
    ]


def _turns(receiver: Client, count: int) -> list[float]:
    """When each turn arrived, once all are there."""
    deadline = time.monotonic() + PATIENCE
    arrived: list[float] = []
    while len(arrived) < count and time.monotonic() < deadline:
        time.sleep(0.1)
        arrived = [at for arrival in receiver.arrivals() for at in _named(arrival, "turn")]
    _check(len(arrived), count)
    return arrived


def _named(arrival: Arrival, name: str) -> list[float]:
    return [arrival.at for _, found in arrival.spans if found == name]


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise LostSpansError(f"{found} spans instead of {expected}")


def _speeds(what: str, timer: Timer, truth: Truth, note: str) -> list[Row]:
    return [Row(what, f"{truth.size / timer.cpu / 1e6:,.0f} MB/s, {truth.messages / timer.cpu / 1000:,.0f}k messages/s",
                "", note)]
