"""Limits of the system that the real program runs into: notifications, descriptors, connections; and many files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agents_support import ClaudeLog, PiInstance, PiLog, PiSession, Truth, some_money
from coding_agent_exporter.pipeline import Pipeline
from faults_support import PEAK, POLLING, cpu, descriptors, memory, settled, spent, threads
from process_support import Exporter, get, wait_for
from support import drain, exact, settings, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify and /proc")


def peak_is_seen(exporter: Exporter, agent: PiInstance, percent: int) -> None:
    """The agent is near its limit for the quarter of a second between two heartbeats: a later scrape shows it."""
    agent.write(percent)
    time.sleep(0.25)  # how long it lasts
    agent.write(20)
    assert total(exporter.scrape(), PEAK) == percent


def peak_is(exporter: Exporter, percent: int) -> bool:
    return total(exporter.scrape(), PEAK) == percent


# -- notifications


@linux
def test_an_overflow_of_notifications_loses_nothing(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """The exporter gets no time while more happens than the system keeps; then peaks and money are seen as before."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 50_000:
        pytest.skip(f"this system keeps {limit} notifications")
    truth, rounds = Truth(), amount(1, 20)
    agent = PiInstance(tmp_path / ".pi/agent/telemetry/instances", 1)
    logs = [PiLog(tmp_path / ".mngr", f"agent-{number}", truth) for number in range(2)]
    noise = [log.path.with_name("noise") for log in logs]
    for log in logs:
        log.message("p/m", 10**9)
    agent.write(1)
    with Exporter(tmp_path) as exporter:
        settled(exporter, truth)
        for round_ in range(rounds):
            exporter.signal(signal.SIGSTOP)
            handles = [path.open("wb", buffering=0) for path in noise]
            for number in range(limit + 100):
                handles[number % 2].write(b"x")
            for handle in handles:
                handle.close()
            for log in logs:
                log.message("p/m", 10**9)
            exporter.signal(signal.SIGCONT)
            spent(exporter, truth)
            peak_is_seen(exporter, agent, 60 + round_)
        assert total(exporter.scrape(), POLLING) == 0
    print(f"{rounds} overflows of {limit} notifications")


@contextmanager
def limited(home: Path, name: str, most: int) -> Iterator[Exporter]:
    """An exporter in a user namespace that grants so many of something; skips where there can be none."""
    shell = f"echo {most} > /proc/sys/user/{name}"
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "-Ur", "sh", "-c", shell], check=False, capture_output=True).returncode:
        pytest.skip("no user namespace can be made here")
    beside = home / "limited.sh"
    beside.write_text(f'#!/bin/sh\nexec unshare -Ur sh -c \'{shell}; exec "$0" "$@"\' {sys.executable} "$@"\n')
    beside.chmod(0o755)
    exporter = Exporter(home)
    exporter.program = [str(beside)]
    with exporter:
        yield exporter


@linux
@pytest.mark.parametrize(("what", "most"), [("max_inotify_instances", 0), ("max_inotify_watches", 0),
                                            ("max_inotify_watches", 4)])
def test_without_notifications_peaks_are_seen_by_polling(what: str, most: int, tmp_path: Path) -> None:
    """None left of either kind, or some: said once, shown as a metric, and the totals are exact."""
    truth = Truth()
    logs = [PiLog(tmp_path / ".mngr", f"agent-{number}", truth) for number in range(20)]
    for log in logs:
        log.message("p/m", 10**9)
    agent = PiInstance(tmp_path / ".pi/agent/telemetry/instances", 1)
    agent.write(1)
    with limited(tmp_path, what, most) as exporter:
        settled(exporter, truth)
        wait_for(lambda: exporter.logged("directories are polled instead"), "a warning")
        assert total(exporter.scrape(), POLLING) == 1
        for round_ in range(3):
            for log in logs:
                log.message("p/m", 10**9)
            spent(exporter, truth)
            agent.write(70 + round_)
            wait_for(partial(peak_is, exporter, 70 + round_), "the peak")
        assert len(exporter.logged("directories are polled instead")) == 1


@linux
def test_very_many_logs_are_no_trouble(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """Each in a directory of its own, all watched: peaks and new agents are seen, what is spent is committed."""
    count = amount(300, 10_000)
    truth = Truth()
    logs = [PiLog(tmp_path / ".mngr", f"agent-{number:05d}", truth) for number in range(count)]
    for log in logs:
        log.message("p/m", 10**9)
    agent = PiInstance(tmp_path / ".pi/agent/telemetry/instances", 1)
    agent.write(1)
    with Exporter(tmp_path) as exporter:
        wait_for(lambda: exporter.get("/-/ready").status == 200, "the first pass", deadline=120)
        settled(exporter, truth)
        spent(exporter, truth)
        chance = random.Random(3)
        began, used = time.monotonic(), cpu(exporter)
        for round_ in range(amount(3, 15)):
            for log in chance.sample(logs, 5):
                log.message("p/m", some_money(chance))
            PiLog(tmp_path / ".mngr", f"new-{round_}", truth).message("p/m", 10**9)
            peak_is_seen(exporter, agent, 40 + round_)
            spent(exporter, truth)
        share = (cpu(exporter) - used) / (time.monotonic() - began) * 100
        assert total(exporter.scrape(), POLLING) == 0
        journal, before = tmp_path / "state.db-wal", (tmp_path / "state.db-wal").stat().st_mtime_ns
        logs[-1].message("p/m", 10**9)
        wait_for(lambda: journal.stat().st_mtime_ns != before, "a commit that nobody asked for")
        print(f"{count} logs: {share:.0f} % of a core while scraped and written to, {memory(exporter):.0f} MB")


# -- rotation


class Writer:
    """An agent that writes, begins anew and is rotated, one rename after the other, at any call of the system."""

    def __init__(self, home: Path, chance: random.Random) -> None:
        self.log = ClaudeLog(home / "mngr", "a")
        self.left = 60
        self._chance, self._often = chance, chance.choice([0.005, 0.02, 0.05])
        self._renames: list[tuple[Path, Path]] = []
        self._at_work = False

    def hooked(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left > 0 and not self._at_work and self._chance.random() < self._often:
                self._at_work = True  # its own calls are none
                self._act()
                self._at_work = False
            return real(*arguments, **options)
        return call

    def finish(self) -> None:
        """What began to be renamed is renamed."""
        while self._renames:
            self._rename()

    def _act(self) -> None:
        if self._renames:
            self._rename()
            return
        self.left -= 1
        what = self._chance.randrange(9)
        if what == 0 and self.log.path.exists():
            parts = sorted(self.log.path.parent.glob("events.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
            self._renames = [(part, part.with_suffix(f".{int(part.suffix[1:]) + 1}")) for part in parts]
            self._renames.append((self.log.path, self.log.path.with_suffix(".jsonl.1")))
            return
        if what < 3:
            self.log.restart()
        self.log.spend("opus", self._chance.randrange(1, 10**12))

    def _rename(self) -> None:
        before, after = self._renames.pop(0)
        before.rename(after)


def test_a_log_that_is_rotated_between_any_two_calls_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: Callable[[int, int], int]
) -> None:
    """Whenever the exporter looks or reads, the log may have moved on: every reading counts once, in order."""
    seeds, events = amount(6, 300), 0
    for seed in range(seeds):
        home = tmp_path / str(seed)
        home.mkdir()
        writer = Writer(home, random.Random(seed))
        writer.log.spend("opus", 10**12)
        pipeline = Pipeline(settings(home, "--usage.root", f"m={home / 'mngr'}"))
        with monkeypatch.context() as patch:
            for name in ("stat", "open", "scandir", "pread", "fstat"):
                patch.setattr(os, name, writer.hooked(getattr(os, name)))
            while writer.left > 0:
                pipeline.step()
            writer.finish()
            drain(pipeline)
        counted = sum(value for (name, _), value in exact(pipeline).items() if name == "coding_agent_cost_usd_total")
        pipeline.close()
        assert counted == writer.log.truth.pico.total(), f"seed {seed}"
        events += sum(path.read_bytes().count(b"\n") for path in writer.log.path.parent.iterdir())
        shutil.rmtree(home)
    print(f"{seeds} seeds, {events:,} readings")


# -- descriptors


@linux
def test_without_free_descriptors_what_is_open_goes_on(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """No file can be opened and no connection accepted; afterwards all is read and answered, and nothing leaked."""
    truth, rounds = Truth(), amount(2, 50)
    log, session = PiLog(tmp_path / ".mngr", "a", truth), PiSession(tmp_path / ".pi/agent/sessions", truth)
    log.message("p/m", 10**9)
    with Exporter(tmp_path) as exporter:
        settled(exporter, truth)
        before = descriptors(exporter)
        limits = resource.prlimit(exporter.pid, resource.RLIMIT_NOFILE)
        for round_ in range(rounds):
            # 0: not one more; later some, which the clients below take.
            some = descriptors(exporter) + 3 * (round_ % 3)
            resource.prlimit(exporter.pid, resource.RLIMIT_NOFILE, (some, limits[1]))
            with ExitStack() as clients:
                for _ in range(20):
                    client = clients.enter_context(socket.create_connection(("127.0.0.1", exporter.port)))
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                log.message("p/m", 10**9)
                session.message("p", "s", 10**9)
                time.sleep(0.3)  # long enough to meet the limit; nothing is expected of it
                resource.prlimit(exporter.pid, resource.RLIMIT_NOFILE, limits)
                settled(exporter, truth)  # where no directory could be listed, that is tried again within a second
        wait_for(lambda: exporter.scrape() and descriptors(exporter) <= before, "descriptors to be given back")
        assert not exporter.logged("Traceback")


# -- the web port


@linux
def test_a_flood_leaves_nothing_behind(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """500 idle connections, readers that take nothing, half-closed clients, scrapes in 20 threads; and a server that
    scrapes as it should, which is answered each time. Then descriptors and threads are what they were."""
    floods, truth = amount(200, 5000), Truth()
    log = PiLog(tmp_path / ".mngr", "a", truth)
    log.message("p/m", 10**9)
    with Exporter(tmp_path) as exporter:
        settled(exporter, truth)
        before = descriptors(exporter), threads(exporter)
        answers: list[int] = []

        def flood() -> None:
            for _ in range(floods // 20):
                try:
                    answers.append(get(exporter.port).status)
                except OSError:
                    answers.append(0)

        with ExitStack() as clients:
            def connect(data: bytes) -> socket.socket:
                client = clients.enter_context(socket.create_connection(("127.0.0.1", exporter.port)))
                client.sendall(data)
                return client

            for _ in range(500):
                connect(b"")
            for _ in range(20):
                connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
                connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").shutdown(socket.SHUT_WR)
            workers = [threading.Thread(target=flood) for _ in range(20)]
            for worker in workers:
                worker.start()
            for _ in range(10):
                log.message("p/m", 10**9)
                wait_for(lambda: answered(exporter), "an answer to a server that asks again")
            for worker in workers:
                worker.join()
        spent(exporter, truth)
        wait_for(lambda: exporter.get("/-/healthy") and descriptors(exporter) <= before[0] + 1, "descriptors")
        wait_for(lambda: exporter.get("/-/healthy") and threads(exporter) <= before[1] + 1, "threads")
        assert set(answers) <= {0, 200, 503}
        print(f"{len(answers)} scrapes, {answers.count(200)} answered, {answers.count(503)} told to come back")


def answered(exporter: Exporter) -> bool:
    try:
        return exporter.get().status == 200
    except OSError:
        return False
