"""What `top` knows: who does what, and what each session spent today and in the last minutes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agents_support import PiInstance, iso
from coding_agent_exporter.model import PICO
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.top.collect import Collector
from coding_agent_exporter.top.view import Agent, Spend, State, View
from coding_agent_exporter.usageperiod import Calendar
from support import CAPTURES, DATA, Clock, drain, exact, expected, settings
from usage_support import RECORDINGS, event, log, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDED = 1_795_230_000.0
"""Within an hour after the recordings, on their day in UTC."""

UUID = "01a1fbc2-74e7-70f3-8236-1cf90229f35d"


class Watch:
    """A collector over `home` at a time that the test sets; its temporary file lies in `home/tmp`."""

    def __init__(self, home: Path, *flags: str, at: float) -> None:
        self.clock = Clock(at)
        self.collector = Collector(settings(home, *flags), clock=self.clock, calendar=Calendar(utc=True))

    def look(self, at: float | None = None) -> View:
        """Everything that is on disk."""
        self.clock.now = self.clock.now if at is None else at
        while self.collector.step():
            pass
        return self.collector.view()


@pytest.fixture
def watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """Closes them, and makes sure that nothing of them is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    made: list[Watch] = []
    yield made
    for watch in made:
        watch.collector.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def billed(spend: Spend) -> float | None:
    return None if spend.billed is None else spend.billed.total / PICO


def heartbeat(home: Path, pid: int, at: float, *, session: str = UUID, percent: float | None = 40.0,
              activity: str = "working", **more: Any) -> None:
    """An instance file as of a time."""
    directory = home / "telemetry"
    directory.mkdir(exist_ok=True)
    (directory / f"{pid}.json").write_text(json.dumps({
        "schemaVersion": 2, "process": {"pid": pid, "startedAt": (RECORDED - 99_999) * 1000, "updatedAt": at * 1000},
        "session": {"id": session, "name": "tidy up"}, "state": {"activity": activity}, "lastEvent": "turn_start",
        "model": {"provider": "anthropic", "id": "opus"}, "workspace": {"git": {"branch": "main"}},
        "context": {"percent": percent, "contextWindow": 200_000}, **more}))


def only(view: View) -> Agent:
    assert len(view.agents) == 1, view.agents
    return view.agents[0]


# -- against the recordings


def test_today_is_what_the_daemon_counts(tmp_path: Path, watches: list[Watch]) -> None:
    """On the day of the recordings of all harnesses, read together: to the pico-USD, real and imputed apart."""
    watch = Watch(tmp_path, *RECORDINGS, at=RECORDED)
    watches.append(watch)
    today = watch.look().today
    pipeline = Pipeline(settings(tmp_path, *RECORDINGS), clock=Clock())
    drain(pipeline)
    counted = {"api_key": 0, "subscription": 0, "tokens": 0}
    for (name, labels), amount in exact(pipeline).items():
        if name == "coding_agent_cost_usd_total":
            counted[labels[4]] += amount
        elif name == "coding_agent_tokens_total":
            counted["tokens"] += amount
    pipeline.close()
    assert today.billed is not None
    assert today.imputed is not None
    assert {"api_key": today.billed.total, "subscription": today.imputed.total, "tokens": today.tokens} == counted
    assert today.billed.total > PICO


def test_each_recorded_agent_has_its_sessions_cost(tmp_path: Path, watches: list[Watch]) -> None:
    """A heartbeat names its session by uuid, a usage log by its file: what mngr's reader makes of it is in the line."""
    last = {}
    for line in (DATA / "heartbeats" / "pi.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry.get("doc"):
            last[entry["name"]] = entry["doc"]
    (tmp_path / "telemetry").mkdir()
    for name, document in last.items():
        document["process"]["updatedAt"] = RECORDED * 1000
        (tmp_path / "telemetry" / name).write_text(json.dumps(document))
    watch = Watch(tmp_path, f"--telemetry.dir=pi={tmp_path / 'telemetry'}", f"--usage.root=m={CAPTURES / 'pi'}",
                  at=RECORDED)
    watches.append(watch)
    agents = watch.look().agents
    wanted = {row["session_id"].rpartition("_")[2]: row["cost_usd"]
              for row in expected(CAPTURES / "pi", "expected-by-mngr-reader.json")["pi-coding"]["by_session"]}
    shown = {agent.session: billed(agent.today) for agent in agents}
    assert len(agents) == 5
    assert set(shown) <= set(wanted)
    assert shown == pytest.approx({session: wanted[session] for session in shown}, abs=1e-12)
    assert {agent.pid for agent in agents} == {int(name.partition(".")[0]) for name in last}


def test_sub_agents_are_their_agents_cost(tmp_path: Path, watches: list[Watch]) -> None:
    """A session that oh-my-pi started as a sub-agent has no line of its own: its cost is in that of the agent."""
    sessions = CAPTURES / "oh-my-pi" / "sessions"
    agent = "01a1fbd4-43a9-7458-b46a-e7da51bc947c"
    heartbeat(tmp_path, 7, RECORDED, session=agent)
    flags = (f"--telemetry.dir=omp={tmp_path / 'telemetry'}", f"--sessions.dir=omp={sessions}")
    whole = Watch(tmp_path, *flags, at=RECORDED)
    watches.append(whole)
    copy = tmp_path / "alone"
    for file in sessions.rglob(f"*{agent}.jsonl"):
        (copy / file.parent.name).mkdir(parents=True)
        shutil.copy(file, copy / file.parent.name)
    alone = Watch(tmp_path, flags[0], f"--sessions.dir=omp={copy}", at=RECORDED)
    watches.append(alone)
    with_them, without = (billed(only(watch.look()).today) for watch in (whole, alone))
    assert with_them is not None
    assert without is not None
    assert with_them > without > 0
    sub_agent = json.loads(next(sessions.rglob("SubOne.jsonl")).read_text().splitlines()[1])["id"]
    heartbeat(tmp_path, 7, RECORDED + 1, session=sub_agent)
    assert billed(only(whole.look(RECORDED + 1)).today) == with_them


# -- time


def test_today_begins_at_midnight(tmp_path: Path, watches: list[Watch]) -> None:
    """What was spent the day before is not in it, and it starts over while the screen is on."""
    midnight = RECORDED // 86_400 * 86_400
    root = log(tmp_path, "pi-coding",
               event(iso(midnight - 1), f"x_{UUID}", 1.0), event(iso(midnight + 1), f"x_{UUID}", 0.25))
    heartbeat(tmp_path, 7, midnight + 10)
    watch = Watch(tmp_path, f"--usage.root=m={root}", f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=midnight + 12)
    watches.append(watch)
    assert billed(only(watch.look()).today) == 0.25
    log(tmp_path, "pi-coding", event(iso(midnight + 60), f"x_{UUID}", 0.5))
    assert billed(only(watch.look(midnight + 70)).today) == 0.75
    next_day = midnight + 86_400
    assert watch.look(next_day + 1).today == Spend()
    log(tmp_path, "pi-coding", event(iso(next_day + 5), f"x_{UUID}", 2.0))
    heartbeat(tmp_path, 7, next_day + 6)
    view = watch.look(next_day + 7)
    assert billed(only(view).today) == 2.0
    assert billed(view.today) == 2.0


def test_rates_are_those_of_the_last_minutes(tmp_path: Path, watches: list[Watch]) -> None:
    """By the times of the messages, not by when they were read; repeated lines count once; then it fades."""
    first = event(iso(RECORDED - 400), f"x_{UUID}", 9.0, tokens=tokens(9000))
    second = event(iso(RECORDED - 60), f"x_{UUID}", 0.5, tokens=tokens(1000, 500, 3000, 500))
    imputed = event(iso(RECORDED - 30), "ses", 1.0, message_id="m", cost_mode="SUBSCRIPTION", tokens=tokens(5))
    root = log(tmp_path, "pi-coding", first, second, second)
    log(tmp_path, "opencode", imputed)
    heartbeat(tmp_path, 7, RECORDED)
    watch = Watch(tmp_path, f"--usage.root=m={root}", f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    view = watch.look()
    agent = next(agent for agent in view.agents if agent.pid)
    assert (agent.rate, view.window) == (1000.0, 300)
    assert agent.last == RECORDED - 60
    assert (view.billed / PICO, view.imputed / PICO, view.rate) == (6.0, 12.0, 1001.0)
    later = watch.look(RECORDED + 250)
    assert (later.billed, later.imputed, later.rate) == (0, 12 * PICO, 1.0)


def test_sessions_without_a_heartbeat(tmp_path: Path, watches: list[Watch]) -> None:
    """Claude Code, Codex and OpenCode have none: who used a model in the last quarter of an hour is shown all the same,
    without a pid, until it is quiet; a session that has a heartbeat is there once."""
    root = log(tmp_path, "opencode", event(iso(RECORDED - 100), "ses_1", 0.5, message_id="m", model="anthropic/opus"),
               event(iso(RECORDED - 1000), "ses_old", 0.5, message_id="n"))
    log(tmp_path, "claude", event(iso(RECORDED - 100), "run", 0.5))
    log(tmp_path, "pi-coding", event(iso(RECORDED - 10), f"x_{UUID}", 0.5))
    log(tmp_path, "pi-coding", event(iso(RECORDED - 10), f"x_{UUID[:-1]}e", 0.5, model="p/m"))
    heartbeat(tmp_path, 7, RECORDED)
    watch = Watch(tmp_path, f"--usage.root=m={root}", f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    agents = watch.look().agents
    assert {(agent.pid, agent.state, agent.root, agent.session, agent.model) for agent in agents} == {
        (7, State.WORKING, "pi", "tidy up", "opus"), (None, State.RECENT, "m", "ses_1", "opus"),
        (None, State.RECENT, "m", "run", "claude"), (None, State.RECENT, "m", f"{UUID[:-1]}e", "m")}
    assert [agent.pid for agent in watch.look(RECORDED + 891).agents] == [7]


# -- heartbeats


def test_a_peak_between_two_frames_is_seen(tmp_path: Path, watches: list[Watch]) -> None:
    """The highest percent stays for a minute, as in the exporter; unknown after a compaction is not 0."""
    watch = Watch(tmp_path, f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    for second, percent in enumerate((40.0, 97.5, None)):
        heartbeat(tmp_path, 7, RECORDED + second, percent=percent)
        agent = only(watch.look(RECORDED + second))
    assert (agent.percent, agent.peak, agent.branch, agent.since) == (None, 97.5, "main", RECORDED)
    heartbeat(tmp_path, 7, RECORDED + 70, percent=20)
    assert only(watch.look(RECORDED + 70)).peak == 20


def test_stale_and_gone(tmp_path: Path, watches: list[Watch]) -> None:
    """Time alone makes an agent stale: what it did is unknown then, what it cost is not. A removed file is an end."""
    heartbeat(tmp_path, 7, RECORDED)
    watch = Watch(tmp_path, f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    assert only(watch.look()).state is State.WORKING
    watch.clock.now = RECORDED + 11
    watch.collector.step(frozenset())
    stale = only(watch.collector.view())
    assert (stale.state, stale.since, stale.percent, stale.peak) == (State.STALE, RECORDED, None, None)
    (tmp_path / "telemetry" / "7.json").unlink()
    assert watch.look().agents == ()


def test_waiting_after_the_end_of_a_run(tmp_path: Path, watches: list[Watch]) -> None:
    """pi goes on saying `working` after `agent_end`: it waits for input, here as in the exporter."""
    heartbeat(tmp_path, 7, RECORDED, lastEvent="agent_end")
    watch = Watch(tmp_path, f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    assert only(watch.look()).state is State.WAITING


# -- reading


def test_agents_are_seen_before_the_logs_are_read(tmp_path: Path, watches: list[Watch]) -> None:
    """The first step shows who is there, and says that nothing has been read yet; the last one that all has."""
    root = log(tmp_path, "pi-coding", event(iso(RECORDED - 60), f"x_{UUID}", 0.5))
    heartbeat(tmp_path, 7, RECORDED)
    watch = Watch(tmp_path, f"--usage.root=m={root}", f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    assert watch.collector.step()
    view = watch.collector.view()
    assert (only(view).pid, view.reading, view.today) == (7, 0.0, Spend())
    view = watch.look()
    assert (view.reading, billed(view.today)) == (None, 0.5)
    assert len(set(watch.collector.read)) == 1


def test_what_cannot_be_read_is_counted(tmp_path: Path, watches: list[Watch]) -> None:
    """A heartbeat that is none, and a log that is no regular file."""
    heartbeat(tmp_path, 7, RECORDED)
    (tmp_path / "telemetry" / "8.json").write_text("{")
    root = log(tmp_path, "pi-coding", event(iso(RECORDED), f"x_{UUID}", 0.5), agent="b")
    os.mkfifo(root / "agents" / "b" / "events" / "pi-coding" / "usage" / "events.jsonl.1")
    watch = Watch(tmp_path, f"--usage.root=m={root}", f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=RECORDED)
    watches.append(watch)
    assert watch.look().unreadable == 2


def test_the_state_file_is_not_touched(tmp_path: Path, watches: list[Watch]) -> None:
    """It can run beside the exporter: what it has to remember lies elsewhere, and is gone at the end."""
    PiInstance(tmp_path / "telemetry", 7).write(12.0)
    watch = Watch(tmp_path, f"--telemetry.dir=pi={tmp_path / 'telemetry'}", at=time.time())
    watches.append(watch)
    watch.look()
    assert not (tmp_path / "state.db").exists()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
