"""Takes a tree of usage logs, gives the speed of the full pipeline beside that of decoding the same lines."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from coding_agent_exporter import config
from coding_agent_exporter.decode import usage
from coding_agent_exporter.ledger import Book, Ledger
from coding_agent_exporter.model import PICO, SourceFile, UsageEvent
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.serve import relax_gc
from coding_agent_exporter.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coding_agent_exporter.config import Settings

PROGRAM = Path(__file__).with_name("usage.mtail")


@dataclass(frozen=True, slots=True)
class Speed:
    """Lines per second, of CPU and of wall time."""

    cpu: float
    wall: float


def settings(home: Path, *flags: str) -> Settings:
    """Settings with nothing to read but what the flags name."""
    nothing = (f"--telemetry.dir={home / 'none'}", f"--sessions.dir={home / 'none'}", f"--usage.root={home / 'none'}")
    given = {flag.partition("=")[0] for flag in flags}
    defaults = [flag for flag in nothing if flag.partition("=")[0] not in given]
    return config.load([f"--state.path={home / 'state.db'}", *defaults, *flags], {}, home=home, cwd=home)


def emptied(home: Path) -> Path:
    """The directory, without what a run before left in it."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    return home


def logs(root: Path) -> Iterator[Path]:
    return iter(sorted(root.glob("agents/*/events/*/usage/events.jsonl")))


def decode_each(root: Path) -> Speed:
    """msgspec alone: read each file, decode each line into a typed struct, drop it."""
    decode = msgspec.json.Decoder(UsageEvent).decode
    timer, lines = Timer(), 0
    with timer:
        for path in logs(root):
            with path.open("rb") as file:
                for line in file:
                    decode(line)
                    lines += 1
    return timer.speed(lines)


def decode_each_and_keep(root: Path) -> Speed:
    """The same, with all structs in memory at the end: what a program must do that sums up afterwards."""
    decode = msgspec.json.Decoder(UsageEvent).decode
    timer, kept = Timer(), []
    with timer:
        for path in logs(root):
            with path.open("rb") as file:
                kept += [decode(line) for line in file]
    return timer.speed(len(kept))


def decode_files(root: Path) -> Speed:
    """msgspec's decode_lines, a whole file in one call: what the pipeline uses, on smaller chunks."""
    decode = msgspec.json.Decoder(UsageEvent).decode_lines
    timer, lines = Timer(), 0
    with timer:
        for path in logs(root):
            lines += len(decode(path.read_bytes()))
    return timer.speed(lines)


class _Nowhere:
    """A storage that has nothing and keeps nothing."""

    def account(self, _: str) -> None:
        return None

    def archived(self, _: str, __: int | str) -> None:
        return None

    def has_figures(self, _: int) -> bool:
        return False

    def quiet(self, _: str, __: int, ___: int) -> list[str]:
        return []


def without_commits(root: Path, *, counting: bool) -> Speed:
    """What the pipeline does before it commits: read and decode in chunks, and count what was decoded."""
    tail = Tail()
    ledger = Ledger(_Nowhere(), lambda *_: None, Book(max_series=10_000, cutoff=0))
    timer, lines = Timer(), 0
    relax_gc()
    with timer:
        for path in logs(root):
            agent, source = path.parts[-5], path.parts[-3]
            file, cursor = SourceFile("usage", "bench", path, f"{agent}/{source}", source, agent), None
            while (chunk := tail.read(path, cursor, root)) is not None:
                events, _ = usage.decode(chunk.data)
                lines += len(events)
                if counting:
                    ledger.apply_usage(file, events, replay=False)
                cursor = chunk.cursor
            ledger.trim()
    return timer.speed(lines)


def pipeline(root: Path, home: Path, lines: int) -> tuple[Speed, int]:
    """A cold start: from an empty state file until everything is read and committed. Also the pico-USD counted."""
    emptied(home)
    timer = Timer()
    relax_gc()
    with timer:
        running = Pipeline(settings(home, f"--usage.root=bench={root}"))
        while running.step():
            pass
    snapshot, _ = running.scrape()
    running.close()
    spent = sum(amount for (name, _), amount in snapshot.counters if name == "coding_agent_cost_usd_total")
    return timer.speed(lines), spent


def mtail(root: Path, home: Path) -> Speed | None:
    """mtail over the same lines in one file, counting without telling repeated messages apart. None: not installed."""
    program = shutil.which("mtail")
    if program is None:
        return None
    merged = home / "merged.log"
    with merged.open("wb") as file:
        lines = 0
        for path in logs(root):
            data = path.read_bytes()
            lines += data.count(b"\n")
            file.write(data)
    timer = Timer(children=True)
    with timer:
        subprocess.run(  # noqa: S603  the program of that name on the path
            [program, "--one_shot", "--progs", str(PROGRAM), "--logs", str(merged)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    merged.unlink()
    return timer.speed(lines)


def best(measure: Callable[[], Speed], *, of: int) -> Speed:
    """The fastest of some runs: what slows one down is the machine's other work."""
    speeds = [measure() for _ in range(of)]
    return Speed(max(speed.cpu for speed in speeds), max(speed.wall for speed in speeds))


def dollars(pico: int) -> float:
    return pico / PICO


class Timer:
    """Adds up seconds of CPU and of wall time over the blocks it is used for."""

    def __init__(self, *, children: bool = False) -> None:
        self._children = children
        self.cpu = self.wall = 0.0
        self._began = (0.0, 0.0)

    def __enter__(self) -> None:
        self._began = (self._now(), time.perf_counter())

    def __exit__(self, *_: object) -> None:
        self.cpu += self._now() - self._began[0]
        self.wall += time.perf_counter() - self._began[1]

    def speed(self, lines: int) -> Speed:
        return Speed(lines / max(self.cpu, 1e-9), lines / max(self.wall, 1e-9))

    def _now(self) -> float:
        if self._children:
            import resource  # noqa: PLC0415  where mtail is there, so is it

            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            return usage.ru_utime + usage.ru_stime
        return time.process_time()
