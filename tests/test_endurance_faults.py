"""Faults of disks, directories, file servers and clocks that the real program meets while agents go on spending.

During the fault a scrape is answered and the rest is counted; after it the totals are exact.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from agents_support import ClaudeLog, OpenCodeLog, PiInstance, PiLog, PiSession, Truth, some_money, some_tokens
from faults_support import COMMITS, RUNNING, Faults, mounted, settled, spent, unreadable
from process_support import Exporter, Scrapes, run, wait_for
from support import Samples, parse, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class Agents:
    """Some agents of each kind below one home, one truth."""

    def __init__(self, home: Path, seed: int) -> None:
        self.truth, self.chance = Truth(), random.Random(seed)
        self.root, self.sessions = home / ".mngr", home / ".pi/agent/sessions"
        self.logs = [PiLog(self.root, f"pi-{number}", self.truth) for number in range(3)]
        self.opencode = OpenCodeLog(self.root, "opencode", self.truth)
        self.claude = ClaudeLog(self.root, "claude", self.truth)
        self.session = PiSession(self.sessions, self.truth)

    def spend(self, times: int = 1) -> bool:
        """Write some of each; False, so that it can be part of a condition."""
        for _ in range(times):
            chance = self.chance
            chance.choice(self.logs).message(f"p/m{chance.randrange(3)}", some_money(chance), some_tokens(chance))
            self.opencode.message("p/open", some_money(chance), some_tokens(chance))
            self.claude.spend("opus", some_money(chance))
            self.session.message("p", "session", some_money(chance), some_tokens(chance))
        return False


# -- the state file


@contextmanager
def full_disk(_: Exporter, disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    yield
    filler.unlink()


@contextmanager
def file_limit(exporter: Exporter, disk: Path) -> Iterator[None]:
    """What a quota does: no file may grow."""
    before = resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE)
    least = min(path.stat().st_size for path in disk.glob("state/state.db*") if path.suffix != ".lock")
    resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE, (least // 2, before[1]))
    yield
    resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def moved(_: Exporter, disk: Path) -> Iterator[None]:
    """Another directory lies where the state was."""
    place = disk / "state"
    place.rename(disk / "aside")
    place.mkdir()
    yield
    place.rmdir()
    (disk / "aside").rename(place)


@contextmanager
def deleted_and_restored(_: Exporter, disk: Path) -> Iterator[None]:
    """Somebody moves the file itself away, and back."""
    file, aside = disk / "state" / "state.db", disk / "state" / "aside.db"
    file.rename(aside)
    yield
    aside.rename(file)


# Killed elsewhere, the next process would begin a state of its own.
@pytest.mark.parametrize(("fault", "killed"), [
    (full_disk, False), (full_disk, True), (file_limit, False), (moved, False), (deleted_and_restored, False)])
def test_a_state_file_that_cannot_be_written_costs_nothing(
    fault: Callable[[Exporter, Path], AbstractContextManager[None]], killed: bool, tmp_path: Path,
    amount: Callable[[int, int], int],
) -> None:
    """Counters stand still, one line says so, /-/ready says 503; then the totals are exact, and stay so."""
    seed = 7
    agents, rounds = Agents(tmp_path, seed), amount(1, 25)
    with mounted(tmp_path / "disk", "16m") as disk:
        state = disk / "state" / "state.db"
        with Exporter(tmp_path, f"--state.path={state}") as exporter:
            agents.spend(3)
            settled(exporter, agents.truth)
            for _ in range(rounds):
                before = exporter.scrape()
                with fault(exporter, disk), Scrapes(exporter) as scrapes:
                    # The write-ahead log may have room of its own for a while.
                    wait_for(lambda: agents.spend() or exporter.get("/-/ready").status == 503, "the exporter to notice")
                    still = exporter.scrape()
                    agents.spend(5)
                    wait_for(lambda: scrapes.count >= 3, "scrapes")
                    during = exporter.scrape()
                    if killed:
                        exporter.kill()
                assert scrapes.fallen == []
                assert total(during, "coding_agent_cost_usd_total") <= agents.truth.usd + 1e-9
                assert total(during, COMMITS, outcome="failed") > total(before, COMMITS, outcome="failed")
                assert total(during, "coding_agent_messages_total") == total(still, "coding_agent_messages_total")
                if killed:
                    exporter.start()
                settled(exporter, agents.truth)
                assert exporter.get("/-/ready").status == 200
                assert killed or exporter.logged("can be written again")
            assert len(exporter.logged("counters stand still")) == rounds
            exporter.kill()
            exporter.start()
            settled(exporter, agents.truth)
            assert not exporter.logged("Traceback")
    print(f"{rounds} times, {agents.truth.usd:.2f} USD")


def test_a_read_only_disk_is_refused_at_the_start_in_one_line(tmp_path: Path) -> None:
    """With the path and the reason, exit code 1; no traceback."""
    with mounted(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, lines = run(tmp_path, f"--state.path={disk / 'state.db'}")
        assert code == 1
        assert len(lines) == 1
        assert str(disk / "state.db") in lines[0]
        assert "Read-only file system" in lines[0]


# -- inputs


@contextmanager
def failing(faults: Faults, root: Path, number: int) -> Iterator[None]:
    faults.meet(root / "agents/pi-1", "stat", "lstat", "open", "scandir", "pread", errno=number)
    yield
    faults.none()


@contextmanager
def renamed(_: Faults, root: Path, __: int) -> Iterator[None]:
    place = root / "agents/pi-1"
    place.rename(root / "aside")
    yield
    if place.exists():
        shutil.rmtree(place)
    (root / "aside").rename(place)


@contextmanager
def root_gone(_: Faults, root: Path, __: int) -> Iterator[None]:
    aside = root.with_name("aside")
    root.rename(aside)
    yield
    aside.rename(root)


@contextmanager
def mounted_over(_: Faults, root: Path, __: int) -> Iterator[None]:
    with mounted(root):
        yield


@contextmanager
def mode_zero(_: Faults, root: Path, __: int) -> Iterator[None]:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    place = root / "agents/pi-1/events"
    place.chmod(0)
    yield
    place.chmod(0o755)


FAULTS = {
    "EIO": (failing, errno.EIO), "ESTALE": (failing, errno.ESTALE), "EACCES": (failing, errno.EACCES),
    "EMFILE": (failing, errno.EMFILE), "ETIMEDOUT": (failing, errno.ETIMEDOUT), "renamed": (renamed, 0),
    "root gone": (root_gone, 0), "mounted over": (mounted_over, 0), "mode 0": (mode_zero, 0),
}


@pytest.mark.parametrize("what", FAULTS)
def test_inputs_that_cannot_be_read_for_a_while_lose_nothing(
    what: str, tmp_path: Path, amount: Callable[[int, int], int]
) -> None:
    """Written to before, in and after the fault; the others are counted meanwhile, by the very scrape that asks."""
    fault, number = FAULTS[what]
    truth, other, rounds = Truth(), Truth(), amount(2, 40)
    lame = PiLog(tmp_path / "a", "pi-1", truth)
    claude = ClaudeLog(tmp_path / "a", "pi-1", truth)
    well = PiLog(tmp_path / "b", "pi-2", other)
    faults = Faults(tmp_path)
    flags = (f"--usage.root=a={tmp_path / 'a'}", f"--usage.root=b={tmp_path / 'b'}")
    with Exporter(tmp_path, *flags, env=faults.env) as exporter:
        for log in (lame, well):
            log.message(f"p/{log.agent}", 10**12)
        claude.spend("opus", 10**12)
        exporter.scrape()
        for round_ in range(rounds):
            lame.message("p/pi-1", 10**9)
            with fault(faults, tmp_path / "a", number):
                for _ in range(3):
                    well.message("p/pi-2", 10**9)
                    if what in {"EIO", "EACCES", "EMFILE", "ESTALE", "ETIMEDOUT", "mode 0"}:
                        lame.message("p/pi-1", 10**9)
                        claude.spend("opus", 10**9)
                    during = exporter.scrape()
                    assert total(during, "coding_agent_cost_usd_total", root="b") == pytest.approx(other.usd, abs=1e-9)
                if what in {"EIO", "EACCES", "EMFILE", "ETIMEDOUT"}:
                    assert unreadable(during) >= 1
            lame.message("p/pi-1", 10**9)
            claude.spend("opus", 10**9)
            both = Truth(truth.pico + other.pico, truth.tokens + other.tokens, truth.messages + other.messages)
            after = settled(exporter, both)
            if round_ % 5 == 1:
                exporter.kill()
                exporter.start()
                after = settled(exporter, both)
        wait_for(lambda: unreadable(exporter.scrape()) == 0, "all to be readable")
        assert total(after, "coding_agent_messages_total", root="a") >= 2 * rounds
        assert not exporter.logged("Traceback")
    print(f"{what}: {rounds} times")


def test_a_root_that_appears_late_is_read_from_its_first_byte(tmp_path: Path) -> None:
    """None of the directories exists when the exporter starts, nor the one above them."""
    home = tmp_path / "not" / "yet"
    flags = (f"--usage.root={home / 'mngr'}", f"--sessions.dir={home / 'sessions'}", f"--telemetry.dir={home / 'run'}")
    with Exporter(tmp_path, *flags) as exporter:
        exporter.scrape()
        truth = Truth()
        log, session = PiLog(home / "mngr", "a", truth), PiSession(home / "sessions", truth)
        log.message("p/m", 10**12)
        session.message("p", "s", 10**12)
        agent = PiInstance(home / "run", 1)
        agent.write(50)
        settled(exporter, truth)
        agent.write(97)
        agent.write(10)
        assert total(exporter.scrape(), "coding_agent_context_percent", pid="1") == 10


# -- disks that do not answer


def test_a_scrape_answers_though_a_file_server_does_not(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """With what the scrape before has shown, and how long the step has taken; health says so, one line is logged."""
    truth, faults = Truth(), Faults(tmp_path)
    log = PiLog(tmp_path / ".mngr", "a", truth)
    with Exporter(tmp_path, env=faults.env) as exporter:
        log.message("p/m", 10**12)
        exporter.scrape()
        before = spent(exporter, truth)
        faults.meet(tmp_path / ".mngr", "open", hang=True)
        log.message("p/m", 10**12)
        for _ in range(3):
            during = impatient(exporter)
            assert total(during, "coding_agent_cost_usd_total") == total(before, "coding_agent_cost_usd_total")
        assert total(during, RUNNING) > 0
        assert exporter.get("/-/healthy").status == 200
        if amount(0, 1):  # it takes the patience of a scrape: 8 s
            wait_for(lambda: exporter.get("/-/ready").status == 503, "the exporter to say so")
        assert len(exporter.logged("does not answer")) == 1
        faults.none()
        after = settled(exporter, truth)
        assert total(after, RUNNING) == 0
        assert exporter.get("/-/ready").status == 200
        faults.meet(tmp_path / ".mngr", "open", hang=True)
        log.message("p/m", 10**12)
        impatient(exporter)
        exporter.kill()  # what the system does with a process that does not end
        faults.none()
        exporter.start()
        settled(exporter, truth)


def impatient(exporter: Exporter) -> Samples:
    """A scrape that waits half a second at most."""
    reply = exporter.get(headers={"X-Prometheus-Scrape-Timeout-Seconds": "0.5"})
    assert reply.status == 200
    return parse(reply.text)


def test_a_slow_file_server_delays_and_loses_nothing(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """Each call takes a while; a scrape that cannot wait shows what is known, and the next ones the rest."""
    truth, faults = Truth(), Faults(tmp_path)
    logs = [PiLog(tmp_path / ".mngr", f"agent-{number}", truth) for number in range(amount(3, 30))]
    near = PiSession(tmp_path / ".pi/agent/sessions", truth)
    with Exporter(tmp_path, env=faults.env) as exporter:
        exporter.scrape()
        faults.meet(tmp_path / ".mngr", "stat", "open", delay=0.02)
        with Scrapes(exporter) as scrapes:
            for log in logs:
                log.message("p/m", 10**9)
                near.message("p", "near", 10**9)
                impatient(exporter)
        settled(exporter, truth)
        assert scrapes.fallen == []
        faults.none()
        spent(exporter, truth)


# -- clocks


def test_a_clock_that_jumps_about_loses_and_doubles_nothing(
    tmp_path: Path, amount: Callable[[int, int], int]
) -> None:
    """The exporter's, by hours and days both ways, while logs are rotated and the exporter is killed."""
    seed, jumps = 11, amount(4, 200)
    agents, faults = Agents(tmp_path, seed), Faults(tmp_path)
    chance = agents.chance
    with Exporter(tmp_path, env=faults.env) as exporter:
        exporter.scrape()
        for jump in range(jumps):
            agents.spend(3)
            settled(exporter, agents.truth)
            faults.clock(chance.choice([0, 1, -1]) * chance.uniform(0, 90 * 3600))
            agents.spend(2)
            if chance.random() < 0.4:
                agents.claude.rotate()
                agents.spend()
            if chance.random() < 0.3:
                agents.claude.restart()
            if chance.random() < 0.3:
                chance.choice(agents.logs).replay(exporter.scrape)
            if jump % 4 == 3:
                exporter.kill()
                exporter.start()
            settled(exporter, agents.truth)
        assert not exporter.logged("Traceback")
    print(f"seed {seed}: {jumps} jumps, {agents.truth.usd:.2f} USD")
