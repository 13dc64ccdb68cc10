"""Takes a work directory, gives the rows of the report about what a new line costs beside all that was there before."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import ingest
from benchmarks.generate import generate
from benchmarks.ingest import Timer
from benchmarks.table import Row
from coding_agent_exporter.listing import RACY_SECONDS
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.serve import relax_gc

if TYPE_CHECKING:
    from collections.abc import Sequence

START = 1_790_000_000


class WrongCountError(Exception):
    """Not every event was counted, or one twice: what that costs is no result."""


def linear(
    work: Path, *, batch: int = 100_000, histories: Sequence[int] = (1_000_000, 4_000_000),
    files: Sequence[int] = (1, 1_000, 10_000), lengths: Sequence[int] = (10, 1_000, 10_000), count: int = 50,
) -> list[Row]:
    """The same work beside little and much history: events, files, and messages of one session."""
    relax_gc()
    return [
        *_histories(work / "histories", batch, histories),
        *(row for number in files for row in _files(work / f"files-{number}", number, count)),
        *(row for source in ("pi-coding", "opencode") for length in lengths
          for row in _lengths(work / f"{source}-{length}", source, length, count)),
    ]


def _histories(work: Path, batch: int, histories: Sequence[int]) -> list[Row]:
    """Each batch is read twice: after the history, and on an empty state."""
    root, rows, had = work / "logs", [], 0
    running = Pipeline(ingest.settings(ingest.emptied(work / "state"), f"--usage.root=bench={root}"))
    for number, history in enumerate(histories):
        more = history - had
        had = history + _read(running, root, more, seed=100 + number, sessions=more // 200)[1]
        after, lines = _read(running, root, batch, seed=200 + number, sessions=batch // 80)
        had += lines
        alone = _alone(work / f"alone-{number}", batch, seed=200 + number)
        rows.append(Row(f"{batch:,} events after {history:,} / on an empty state", f"{after.cpu / alone.cpu:.2f}", "1",
                        f"CPU time: {after.cpu:.2f} s and {alone.cpu:.2f} s for the same {lines:,} events"))
    running.close()
    return rows


def _alone(work: Path, batch: int, seed: int) -> Timer:
    root = work / "logs"
    running = Pipeline(ingest.settings(ingest.emptied(work / "state"), f"--usage.root=bench={root}"))
    timer, _ = _read(running, root, batch, seed=seed, sessions=batch // 80)
    running.close()
    return timer


def _read(running: Pipeline, root: Path, events: int, *, seed: int, sessions: int) -> tuple[Timer, int]:
    """Write so many events and read them; how long that took, and how many they are."""
    before = _messages(running)
    truth = generate(root, events=events, sessions=max(sessions, 40), agents=40, seed=seed)
    timer = Timer()
    with timer:
        while running.step():
            pass
    if _messages(running) - before != truth.messages:
        raise WrongCountError(f"{_messages(running) - before} messages instead of {truth.messages}")
    return timer, truth.lines


def _messages(running: Pipeline) -> int:
    for _ in range(2):  # a series that is new is first shown at 0
        snapshot, delivered = running.scrape()
        delivered()
    return sum(value for (name, _), value in snapshot.counters if name == "coding_agent_messages_total")


def _files(work: Path, number: int, count: int) -> list[Row]:
    """A step that is told of nothing, one that is told of a line, and one that looks at everything."""
    root = work / "sessions"
    for one in range(number):
        folder = root / f"--srv-project-{one % 20}--"
        folder.mkdir(parents=True, exist_ok=True)
        uuid = f"00000000-0000-7000-8000-{one:012d}"
        header = {"type": "session", "version": 3, "id": uuid, "timestamp": "2025-01-01T00:00:00.000Z"}
        path = folder / f"2025-01-01T00-00-00-000Z_{uuid}.jsonl"
        path.write_text(json.dumps(header) + "\n")
    running = Pipeline(ingest.settings(ingest.emptied(work / "state"), f"--sessions.dir=pi={root}"))
    time.sleep(RACY_SECONDS + 0.1)  # what changed just now is looked at more closely for as long
    while running.step():
        pass
    told, everything, appended = Timer(), Timer(), Timer()
    for _ in range(count):
        with told:
            running.step(changes=frozenset())
        with path.open("a") as file:
            file.write(json.dumps({"type": "custom", "id": "0", "parentId": None}) + "\n")
        with appended:
            running.step(changes=frozenset([str(path)]))
        with everything:
            running.step()
    running.close()
    note = f"CPU time, of {count}; beside {_files_of(number)} of sessions"
    return [
        Row(f"a step that is told of nothing, {_files_of(number)}", _us(told.cpu / count), "", note),
        Row(f"a step that is told of a line, {_files_of(number)}", _us(appended.cpu / count), "", note),
        Row(f"a step that looks at all, {_files_of(number)}", _us(everything.cpu / count), "",
            "that of a scrape, and one every 10 s"),
    ]


def _lengths(work: Path, source: str, length: int, count: int) -> list[Row]:
    """Messages of one session, one at a time, each committed."""
    log = work / "logs" / "agents" / "one" / "events" / source / "usage" / "events.jsonl"
    log.parent.mkdir(parents=True)
    now = float(START)
    running = Pipeline(
        ingest.settings(ingest.emptied(work / "state"), f"--usage.root=bench={work / 'logs'}"), clock=lambda: now)
    log.write_text("".join(_line(source, number, START - 20 * (length - number)) for number in range(length)))
    while running.step():
        pass
    timer, written = Timer(), _written()
    for number in range(length, length + count):
        now += 1
        with log.open("a") as file:
            file.write(_line(source, number, int(now)))
        with timer:
            running.step(changes=frozenset([str(log)]))
    written = (_written() - written) // count
    if _messages(running) != length + count:
        raise WrongCountError(f"{_messages(running)} messages instead of {length + count}")
    running.close()
    return [Row(f"a message of a session of {length:,}, {source}", _us(timer.cpu / count), "",
                f"CPU time, of {count}; {written / 1000:,.0f} kB written for each")]


def _line(source: str, number: int, at: int) -> str:
    event = {
        "source": f"{source}/usage", "type": "cost_snapshot", "event_id": f"evt-{number}",
        "timestamp": datetime.fromtimestamp(at, UTC).isoformat(), "session_id": "session",
        "cost": {"total_cost_usd": 0.01 + number / 10**6},
        "tokens": {"input": 1000 + number, "output": 200, "cache_read": 30_000, "cache_creation": 400},
        "model": "anthropic/claude-opus-4-8", "cost_mode": "API_KEY",
    }
    if source == "opencode":
        event["message_id"] = f"msg_{number:026x}"
    return json.dumps(event) + "\n"


def _files_of(number: int) -> str:
    return f"{number:,} file{'s' if number > 1 else ''}"


def _written() -> int:
    """Bytes that this process has given to the system to write, 0 where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), 0)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
