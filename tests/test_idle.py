"""What heartbeats cost while nothing else happens: one file is read, and what matters in it is not lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Self

import pytest

from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.serve import MIN_INTERVAL
from coding_agent_exporter.watch import DEBOUNCE_MS, STEP_MS
from support import Clock, drain, exact, scrape, settings, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CROSSINGS = "coding_agent_context_limit_crossings_total"


class Desk:
    """An exporter that has read all there is, and one agent that it has seen alive."""

    def __init__(self, home: Path) -> None:
        self.clock = Clock()
        self.telemetry = home / "instances"
        self.telemetry.mkdir()
        self.path = self.telemetry / "77.json"
        self.flags = (f"--telemetry.dir=pi={self.telemetry}", f"--usage.root=logs={home / 'logs'}")
        self.log = home / "logs" / "agents" / "a" / "events" / "pi-coding" / "usage" / "events.jsonl"
        self.home = home
        self.beat()
        self.start()

    def start(self) -> None:
        self.pipeline = Pipeline(settings(self.home, *self.flags), clock=self.clock)
        drain(self.pipeline)
        scrape(self.pipeline)

    def beat(self, percent: float = 10.0, pressure: str = "normal") -> None:
        part = self.telemetry / "77.json.tmp-77"
        part.write_text(json.dumps({
            "process": {"pid": 77, "startedAt": 1_000, "updatedAt": round(self.clock.now * 1000)},
            "session": {"id": "s"}, "state": {"activity": "working"}, "lastEvent": "turn_end",
            "context": {"percent": percent, "tokens": 1, "contextWindow": 100, "pressure": pressure},
        }))
        part.rename(self.path)

    def told(self, *paths: Path) -> bool:
        """A step that a notification causes, a moment later than the one before."""
        self.clock.now += 0.1
        return self.pipeline.step(changes=frozenset(map(str, paths)))

    def write(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps({
                "source": "pi-coding/usage", "type": "cost_snapshot", "event_id": f"evt-{file.tell()}",
                "timestamp": "2027-01-15T08:00:00Z", "session_id": "s", "cost": {"total_cost_usd": 1.0}, "model": "a/b",
            }) + "\n")


def refuse(what: str) -> Callable[..., object]:
    def called(*_: object, **__: object) -> object:
        raise AssertionError(what)

    return called


def test_a_heartbeat_asks_for_no_log_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty agents write thirteen times a second: all that is done then is to read what they wrote."""
    desk = Desk(tmp_path)
    desk.clock.now += 1
    desk.pipeline.step()
    monkeypatch.setattr(desk.pipeline.inputs, "step", refuse("logs were looked at"))
    monkeypatch.setattr(desk.pipeline._store, "commit", refuse("something was committed"))
    for _ in range(5):
        desk.beat(20.0)
        assert not desk.told(desk.path, desk.path.with_name("77.json.tmp-77"))
    assert [one.heartbeat.context_percent for one in desk.pipeline._instances.view(desk.clock.now)] == [20.0]
    desk.pipeline.close()


def test_a_crossing_between_scrapes_is_committed_by_the_step_that_saw_it(tmp_path: Path) -> None:
    """A crash right after it does not take it back, and the peak stays to be seen."""
    desk = Desk(tmp_path)
    desk.beat(97.0, "near_limit")
    desk.told(desk.path)
    assert exact(desk.pipeline)[CROSSINGS, ("pi", "near_limit")] == 1
    desk.beat(10.0)
    desk.told(desk.path)
    shown = scrape(desk.pipeline)
    assert total(shown, "coding_agent_context_percent_peak") == 97.0
    desk.pipeline.close()  # as a crash leaves it: nothing is written at the end
    desk.start()
    assert exact(desk.pipeline)[CROSSINGS, ("pi", "near_limit")] == 1
    assert total(scrape(desk.pipeline), CROSSINGS, pressure="near_limit") == 1
    desk.pipeline.close()


def test_a_process_that_died_is_noticed_while_others_write(tmp_path: Path) -> None:
    """The steps that they cause look at the time too, and count and store the loss."""
    desk = Desk(tmp_path)
    for _ in range(120):
        desk.told(desk.telemetry / "78.json")
    assert exact(desk.pipeline)["coding_agent_instances_lost_total", ("pi",)] == 1
    desk.pipeline.close()


def test_what_nobody_knows_is_looked_for_everywhere(tmp_path: Path) -> None:
    """A new log, and a path that some systems name differently than the settings do, in one change with a heartbeat."""
    desk = Desk(tmp_path)
    desk.write()
    desk.beat(30.0)
    desk.told(tmp_path / "elsewhere", desk.path)
    assert exact(desk.pipeline)["coding_agent_messages_total", ("logs", "pi-coding", "a", "b", "api_key")] == 1
    desk.write()
    desk.beat(40.0)
    desk.told(desk.log, desk.path)
    assert exact(desk.pipeline)["coding_agent_messages_total", ("logs", "pi-coding", "a", "b", "api_key")] == 2
    desk.write()
    desk.beat(97.0, "near_limit")
    desk.told(tmp_path / "elsewhere")
    assert exact(desk.pipeline)[CROSSINGS, ("pi", "near_limit")] == 1
    desk.pipeline.close()


class Told(frozenset[str]):
    """A set in an order that the test chooses, as chance does in a real one."""

    paths: list[str]

    def __new__(cls, *paths: Path) -> Self:
        made = super().__new__(cls, map(str, paths))
        made.paths = [str(path) for path in paths]
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)


@pytest.mark.parametrize("turned", [False, True])
def test_what_one_notification_tells_of_is_read_in_the_order_of_all(tmp_path: Path, turned: bool) -> None:
    """A message that a usage log and a session file know is the log's, whichever of them is named first."""
    uuid, at = "00000000-0000-7000-8000-000000000001", "2027-01-15T08:00:00.000Z"
    log = tmp_path / "logs" / "agents" / "a" / "events" / "pi-coding" / "usage" / "events.jsonl"
    session = tmp_path / "sessions" / "--srv--" / f"2027-01-15T07-59-00-000Z_{uuid}.jsonl"
    for path in (log, session):
        path.parent.mkdir(parents=True)
    log.touch()
    session.write_text(json.dumps({"type": "session", "version": 3, "id": uuid, "timestamp": at}) + "\n")
    flags = (f"--usage.root=logs={tmp_path / 'logs'}", f"--sessions.dir=pi={tmp_path / 'sessions'}")
    pipeline = Pipeline(settings(tmp_path, *flags), clock=Clock())
    drain(pipeline)
    with log.open("a") as file:
        file.write(json.dumps({
            "source": "pi-coding/usage", "type": "cost_snapshot", "event_id": "evt-1", "timestamp": at,
            "session_id": session.stem, "cost": {"total_cost_usd": 1.0}, "model": "a/b"}) + "\n")
    with session.open("a") as file:
        file.write(json.dumps({"type": "message", "id": "1", "timestamp": at, "message": {
            "role": "assistant", "provider": "a", "model": "b", "usage": {"cost": {"total": 1.0}},
            "timestamp": 1_800_000_000_000}}) + "\n")
    pipeline.step(changes=Told(session, log) if turned else Told(log, session))
    cost = {labels[0]: amount for (name, labels), amount in exact(pipeline).items()
            if name == "coding_agent_cost_usd_total"}
    assert cost == {"logs": 10**12}
    pipeline.close()


def test_a_peak_of_250_ms_outlasts_the_time_between_two_looks() -> None:
    """The longest that nothing is read while files change, by design: with a quarter of the peak's time to spare."""
    noticed = STEP_MS * (1 + -(-DEBOUNCE_MS // STEP_MS))  # the notifier's ticks: one sees it, and no burst lasts longer
    assert MIN_INTERVAL * 1000 + noticed <= 0.75 * 250


def test_logs_below_a_telemetry_directory_are_read_when_they_are_told_of(tmp_path: Path) -> None:
    """They are no heartbeats, wherever they lie."""
    desk = Desk(tmp_path)
    desk.pipeline.close()
    desk.log = desk.telemetry / "logs" / "agents" / "a" / "events" / "pi-coding" / "usage" / "events.jsonl"
    desk.flags = (f"--telemetry.dir=pi={desk.telemetry}", f"--usage.root=logs={desk.telemetry / 'logs'}")
    desk.log.parent.mkdir(parents=True)
    desk.log.touch()
    desk.start()
    desk.write()
    desk.told(desk.log)
    assert sum(exact(desk.pipeline).values()) > 0
    desk.pipeline.close()
