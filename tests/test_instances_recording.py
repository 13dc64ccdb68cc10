"""Two recordings of real agents, replayed in time: what a sidecar shows of them, and what it counts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from coding_agent_exporter.decode.heartbeat import parse
from coding_agent_exporter.heartbeat import InstanceDir
from coding_agent_exporter.instances import Instances
from coding_agent_exporter.model import Activity, CounterKey, Heartbeat, Instance, Root

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parent / "data" / "heartbeats"
PI_START = 1795225187.721
OMP_START = 1795226354.795


class Sample(NamedTuple):
    """One write of a file, or its removal when `raw` is None."""

    t: float
    name: str
    raw: bytes | None


def recording(name: str, start: float) -> Iterator[Sample]:
    """Samples with `t` in seconds since the start of the recording."""
    for line in (DATA / name).read_text().splitlines():
        entry = json.loads(line)
        raw = json.dumps(entry["doc"]).encode() if "doc" in entry else None
        yield Sample(entry["t"] - start, entry["name"], raw)


def pi() -> Iterator[Sample]:
    return recording("pi.jsonl", PI_START)


def oh_my_pi() -> Iterator[Sample]:
    return recording("oh-my-pi.jsonl", OMP_START)


@dataclass
class Replay:
    """Feeds samples to Instances as a sidecar would: each write, then a tick, and scrapes at an interval."""

    start: float
    scrape_every: float = 15.0
    instances: Instances = field(default_factory=Instances)
    counters: dict[CounterKey, int] = field(default_factory=dict)
    scrapes: list[tuple[float, dict[int, Instance]]] = field(default_factory=list)
    after: list[tuple[float, dict[int, Instance]]] = field(default_factory=list)
    """The view after each sample."""

    def run(self, samples: Iterator[Sample], until: float) -> Replay:
        due = self.scrape_every
        for sample in samples:
            while due < sample.t:
                self.scrape(due)
                due += self.scrape_every
            self.feed(sample)
        while due <= until:
            self.scrape(due)
            due += self.scrape_every
        self.scrape(until)
        return self

    def feed(self, sample: Sample) -> None:
        now = self.start + sample.t
        if sample.raw is None:
            self.instances.gone("home", sample.name, now)
        else:
            heartbeat = parse(sample.raw)
            assert isinstance(heartbeat, Heartbeat)
            self.instances.observe("home", sample.name, heartbeat, now)
        self.step(now)
        self.after.append((sample.t, self.view(now)))

    def step(self, now: float) -> None:
        self.instances.tick(now)
        for key, amount in self.instances.take().items():
            self.counters[key] = self.counters.get(key, 0) + amount

    def scrape(self, t: float) -> None:
        self.step(self.start + t)
        self.scrapes.append((t, self.view(self.start + t)))
        self.instances.scraped(self.start + t)

    def view(self, now: float) -> dict[int, Instance]:
        return {instance.heartbeat.pid: instance for instance in self.instances.view(now)}

    def count(self, family: str) -> dict[tuple[str, ...], int]:
        """Counts by the labels after `root`."""
        return {labels[1:]: amount for (name, labels), amount in self.counters.items()
                if name == f"coding_agent_{family}_total"}

    def history(self, pid: int) -> Iterator[tuple[float, Instance]]:
        for t, view in self.after:
            if pid in view:
                yield t, view[pid]


def changes(replay: Replay, pid: int) -> list[tuple[float, Activity, float]]:
    """(when shown, activity, activity_since) at each change of activity; times since the start."""
    found: list[tuple[float, Activity, float]] = []
    for t, instance in replay.history(pid):
        if not found or found[-1][1] is not instance.activity:
            found.append((t, instance.activity, instance.activity_since - replay.start))
    return found


def test_activity_is_true_after_agent_end() -> None:
    """The agent waits from agent_end on, though its file says working until the next prompt 4 s later."""
    replay = Replay(OMP_START).run((s for s in oh_my_pi() if s.t < 8.5), until=8.5)
    shown, activities, since = zip(*changes(replay, 20007), strict=True)
    waiting, working = Activity.WAITING_INPUT, Activity.WORKING
    assert activities == (waiting, working, waiting, working, waiting)
    assert shown == pytest.approx((0.0, 3.99, 4.455, 7.977, 8.394), abs=0.01)
    assert since == pytest.approx((-0.03, 3.97, 4.438, 7.955, 8.382), abs=0.01)


def test_repeated_heartbeats_do_not_move_the_beginning_of_an_activity() -> None:
    """An agent that ended its run at 33.06 s still waits since then after ten more seconds of heartbeats."""
    replay = Replay(OMP_START).run((s for s in oh_my_pi() if s.t < 43), until=43)
    t, instance = list(replay.history(20007))[-1]
    assert t > 42
    assert instance.activity is Activity.WAITING_INPUT
    assert instance.activity_since - OMP_START == pytest.approx(33.06, abs=0.01)


def test_a_new_session_in_the_same_process_shows_and_is_no_loss() -> None:
    """10642 starts a session at 10.27 s, as a new writer: it owns the file 5 s later, and nothing died."""
    replay = Replay(PI_START).run((s for s in pi() if s.name == "10642.json"), until=23)
    sessions = [(t, instance.heartbeat.session_id[-4:]) for t, instance in replay.history(10642)]
    first = next(t for t, session in sessions if session == "907e")
    assert {session for t, session in sessions if t < first} == {"4902"}
    assert {session for t, session in sessions if t >= first} == {"907e"}
    assert 10.27 < first < 16.5
    assert not any(instance.stale for _, instance in replay.history(10642))
    assert replay.count("instances_lost") == {}


def test_a_new_session_shows_at_once_when_the_removal_in_between_was_seen() -> None:
    """pi removes the file before the new session writes it again: seeing that needs no waiting."""
    samples = [s for s in pi() if s.name == "10642.json"]
    switch = next(i for i, s in enumerate(samples) if s.t > 10.27)
    samples.insert(switch, Sample(10.26, "10642.json", None))
    replay = Replay(PI_START).run(iter(samples), until=23)
    shown = {instance.heartbeat.session_id[-4:] for t, instance in replay.history(10642) if t > 10.27}
    assert shown == {"907e"}
    assert replay.count("instances_lost") == {}


@pytest.mark.parametrize("interval", [15.0, 5.0, 12.0])
def test_peaks_of_a_third_of_a_second_are_seen_by_the_next_scrape(interval: float) -> None:
    """97 % (10646) and 93 % (10644) lasted 300 ms and were compacted away: the next scrape shows them."""
    replay = Replay(PI_START, scrape_every=interval).run(pi(), until=23)
    t, view = replay.scrapes[0]
    assert t == interval
    assert view[10646].context_percent_peak == pytest.approx(97.08, abs=0.01)
    assert view[10644].context_percent_peak == pytest.approx(93.09, abs=0.01)
    assert view[10646].heartbeat.context_percent is None
    assert view[10642].context_percent_peak == pytest.approx(0.51 if interval < 6 else 7.89, abs=0.01)


def test_a_peak_leaves_the_gauge_after_the_window() -> None:
    """With a window of 5 s and a scrape every 8 s the peak of 1.2 s shows in the first scrape only."""
    replay = Replay(PI_START, scrape_every=8, instances=Instances(peak_window=5)).run(pi(), until=23)
    peaks = [view[10646].context_percent_peak for _, view in replay.scrapes]
    assert peaks == [pytest.approx(97.08, abs=0.01), None, None]


def test_crossings_of_pi_are_counted_exactly() -> None:
    """10646 passes two levels, is compacted, passes one; 10644 passes one."""
    replay = Replay(PI_START).run(pi(), until=23)
    assert replay.count("context_limit_crossings") == {("approaching_limit",): 3, ("near_limit",): 1}


def test_compactions_of_pi_are_counted_but_for_those_no_heartbeat_tells() -> None:
    """Ten of twelve: one followed another within 25 ms, one ended after its session was replaced."""
    replay = Replay(PI_START).run(pi(), until=23)
    assert replay.count("compactions") == {(): 10}


def test_compactions_are_left_to_the_session_files_on_request() -> None:
    """A caller that counts them elsewhere gets none from heartbeats."""
    instances = Instances()
    for sample in pi():
        heartbeat = parse(sample.raw or b"")
        assert isinstance(heartbeat, Heartbeat)
        instances.observe("home", sample.name, heartbeat, PI_START + sample.t, False)  # noqa: FBT003 -- its place
    assert not any("compactions" in family for family, _ in instances.take())


@pytest.mark.parametrize(("step", "counted"), [(0.25, 10), (0.5, 8), (1.0, 6)])
def test_most_compactions_are_counted_when_looks_are_rarer(step: float, counted: int) -> None:
    """Some events are then overwritten before they are seen, and the vanished percent tells."""
    latest: dict[tuple[str, int], Sample] = {}
    for sample in pi():
        latest[sample.name, int(sample.t / step)] = sample
    replay = Replay(PI_START).run(iter(sorted(latest.values())), until=23)
    assert replay.count("compactions") == {(): counted}


def test_a_killed_process_is_lost_once() -> None:
    """10648 was killed at 14.6 s and left its file; the others are still there."""
    replay = Replay(PI_START)
    replay.run(pi(), until=23.5)
    assert replay.count("instances_lost") == {}
    for t in (24.0, 25.0, 26.0, 30.0):
        replay.step(PI_START + t)
    # The recording ends at 23 s, and that of 10644 before: it too has not been seen to remove its file.
    stale = {pid for pid, instance in replay.view(PI_START + 30).items() if instance.stale}
    assert stale == {10648, 10644}
    assert replay.count("instances_lost") == {(): 2}


def test_a_process_that_removes_its_file_is_not_lost() -> None:
    """All but the killed one shut down gracefully, as they did when this was recorded."""
    replay = Replay(PI_START)
    ends = {"10644.json": 15.5, "10642.json": 23.4, "10646.json": 23.4, "11056.json": 23.4}
    samples = sorted([*pi(), *(Sample(t, name, None) for name, t in ends.items())])
    replay.run(iter(samples), until=60)
    assert replay.count("instances_lost") == {(): 1}
    assert [(pid, instance.stale) for pid, instance in replay.view(PI_START + 60).items()] == [(10648, True)]


def test_two_writers_of_one_file_do_not_flap() -> None:
    """While a sub-agent writes the same file, the process's own session, model and percent are shown."""
    replay = Replay(OMP_START).run(oh_my_pi(), until=45)
    raw = [json.loads(s.raw) for s in oh_my_pi() if s.raw and s.name == "20007.json"]
    assert len({document["session"]["id"] for document in raw}) == 2
    shown = [instance for _, instance in replay.history(20007)]
    assert len({instance.heartbeat.session_id for instance in shown}) == 1
    assert len({instance.heartbeat.started_at for instance in shown}) == 1
    percents = [instance.heartbeat.context_percent for t, instance in replay.history(20007) if 33.1 < t < 43]
    assert set(percents) == {98.5}
    assert not any(instance.stale for t, instance in replay.history(20007) if t < 50)
    heartbeats = [instance.heartbeat.updated_at for instance in shown]
    assert heartbeats == sorted(heartbeats)
    assert heartbeats[-1] - OMP_START > 45


@pytest.mark.parametrize("step", [3.7, 5.0, 7.0, 15.0])
def test_two_writers_do_not_flap_when_looks_are_rare(step: float) -> None:
    """A look finds one of the two by chance: that alone does not hand the gauges over."""
    latest: dict[int, Sample] = {}
    for sample in oh_my_pi():
        if sample.name == "20007.json":
            latest[int(sample.t / step)] = sample
    replay = Replay(OMP_START).run(iter(latest.values()), until=45)
    assert len({instance.heartbeat.session_id for _, instance in replay.history(20007)}) == 1
    assert replay.count("instances_lost") == {}


def test_crossings_of_oh_my_pi_are_counted_exactly() -> None:
    """87.5, 96.5, 102.5 % step by step, then 98.5 % at one blow: the sub-agent's readings add none."""
    replay = Replay(OMP_START).run(oh_my_pi(), until=60)
    assert replay.count("context_limit_crossings") == {
        ("approaching_limit",): 2, ("near_limit",): 2, ("at_limit",): 1}
    assert replay.count("compactions") == {(): 1}
    peak = max(view[20007].context_percent_peak or 0 for _, view in replay.scrapes)
    assert peak == pytest.approx(102.5)


def test_leftovers_of_sigkill_and_sigterm_are_lost_and_a_graceful_end_is_not() -> None:
    """20007 and 20280 leave their files behind; 20363 removes its own."""
    replay = Replay(OMP_START).run(oh_my_pi(), until=120)
    assert replay.count("instances_lost") == {(): 2}
    assert {pid: instance.stale for pid, instance in replay.view(OMP_START + 120).items()} == {
        20007: True, 20280: True}


def test_the_same_through_real_files(tmp_path: Path) -> None:
    """Written to a directory and scanned, a recording gives the counters of one that was fed directly."""
    folder = InstanceDir(Root("telemetry", "home", tmp_path))
    direct, scanned = Replay(OMP_START), Replay(OMP_START)
    present: frozenset[str] = frozenset()
    for sample in oh_my_pi():
        direct.feed(sample)
        now = OMP_START + sample.t
        path = tmp_path / sample.name
        if sample.raw is None:
            path.unlink()
        else:
            scratch = tmp_path / f"{sample.name}.tmp-1"
            scratch.write_bytes(sample.raw)
            os.utime(scratch, ns=(int(now * 1e9), int(now * 1e9)))
            scratch.rename(path)
        scan = folder.scan()
        for name, heartbeat in scan.changed:
            scanned.instances.observe("home", name, heartbeat, now)
        for name in present - scan.present:
            scanned.instances.gone("home", name, now)
        present = scan.present
        scanned.step(now)
        assert scanned.view(now) == direct.view(now)
    for replay in (direct, scanned):
        replay.step(OMP_START + 120)
    assert scanned.counters == direct.counters
    assert scanned.count("instances_lost") == {(): 2}
