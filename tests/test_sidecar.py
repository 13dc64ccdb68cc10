"""The contract of a sidecar, without a cluster: an agent and the exporter in containers of their own, and a volume.

Each has its own processes, mounts and user, and no capability; the exporter has a root that is read-only, and reads
the volume through a mount that is.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from process_support import wait_for
from sidecar_support import AGENT_UID, EXPORTER_UID, SHARED_GID, Container, agent, exporter, require_namespaces
from support import Samples, total

if TYPE_CHECKING:
    from collections.abc import Callable

USD = 10**12
COST = "coding_agent_cost_usd_total"
LOST = "coding_agent_instances_lost_total"
HEARTBEAT = "coding_agent_instance_heartbeat_timestamp_seconds"
STALE = "coding_agent_instance_stale"
REJECTED = "coding_agent_exporter_rejected_total"
FILES = "coding_agent_exporter_files"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """The shared volume as `fsGroup` makes it: of root and the group, which new files are in too."""
    require_namespaces(tmp_path / "try")
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 0, SHARED_GID)
    volume.chmod(0o2770)
    return volume


def running(samples: Samples) -> dict[str, float]:
    """Pids that have an instance, and whether it is stale."""
    return {dict(labels)["pid"]: value for (name, labels), value in samples.items() if name == STALE}


def scraped(sidecar: Container, condition: Callable[[Samples], bool], what: str) -> Samples:
    """Scrape until it holds; the samples in which it did."""
    seen: list[Samples] = []

    def look() -> bool:
        seen.append(sidecar.scrape())
        return condition(seen[-1])

    wait_for(look, what, every=0.05)
    return seen[-1]


def test_the_sidecar_is_as_bare_as_it_says(volume: Path, tmp_path: Path) -> None:
    """Another user, no capability, nothing to gain, a root and a volume it cannot write: what follows relies on it."""
    with exporter(tmp_path / "sidecar", volume) as sidecar:
        status = sidecar.listens().status()
        mounts = Path(f"/proc/{sidecar.pid}/mountinfo").read_text().splitlines()
    assert status["Uid"].split() == status["Gid"].split() == [str(EXPORTER_UID)] * 4
    assert status["Groups"] == str(SHARED_GID)
    assert status["NSpid"].split() == [str(sidecar.pid), "1"]
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    options = {words[4]: words[5].split(",") for words in map(str.split, mounts)}
    for inside in ("/", "/agent"):
        assert {"ro", "nosuid", "nodev"} <= set(options[inside]), inside


def test_reads_an_agent_it_shares_nothing_but_a_directory_with(volume: Path, tmp_path: Path) -> None:
    """pid 7 of the agent's own namespace, which is nobody in the exporter's: its instance, cost and tokens are there.

    The agent's umask leaves its files to the volume's group alone.
    """
    with exporter(tmp_path / "sidecar", volume) as sidecar, agent(tmp_path / "agent", volume, pid=7) as pi:
        sidecar.listens().scrape()
        assert pi.ask("beat", 42.5) == "7"
        pi.ask("session", "opus", USD // 4)
        pi.ask("usage", "haiku", 3 * USD)
        sidecar.scrape()
        seen = sidecar.scrape()
        files = {path: path.stat() for path in volume.rglob("*") if path.is_file()}
    assert total(seen, "coding_agent_context_percent", root="pi", pid="7") == 42.5
    assert total(seen, "coding_agent_instances", root="pi", activity="working") == 1
    assert total(seen, COST, root="pi", model="opus") == 0.25
    assert total(seen, COST, root="mngr", model="haiku") == 3
    assert total(seen, "coding_agent_tokens_total", root="pi", model="opus") == 26
    assert total(seen, FILES, state="unreadable") == 0
    assert len(files) == 3
    assert {(found.st_uid, found.st_gid, found.st_mode & 0o777) for found in files.values()} == \
        {(AGENT_UID, SHARED_GID, 0o640)}


def test_an_agent_is_alive_while_its_heartbeat_is(volume: Path, tmp_path: Path) -> None:
    """Long after a silent one would be stale: that its pid is nobody's where the exporter looks is no sign."""
    flags = ("--telemetry.stale-after=1s",)
    with exporter(tmp_path / "sidecar", volume, *flags) as sidecar, agent(tmp_path / "agent", volume, pid=7) as pi:
        sidecar.listens()
        pi.ask("beat", 1)
        first = total(scraped(sidecar, lambda seen: "7" in running(seen), "the agent"), HEARTBEAT)

        def later(seen: Samples) -> bool:
            # A machine that is busy may hold up the agent itself.
            fresh = total(seen, HEARTBEAT) > time.time() - 0.9
            assert running(seen) == {"7": 0} or not fresh, "stale although its heartbeat is fresh"
            return fresh and total(seen, HEARTBEAT) > first + 3

        seen = scraped(sidecar, later, "heartbeats of three seconds")
    assert total(seen, LOST) == 0


@pytest.mark.parametrize("pid", [1, 7])
def test_a_killed_agent_is_lost_once(pid: int, volume: Path, tmp_path: Path) -> None:
    """kill -9 leaves the file behind: stale when its time is up, and counted as lost one time.

    Also pid 1, which does exist where the exporter looks: it is the exporter itself.
    """
    flags = ("--telemetry.stale-after=1s",)
    with exporter(tmp_path / "sidecar", volume, *flags) as sidecar, agent(tmp_path / "agent", volume, pid=pid) as pi:
        sidecar.listens()
        pi.ask("beat", 10)
        scraped(sidecar, lambda seen: running(seen) == {str(pid): 0}, "the agent")
        pi.kill()
        seen = scraped(sidecar, lambda seen: running(seen) == {str(pid): 1}, "the agent to be stale")
        assert total(seen, "coding_agent_instances") == 0
        seen = scraped(sidecar, lambda seen: total(seen, LOST) > 0, "the loss to be counted")
        for _ in range(3):
            seen = sidecar.scrape()
        assert total(seen, LOST, root="pi") == 1
        assert (volume / "telemetry" / f"{pid}.json").exists()


def test_an_agent_that_ends_is_gone_and_not_lost(volume: Path, tmp_path: Path) -> None:
    """It takes its file away: no instance is left, and none is lost when its time would have been up."""
    flags = ("--telemetry.stale-after=1s",)
    with exporter(tmp_path / "sidecar", volume, *flags) as sidecar, agent(tmp_path / "agent", volume) as pi:
        sidecar.listens()
        pi.ask("beat", 10)
        seen = scraped(sidecar, lambda seen: running(seen) == {"1": 0}, "the agent")
        heartbeat = total(seen, HEARTBEAT)
        assert pi.finish() == 0
        wait_for(lambda: time.time() > heartbeat + 2, "its time to be up")
        seen = sidecar.scrape()
    assert running(seen) == {}
    assert total(seen, LOST) == 0


def test_the_last_turn_is_scraped_after_the_agent_has_ended(volume: Path, tmp_path: Path) -> None:
    """The order of a native sidecar: the agent ends, then SIGTERM, then two scrapes, and the exporter ends with 0.

    The first of the two shows the new series at zero, the second shows what the last turn cost.
    """
    with exporter(tmp_path / "sidecar", volume, "--shutdown.linger=1h") as sidecar:
        with agent(tmp_path / "agent", volume) as pi:
            sidecar.listens()
            pi.ask("beat", 10)
            scraped(sidecar, lambda seen: running(seen) == {"1": 0}, "the agent")
            pi.ask("session", "opus", USD // 4)
            assert pi.finish() == 0
        sidecar.signal(signal.SIGTERM)
        wait_for(lambda: "msg=stopping" in sidecar.log, "the linger to begin")
        first, second = sidecar.scrape(), sidecar.scrape()
        assert sidecar.wait() == 0
    assert (total(first, COST, model="opus"), total(second, COST, model="opus")) == (0, 0.25)
    assert COST in {name for name, _ in first}, "zero is shown, not left out"
    assert running(second) == {}
    assert "final=true" in sidecar.log


def test_the_state_goes_on_in_the_next_container(volume: Path, tmp_path: Path) -> None:
    """The container is killed and another one started on the same volumes: the same totals, and no file read twice."""
    with agent(tmp_path / "agent", volume) as pi:
        with exporter(tmp_path / "one", volume) as sidecar:
            pi.ask("session", "opus", USD)
            sidecar.listens().scrape()
            scraped(sidecar, lambda seen: total(seen, COST) == 1, "the turn")
            sidecar.kill()
        pi.ask("session", "opus", USD)
        with exporter(tmp_path / "two", volume) as sidecar:
            scraped(sidecar.listens(), lambda seen: total(seen, COST) == 2, "both turns")
            sidecar.signal()
            assert sidecar.wait() == 0


def test_files_that_may_not_be_read_are_said_to_be_unreadable(volume: Path, tmp_path: Path) -> None:
    """Files of mode 0600 in directories that are open: counted by kind, not taken for an agent that does nothing."""
    with exporter(tmp_path / "sidecar", volume) as sidecar, agent(tmp_path / "agent", volume, umask=0o077) as pi:
        sidecar.listens()
        pi.ask("beat", 10)
        pi.ask("session", "opus", USD)
        for path in volume.rglob("*"):
            if path.is_dir():
                path.chmod(0o2770)
        seen = scraped(sidecar, lambda seen: total(seen, FILES, state="unreadable") == 2, "two unreadable files")
        session, heartbeat = next(volume.glob("sessions/*/*.jsonl")), next(volume.rglob("*.json"))
        wait_for(lambda: session.name in sidecar.log and heartbeat.name in sidecar.log, "the log to name both files")
    assert total(seen, FILES, kind="telemetry", state="unreadable") == 1
    assert total(seen, FILES, kind="sessions", state="unreadable") == 1
    assert (running(seen), total(seen, COST)) == ({}, 0)


def test_directories_that_may_not_be_read_are_named_in_the_log(volume: Path, tmp_path: Path) -> None:
    """Directories of mode 0700, as an agent makes them that knows nothing of groups; once they are open, all counts."""
    with exporter(tmp_path / "sidecar", volume) as sidecar, agent(tmp_path / "agent", volume, umask=0o077) as pi:
        sidecar.listens()
        pi.ask("beat", 10)
        pi.ask("session", "opus", USD)
        seen = scraped(sidecar, lambda seen: total(seen, REJECTED, kind="telemetry", reason="unreadable") == 1,
                       "the telemetry directory to be reported")
        wait_for(lambda: "path=/agent/sessions reason=permission" in sidecar.log, "the log to name the directory")
        assert (running(seen), total(seen, COST)) == ({}, 0)
        for path in volume.rglob("*"):
            path.chmod(0o2770 if path.is_dir() else 0o640)
        scraped(sidecar, lambda seen: total(seen, COST) == 1, "what was spent")
