"""Agents that a Python program drives, seen by the exporter as a process: as all others."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from agents_support import Truth
from coding_agent_exporter.integrations.pidriver import observed
from coding_agent_exporter.model import PICO
from otlp_receiver import http_receiver
from process_support import Exporter, wait_for
from rpc_support import PIDS, Replay, session_file
from support import CAPTURES, total

if TYPE_CHECKING:
    from pathlib import Path


def truth(*agents: str) -> Truth:
    """What mngr's own writer logged of the recorded processes."""
    found = Truth()
    for agent in agents:
        log = CAPTURES / "pi" / "agents" / agent / "events" / "pi-coding" / "usage" / "events.jsonl"
        for line in map(json.loads, log.read_text().splitlines()):
            provider, _, model = line["model"].partition("/")
            tokens = tuple(line["tokens"][kind] for kind in ("input", "output", "cache_read", "cache_creation"))
            found.add(("pi-coding", provider, model, "api_key"), round(line["cost"]["total_cost_usd"] * PICO), tokens)
    return found


def drivers(home: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Any]:
    """Transports of recorded processes, as a driver of this user makes them: one line, no settings."""
    monkeypatch.setenv("HOME", str(home))
    for variable in ("PI_TELEMETRY_DIR", "MNGR_HOST_DIR", "MNGR_AGENT_STATE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return [observed(Replay)(name) for name in names]


async def run(transports: list[Any], *, close: bool) -> None:
    for transport in transports:
        await transport.start()
        for _ in range(len(transport.frames)):
            await transport.receive()
    for transport in transports:
        if close:
            await transport.aclose()
            transport._recorder.join()


@pytest.mark.parametrize("with_sessions", [False, True])
def test_usage_is_counted_once(with_sessions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter and drivers of one user, all with their defaults: to the token, also beside pi's session files."""
    if with_sessions:
        place = tmp_path / ".pi" / "agent" / "sessions" / "--srv-project--"
        place.mkdir(parents=True)
        for name in ("a", "b", "c"):
            shutil.copy(session_file(name), place)
        shutil.copy(session_file("a", 1), place)
    transports = drivers(tmp_path, monkeypatch, "a", "b", "c", "b2")
    with Exporter(tmp_path) as exporter:
        asyncio.run(run(transports, close=True))
        wanted = truth("agent-a", "agent-b", "agent-c")
        wait_for(lambda: not wanted.differences(exporter.scrape()), f"usage of {wanted.usd} USD")
        samples = exporter.scrape()
        assert total(samples, "coding_agent_messages_total") == wanted.messages.total()
        assert total(samples, "coding_agent_sessions_total") == 5
        assert total(samples, "coding_agent_exporter_rejected_total") == 0


def test_the_gauges_show_what_the_agents_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activity, context, peaks that a compaction ended, compactions; a process that dies is lost."""
    transports = drivers(tmp_path, monkeypatch, "c", "d")
    pids = {name: str(PIDS[name]) for name in ("c", "d")}
    with Exporter(tmp_path, "--telemetry.stale-after=1500ms", "--telemetry.peak-window=10m") as exporter:
        async def steps() -> None:
            c, d = transports
            await c.start()
            await asyncio.to_thread(
                wait_for, lambda: total(exporter.scrape(), "coding_agent_instances") == 1, "the first agent")
            while c.frames:
                frame = await c.receive()
                # A scrape at the end of each message: what a watching exporter sees without one.
                if frame["type"] in {"agent_end", "compaction_end"}:
                    await asyncio.to_thread(_see, exporter, pids["c"], frame["type"])
            await run([d], close=False)
            await asyncio.to_thread(wait_for, lambda: activity(exporter, pids["d"]) == {"working": 1.0}, "d to work")
            samples = await asyncio.to_thread(exporter.scrape)
            assert total(samples, "coding_agent_context_percent_peak", pid=pids["c"]) == pytest.approx(97.08, abs=0.1)
            assert total(samples, "coding_agent_compactions_total") == 2
            assert total(samples, "coding_agent_context_limit_crossings_total", pressure="near_limit") == 1
            assert total(samples, "coding_agent_context_window_tokens", pid=pids["d"]) == 200_000
            assert activity(exporter, pids["c"]) == {"waiting_input": 1.0}
            d.__dict__["_inner"].died(-9)
            await asyncio.to_thread(
                wait_for, lambda: total(exporter.scrape(), "coding_agent_instances_lost_total") == 1, "the loss")
            await c.aclose()
            await asyncio.to_thread(
                wait_for, lambda: total(exporter.scrape(), "coding_agent_instances") == 0, "no agents")
            assert total(await asyncio.to_thread(exporter.scrape), "coding_agent_instances_lost_total") == 1

        asyncio.run(steps())


def test_messages_become_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without session files: one span for each call, with the times and figures of the frames."""
    with http_receiver() as receiver, Exporter(
        tmp_path, f"--otlp.endpoint={receiver.url}", "--otlp.pi-spans=usage", "--otlp.backfill",
    ) as exporter:
        asyncio.run(run(drivers(tmp_path, monkeypatch, "a", "c"), close=True))
        wanted = truth("agent-a", "agent-c").messages.total()
        wait_for(lambda: len(receiver.spans) >= wanted, f"{wanted} spans")
        spans = list(receiver.spans)
        assert exporter.terminate() == 0
    assert len({span.span_id for span in spans}) == wanted
    assert {span.name for span in spans} == {"chat sonnet-like", "chat haiku-like", "chat tiny-ctx"}


def activity(exporter: Exporter, pid: str) -> dict[str, float]:
    return {dict(labels)["activity"]: value for (name, labels), value in exporter.scrape().items()
            if name == "coding_agent_activity" and dict(labels)["pid"] == pid and value}


def _see(exporter: Exporter, pid: str, event: str) -> None:
    def percent() -> list[float]:
        return [value for (name, labels), value in exporter.scrape().items()
                if name == "coding_agent_context_percent" and dict(labels)["pid"] == pid]

    wait_for(lambda: percent()[:1] > [50.0] if event == "agent_end" else not percent(), event)
