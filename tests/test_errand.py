"""A call that may never end holds up nobody, health tells of one; a long step hides no peak."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from agents_support import PiInstance, PiLog
from coding_agent_exporter import inputs
from coding_agent_exporter import pipeline as pipelines
from coding_agent_exporter.errand import within
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.watch import TimerWaker
from coding_agent_exporter.webapp import App
from support import scrape, settings, total

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_call_returns_or_raises_is_handed_on() -> None:
    """As if it had been called."""
    assert within(20, lambda: 17) == 17
    with pytest.raises(TimeoutError, match="its own"):
        within(20, lambda: raise_(TimeoutError("its own")))


def raise_(error: Exception) -> int:
    raise error


def test_a_call_that_does_not_end_is_left_alone() -> None:
    """Nobody waits longer than said."""
    gate = threading.Event()
    assert within(0.01, gate.wait) is None
    gate.set()


def test_a_scrape_waits_for_no_step_longer_than_its_patience(tmp_path: Path) -> None:
    """Another thread is in a step that does not end: what is known is shown, and /-/ready says so after a while."""
    pipeline = Pipeline(settings(tmp_path))
    pipeline.step()
    app = App(pipeline, TimerWaker(1))
    assert app.ready().status == 200
    gate, held = threading.Event(), threading.Event()

    def step() -> None:
        with pipeline._lock:
            pipeline._step_began = time.monotonic() - pipelines.SCRAPE_PATIENCE - 1
            held.set()
            gate.wait()
            pipeline._step_began = 0.0

    stuck = threading.Thread(target=step)
    stuck.start()
    held.wait()
    assert b"step_running_seconds 9" in app.metrics("", frozenset(), 0.02).body
    assert (app.ready().status, app.healthy().status) == (503, 200)
    gate.set()
    stuck.join()
    assert b"step_running_seconds 0.0" in app.metrics("", frozenset(), 10).body
    assert app.ready().status == 200
    pipeline.close()


def test_a_peak_within_a_long_step_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent comes near its limit and compacts while a step still looks at thousands of logs."""
    for number in range(800):
        PiLog(tmp_path / "mngr", f"agent-{number:03d}").message("p/m", 10**9)
    agent, real = PiInstance(tmp_path / "run", 1), os.stat
    agent.write(10)
    pipeline = Pipeline(settings(
        tmp_path, "--usage.root", f"m={tmp_path / 'mngr'}", "--telemetry.dir", f"t={tmp_path / 'run'}"))
    while pipeline.step():
        pass

    def stat(path: str, *arguments: Any, **options: Any) -> os.stat_result:
        for number, percent in (("agent-100", 97), ("agent-700", 20)):
            if f"/{number}/" in str(path) and str(path).endswith("events.jsonl"):
                agent.write(percent)
        return real(path, *arguments, **options)

    monkeypatch.setattr(inputs, "BREATH", 0.0)
    monkeypatch.setattr(os, "stat", stat)
    assert total(scrape(pipeline), "coding_agent_context_percent_peak", pid="1") == 97
    pipeline.close()
