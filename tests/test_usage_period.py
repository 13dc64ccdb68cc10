"""`--since` and `--until`: what a duration, a date, a time or a word means, and where days begin."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.usageperiod import Calendar, Period

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOW = datetime(2026, 11, 21, 8, 30, tzinfo=UTC).timestamp()  # a Saturday


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process."""
    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def at(text: str, *, end: bool = False) -> str:
    """The instant as UTC says it."""
    return datetime.fromtimestamp(Calendar(utc=True).instant(text, NOW, end=end), UTC).isoformat()


@pytest.mark.parametrize(("text", "since", "until"), [
    ("24h", "2026-11-20T08:30:00", "2026-11-20T08:30:00"),
    ("1d12h", "2026-11-19T20:30:00", "2026-11-19T20:30:00"),
    ("90", "2026-11-21T08:28:30", "2026-11-21T08:28:30"),
    ("2026-11-02", "2026-11-02T00:00:00", "2026-11-03T00:00:00"),
    ("2026-11-02T06:07", "2026-11-02T06:07:00", "2026-11-02T06:07:00"),
    ("2026-11-02 06:07:08", "2026-11-02T06:07:08", "2026-11-02T06:07:08"),
    ("2026-11-02T06:07:08+02:00", "2026-11-02T04:07:08", "2026-11-02T04:07:08"),
    ("2026-11-02T06:07:08Z", "2026-11-02T06:07:08", "2026-11-02T06:07:08"),
    ("today", "2026-11-21T00:00:00", "2026-11-22T00:00:00"),
    ("yesterday", "2026-11-20T00:00:00", "2026-11-21T00:00:00"),
    ("week", "2026-11-16T00:00:00", "2026-11-23T00:00:00"),
    ("month", "2026-11-01T00:00:00", "2026-12-01T00:00:00"),
])
def test_bounds(text: str, since: str, until: str) -> None:
    """A date, and a word for a period, stand for all of it: its beginning in `--since`, its end in `--until`."""
    assert at(text) == f"{since}+00:00"
    assert at(text, end=True) == f"{until}+00:00"


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01", "2026-02-30", "24 hours", "-1h", "2026-11-02T99", "1e3",
                                  "20261121", "9999-12-31T99:00", "101y"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """With a sentence that says what there is to choose from."""
    with pytest.raises(ValueError, match="is not a duration such as 24h or 7d, a date, a time"):
        Calendar().instant(text, NOW, end=False)


@pytest.mark.parametrize("text", ["0001-01-01T00:00+14:00", "9999-12-31T23:00-14:00"])
@pytest.mark.parametrize("utc", [True, False])
def test_times_beyond_the_calendar_are_refused_not_fatal(text: str, utc: bool) -> None:
    """Where only an offset leads there."""
    with pytest.raises(ValueError, match="is not a duration"):
        Calendar(utc=utc).instant(text, NOW, end=False)


def test_dates_at_the_end_of_time_are_refused_not_fatal() -> None:
    """There is no day after the last one that can be written."""
    with pytest.raises(ValueError, match="is not a duration"):
        Calendar(utc=True).instant("9999-12-31", NOW, end=True)


def test_days_follow_the_local_clock(zone: Callable[[str], None]) -> None:
    """Also where it is off by a quarter of an hour, and on days of 23 and 25 hours."""
    zone("Asia/Kathmandu")  # UTC+05:45
    assert Calendar().day(datetime(2026, 11, 20, 18, 14, 59, tzinfo=UTC).timestamp()) == "2026-11-20"
    assert Calendar().day(datetime(2026, 11, 20, 18, 15, tzinfo=UTC).timestamp()) == "2026-11-21"
    assert Calendar(utc=True).day(datetime(2026, 11, 20, 23, 59, 59, tzinfo=UTC).timestamp()) == "2026-11-20"
    zone("America/New_York")
    here = Calendar()
    for day, hours in (("2026-03-08", 23), ("2026-11-01", 25), ("2026-11-02", 24)):
        first, last = here.instant(day, NOW, end=False), here.instant(day, NOW, end=True)
        assert last - first == hours * 3600
        assert (here.day(first), here.day(last - 1)) == (day, day)
        assert here.day(first - 1) < day < here.day(last)
    assert here.iso(first) == "2026-11-02T00:00:00-05:00"


@given(st.integers(-(10**9), 10**11))
def test_every_second_is_in_its_day(second: int) -> None:
    """And in no other one. (Before 1970, and far beyond anybody's logs, too.)"""
    calendar = Calendar(utc=True)
    day = calendar.day(second)
    expected = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=second)
    assert day == expected.date().isoformat()
    assert second in Period(calendar.instant(day, NOW, end=False), calendar.instant(day, NOW, end=True))
