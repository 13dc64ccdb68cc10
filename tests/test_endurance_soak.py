"""Endurance: agents at a hundred times their speed beside the real program, and simulated weeks in one process.

At the end the totals are the agents' own to the pico-USD, no span is missing, and what is held has stopped growing.
"""

from __future__ import annotations

import statistics
import tracemalloc
from typing import TYPE_CHECKING

from otlp_receiver import http_receiver
from process_support import Exporter, Scrapes, wait_for
from soak_support import (
    COST,
    GONE,
    Held,
    Soak,
    Weeks,
    by_kind,
    differences,
    expected_spans,
    rows,
    stored,
    traced_memory,
)
from spans_process_support import DROPPED, PENDING, received
from support import scrape, total

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPEED = 100


def test_an_hour_of_a_busy_fleet_leaves_exact_totals_and_nothing_behind(
    tmp_path: Path, amount: Callable[[int, int], int],
) -> None:
    """Sessions come, go and fork, contexts are compacted, logs rotated, processes lost, pids used again, models new."""
    seconds, seed = amount(5, 420), 11
    home = tmp_path / "home"
    home.mkdir()
    soak = Soak(home, seed=seed, speed=SPEED, seconds=seconds)
    with http_receiver() as receiver, Exporter(home, f"--otlp.endpoint={receiver.url}") as exporter:
        with Scrapes(exporter, every=amount(50, 500) / 1000) as scrapes:
            held = [Held.by(exporter) for _ in soak.run()]
        for _ in range(2):  # a series that is new is first shown at 0
            shown = exporter.scrape()
        assert differences(soak.truth, shown) == []
        wait_for(lambda: total(exporter.scrape(), PENDING) == 0, "the outbox to be empty", every=0.2)
        said, possible, calls = expected_spans(soak, home, tmp_path / "reference")
        wait_for(lambda: said <= received(receiver).keys(), "every span to arrive", every=0.2)
        sent = received(receiver)
        # What an idle moment holds, against an idle moment of the first half.
        least = min(one.descriptors for one in held[1:len(held) // 2 + 1])
        wait_for(lambda: Held.by(exporter).descriptors <= least, f"at most {least} descriptors")
        threads = min(one.threads for one in held[1:len(held) // 2 + 1])
        wait_for(lambda: Held.by(exporter).threads <= threads, f"at most {threads} threads")
        last = Held.by(exporter)
        assert exporter.terminate() == 0
    assert scrapes.fallen == []
    assert sent.keys() <= possible
    assert total(shown, DROPPED) == 0
    # Each model call of those three is one span, and the simulation knows how many it made.
    assert calls == sum(one.usage.source in {"pi-coding", "omp", "opencode"} for one in soak.truth.spends)
    assert stored(home / "state.db") == soak.truth.pico().total()
    lost = total(shown, "coding_agent_instances_lost_total")
    assert soak.rotated > 2
    assert soak.pids > 5
    # At first it lives for moments, in which nobody may have looked.
    seen = sum(soak.started + 5 < at < soak.started + seconds - GONE for at in soak.killed)
    assert seen <= lost <= len(soak.killed)
    middle = len(held) // 2
    start, half, end = (statistics.median(one.rss for one in part) / 1e6
                        for part in (held[1:4], held[middle - 2:middle + 3], held[-5:]))
    logs, state = (sum(path.stat().st_size for path in home.rglob(name)) for name in ("*.jsonl*", "state.db"))
    print(f"soak, seed {seed}: {seconds} s at {SPEED} times, {len(soak.truth.spends)} messages, {len(sent)} spans, "
          f"{soak.pids} processes of which {len(soak.killed)} killed ({lost:.0f} lost seen), {soak.rotated} rotations, "
          f"{len(soak.truth.pico())} label sets, {scrapes.count} scrapes; "
          f"RSS {start:.1f} -> {half:.1f} -> {end:.1f} MB (+{half - start:.1f}, then +{end - half:.1f}), "
          f"{last.descriptors} descriptors, {last.threads} threads, "
          f"state {state / 1e6:.1f} MB of {logs / 1e6:.1f} MB of logs, rows {rows(home / 'state.db')}, "
          f"{total(shown, COST):.2f} USD")
    assert rows(home / "state.db")["outbox"] == 0
    if amount(0, 1):
        assert end - half <= max(0.15 * half, half - start)
        assert state < logs / 2


def test_weeks_leave_no_more_in_memory_than_a_few_of_them(tmp_path: Path, amount: Callable[[int, int], int]) -> None:
    """Sessions settle, rows of files that are gone expire after a week, days begin, dead agents are forgotten."""
    weeks, seed, settled = amount(4, 12), 5, amount(2, 4)
    team = Weeks(tmp_path, seed=seed, cache=300)
    held, traced = [], []
    if amount(0, 1):
        tracemalloc.start()
    for _ in range(weeks):
        team.week()
        held.append(team.held())
        traced.append(traced_memory() if tracemalloc.is_tracing() else 0)
    tracemalloc.stop()
    for _ in range(2):  # a series that is new is first shown at 0
        shown = scrape(team.pipeline)
    team.pipeline.close()
    assert differences(team.truth, shown) == []
    assert stored(tmp_path / "state.db") == team.truth.pico().total()
    accounts = by_kind(tmp_path / "state.db")
    sessions = accounts["turns"][0]
    print(f"weeks, seed {seed}: {weeks} weeks, {len(team.truth.spends)} messages, {sessions} sessions of pi and omp; "
          f"held after {settled} weeks {held[settled - 1]}, at the end {held[-1]}; traced by week "
          f"{[round(one / 1000) for one in traced]} kB; accounts (number, bytes) {accounts}")
    # Far more has passed than is still known: what is held follows the team's size, not its past.
    assert sessions > 1.5 * held[-1]["sessions"]
    grown = {name: (held[settled - 1][name], count) for name, count in held[-1].items()
             if count > 1.25 * held[settled - 1][name] + 20}
    assert grown == {}
    if traced[-1]:
        half = len(traced) // 2
        assert traced[-1] - traced[half] < 0.1 * traced[half]
