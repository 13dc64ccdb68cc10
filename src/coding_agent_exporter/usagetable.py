"""Takes sums from a tally, gives `usage` a table for people, a CSV file for spreadsheets, or JSON for programs.

Real and imputed money never meet: each has its own columns, and nothing adds them up.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from coding_agent_exporter.ledger.book import (
    CACHE_CREATION,
    CACHE_READ,
    ESTIMATED,
    INPUT,
    MESSAGES,
    OUTPUT,
    REPORTED,
    SESSIONS,
    UNPRICED,
)
from coding_agent_exporter.model import PICO
from coding_agent_exporter.usagetally import API, SUBSCRIPTION, Sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coding_agent_exporter.usagetally import Dimension, Tally

TOKENS = {"input": INPUT, "output": OUTPUT, "cache_read": CACHE_READ, "cache_creation": CACHE_CREATION}

MIN_NAME = 8
"""Columns that a name keeps, however narrow the table has to be."""

_GAP = "  "
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Money:
    """What was spent in one cost mode, in pico-USD; `estimated` is the part of `total` that nobody reported.

    Not `known`, and 0, where there are but tokens without a price.
    """

    total: int
    estimated: int
    known: bool


def money(row: Sum, mode: str) -> Money | None:
    """What a row comes to in a cost mode; None where nothing of it was used in that mode."""
    slots = row.modes.get(mode)
    if slots is None:
        return None
    # A session stays where it was first counted, also when its cost mode turned out to be the other one.
    used = {name for name, amounts in row.modes.items() if any(amounts[:SESSIONS])}
    if used and mode not in used:
        return None
    total = slots[REPORTED] + slots[ESTIMATED]
    return Money(total, slots[ESTIMATED], total != 0 or not slots[UNPRICED])


def rows(tally: Tally, by: tuple[Dimension, ...]) -> list[tuple[Key, Sum]]:
    """The rows of a tally with their values as text: days as they passed, everything else by what it came to."""
    ranks: list[dict[tuple[Any, ...], tuple[Any, ...]]] = []
    for depth, dimension in enumerate(by, start=1):
        sums: dict[tuple[Any, ...], Sum] = {}
        for key, row in tally.rows.items():
            sums.setdefault(key[:depth], Sum()).merge(row)
        ranks.append({key: (key[-1],) if dimension == "day" else (*_weight(row), key[-1]) for key, row in sums.items()})
    ordered = sorted(
        tally.rows.items(), key=lambda item: [rank[item[0][:depth]] for depth, rank in enumerate(ranks, start=1)])
    return [(tuple(tally.names[value] if isinstance(value, int) else value for value in key), row)
            for key, row in ordered]


def _weight(row: Sum) -> tuple[int, ...]:
    """What sorts the dearest first: by real money, then by imputed money, then by tokens."""
    api, subscription = money(row, API), money(row, SUBSCRIPTION)
    return (-(api.total if api else 0), -(subscription.total if subscription else 0), -_tokens(row))


@dataclass(frozen=True)
class Table:
    """`bounds` are those of the period, ISO times with offset or None; `now` is epoch seconds."""

    by: tuple[Dimension, ...]
    rows: Sequence[tuple[Key, Sum]]
    bounds: tuple[str | None, str | None]
    now: int

    @cached_property
    def total(self) -> Sum:
        total = Sum()
        for _, row in self.rows:
            total.merge(row)
        return total

    # -- for people

    def text(self, width: int, *, ellipsis: str = "…") -> str:
        """Aligned lines of at most `width` columns, unless the numbers alone are wider. Empty without rows."""
        if not self.rows:
            return ""
        unpriced = any(row.slot(UNPRICED) for _, row in self.rows)
        heads = ["MSGS", "INPUT", "OUTPUT", "CACHE", *(["UNPRICED"] if unpriced else []), "API USD", "SUBSCR USD"]
        numbers = [_numbers(row, unpriced=unpriced) for row in (*(row for _, row in self.rows), self.total)]
        keys = [tuple(printable(value) or "-" for value in key) for key, _ in self.rows]
        names = [tuple(map(str.upper, self.by)), *keys, ("TOTAL", *[""] * (len(self.by) - 1))]
        table = [heads, *numbers]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        room = width - sum(widths) - len(_GAP) * (len(widths) + len(self.by) - 1)
        fitted = _fit([max(map(columns, column)) for column in zip(*names, strict=True)], room)
        lines = []
        for name, cells in zip(names, table, strict=True):
            left = (_left(value, size, ellipsis) for value, size in zip(name, fitted, strict=True))
            right = (cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
            lines.append(_GAP.join((*left, *right)).rstrip())
        return "".join(f"{line}\n" for line in (*self._head(), *lines, *self._legend(unpriced=unpriced)))

    def _head(self) -> list[str]:
        since, until = self.bounds
        words = [*([f"from {since}"] if since else []), *([f"until {until}"] if until else [])]
        return [" ".join(words), ""] if words else []

    def _legend(self, *, unpriced: bool) -> list[str]:
        legend = []
        spent = (money(row, mode) for _, row in self.rows for mode in (API, SUBSCRIPTION))
        if any(one and one.estimated for one in spent):
            legend.append("~ estimated, at least in part, from tokens and list prices")
        if unpriced:
            legend.append("UNPRICED: tokens whose cost (?) nobody reported or knows; they are in no amount")
        if money(self.total, SUBSCRIPTION):
            legend.append("SUBSCR USD: imputed to subscriptions, not billed; not to be added to API USD")
        return ["", *legend] if legend else []

    # -- for programs

    def json(self) -> str:
        """One document; numbers in full. See docs/usage.md."""
        since, until = self.bounds
        document = {
            "now": self.now, "since": since, "until": until, "by": list(self.by),
            "rows": [{**dict(zip(self.by, (value or None for value in key), strict=True)), **_fields(row)}
                     for key, row in self.rows],
            "total": _fields(self.total),
        }
        return json.dumps(document, indent=2) + "\n"

    def csv(self) -> str:
        """RFC 4180, with a header and without a total: spreadsheets add up by themselves."""
        out = io.StringIO()
        write = csv.writer(out).writerow
        write([*self.by, "sessions", "messages", *(f"{name}_tokens" for name in TOKENS), "unpriced_tokens",
               "api_cost_usd", "api_estimated_usd", "subscription_cost_usd", "subscription_estimated_usd"])
        for key, row in self.rows:
            spent = [money(row, mode) for mode in (API, SUBSCRIPTION)]
            write([*map(_cell, key), len(row.sessions), row.slot(MESSAGES), *map(row.slot, TOKENS.values()),
                   row.slot(UNPRICED),
                   *(text for one in spent
                     for text in ((_decimal(one.total), _decimal(one.estimated)) if one and one.known else ("", "")))])
        return out.getvalue()


def _fields(row: Sum) -> dict[str, Any]:
    return {
        "sessions": len(row.sessions),
        "messages": row.slot(MESSAGES),
        "tokens": {name: row.slot(number) for name, number in TOKENS.items()},
        "unpriced_tokens": row.slot(UNPRICED),
        "api_cost": _cost(money(row, API)),
        "subscription_cost": _cost(money(row, SUBSCRIPTION)),
    }


def _cost(spent: Money | None) -> dict[str, Any] | None:
    if spent is None:
        return None
    return {"total_cost_usd": spent.total / PICO if spent.known else None, "estimated_cost_usd": spent.estimated / PICO,
            "is_estimated": spent.estimated != 0}


def _numbers(row: Sum, *, unpriced: bool) -> list[str]:
    return [
        _short(row.slot(MESSAGES)), _short(row.slot(INPUT)), _short(row.slot(OUTPUT)),
        _short(row.slot(CACHE_READ) + row.slot(CACHE_CREATION)),
        *([_short(row.slot(UNPRICED))] if unpriced else []),
        _dollars(money(row, API)), _dollars(money(row, SUBSCRIPTION)),
    ]


def _tokens(row: Sum) -> int:
    return sum(map(row.slot, TOKENS.values()))


def _short(count: int) -> str:
    """A count in at most five characters, as long as there is a unit for it; of what is not known nothing is shown."""
    if not count:
        return "-"
    if abs(count) < 10_000:
        return str(count)
    size, unit = next((size, unit) for size, unit in _UNITS if abs(count) >= 0.9995 * size)
    value = count / size
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}{unit}"


def _dollars(spent: Money | None) -> str:
    if spent is None:
        return "-"
    if not spent.known:
        return "?"
    mark = "~" if spent.estimated else ""
    if 0 < abs(spent.total) < PICO // 20_000:
        return f"{mark}<0.0001" if spent.total > 0 else f"{mark}>-0.0001"
    return f"{mark}{spent.total / PICO:.4f}"


def _decimal(pico: int) -> str:
    """Pico-USD as USD, all digits."""
    whole, part = divmod(abs(pico), PICO)
    digits = f"{part:012d}".rstrip("0")
    return f"{'-' if pico < 0 else ''}{whole}{'.' if digits else ''}{digits}"


def _cell(value: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    value = printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value


# -- text on a terminal


def printable(text: str) -> str:
    """Names of agents, models and sessions come from elsewhere; they must not steer somebody's terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def columns(text: str) -> int:
    """How many columns a terminal takes for a printable text."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def shorten(text: str, width: int, ellipsis: str = "…") -> str:
    """Leave out of the middle what is too much for so many columns: names tell themselves apart at their ends."""
    if columns(text) <= width:
        return text
    room = max(0, width - len(ellipsis))
    head, tail = _prefix(text, room - room // 2), _prefix(text[::-1], room // 2)[::-1]
    return f"{head}{ellipsis}{tail}"


def _prefix(text: Iterable[str], width: int) -> str:
    kept, used = [], 0
    for character in text:
        used += _columns(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept)


def _left(text: str, width: int, ellipsis: str) -> str:
    shown = shorten(text, width, ellipsis)
    return shown + " " * (width - columns(shown))


def _fit(wanted: list[int], room: int) -> list[int]:
    """Widths for names: the widest give way first, down to `MIN_NAME`."""
    widths = list(wanted)
    while sum(widths) > room and max(widths) > MIN_NAME:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    return widths
