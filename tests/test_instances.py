"""Instances, on readings made up for one rule each: life and death, writers, crossings, peaks, restarts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coding_agent_exporter.decode.heartbeat import derive_pressure
from coding_agent_exporter.families import COMPACTIONS, CROSSINGS, LOST
from coding_agent_exporter.instances import Instances
from coding_agent_exporter.model import Activity, Heartbeat, Instance

T = 1_795_225_000.0
NAME = "7.json"


def beat(at: float, percent: float | None = 10.0, *, started: float | None = 0.0, session: str = "s",
         event: str = "turn_end", activity: Activity = Activity.WORKING, pending: bool = False,
         every: float = 1.0, window: float | None = 200_000.0, pid: int = 7) -> Heartbeat:
    """A reading written `at` seconds after T by a writer that started `started` seconds after T."""
    return Heartbeat(
        pid=pid, started_at=None if started is None else T + started, updated_at=T + at,
        heartbeat_seconds=every, activity=activity, has_pending_messages=pending, last_event=event, session_id=session,
        context_percent=percent, context_window=window, pressure=derive_pressure(percent))


class Rig:
    """Instances with a clock in seconds after T, one file and running totals of its counters."""

    def __init__(self, instances: Instances | None = None) -> None:
        self.instances = instances or Instances()
        self.totals: dict[str, int] = {}

    def see(self, heartbeat: Heartbeat, delay: float = 0.1, *, now: float | None = None) -> None:
        """One look that finds this reading `delay` seconds after it was written, or at `now`."""
        now = heartbeat.updated_at + delay if now is None else T + now
        self.instances.observe("home", NAME, heartbeat, now)
        self.instances.tick(now)

    def live(self, *times: float, **fields: object) -> None:
        for at in times:
            self.see(beat(at, **fields))  # type: ignore[arg-type]  # the caller's names are those of beat

    def look(self, at: float) -> None:
        """One look that finds nothing changed."""
        self.instances.tick(T + at)

    def gone(self, at: float) -> None:
        self.instances.gone("home", NAME, T + at)
        self.instances.tick(T + at)

    def only(self, at: float) -> Instance:
        instance, = self.instances.view(T + at)
        return instance

    def count(self, family: str, *labels: str) -> int:
        for (name, rest), amount in self.instances.take().items():
            key = " ".join((name, *rest[1:]))
            self.totals[key] = self.totals.get(key, 0) + amount
        return self.totals.get(" ".join((family, *labels)), 0)

    @property
    def lost(self) -> int:
        return self.count(LOST.name)

    @property
    def compactions(self) -> int:
        return self.count(COMPACTIONS.name)

    @property
    def crossings(self) -> tuple[int, int, int]:
        approaching, near, at = (self.count(CROSSINGS.name, level)
                                 for level in ("approaching_limit", "near_limit", "at_limit"))
        return approaching, near, at


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Life and death


def test_a_process_that_falls_silent_is_stale_and_lost_once(rig: Rig) -> None:
    """Ten seconds after its last heartbeat it is stale; that counts once, however long the file stays."""
    rig.live(0, 1, 2)
    rig.look(12)
    assert (rig.only(12).stale, rig.lost) == (False, 0)
    rig.look(12.1)
    assert (rig.only(12.1).stale, rig.lost) == (True, 1)
    rig.look(100)
    rig.look(3000)
    rig.gone(3001)
    assert rig.lost == 1


def test_a_process_that_removes_its_file_is_not_lost(rig: Rig) -> None:
    """Also when we look long after its last heartbeat."""
    rig.live(0, 1)
    rig.gone(60)
    rig.look(100)
    assert (rig.instances.view(T + 100), rig.lost) == ([], 0)


def test_a_process_that_comes_back_can_be_lost_again(rig: Rig) -> None:
    """A stopped process or a sleeping laptop: fresh again after the pause; a second loss is a second one."""
    rig.live(0, 1)
    rig.look(30)
    rig.live(600, 601)
    assert (rig.only(601.1).stale, rig.lost) == (False, 1)
    rig.look(602)
    rig.look(640)
    rig.look(660)
    assert rig.lost == 2


def test_a_leftover_is_stale_but_not_lost(rig: Rig) -> None:
    """A file that was old when first seen belongs to a process that this exporter never saw alive."""
    rig.see(beat(0, 98.5), now=500)
    rig.look(501)
    rig.look(600)
    assert rig.only(600).stale
    assert (rig.lost, rig.crossings) == (0, (0, 0, 0))


def test_stale_instances_are_forgotten_after_a_while() -> None:
    """The file may stay for ever, the instance is hidden an hour after it went stale, and can come back."""
    rig = Rig(Instances(forget_after=3600))
    rig.live(0)
    rig.look(3610)
    assert rig.only(3610).stale
    rig.look(3611)
    assert rig.instances.view(T + 3611) == []
    assert b"7.json" not in rig.instances.dump()
    rig.live(5000)
    assert not rig.only(5000.1).stale


def test_a_leftover_older_than_that_is_never_shown(rig: Rig) -> None:
    """A directory full of last month's leftovers shows no instance at all."""
    rig.see(beat(-5000), now=0)
    rig.look(1)
    assert rig.instances.view(T + 1) == []


def test_counts_are_of_fresh_instances_of_the_root() -> None:
    """Every activity has a count; stale instances and other roots are in none."""
    instances = Instances()
    instances.observe("home", "1.json", beat(0, pid=1), T)
    instances.observe("home", "2.json", beat(50, pid=2), T + 50)
    instances.observe("home", "3.json", beat(50, pid=3, event="agent_end"), T + 50)
    instances.observe("work", "1.json", beat(50, pid=1), T + 50)
    instances.tick(T + 50)
    assert instances.counts("home") == {
        Activity.WORKING: 1, Activity.WAITING_INPUT: 1, Activity.UNKNOWN: 0}
    assert instances.counts("none") == dict.fromkeys(Activity, 0)


def test_the_view_is_sorted_by_root_and_number_of_the_process() -> None:
    """Order does not depend on which file was read first, and 9 comes before 10."""
    instances = Instances()
    for root, pid in (("b", 1), ("a", 10), ("a", 9)):
        instances.observe(root, f"{pid}.json", beat(0, pid=pid), T)
    assert [(shown.root, shown.heartbeat.pid) for shown in instances.view(T)] == [("a", 9), ("a", 10), ("b", 1)]


# Clocks


def test_a_time_in_the_future_does_not_make_immortal(rig: Rig) -> None:
    """An hour ahead: fresh while it moves, stale and lost ten seconds after it stopped moving."""
    for at in range(5):
        rig.see(beat(3600 + at), now=at)
    assert not rig.only(14).stale
    rig.look(14.1)
    assert (rig.only(14.1).stale, rig.lost) == (True, 1)


def test_a_leftover_from_the_future_goes_stale_and_is_not_lost(rig: Rig) -> None:
    """A file that never moves was not seen alive, whatever its time says."""
    rig.see(beat(3600, 99), now=0)
    rig.look(10.1)
    assert rig.only(10.1).stale
    assert (rig.lost, rig.crossings) == (0, (0, 0, 0))


def test_a_writer_whose_clock_is_behind_is_fresh_while_it_moves(rig: Rig) -> None:
    """An hour behind: stale at first sight, fresh from the second reading on, lost when it stops."""
    rig.see(beat(-3600), now=0)
    assert rig.only(0).stale
    rig.see(beat(-3599), now=1)
    assert not rig.only(1).stale
    rig.look(11.5)
    assert (rig.only(11.5).stale, rig.lost) == (True, 1)


def test_a_change_that_is_read_too_late_is_no_life(rig: Rig) -> None:
    """Killed at 20 s, looked at only at 60 s: the new reading is old news, the process is lost."""
    rig.live(0)
    rig.see(beat(20), now=60)
    assert (rig.only(60).stale, rig.lost) == (True, 1)


def test_our_own_clock_set_back_keeps_nobody_alive(rig: Rig) -> None:
    """Set back by an hour: living processes stay fresh, and one that is killed then is lost in ten seconds."""
    rig.live(0, 1)
    rig.see(beat(2), now=-3600)
    rig.look(-3595)
    assert (rig.only(-3595).stale, rig.lost) == (False, 0)
    rig.look(-3589)
    assert (rig.only(-3589).stale, rig.lost) == (True, 1)


def test_the_clock_of_the_whole_host_set_back_is_no_event(rig: Rig) -> None:
    """Writer and exporter both jump back by an hour: the process stays fresh and is lost once it stops."""
    rig.live(0, 1)
    rig.live(-3600, -3599)
    assert (rig.only(-3599).stale, rig.lost) == (False, 0)
    rig.look(-3588)
    assert rig.lost == 1


def test_a_writers_clock_set_back_is_no_event(rig: Rig) -> None:
    """Its time goes back by an hour between two heartbeats, ours does not: it lives."""
    rig.live(0)
    rig.see(beat(-3592), now=8)
    rig.look(17)
    rig.see(beat(-3583), now=17)
    rig.look(26)
    assert (rig.only(26).stale, rig.lost) == (False, 0)
    rig.look(28)
    assert rig.lost == 1


def test_both_clocks_set_forward_is_no_event(rig: Rig) -> None:
    """The whole host jumps ahead between two heartbeats."""
    rig.live(0, 1)
    rig.live(7200)
    assert (rig.only(7200).stale, rig.lost) == (False, 0)


# Activity


def test_agent_end_means_waiting_unless_messages_are_pending(rig: Rig) -> None:
    """The raw activity stays in the heartbeat; the true one is shown."""
    rig.live(0, event="agent_end")
    assert rig.only(0).activity is Activity.WAITING_INPUT
    assert rig.only(0).heartbeat.activity is Activity.WORKING
    rig.live(1, event="agent_end", pending=True)
    assert rig.only(1).activity is Activity.WORKING


def test_activity_since_is_the_first_reading_of_the_activity(rig: Rig) -> None:
    """By the writer's time; heartbeats that repeat it do not move it, a new session neither."""
    rig.live(0, 1, 2)
    assert rig.only(2).activity_since == T
    rig.live(3, 4, event="agent_end")
    rig.live(5, activity=Activity.WAITING_INPUT, session="other")
    assert rig.only(5).activity_since == T + 3


# Crossings


def test_a_rise_counts_once_for_every_level_passed(rig: Rig) -> None:
    """Levels jumped over count too; staying and falling do not; each further rise does."""
    rig.live(0, 1, percent=50)
    assert rig.crossings == (0, 0, 0)
    rig.live(2, 3, percent=97)
    assert rig.crossings == (1, 1, 0)
    rig.live(4, percent=101)
    assert rig.crossings == (1, 1, 1)
    rig.live(5, percent=90)
    assert rig.crossings == (1, 1, 1)
    rig.live(6, percent=96)
    assert rig.crossings == (1, 2, 1)


def test_unknown_percent_is_below_all_levels(rig: Rig) -> None:
    """After a compaction the way up counts again, whatever pressure is reported with the missing percent."""
    rig.live(0, percent=97)
    rig.see(replace(beat(1, None), pressure=beat(0, 97).pressure))
    rig.live(2, percent=97)
    assert rig.crossings == (2, 2, 0)


def test_first_seen_near_the_limit_is_a_crossing(rig: Rig) -> None:
    """A process that is at its limit in its first reading has got there."""
    rig.live(0, percent=96)
    assert rig.crossings == (1, 1, 0)


def test_a_session_switch_carries_no_pressure_over(rig: Rig) -> None:
    """Leaving a full session is no event; resuming one that is full crosses."""
    rig.live(0, percent=96, session="full")
    rig.live(1, percent=5, session="new")
    rig.live(2, percent=96, session="full")
    assert rig.crossings == (2, 2, 0)
    rig.live(3, percent=96, session="as full")
    assert rig.crossings == (3, 3, 0)


# Peaks


def test_the_peak_is_kept_until_a_scrape_has_seen_it(rig: Rig) -> None:
    """Scrapes further apart than the window still see what lay between them."""
    rig.live(0, percent=50)
    rig.instances.scraped(T + 1)
    rig.live(2, percent=97)
    rig.live(3, percent=None)
    rig.live(*range(4, 300), percent=20)
    assert rig.only(299).context_percent_peak == 97
    rig.instances.scraped(T + 299.5)
    assert rig.only(299.6).context_percent_peak == 20


def test_the_peak_stays_for_the_window(rig: Rig) -> None:
    """Several servers scrape: within 60 s all of them see the peak, then it is over."""
    rig.live(0, percent=97)
    for at in range(1, 70):
        rig.live(at, percent=20)
        assert rig.only(at + 0.1).context_percent_peak == (97 if at <= 60 else 20)
        rig.instances.scraped(T + at + 0.1)


def test_peaks_below_an_earlier_peak_show_after_it(rig: Rig) -> None:
    """When the highest leaves the window the next highest shows, not the latest."""
    rig.instances.scraped(T)
    for at, percent in ((1, 90.0), (20, 40.0), (30, 70.0), (40, 10.0)):
        rig.live(at, percent=percent)
    peaks = []
    for at in (60, 80, 95, 120):
        rig.instances.scraped(T + at)
        peaks.append(rig.only(at).context_percent_peak)
    assert peaks == [90, 70, 10, 10]


def test_there_is_no_peak_where_there_never_was_a_percent(rig: Rig) -> None:
    """Unknown is not 0."""
    rig.live(0, percent=None)
    assert rig.only(0).context_percent_peak is None


def test_ever_falling_readings_do_not_fill_the_memory(rig: Rig) -> None:
    """Nobody scrapes, each reading is lower than the last: what is kept is bounded, the highest is in it."""
    for at in range(5000):
        rig.live(at, percent=99 - at / 100)
    file, = rig.instances._files.values()
    writer, = file.writers.values()
    assert len(writer.peaks) <= 64
    assert rig.only(5000).context_percent_peak == 99


# Compactions


def test_a_compaction_counts_once_for_all_heartbeats_that_repeat_it(rig: Rig) -> None:
    """One event, many heartbeats; a later one after other events is another."""
    rig.live(0, percent=90)
    rig.live(1, 2, 3, percent=None, event="session_compact")
    assert rig.compactions == 1
    rig.live(4, percent=30)
    rig.live(5, 6, percent=25, event="session_compact")
    assert rig.compactions == 2
    rig.live(7, percent=12, event="session_compact")
    assert rig.compactions == 3


def test_a_vanished_percent_is_a_compaction_whose_event_was_overwritten(rig: Rig) -> None:
    """Only in the same session, with a window, and not after moving in the session tree."""
    rig.live(0, percent=90)
    rig.live(1, 2, percent=None, event="before_agent_start")
    assert rig.compactions == 1
    rig.live(3, percent=90)
    rig.live(4, percent=None, session="other", event="session_start")
    rig.live(5, percent=50, session="other")
    rig.live(6, percent=None, session="other", window=None, event="model_select")
    rig.live(7, percent=50, session="other")
    rig.live(8, percent=None, session="other", event="session_tree")
    assert rig.compactions == 1


def test_a_compaction_before_the_first_look_is_not_counted(rig: Rig) -> None:
    """The snapshot may be hours old, and an earlier exporter may have counted it."""
    rig.live(0, 1, percent=None, event="session_compact")
    assert rig.compactions == 0


# Several writers of one file


def test_a_younger_writer_proves_life_and_changes_nothing(rig: Rig) -> None:
    """A sub-agent near its limit: no gauge of the process moves, no crossing counts, and it stays fresh."""
    rig.live(0, percent=20)
    for at in range(1, 60):
        rig.live(at, percent=20)
        rig.live(at + 0.5, percent=99, started=0.4, session="sub", event="session_compact")
        shown = rig.only(at + 0.6)
        assert (shown.heartbeat.session_id, shown.heartbeat.context_percent) == ("s", 20)
        assert (shown.context_percent_peak, shown.activity_since) == (20, T)
        assert shown.heartbeat.updated_at == T + at + 0.5
    assert (rig.crossings, rig.compactions, rig.lost) == ((0, 0, 0), 0, 0)


def test_both_writers_killed_are_one_loss(rig: Rig) -> None:
    """They are one process."""
    rig.live(0, 1, 2)
    rig.live(2.5, started=2.2, session="sub")
    rig.look(12.4)
    assert rig.lost == 0
    rig.look(12.6)
    rig.look(50)
    assert rig.lost == 1


def test_an_older_writer_that_is_seen_second_owns_the_gauges(rig: Rig) -> None:
    """The exporter starts when the sub-agent wrote last: the process's own session shows once it writes."""
    rig.live(10, started=9, session="sub")
    rig.live(10.5, started=0)
    rig.live(11, started=9, session="sub")
    assert rig.only(11.1).heartbeat.session_id == "s"


def test_a_new_session_of_the_process_takes_over_and_brings_what_it_did(rig: Rig) -> None:
    """A writer that follows the older one without a gap: nothing is lost, its early crossing counts later."""
    rig.live(0, 1, 2, percent=90)
    rig.live(2.5, started=2.3, session="new", percent=97)
    rig.live(3, 3.5, 4, 5, 6, 7, started=2.3, session="new", percent=3)
    assert rig.only(7.1).heartbeat.session_id == "s"
    assert rig.crossings == (1, 0, 0)
    rig.live(8, started=2.3, session="new", percent=3)
    shown = rig.only(8.1)
    assert (shown.heartbeat.session_id, shown.heartbeat.context_percent) == ("new", 3)
    assert shown.context_percent_peak == 97
    assert (rig.crossings, rig.lost) == ((2, 1, 0), 0)


@pytest.mark.parametrize("end", ["gone", "killed"])
def test_a_new_session_that_ends_before_it_took_over_counts_all_the_same(rig: Rig, end: str) -> None:
    """Near the limit for a moment, then over, all within 5 s of its start: the crossing counts."""
    rig.live(0, 1, 2)
    rig.live(2.5, 3, started=2.3, session="new", percent=97)
    if end == "gone":
        rig.gone(3.5)
    else:
        rig.look(60)
    assert rig.crossings == (1, 1, 0)
    assert rig.lost == (end == "killed")


def test_a_sub_agent_that_wrote_last_does_not_count_at_the_end(rig: Rig) -> None:
    """The process ends while its sub-agent is near the limit: still no crossing of the process."""
    rig.live(0, 1, 2)
    rig.live(2.5, started=1.5, session="sub", percent=97)
    rig.gone(3)
    assert rig.crossings == (0, 0, 0)


def test_a_long_silence_of_the_owner_outlasts_its_heartbeat(rig: Rig) -> None:
    """An owner that beats every 5 s is waited for 20 s, not 5."""
    rig.live(0, 5, every=5.0)
    rig.live(*(10 + n for n in range(15)), started=6, session="new")
    assert rig.only(24.2).heartbeat.session_id == "s"
    rig.live(25.5, started=6, session="new")
    assert rig.only(25.6).heartbeat.session_id == "new"


def test_an_owner_that_takes_turns_is_missed_for_longer(rig: Rig) -> None:
    """Rare looks find the sub-agent eight times in a row: the session still owns the gauges."""
    rig.live(0)
    rig.live(1, started=0.5, session="sub")
    rig.live(2)
    rig.live(*range(17, 137, 15), started=0.5, session="sub")
    assert rig.only(136).heartbeat.session_id == "s"
    rig.live(*range(137, 257, 15), started=0.5, session="sub")
    assert rig.only(256).heartbeat.session_id == "sub"
    assert rig.lost == 0


def test_a_new_session_with_a_sub_agent_is_the_one_that_takes_over(rig: Rig) -> None:
    """Both are younger than the silent owner; the older of them follows it, whichever is read.

    The process goes on, and so does the peak that it had before.
    """
    rig.live(0, 1, 2, percent=99)
    for at in (2.5, 3, 4, 5, 6, 7):
        rig.live(at, started=2.3, session="new")
        rig.live(at + 0.3, started=2.7, session="sub")
    rig.live(7.6, started=2.7, session="sub")
    assert rig.only(7.7).heartbeat.session_id == "new"
    assert rig.only(7.7).context_percent_peak == 99


def test_twenty_sub_agents_within_one_heartbeat(rig: Rig) -> None:
    """More writers than are remembered, all heard since the owner's last word: the owner is not forgotten."""
    rig.live(0)
    for n in range(20):
        rig.live(0.5 + n / 100, started=0.4 + n / 100, session=f"sub {n}")
    assert rig.only(0.9).heartbeat.session_id == "s"
    rig.live(1)
    assert rig.only(1.1).heartbeat.updated_at == T + 1


def test_many_sub_agents_do_not_fill_the_memory(rig: Rig) -> None:
    """A thousand writers of one file, one after the other: the owner stays, the memory is bounded."""
    for n in range(1000):
        rig.live(n)
        rig.live(n + 0.5, started=n + 0.4, session=f"sub {n}")
    file, = rig.instances._files.values()
    assert len(file.writers) <= 16
    assert rig.only(999.6).heartbeat.session_id == "s"


# The same pid again


def test_a_pid_used_again_after_a_crash_is_a_loss_and_a_fresh_start(rig: Rig) -> None:
    """In a container: killed at 2 s, its file overwritten by a new process from 8 s on."""
    rig.live(0, 1, 2, percent=97)
    for at in (3, 4, 5, 6, 7):
        rig.look(at)
    rig.live(8.2, 9, 10, started=8, session="new", percent=30)
    assert rig.only(10.1).heartbeat.session_id == "s"
    rig.live(11, started=8, session="new", percent=30)
    shown = rig.only(11.1)
    assert (shown.heartbeat.session_id, shown.context_percent_peak) == ("new", 30)
    assert shown.activity_since == T + 8.2
    assert (rig.lost, rig.crossings) == (1, (1, 1, 0))


def test_a_pid_used_again_after_it_went_stale_takes_over_at_once(rig: Rig) -> None:
    """The loss was counted when the file went stale; the new process is shown from its first reading."""
    rig.live(0, 1, percent=97)
    rig.look(20)
    rig.live(30, started=29, session="new", percent=96)
    shown = rig.only(30.1)
    assert (shown.heartbeat.session_id, shown.context_percent_peak, shown.stale) == ("new", 96, False)
    assert (rig.lost, rig.crossings) == (1, (2, 2, 0))


@pytest.mark.parametrize("known", [True, False])
def test_a_stopped_process_whose_sub_agent_wakes_first_is_itself(rig: Rig, *, known: bool) -> None:
    """Stopped and continued: the sub-agent's first word does not take the gauges from the session."""
    rig.live(0, 1)
    if known:
        rig.live(1.2, started=0.9, session="sub")
    rig.look(60)
    rig.live(100, started=0.9, session="sub")
    assert rig.only(100.1).heartbeat.session_id == "s"
    rig.live(100.5)
    assert (rig.only(100.6).heartbeat.session_id, rig.lost) == ("s", 1)


def test_a_removed_and_rewritten_file_is_another_process(rig: Rig) -> None:
    """A graceful restart: no loss, and peaks, pressure and times begin anew."""
    rig.live(0, 1, percent=97)
    rig.gone(2)
    rig.live(3, started=2.9, percent=96)
    shown = rig.only(3.1)
    assert (shown.context_percent_peak, shown.activity_since) == (96, T + 3)
    assert (rig.lost, rig.crossings) == (0, (2, 2, 0))


def test_a_new_session_that_is_slow_to_write_is_no_loss(rig: Rig) -> None:
    """It started right after the old one's last word, and first wrote 6 s later: one process all the time."""
    rig.live(0, 1, 2)
    for at in range(3, 8):
        rig.look(at)
    rig.live(8, 9, 10, 11, 12, started=2.3, session="new")
    assert (rig.only(12.1).heartbeat.session_id, rig.lost) == ("new", 0)


def test_rare_looks_do_not_invent_a_loss(rig: Rig) -> None:
    """A look every 15 s finds a new session: nobody saw the old one missing, so it is not called lost."""
    rig.live(0, 15, 30)
    rig.live(45, 60, 75, 90, 105, started=44, session="new")
    assert (rig.only(105.1).heartbeat.session_id, rig.lost) == ("new", 0)


# Restart of the exporter


def restarted(rig: Rig) -> Rig:
    instances = Instances()
    instances.load(rig.instances.dump())
    return Rig(instances)


def test_a_restart_loses_nothing_and_counts_nothing_twice(rig: Rig) -> None:
    """Near its limit before and after: no second crossing, and the activity began when it did."""
    rig.live(0, 1, percent=97)
    rig.live(2, 3, percent=96, event="agent_end")
    after = restarted(rig)
    after.live(20, percent=96, event="agent_end")
    assert after.only(20.1).activity_since == T + 2
    assert (after.crossings, after.lost) == ((0, 0, 0), 0)
    after.live(21, percent=100, event="agent_end")
    assert after.crossings == (0, 0, 1)


def test_a_counted_compaction_is_not_counted_after_a_restart(rig: Rig) -> None:
    """Heartbeats go on repeating the event; one that happened while nobody looked is counted."""
    rig.live(0, percent=90)
    rig.live(1, percent=None, event="session_compact")
    rig.live(3, percent=40)
    rig.live(4, percent=30, event="session_compact")
    after = restarted(rig)
    after.live(20, percent=30, event="session_compact")
    assert after.compactions == 0
    later = restarted(after)
    later.live(40, percent=None, event="agent_start")
    assert later.compactions == 1


def test_a_process_killed_while_the_exporter_was_down_is_lost_once(rig: Rig) -> None:
    """Also when the exporter restarts twice after that."""
    rig.live(0, 1)
    after = restarted(rig)
    after.see(beat(5), now=60)
    assert after.lost == 1
    third = restarted(after)
    third.see(beat(5), now=90)
    third.look(91)
    assert third.lost == 0


def test_a_process_killed_at_its_last_dump_is_lost_after_the_restart(rig: Rig) -> None:
    """The file is exactly as it was when it was remembered, only older."""
    rig.live(0)
    after = restarted(rig)
    after.see(beat(0), now=60)
    assert (after.only(60).stale, after.lost) == (True, 1)


def test_a_quick_restart_keeps_the_time_that_is_left(rig: Rig) -> None:
    """Down for 4 s after the last heartbeat, the process still has until 10 s."""
    rig.live(0)
    after = restarted(rig)
    after.see(beat(0), now=4)
    after.look(9.9)
    assert after.lost == 0
    after.look(10.1)
    assert after.lost == 1


def test_another_process_with_the_pid_is_not_the_one_remembered(rig: Rig) -> None:
    """Started after the remembered one's last word: a first sight like any other."""
    rig.live(0, 1, percent=97)
    after = restarted(rig)
    after.see(beat(50, 97, started=40), now=50.1)
    assert (after.crossings, after.lost) == ((1, 1, 0), 0)
    old = restarted(rig)
    old.see(beat(50, 97, started=40), now=90)
    assert (old.crossings, old.lost) == ((0, 0, 0), 0)


def test_memory_outlasts_a_sub_agent_that_is_read_first(rig: Rig) -> None:
    """After the restart the sub-agent wrote last: the session's own memory waits for its next heartbeat."""
    rig.live(0, 1, percent=97)
    rig.live(1.5, started=0.5, session="sub")
    after = restarted(rig)
    after.live(20, started=0.5, session="sub")
    after.live(20.5, percent=97)
    assert (after.crossings, after.only(20.6).activity_since) == ((0, 0, 0), T)


def test_what_never_comes_back_is_forgotten(rig: Rig) -> None:
    """Removed while the exporter was down: no loss, and an hour later not even a memory."""
    rig.live(0)
    after = Rig()
    after.look(-8000)
    after.instances.load(rig.instances.dump())
    after.look(60)
    assert b"7.json" in after.instances.dump()
    after.look(3661)
    assert after.instances.dirty
    assert b"7.json" not in after.instances.dump()
    assert after.lost == 0


def test_what_is_seen_to_be_gone_is_forgotten_at_once(rig: Rig) -> None:
    """A caller that knows of the removal says so, also of a file that this run has not read."""
    rig.live(0)
    after = restarted(rig)
    after.gone(5)
    assert b"7.json" not in after.instances.dump()


def test_the_stored_format_is_frozen() -> None:
    """What this version wrote is what every later one must read, to the byte."""
    stored = (b'[1,[{"root":"home","name":"7.json","started":1795225000.0,"session":"s","activity":"working",'
              b'"since":1795225000.0,"rank":2,"known":true,"compacted":false,"updated":1795225001.0,"lag":0.5,'
              b'"alive":true}]]')
    instances = Instances()
    instances.load(stored)
    assert instances.dump() == stored
    rig = Rig(Instances())
    rig.instances.observe("home", NAME, beat(0, 97), T)
    rig.see(beat(1, 97), delay=0.5)
    assert rig.instances.dump() == stored


RECORD = {"root": "r", "name": "7.json", "started": 1.0, "session": "s", "activity": "working", "since": 1.0,
          "rank": 2, "known": True, "compacted": False, "updated": 1.0, "lag": 0.1, "alive": True}


@pytest.mark.parametrize("garbage", [
    b"", b"\xff\xfe", b"null", b"{}", b"[]", b"[2,[]]", b'["1",[]]', b"[1,{}]", b"[1,[{}]]", b"[" * 200_000,
    b'[1,["\xff"]]',
    *(json.dumps([1, [{**RECORD, **wrong}]]).encode() for wrong in (
        {"rank": 4}, {"rank": -1}, {"rank": True}, {"since": "1"}, {"since": None}, {"activity": "sleeping"},
        {"alive": 1}, {"name": 7}))])
def test_garbage_is_refused_whole(rig: Rig, garbage: bytes) -> None:
    """A damaged memory is a ValueError, and what was known before stays known."""
    rig.live(0)
    before = rig.instances.dump()
    with pytest.raises(ValueError):  # noqa: PT011 -- the message is msgspec's
        rig.instances.load(garbage)
    assert rig.instances.dump() == before


def test_only_changes_of_state_are_worth_persisting(rig: Rig) -> None:
    """Heartbeats and a creeping percent are not; activity, pressure, session, loss, return, removal are."""
    def changed() -> bool:
        dirty = rig.instances.dirty
        rig.instances.dump()
        return dirty

    assert not changed()
    rig.live(0)
    assert changed()
    rig.live(1, 2, percent=10)
    rig.live(3, percent=20)
    assert not changed()
    rig.live(4, percent=20, event="agent_end")
    assert changed()
    rig.live(5, percent=90, event="agent_end")
    assert changed()
    rig.live(6, percent=90, event="agent_end", session="other")
    assert changed()
    rig.live(7, percent=90, event="agent_end", started=6.5, session="sub")
    assert not changed()
    rig.look(60)
    assert changed()
    rig.look(61)
    assert not changed()
    rig.live(62, percent=90, event="agent_end", session="other")
    assert changed()
    rig.gone(63)
    assert changed()
    rig.gone(64)
    assert not changed()


# Whatever happens

times = st.floats(-50, 50, allow_nan=False)
beats = st.builds(
    beat, at=times, percent=st.none() | st.floats(0, 120), started=st.none() | st.sampled_from([-9.0, 0.0, 3.0]),
    session=st.sampled_from(["s", "t"]), event=st.sampled_from(["turn_end", "agent_end", "session_compact"]),
    activity=st.sampled_from(Activity), every=st.sampled_from([0.25, 1.5, 86_400.0]))
actions = st.one_of(
    st.tuples(st.just("observe"), st.sampled_from(["1.json", "2.json"]), beats),
    st.tuples(st.just("gone"), st.sampled_from(["1.json", "2.json"]), st.none()),
    st.tuples(st.sampled_from(["tick", "scraped", "restart"]), st.just(""), st.none()))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(-20, 40), actions), max_size=60))
def test_nothing_raises_counters_grow_and_peaks_cover_the_present(
        steps: list[tuple[float, tuple[str, str, Heartbeat | None]]]) -> None:
    """Any order of calls, clocks that jump both ways, restarts in between: the promises hold."""
    instances = Instances()
    now, lives = T, 0
    for passed, (action, name, heartbeat) in steps:
        now += passed
        if action == "observe":
            assert heartbeat is not None
            instances.observe("home", name, heartbeat, now)
            lives += 1
        elif action == "gone":
            instances.gone("home", name, now)
        elif action == "restart":
            lost = instances.take()
            assert all(amount > 0 for amount in lost.values())
            raw, instances = instances.dump(), Instances()
            instances.load(raw)
            assert instances.dump() == raw
        elif action == "tick":
            instances.tick(now)
        else:
            instances.scraped(now)
        shown = instances.view(now)
        for instance in shown:
            percent, peak = instance.heartbeat.context_percent, instance.context_percent_peak
            assert percent is None or (peak is not None and peak >= percent)
        assert sum(instances.counts("home").values()) == sum(not instance.stale for instance in shown)
        taken = instances.take()
        assert all(amount > 0 for amount in taken.values())
        lives -= taken.get((LOST.name, ("home",)), 0)
        assert lives >= 0
        assert instances.take() == {}
