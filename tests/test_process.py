"""The program as a process: it starts, serves, refuses to start, is asked to stop, and outlives a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sqlite3
import time
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest

from agents_support import ClaudeLog, OpenCodeLog, PiInstance, PiLog, PiSession, Truth
from process_support import Exporter, counters, fallen, run, wait_for
from support import total

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COST = "coding_agent_cost_usd_total"
COMMITS = "coding_agent_exporter_store_commits_total"


def test_starts_with_nothing_there_and_serves_all_pages(tmp_path: Path) -> None:
    """No directory exists, nothing is configured: it is ready, healthy, and has a page for people."""
    with Exporter(tmp_path) as exporter:
        wait_for(lambda: exporter.get("/-/ready").status == 200, "readiness")
        assert exporter.get("/-/healthy").status == 200
        page = exporter.get("/")
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "/metrics" in page.text
        assert total(exporter.scrape(), "coding_agent_exporter_build_info") == 1
        assert exporter.get("/nothing").status == 404
        assert exporter.terminate() == 0
    assert list((tmp_path / ".pi").glob("*")) == [], "nothing is made where agents keep their files"


def test_directories_that_appear_later_are_read_under_their_default_names(tmp_path: Path) -> None:
    """pi, oh-my-pi and mngr are installed while the exporter runs: no restart, and no default is forgotten."""
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        PiInstance(tmp_path / ".pi/agent/telemetry/instances", 4711).write(12.5)
        PiLog(tmp_path / ".mngr", "agent-1").message("anthropic/opus", 10**12)
        PiSession(tmp_path / ".pi/agent/sessions").message("anthropic", "haiku", 3 * 10**12)
        exporter.scrape()
        seen = exporter.scrape()
    assert total(seen, "coding_agent_context_percent", root="pi", pid="4711") == 12.5
    assert total(seen, COST, root="mngr", model="opus") == 1
    assert total(seen, COST, root="pi", model="haiku") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0(number: int, tmp_path: Path) -> None:
    """Without a linger it says that it stops, and stops."""
    with Exporter(tmp_path) as exporter:
        exporter.signal(number)
        assert exporter.wait() == 0
    assert exporter.logged("stopped")


def test_what_was_written_right_before_the_signal_is_read_before_the_end(tmp_path: Path) -> None:
    """Without a linger, without notification, and though the log is gone when the next one starts."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path, "--watch.force-polling", "--watch.poll-interval=1h") as exporter:
        exporter.scrape()
        log.message("anthropic/opus", 10**12)
        assert exporter.terminate() == 0
        log.delete()
        exporter.start()
        exporter.scrape()
        assert total(exporter.scrape(), COST) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_linger_at_once(number: int, tmp_path: Path) -> None:
    """A person who presses ctrl-C twice does not want to wait for a scrape."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path, "--shutdown.linger=1h") as exporter:
        log.message("anthropic/opus", 1)
        exporter.signal(number)
        wait_for(lambda: exporter.logged("stopping"), "the linger to begin")
        exporter.signal(number)
        began = time.monotonic()
        exporter.wait()
        assert time.monotonic() - began < 30


def test_linger_shows_the_last_turn_and_ends_soon_after_it_was_seen(tmp_path: Path) -> None:
    """A model's first and last turn, written right before SIGTERM: two scrapes make it an increase after zero."""
    log = OpenCodeLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path, "--shutdown.linger=1h") as exporter:
        exporter.scrape()
        log.message("anthropic/opus", 250_000_000_000, (1, 2, 3, 4))
        exporter.signal()
        wait_for(lambda: exporter.logged("stopping"), "the linger to begin")
        first, second = exporter.scrape(), exporter.scrape()
        assert exporter.wait() == 0
    assert (total(first, COST, model="opus"), total(second, COST, model="opus")) == (0, 0.25)
    assert (COST in {name for name, _ in first}), "zero is shown, not left out"
    assert total(second, "coding_agent_tokens_total", model="opus") == 10
    assert exporter.logged("final=true")


def test_linger_ends_when_its_time_is_up(tmp_path: Path) -> None:
    """Nobody scrapes; what was read is in the state all the same."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path, "--shutdown.linger=300ms") as exporter:
        exporter.scrape()
        log.message("anthropic/opus", 10**12)
        assert exporter.terminate() == 0
        assert exporter.logged("final=false")
        log.delete()
        exporter.start()
        exporter.scrape()
        assert total(exporter.scrape(), COST) == 1


def test_linger_ends_at_once_when_everything_had_been_seen(tmp_path: Path) -> None:
    """Idle, scraped, asked to stop: there is nothing to wait for."""
    with Exporter(tmp_path, "--shutdown.linger=1h") as exporter:
        PiLog(tmp_path / ".mngr", "agent-1").message("anthropic/opus", 10**12)
        exporter.scrape()
        exporter.scrape()
        assert exporter.terminate() == 0


def test_a_second_exporter_on_one_state_file_refuses_to_start(tmp_path: Path) -> None:
    """Two would count everything twice: the second says so in one line, the first goes on."""
    with Exporter(tmp_path) as exporter:
        code, lines = run(tmp_path)
        assert code == 1
        assert len(lines) == 1
        assert "state.db is in use by another exporter" in lines[0]
        assert exporter.get("/-/healthy").status == 200


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()


@pytest.mark.parametrize(
    ("spoil", "says"), [(_garbage, "damaged"), (_truncated, "damaged"), (_newer, "newer version")]
)
def test_a_state_file_that_cannot_be_used_is_one_line_and_left_alone(
    spoil: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    """Starting over in silence would lose the totals: a person has to decide."""
    PiLog(tmp_path / ".mngr", "agent-1").message("anthropic/opus", 10**12)
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        assert exporter.terminate() == 0
    state = tmp_path / "state.db"
    spoil(state)
    content = state.read_bytes()
    code, lines = run(tmp_path)
    assert code == 1
    assert len(lines) == 1
    assert says in lines[0]
    assert str(state) in lines[0]
    assert state.read_bytes() == content


def test_a_state_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A path below a regular file stands for a read-only volume: it fails for root too."""
    (tmp_path / "file").write_text("")
    code, lines = run(tmp_path, f"--state.path={tmp_path / 'file' / 'state.db'}")
    assert code == 1
    assert len(lines) == 1
    assert "cannot write the state file" in lines[0]


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    """The line names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, lines = run(tmp_path, f"--web.listen-address={address}")
    assert code == 1
    assert len(lines) == 1
    assert f"cannot listen on {address}" in lines[0]


@pytest.mark.parametrize("room", [0, 3000], ids=["no byte more", "room for a part of a commit"])
def test_a_full_disk_stops_the_counters_and_nothing_else(room: int, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the middle of a transaction.

    Scrapes are answered, gauges move, readiness says what is wrong, and once there is room again every message
    of that time is counted, once.
    """
    truth = Truth()
    pi, claude = PiLog(tmp_path / ".mngr", "agent-1", truth), ClaudeLog(tmp_path / ".mngr", "agent-2", truth)
    agent = PiInstance(tmp_path / ".pi/agent/telemetry/instances", 7)
    with Exporter(tmp_path) as exporter:
        pi.message("anthropic/opus", 10**12)
        claude.spend("opus", 5 * 10**11)
        agent.write(10)
        exporter.scrape()
        before = exporter.scrape()
        log = tmp_path / "state.db-wal"
        soft, hard = resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE, ((log.stat().st_size + room) if room else 0, hard))
        for number in range(40):
            pi.message(f"anthropic/new-{number}", 10**9)
        claude.spend("opus", 7 * 10**11)
        agent.write(20)
        during = [exporter.scrape() for _ in range(3)]
        assert exporter.get("/-/ready").status == 503
        assert exporter.get("/-/healthy").status == 200
        assert exporter.get("/").status == 200
        for seen in during:
            assert counters(seen) == counters(before)
            assert total(seen, COMMITS, outcome="failed") >= 1
        assert total(during[-1], "coding_agent_context_percent", pid="7") == 20
        resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE, (soft, hard))
        exporter.scrape()
        after = exporter.scrape()
        assert exporter.get("/-/ready").status == 200
        assert fallen(before, after) == []
        assert truth.differences(after) == []
        assert len(exporter.logged("counters stand still")) == 1
        exporter.kill()
        exporter.start()
        assert truth.differences(exporter.scrape()) == []


def test_a_disk_that_is_full_when_it_is_asked_to_stop_does_not_keep_it(tmp_path: Path) -> None:
    """It ends, and what could not be stored is read again by the next one."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        _, hard = resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(exporter.pid, resource.RLIMIT_FSIZE, (0, hard))
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        exporter.terminate()
        exporter.start()
        exporter.scrape()
        assert log.truth.differences(exporter.scrape()) == []


def test_a_password_in_the_web_configuration_counts_from_the_next_request_on(tmp_path: Path) -> None:
    """Changing it needs no restart, and the old one is worth nothing any more."""
    import bcrypt

    config = tmp_path / "web.yml"

    def write(password: str) -> None:
        digest = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
        beside = tmp_path / "web.yml.new"
        beside.write_text(f"basic_auth_users:\n  prometheus: {digest}\n")
        beside.rename(config)

    def status(exporter: Exporter, password: str) -> int:
        token = b64encode(f"prometheus:{password}".encode()).decode()
        return exporter.get("/metrics", {"Authorization": f"Basic {token}"}).status

    write("first")
    with Exporter(tmp_path, f"--web.config.file={config}") as exporter:
        assert exporter.get().status == 401
        assert (status(exporter, "first"), status(exporter, "second")) == (200, 401)
        write("second")
        assert (status(exporter, "first"), status(exporter, "second")) == (401, 200)
        assert exporter.terminate() == 0


@pytest.mark.parametrize("log_format", ["json", "logfmt"])
def test_every_line_of_the_log_has_its_format(log_format: str, tmp_path: Path) -> None:
    """From the first line to the last, with a warning about a file in between."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    log.path.mkdir(parents=True)
    with Exporter(tmp_path, f"--log.format={log_format}", "--log.level=debug") as exporter:
        exporter.scrape()
        assert exporter.terminate() == 0
    assert exporter.logged(str(log.path)), "the directory in the place of a log is named"
    for line in exporter.lines:
        if log_format == "json":
            assert json.loads(line).keys() >= {"ts", "level", "msg"}
        else:
            assert line.startswith("ts=")
    assert exporter.logged("listening")
    assert exporter.logged("stopped")
