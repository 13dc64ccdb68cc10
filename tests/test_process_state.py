"""What becomes of the running program when its state file is damaged, moved, or taken by another one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from agents_support import PiInstance, PiLog
from process_support import Exporter, counters, fallen, wait_for
from support import total

COST = "coding_agent_cost_usd_total"


def test_damage_that_is_found_while_it_runs_ends_it_with_one_line(tmp_path: Path) -> None:
    """A session's account has a wrong bit; it is read when the session goes on. Scrapes get no reply that is wrong."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path) as exporter:
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        assert exporter.terminate() == 0
        state = tmp_path / "state.db"
        with closing(sqlite3.connect(state)) as db:
            blob = db.execute("SELECT value FROM accounts WHERE key LIKE 'session%'").fetchone()[0]
        content = state.read_bytes()
        assert content.count(blob) == 1
        place = content.index(blob) + len(blob) // 2
        state.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
        before = len(exporter.lines)
        exporter.start()
        assert exporter.get().status == 200
        log.message("anthropic/opus", 10**12)
        assert exporter.wait() == 1
        assert [line for line in exporter.lines[before:] if "level=error" in line] == exporter.lines[-1:]
        assert "cannot go on" in exporter.lines[-1]
        assert "is damaged (a row of accounts was changed); restore a copy" in exporter.lines[-1]
        assert exporter.logged("Traceback") == []


def test_a_span_that_was_damaged_ends_it_and_is_not_sent(tmp_path: Path) -> None:
    """The worker finds it; the loop ends the program."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    flags = ("--otlp.pi-spans=usage", "--otlp.endpoint=http://127.0.0.1:1")
    with Exporter(tmp_path, *flags) as exporter:
        log.message("anthropic/opus", 10**12)
        log.new_session()
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        assert total(exporter.scrape(), "coding_agent_exporter_spans_pending") > 0
        assert exporter.terminate() == 0
        state = tmp_path / "state.db"
        content = state.read_bytes()
        place = content.rindex(b"chat opus")
        state.write_bytes(content[:place] + b"shot" + content[place + 4:])
        exporter.start()
        wait_for(lambda: not _answers(exporter), "the end", every=0.1)  # each scrape is a step
        assert exporter.wait() == 1
        assert "is damaged (a row of outbox was changed)" in exporter.lines[-1]
        assert exporter.logged("Traceback") == []


def _answers(exporter: Exporter) -> bool:
    try:
        return exporter.get().status == 200
    except OSError:
        return False


def test_a_state_directory_that_is_moved_away_stops_the_counters_until_it_is_back(tmp_path: Path) -> None:
    """What would be committed to it the next start would not find: it says so, and goes on otherwise."""
    log, agent = PiLog(tmp_path / ".mngr", "agent-1"), PiInstance(tmp_path / ".pi/agent/telemetry/instances", 7)
    place = tmp_path / "place"
    with Exporter(tmp_path, f"--state.path={place / 'state.db'}") as exporter:
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        before = exporter.scrape()
        place.rename(tmp_path / "elsewhere")
        log.message("anthropic/opus", 10**12)
        agent.write(20)
        during = exporter.scrape()
        assert counters(during) == counters(before)
        assert total(during, "coding_agent_context_percent", pid="7") == 20
        assert exporter.get("/-/ready").status == 503
        assert exporter.get("/-/healthy").status == 200
        assert len(exporter.logged("moved or deleted while it was in use")) == 1
        assert not place.exists()
        (tmp_path / "elsewhere").rename(place)
        exporter.scrape()
        after = exporter.scrape()
        assert fallen(before, after) == []
        assert log.truth.differences(after) == []
        assert exporter.get("/-/ready").status == 200
        assert exporter.terminate() == 0


def test_two_exporters_on_one_state_whose_lock_file_was_deleted(tmp_path: Path) -> None:
    """The one that came later goes on; the other one ends before it commits anything, and counts nothing twice."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    with Exporter(tmp_path) as first:
        log.message("anthropic/opus", 10**12)
        first.scrape()
        first.scrape()
        (tmp_path / "state.db.lock").unlink()
        with Exporter(tmp_path) as second:
            log.message("anthropic/opus", 10**12)
            second.scrape()
            assert first.wait() == 1
            assert "in use by another exporter" in first.lines[-1]
            assert first.logged("Traceback") == []
            log.message("anthropic/opus", 10**12)
            assert log.truth.differences(second.scrape()) == []
            assert second.get("/-/healthy").status == 200
            wait_for(lambda: second.get("/-/ready").status == 200, "readiness")
            assert total(second.scrape(), COST) == 3
