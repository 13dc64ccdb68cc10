"""Takes targets, each a made-up fleet with an exporter beside it, gives blocks as a Prometheus would have of them.

The fleet writes its files, the real pipeline reads them by the same clock, and what each scrape was served goes with
its time into a file in OpenMetrics, of which `promtool` makes blocks. A week takes minutes instead of a week.

What differs from a server that did scrape:
- A block made this way has no staleness markers: a series that has vanished is still seen for the time that an
  instant query looks back, five minutes by default. `serve` makes it two and a half intervals.
- There are no `process_*` metrics: they would be those of this program.
- Nobody watches the files. The pipeline looks at each scrape, and in the moments in between of which the fleet tells.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coding_agent_exporter import config
from coding_agent_exporter.demo.agents import DAY
from coding_agent_exporter.demo.simulation import BENCH, DESK, POD, Fleet
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.watch import TimerWaker
from coding_agent_exporter.webapp import App

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from coding_agent_exporter.demo.agents import Role
    from coding_agent_exporter.demo.writers import Truth

START = 1_767_744_000.0
"""Wednesday, 7 January 2026, midnight UTC: a day is a day, and the weekend lies in the middle of a week."""

DEADLINE = 60.0
"""Seconds in which a server that works is ready."""


@dataclass(frozen=True)
class Target:
    """One exporter. `start` and `end` are epoch seconds; a fleet that is done ends sooner.

    `labels` are those that a scrape config would add to `job` and `instance`. `before`: seconds for which the agents
    had worked already when the exporter started.
    """

    job: str
    instance: str
    cast: tuple[Role, ...]
    start: float
    end: float
    seed: int = 1
    labels: tuple[tuple[str, str], ...] = ()
    before: float = 0.0


@dataclass
class Record:
    """What became of a target: what its agents spent, when it was scraped, and the file with all samples."""

    target: Target
    truth: Truth
    scrapes: list[float] = field(default_factory=list)
    file: Path = Path()
    samples: int = 0


@dataclass
class _Clock:
    now: float

    def __call__(self) -> float:
        return self.now


class _Scraper:
    """One target's exporter, asked as Prometheus does."""

    def __init__(self, target: Target, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._clock = _Clock(target.start)
        settings = config.load(["--state.path", str(home / "state.db")], {}, home=home, cwd=home)
        self.pipeline = Pipeline(settings, clock=self._clock)
        self._app = App(self.pipeline, TimerWaker(1.0))
        labels = {**dict(target.labels), "instance": target.instance, "job": target.job}
        self._labels = ",".join(f'{name}="{value}"' for name, value in labels.items())
        self._series: dict[str, str] = {}

    def look(self, now: float) -> None:
        """A change was noticed."""
        self._clock.now = now
        self.pipeline.step()

    def scrape(self, now: float) -> list[str]:
        """The samples of one scrape that succeeded, with the labels and series that Prometheus adds."""
        self._clock.now = now
        reply = self._app.metrics("", frozenset(), None)
        known, stamp = self._series, f" {now:.3f}\n"
        lines = [f"up{{{self._labels}}} 1{stamp}"]
        for line in reply.body.decode().splitlines():
            if line.startswith(("#", "process_")):
                continue
            series, _, value = line.rpartition(" ")
            named = known.get(series)
            if named is None:
                name, brace, rest = series.partition("{")
                named = known[series] = f"{name}{{{self._labels}{',' + rest if brace else '}'} "
            lines.append(f"{named}{value}{stamp}")
        assert reply.sent is not None
        reply.sent()
        return lines


def record(target: Target, home: Path, *, interval: float = 60.0) -> Record:
    """Let a target live, in `home`, and scrape it every `interval` seconds, on times that are multiples of it.

    A target that is done before its time is told to stop, and lingers until it has been seen to the end.
    """
    host = target.instance.partition(":")[0]
    fleet = Fleet(home / "home", target.seed, start=target.start - target.before, cast=target.cast, host=host)
    fleet.advance(target.start)
    scraper = _Scraper(target, home / "home")
    made = Record(target, fleet.truth, file=home / "samples.txt")
    at = target.start - target.start % interval
    with made.file.open("w", encoding="utf-8") as file:
        while at + interval <= target.end:
            at += interval
            fleet.advance(at, scraper.look)
            if fleet.done:
                scraper.look(at)
                scraper.pipeline.stop()
            lines = scraper.scrape(at)
            file.writelines(lines)
            made.scrapes.append(at)
            made.samples += len(lines)
            if fleet.done and scraper.pipeline.final():
                break
        file.write("# EOF\n")
    scraper.pipeline.close()
    return made


def record_all(targets: Sequence[Target], home: Path, *, interval: float = 60.0, workers: int = 1) -> list[Record]:
    """All targets, each below `home`; with several workers, in processes of their own."""
    homes = [home / str(number) for number in range(len(targets))]
    if workers == 1:
        return [record(target, place, interval=interval) for target, place in zip(targets, homes, strict=True)]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(partial(record, interval=interval), targets, homes))


def make_blocks(records: Sequence[Record], data: Path, promtool: str) -> None:
    """Write the samples as blocks below `data`; those of different targets overlap, which Prometheus takes.

    Raises subprocess.CalledProcessError when promtool does not want them.
    """
    for made in records:
        # promtool reads its input once for each block: few blocks, however long they last.
        subprocess.run(  # noqa: S603  a path that the caller chose, and our own file
            [promtool, "tsdb", "create-blocks-from", "openmetrics", "--quiet", "--max-block-duration=240h",
             str(made.file), str(data)],
            check=True, capture_output=True,
        )


def fleet_of(days: float, *, start: float = START, interval: float = 60.0, pods: int = 3) -> list[Target]:
    """Two developers' machines, and so many jobs in pods on each day that is not on a weekend."""
    end = start + days * DAY / 1000
    found = [
        Target("coding-agents", "laptop-a:10464", DESK, start, end, seed=1),
        Target("coding-agents", "laptop-b:10464", BENCH, start, end, seed=2),
    ]
    number = 0
    midnight = start - start % 86_400
    while midnight < end:
        weekend = (midnight // 86_400 + 3) % 7 >= 5
        for turn in range(0 if weekend else pods):
            number += 1
            begin = midnight + (9.4 + 7.5 * turn / max(1, pods)) * 3600 + number * 97 % 1800
            begin -= begin % interval
            if start <= begin < end:
                found.append(Target(
                    "coding-agent-jobs", f"10.1.0.{number}:10464", POD, begin, min(end, begin + 7200),
                    seed=100 + number, labels=(("namespace", "agents"), ("pod", f"job-{number:03d}")),
                ))
        midnight += 86_400
    return found


class Server:
    """The API of a Prometheus server on a port of 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.port = port

    def query(self, expression: str, at: float) -> list[dict[str, Any]]:
        """The result of an instant query."""
        return self._get("query", {"query": expression, "time": f"{at:.3f}"})

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The result of a range query."""
        return self._get("query_range", {
            "query": expression, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"})

    def _get(self, path: str, arguments: Mapping[str, str]) -> list[dict[str, Any]]:
        body = urllib.parse.urlencode(arguments).encode()
        asked = f"http://127.0.0.1:{self.port}/api/v1/{path}"
        try:
            with urllib.request.urlopen(asked, body, timeout=DEADLINE) as answer:
                reply = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{arguments['query']}: {json.load(error)['error']}") from error
        result: list[dict[str, Any]] = reply["data"]["result"]
        return result


@contextmanager
def serve(prometheus: str, home: Path, *, interval: float = 60.0, rules: Sequence[Path] = ()) -> Iterator[Server]:
    """A server over the blocks below `home/data`, which scrapes nothing and keeps everything; stopped at the end.

    Raises TimeoutError, with its log, when it does not get ready.
    """
    settings = {"rule_files": [str(rule) for rule in rules], "global": {"evaluation_interval": "1h"}}
    (home / "prometheus.yml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  a path that the caller chose
            [prometheus, f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--storage.tsdb.retention.time=100y",
             f"--query.lookback-delta={round(2.5 * interval)}s", "--query.max-samples=200000000"],
            cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )
        try:
            _wait(process, port, home / "log")
            yield Server(port)
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"Prometheus is not ready: {log.read_text(encoding='utf-8')}")


def cores() -> int:
    """How many processes make sense."""
    return os.cpu_count() or 1
