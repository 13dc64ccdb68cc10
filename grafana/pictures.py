"""Takes the dashboards and a simulated week, gives pictures of them: `python -m grafana.pictures`.

A Prometheus over the simulated history is asked the dashboards' own queries. What is drawn is a selection of their
panels, in much their arrangement, for the documentation; Grafana draws them better.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grafana.drawing import MUTED, PALETTE, TEXT, Line, Page, Points, colours
from grafana.history import START, Server, cores, fleet_of, make_blocks, record_all, serve
from grafana.panels import BLUE, COLOURS, CONTEXT, GREEN, GREY, ORANGE, PURPLE, RED, STATES
from grafana.queries import of_dashboard
from grafana.spend import LIMIT
from grafana.units import count, dollars, duration, money, percent, plain, share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grafana.queries import Query

HERE = Path(__file__).parent
INTERVAL = 60.0
HOUR, DAY = 3600.0, 86_400.0
NOW = START + 6 * DAY + 15 * HOUR + 35 * 60
"""Tuesday afternoon: not long after a context was compacted, nor long before the next one is."""
FEW = 9
"""So many series are drawn by name; the rest is one."""


@dataclass(frozen=True)
class Series:
    """One series of an answer."""

    labels: dict[str, str]
    name: str
    points: Points

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Source:
    """A server, and a dashboard whose queries it is asked, for the time from `since` to `now`, epoch seconds."""

    def __init__(self, server: Server, document: dict[str, Any], since: float, now: float) -> None:
        self.span = (since, now)
        self._server = server
        self._document = document

    def instant(self, title: str, ref: str = "A") -> list[Series]:
        """The values of a panel at the end of the time range."""
        since, now = self.span
        query = self._query(title, ref, now - since, 15.0)
        if query.range is not None:
            query = self._query(title, ref, now - _start(query.range[0], now), 15.0)
        found = self._server.query(query.expr, now)
        return [Series(one["metric"], _legend(query, one["metric"]), [(now, float(one["value"][1]))]) for one in found]

    def number(self, title: str) -> float | None:
        """The value of a panel that shows one; None where it shows none."""
        found = self.instant(title)
        return found[0].last if found else None

    def over_time(self, title: str, ref: str = "A", *, step: float) -> list[Series]:
        """The series of a panel over the time range, at multiples of `step`, without what is not a number."""
        since, now = self.span
        query = self._query(title, ref, now - since, step)
        series = []
        for one in self._server.query_range(query.expr, since - since % step, now, step):
            points = [(at, float(value)) for at, value in one["values"] if value not in {"NaN", "+Inf", "-Inf"}]
            series.append(Series(one["metric"], _legend(query, one["metric"]), points))
        return series

    def _query(self, title: str, ref: str, seconds: float, step: float) -> Query:
        for query in of_dashboard(
            self._document, range_seconds=seconds, step_seconds=step, scrape_seconds=INTERVAL,
        ):
            if query.title == title and query.ref == ref:
                return query
        raise LookupError(f"{self._document['title']} has no panel {title!r} with a query {ref}")


def fleet(source: Source) -> Page:
    """Who works and who waits, and how full contexts are."""
    page = Page("Coding agents / Fleet", _note(source.span), 29)
    wait = ((None, GREEN), (300, ORANGE), (900, RED))
    one = ((None, GREEN), (1, RED))
    _numbers(page, source, (
        ("Working", count, ((None, BLUE),)), ("Waiting for input", count, ((None, PURPLE),)),
        ("Longest wait", duration, wait), ("Fullest context", percent, CONTEXT), ("Stale", count, one),
        ("Lost", count, one), ("Spent today", money, ((None, BLUE),)), ("Burn rate per hour", money, ((None, BLUE),)),
    ))
    _agents(page, source)
    rows = sorted(source.over_time("What agents did", step=INTERVAL), key=_by_instance)
    page.timeline(0, 10, 24, 10.4, "What agents did", [(series.name, series.points) for series in rows[:24]],
                  span=source.span, step=INTERVAL, names=310,
                  states={place: (name, COLOURS[state]) for place, (state, name) in enumerate(STATES, 1)})
    peaks = source.over_time("Peaks of context", step=INTERVAL)
    page.lines(0, 20.4, 16, 8.5, "Peaks of context", _lines(peaks, most=40, named=False), unit=percent,
               span=source.span, limits=_limits(CONTEXT), top=104, gap=3 * INTERVAL, legend=0)
    crossed = source.over_time("Limits crossed", step=1800)
    page.columns(16, 20.4, 8, 8.5, "Limits crossed, by half hour", _lines(crossed, fixed=COLOURS), unit=count,
                 span=_whole(source.span, 1800), step=1800)
    return page


def _agents(page: Page, source: Source) -> None:
    """The table of agents: rows of several queries, by agent."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for ref in "ABCDE":
        for series in source.instant("Agents", ref):
            key = tuple(series.labels.get(name, "") for name in ("instance", "root", "pid"))
            rows.setdefault(key, {})[ref] = series
    states = dict(STATES)
    shown = []
    for (instance, root, pid), row in sorted(
        rows.items(), key=lambda item: -item[1]["D"].last if "D" in item[1] else 0.0
    ):
        labels = row["A"].labels if "A" in row else {}
        state = labels.get("activity", "")
        cells = [(states.get(state, state), COLOURS.get(state, TEXT)), _cell(row, "D", duration)]
        cells += [(labels.get(name, ""), TEXT) for name in ("session_name", "model", "git_branch")]
        cells += [_cell(row, "B", percent, CONTEXT), _cell(row, "C", percent, CONTEXT), (root, MUTED), (pid, MUTED),
                  (instance, MUTED), _cell(row, "E", duration, ((None, GREEN), (10, RED)))]
        shown.append(cells)
    page.table(0, 3, 24, 7, "Agents", (
        ("State", 0.12), ("For", 0.08), ("Session", 0.1), ("Model", 0.15), ("Branch", 0.07), ("Context", 0.07),
        ("Peak", 0.07), ("Root", 0.06), ("Pid", 0.07), ("Instance", 0.12), ("Heartbeat age", 0.09)), shown)


def spend(source: Source) -> Page:
    """What a week has cost, and what a subscription would have."""
    page = Page("Coding agents / Spend", _note(source.span), 27.7)
    blue, grey = ((None, BLUE),), ((None, GREY),)
    _numbers(page, source, (
        ("Today", money, blue), ("This week", money, blue), ("This month", money, blue),
        ("Forecast for the month", money, blue), ("Of it estimated", money, ((None, GREEN), (0.005, ORANGE))),
        ("Today, imputed", money, grey), ("This month, imputed", money, grey),
        ("Cache hits", share, ((None, ORANGE), (0.5, BLUE), (0.8, GREEN))),
    ))
    days = source.over_time("Real money by day", step=DAY)
    hours = source.over_time("Real money over time", step=HOUR)
    # The dearest first: those are what is seen.
    days.sort(key=lambda series: -sum(value for _, value in series.points))
    fixed = colours([series.name for series in days], {})
    page.columns(0, 3, 16, 10.3, "Real money by day", _lines(days, fixed=fixed, most=14, ordered=True), unit=dollars,
                 span=_whole(source.span, DAY), step=DAY, columns=3, legend=3)
    imputed = source.over_time("Imputed by day", step=DAY)
    page.columns(16, 3, 8, 10.3, "Imputed by day: a subscription, billed to nobody",
                 _lines(imputed, fixed={imputed[0].name: GREY}), unit=dollars, span=_whole(source.span, DAY), step=DAY,
                 columns=1)
    page.columns(0, 13.3, 24, 6.6, "Real money over time, by hour", _lines(hours, fixed=fixed, most=14), unit=dollars,
                 span=source.span, step=HOUR, legend=0)
    tokens = source.over_time("Tokens", step=4 * HOUR)
    page.columns(0, 19.9, 8, 7.7, "Tokens, by four hours", _lines(tokens, fixed=COLOURS), unit=count, span=source.span,
                 step=4 * HOUR)
    models = source.instant("By model")
    page.ranking(8, 19.9, 8, 7.7, "By model, in the time range",
                 [(series.name, series.last, PALETTE[0]) for series in models[:6]], unit=money)
    windows = source.over_time("Rate-limit windows over time", step=600)
    page.lines(16, 19.9, 8, 7.7, "Rate-limit windows over time", _lines(windows), unit=percent, span=source.span,
               limits=_limits(LIMIT), top=104, gap=1800, columns=1, legend=2)
    return page


def turns(source: Source) -> Page:
    """How long turns take, why they end, and what tools do."""
    page = Page("Coding agents / Turns", _note(source.span), 28.3)
    blue, bad = ((None, BLUE),), ((None, GREEN), (0.05, ORANGE), (0.2, RED))
    _numbers(page, source, (
        ("Turns", count, blue), ("Median duration", duration, blue), ("p99 duration", duration, blue),
        ("Median to first token", duration, blue), ("Failed model calls", share, bad),
        ("Failed tool calls", share, bad),
    ))
    quantiles = [series for ref in "ABC" for series in source.over_time("Duration of turns", ref, step=600)]
    page.lines(0, 3, 12, 8.6, "Duration of turns", _lines(quantiles, ordered=True), unit=duration,
               span=source.span, log=True, gap=1300)
    page.heat(12, 3, 12, 8.6, "Durations: how many turns took how long", _buckets(
        source.over_time("Durations", step=600)), span=_whole(source.span, 600), step=600)
    rate = source.over_time("Turns a minute", step=600)
    page.columns(0, 11.6, 12, 8.6, "Turns a minute", _lines(rate), unit=plain, span=_whole(source.span, 600), step=600,
                 columns=3, legend=2)
    ends = source.over_time("Why turns ended", step=900)
    page.columns(12, 11.6, 12, 8.6, "Why turns ended, by quarter of an hour", _lines(ends, fixed=COLOURS), unit=count,
                 span=_whole(source.span, 900), step=900, columns=6)
    page.table(0, 20.2, 12, 8, "Tools", (
        ("Tool", 0.22), ("Source", 0.22), ("Calls", 0.14), ("Failed", 0.14), ("Mean", 0.14), ("p90", 0.14)),
        _tools(source))
    calls = source.over_time("Tool calls", step=900)
    page.columns(12, 20.2, 12, 8, "Tool calls, by quarter of an hour", _lines(calls), unit=count,
                 span=_whole(source.span, 900), step=900, columns=6)
    return page


def _tools(source: Source) -> list[list[tuple[str, str]]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for ref in "ABCD":
        for series in source.instant("Tools", ref):
            rows.setdefault((series.labels["tool"], series.labels["source"]), {})[ref] = series
    found = []
    for (tool, harness), row in sorted(rows.items(), key=lambda item: -item[1]["A"].last):
        found.append([(tool, TEXT), (harness, MUTED), _cell(row, "A", count),
                      _cell(row, "B", share, ((None, GREEN), (0.05, ORANGE), (0.2, RED))), _cell(row, "C", duration),
                      _cell(row, "D", duration)])
    return found


def _buckets(cumulative: Sequence[Series]) -> list[tuple[str, Points]]:
    """Counts of each bucket out of those up to it; buckets at either end that are empty throughout are left out."""
    rows: list[tuple[str, Points]] = []
    below: dict[float, float] = {}
    for series in sorted(cumulative, key=lambda one: float(one.labels["le"])):
        points = dict(series.points)
        name = "more" if series.labels["le"] == "+Inf" else duration(float(series.labels["le"]))
        rows.append((name, [(at, value - below.get(at, 0.0)) for at, value in points.items()]))
        below = points
    for end in (0, -1):
        while rows and all(value < 0.5 for _, value in rows[end][1]):
            rows.pop(end)
    return rows


def _numbers(
    page: Page, source: Source,
    tiles: Sequence[tuple[str, Callable[[float], str], Sequence[tuple[float | None, str]]]],
) -> None:
    """A row of large numbers, coloured by thresholds."""
    width = 24 / len(tiles)
    for place, (title, unit, thresholds) in enumerate(tiles):
        value = source.number(title)
        text, colour = ("-", MUTED) if value is None else (unit(value), _colour(value, thresholds))
        page.number(place * width, 0, width, 3, title, text, colour)


def _limits(thresholds: Sequence[tuple[float | None, str]]) -> dict[float, str]:
    """The lines that a panel draws at its thresholds."""
    return {float(at): colour for at, colour in thresholds if at is not None}


def _cell(
    row: dict[str, Series], ref: str, unit: Callable[[float], str],
    thresholds: Sequence[tuple[float | None, str]] = ((None, TEXT),),
) -> tuple[str, str]:
    series = row.get(ref)
    return ("-", MUTED) if series is None else (unit(series.last), _colour(series.last, thresholds))


def _colour(value: float, thresholds: Sequence[tuple[float | None, str]]) -> str:
    return [colour for least, colour in thresholds if least is None or value >= least][-1]


def _lines(
    found: Sequence[Series], *, fixed: dict[str, str] | None = None, most: int = FEW, named: bool = True,
    ordered: bool = False,
) -> list[Line]:
    """Lines in the order of their names (or as they are), in colours that depend on the names alone."""
    shown = [series for series in (found if ordered else sorted(found, key=lambda one: one.name))
             if any(value for _, value in series.points)][:most]
    chosen = colours([series.name for series in shown], fixed or {})
    return [Line(series.name if named else "", chosen[series.name], series.points) for series in shown]


def _by_instance(series: Series) -> tuple[str, str, float]:
    return series.labels["instance"], series.labels["session_name"], series.points[0][0]


def _legend(query: Query, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), query.legend)


def _start(since: str, now: float) -> float:
    """Where Grafana's `now/d`, `now/w` and `now/M` begin, by UTC and with weeks from Monday on; or `now-7d`."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0)
    midnight = today.timestamp()
    starts = {"now/d": midnight, "now/w": midnight - today.weekday() * DAY, "now/M": midnight - (today.day - 1) * DAY}
    return starts[since] if since in starts else now - float(since.removeprefix("now-").removesuffix("d")) * DAY


def _whole(span: tuple[float, float], step: float) -> tuple[float, float]:
    """The time that bars of this length take up."""
    return span[0] - span[0] % step, span[1] + -span[1] % step


def _note(span: tuple[float, float]) -> str:
    begin, end = (datetime.fromtimestamp(at, UTC) for at in span)
    return f"{begin:%a} {begin.day} {begin:%b %H:%M} to {end:%a} {end.day} {end:%b %H:%M} UTC"


def draw(server: Server, dashboards: Path, out: Path, now: float = NOW) -> None:
    """Draw all pictures as of a time. Raises LookupError where a dashboard has no such panel any more."""
    recent = now - 6 * HOUR
    for name, picture, since in (("fleet", fleet, recent), ("spend", spend, START), ("turns", turns, recent)):
        document = json.loads((dashboards / f"{name}.json").read_text(encoding="utf-8"))
        picture(Source(server, document, since, now)).save(out / f"{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws all pictures. Ends with 1 where promtool or prometheus is missing."""
    parser = argparse.ArgumentParser(prog="python -m grafana.pictures", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images", help="where the pictures go")
    parser.add_argument("--dashboards", type=Path, default=HERE / "dashboards", help="where the dashboards are")
    parser.add_argument("--history", type=Path, help="keep the simulated week here, and use it if it is there")
    arguments = parser.parse_args(argv)
    promtool, prometheus = shutil.which("promtool"), shutil.which("prometheus")
    if promtool is None or prometheus is None:
        sys.stderr.write("promtool and prometheus are needed\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="pictures-") as temporary:
        home = (arguments.history or Path(temporary)).absolute()
        if not (home / "data").exists():
            records = record_all(fleet_of((NOW - START) / DAY), home, interval=INTERVAL, workers=cores())
            make_blocks(records, home / "data", promtool)
        with serve(prometheus, home, interval=INTERVAL) as server:
            draw(server, arguments.dashboards, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
