"""Takes what `--since` and `--until` say, gives `usage` epoch seconds; and the day of an epoch second."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from pathlib import Path

from coding_agent_exporter.values import Place, duration

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_NOWHERE = Place(Path(), Path())

WORDS = ("today", "yesterday", "week", "month")


@dataclass(frozen=True, slots=True)
class Period:
    """From `since` up to, and without, `until`; epoch seconds, infinite where nothing bounds it."""

    since: float = -math.inf
    until: float = math.inf

    def __contains__(self, second: float) -> bool:
        return self.since <= second < self.until


class Calendar:
    """Days in the time zone of this machine, or in UTC."""

    def __init__(self, *, utc: bool = False) -> None:
        self._zone: tzinfo | None = UTC if utc else None
        # Every zone there is in living memory changes its date on a quarter of an hour.
        self._day = lru_cache(4096)(self._day_of)

    def day(self, second: float) -> str:
        """The date of an epoch second, `YYYY-MM-DD`."""
        return self._day(int(second // 900))

    def _day_of(self, quarter: int) -> str:
        there = time.localtime if self._zone is None else time.gmtime
        found = there(quarter * 900)
        return f"{found.tm_year:04d}-{found.tm_mon:02d}-{found.tm_mday:02d}"

    def midnight(self, day: date) -> float:
        """When a date begins, epoch seconds."""
        return datetime(day.year, day.month, day.day, tzinfo=self._zone).timestamp()

    def today(self, now: float) -> date:
        return datetime.fromtimestamp(now, self._zone).date()

    def iso(self, second: float) -> str | None:
        """An instant with its offset, for people and programs; None where there is no bound."""
        if math.isinf(second):
            return None
        at = datetime.fromtimestamp(second, UTC)
        return (at if self._zone else at.astimezone()).isoformat(timespec="seconds")

    def instant(self, text: str, now: float, *, end: bool) -> float:
        """What a bound of a period means, epoch seconds.

        A duration counts back from now, as do plain seconds. A date, or a word for a period, stands for all of it: its
        beginning, or with `end` its end. Times without an offset are of this calendar. Raises ValueError.
        """
        text = text.strip()
        try:
            found = self._instant(text, now, end=end)
            self.iso(found)  # an offset can lead out of the years that there are
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{text!r} is not a duration such as 24h or 7d, a date, a time (2026-11-21T08:00), "
                f"or one of {', '.join(WORDS)}"
            ) from error
        return found

    def _instant(self, text: str, now: float, *, end: bool) -> float:
        if text in WORDS:
            return self.midnight(_bounds(text, self.today(now))[end])
        if _DATE.fullmatch(text):
            first = date.fromisoformat(text)
            return self.midnight(first + timedelta(days=1) if end else first)
        if re.fullmatch(r"[0-9]{1,7}", text):
            return now - int(text)
        if "T" in text or " " in text:
            at = datetime.fromisoformat(text)
            return (at.replace(tzinfo=self._zone) if at.tzinfo is None else at).timestamp()
        return now - duration(text, _NOWHERE)


def _bounds(word: str, today: date) -> tuple[date, date]:
    """The first day of a period, and the first after it. Weeks begin on Monday."""
    if word == "week":
        first = today - timedelta(days=today.weekday())
        return first, first + timedelta(days=7)
    if word == "month":
        first = today.replace(day=1)
        return first, (first + timedelta(days=31)).replace(day=1)
    first = today - timedelta(days=word == "yesterday")
    return first, first + timedelta(days=1)
