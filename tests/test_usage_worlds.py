"""`usage` on made-up worlds: whatever agents of all kinds wrote, its parts add up to what the daemon counts."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.usage import read
from coding_agent_exporter.usageperiod import Calendar, Period
from coding_agent_exporter.usagetally import Dimension, Tally
from support import Clock
from test_usage_counting import FINEST, counted_by_the_daemon, counted_by_usage
from usage_support import log, settings, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST = datetime(2026, 10, 24, 12, tzinfo=UTC)
"""Clocks are set back in the night to the 25th, in Europe: that day has 25 hours."""
HOURS = 60

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["pi-coding", "opencode", "claude", "codex", "mystery"]), st.sampled_from(["one", "two"]),
        st.integers(0, HOURS * 4), st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 4),
        st.sampled_from(["anthropic/claude-sonnet-4-5", "openai/gpt-5", "no/body", None]),
        st.sampled_from([{}, {}, {}, {"cost_mode": "API_KEY"}, {"cost_mode": "SUBSCRIPTION"},
                         {"rate_limits": {"five_hour": {"used_percentage": 1}}}]),
        st.booleans()),
    min_size=1, max_size=30)
"""Source, agent, quarter of an hour, session, message, amount, model, hints, and whether the cost is reported."""


@pytest.fixture
def berlin() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def written(home: Path, drawn: list[tuple[Any, ...]]) -> str:
    """The logs of a world, as a flag. Messages repeat and change, totals rise and fall, times go back and forth."""
    for number, (source, agent, quarter, session, message, amount, model, hints, reported) in enumerate(drawn):
        line: dict[str, Any] = {
            "type": "cost_snapshot", "event_id": f"e{number}", "session_id": session, **hints,
            "timestamp": (FIRST + timedelta(minutes=15 * quarter)).isoformat()}
        if source in {"pi-coding", "opencode"}:
            line["message_id"] = f"m{message}"
        if reported or source in {"claude", "mystery"}:
            line["cost"] = {"total_cost_usd": amount / 7}
        if source not in {"claude", "mystery"}:
            line["tokens"] = tokens(amount, 2 * amount, amount * message)
        if model:
            line["model"] = model
        log(home, source, line, agent=agent)
    return f"--usage.root=m={home / 'mngr'}"


def sums(home: Path, by: tuple[Dimension, ...], flag: str, period: Period) -> Counter[tuple[Any, ...]]:
    """What a tally of local days holds: by row, cost mode and slot."""
    tally = Tally(by, period, Calendar())
    read(settings(home, flag), tally, clock=Clock())
    found: Counter[tuple[Any, ...]] = Counter()
    for key, row in tally.rows.items():
        for mode, slots in row.modes.items():
            found.update({(*key, mode, slot): amount for slot, amount in enumerate(slots) if amount})
    return found


def _without_zeros(found: Counter[tuple[Any, ...]]) -> dict[tuple[Any, ...], int]:
    return {key: amount for key, amount in found.items() if amount}


@hypothesis.settings(deadline=None, max_examples=40)
@given(EVENTS, st.lists(st.integers(0, HOURS * 60), max_size=3))
@pytest.mark.usefixtures("berlin")
def test_parts_add_up(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], cuts: list[int]) -> None:
    """The daemon's counters; periods that meet, wherever they are cut; and a period of one day is that day's row."""
    home = tmp_path_factory.mktemp("world")
    flag = written(home, drawn)
    counted = {key: amount for key, amount in counted_by_the_daemon(home, flag).items() if amount}
    assert counted_by_usage(home, FINEST, flag) == counted
    by: tuple[Dimension, ...] = ("day", "source", "model")
    whole = sums(home, by, flag, Period())
    bounds = [Period().since, *sorted((FIRST + timedelta(minutes=cut)).timestamp() for cut in cuts), Period().until]
    parts: Counter[tuple[Any, ...]] = Counter()
    for since, until in pairwise(bounds):
        parts.update(sums(home, by, flag, Period(since, until)))
    assert _without_zeros(parts) == whole
    calendar = Calendar()
    for day in map(str, (date(2026, 10, 24), date(2026, 10, 25), date(2026, 10, 26))):
        period = Period(calendar.instant(day, 0, end=False), calendar.instant(day, 0, end=True))
        assert sums(home, by, flag, period) == {key: amount for key, amount in whole.items() if key[0] == day}
