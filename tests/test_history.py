"""What a window of time cost, in a real Prometheus over a made-up history: the form that dashboards and rules use.

    max_over_time(x[w]) - (last_over_time(x[10m] offset w) or min_over_time(x[w]))

Agents, exporter and scrapes are simulated by one clock (`grafana/history.py`), so that what a day has cost is known to
the last digit. A window holds what was written to the files between two scrapes, the last one up to its beginning and
the last one up to its end; but a new series is shown at zero in one scrape, so what brought it about is seen with the
next.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest
from grafana.history import START, Record, Server, Target, make_blocks, record_all, serve

from coding_agent_exporter.demo.simulation import BENCH, DESK, POD
from coding_agent_exporter.demo.writers import TOKEN_TYPES, Usage
from coding_agent_exporter.model import PICO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INTERVAL = 60.0
HOUR, DAY = 3600.0, 86_400.0
BEGIN = START + 8 * HOUR
END = BEGIN + 26 * HOUR
COST = 'coding_agent_cost_usd_total{provenance="reported"}'
TOKENS = "coding_agent_tokens_total"
BY = "root, source, provider, model, cost_mode"
NOON = START + 12 * HOUR
"""When the pods start; one more does an hour and a half later."""


class Window(NamedTuple):
    """A window of time that ends at `end`."""

    end: float
    seconds: float

    @property
    def begin(self) -> float:
        return self.end - self.seconds


class History(NamedTuple):
    """A server and what it knows."""

    server: Server
    records: list[Record]

    def spent(self, name: str, window: Window, by: str = BY, where: str = "") -> dict[tuple[str, ...], float]:
        """The exact form for one window, without what is zero."""
        x, w = name.replace("}", f",{where}}}") if where else name, f"{window.seconds:.0f}s"
        before = f"last_over_time({x}[10m] offset {w}) or min_over_time({x}[{w}])"
        found = self.server.query(f"sum by ({by}) (max_over_time({x}[{w}]) - ({before}))", window.end)
        labels = by.split(", ")
        values = {tuple(one["metric"].get(label, "") for label in labels): float(one["value"][1]) for one in found}
        return {key: value for key, value in values.items() if value}

    def increase(self, window: Window) -> float:
        (one,) = self.server.query(f"sum(increase({COST}[{window.seconds:.0f}s]))", window.end)
        return float(one["value"][1])

    def truth(self, window: Window) -> dict[tuple[str, ...], float]:
        """What the files say of it, by `BY`, in US dollars."""
        spent: Counter[Usage] = Counter()
        for record in self.records:
            for usage in record.truth.pico():
                spent[usage] += known(record, usage, window.end) - known(record, usage, window.begin)
        return {tuple(usage): pico / PICO for usage, pico in spent.items() if pico}


def known(record: Record, usage: Usage, at: float) -> int:
    """What Prometheus has been shown of a label set at a time, in pico-USD since the exporter started."""
    since, at = record.target.start, at - at % INTERVAL
    spends = [spend.at / 1000 for spend in record.truth.spends if spend.usage == usage]
    if spends[0] > since:
        born = since + math.ceil((spends[0] - since) / INTERVAL) * INTERVAL
        if at <= born:
            return 0
    return record.truth.pico(since, at)[usage]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Iterator[History]:
    """26 hours from a morning on: two machines, one whose agents had worked for a day before, and four pods."""
    home, promtool, prometheus = tmp_path_factory.mktemp("history"), tool("promtool"), tool("prometheus")
    targets = [
        Target("agents", "laptop-a:10464", DESK, BEGIN, END),
        Target("agents", "laptop-b:10464", BENCH[:4], START + 6 * HOUR, END, seed=2, before=34 * HOUR),
        *(Target("jobs", f"10.1.0.{number}:10464", POD, NOON + (number == 3) * 1.5 * HOUR, END, seed=number,
                 labels=(("namespace", "agents"), ("pod", f"job-{number}")))
          for number in range(4)),
    ]
    records = record_all(targets, home, interval=INTERVAL)
    make_blocks(records, home / "data", promtool)
    with serve(prometheus, home, interval=INTERVAL) as server:
        yield History(server, records)


WHOLE = Window(END, 30 * HOUR)


@pytest.mark.parametrize("window", [
    *(Window(BEGIN + hour * HOUR, HOUR) for hour in range(1, 12)),
    *(Window(BEGIN + hour * HOUR + 23, HOUR) for hour in range(1, 12)),
    Window(BEGIN + 2 * HOUR, 420), Window(BEGIN + 5 * HOUR + 59, 1000), Window(NOON + 3 * HOUR, 6 * HOUR),
    Window(END, DAY), Window(END - HOUR + 23, DAY), WHOLE,
], ids=lambda window: f"{window.seconds:.0f}s-until-{(window.end - START) / HOUR:.2f}h")
def test_a_window_costs_what_the_files_say(window: Window, history: History) -> None:
    """For each label set, to 1e-9 USD, whether its series were born, lived or ended within the window."""
    found, truth = history.spent(COST, window), history.truth(window)
    assert found.keys() == truth.keys()
    assert sum(found.values()) > 0.05
    for key, usd in truth.items():
        assert found[key] == pytest.approx(usd, abs=1e-9)


def test_the_whole_is_what_was_spent_since_the_exporters_started(history: History) -> None:
    """What agents had spent the day before is the baseline of its series, and in no window."""
    before = history.records[1].truth.pico(0, history.records[1].target.start).total() / PICO
    since = sum(record.truth.pico(record.target.start).total() for record in history.records) / PICO
    assert before > 5
    assert sum(history.spent(COST, WHOLE).values()) == pytest.approx(since, abs=1e-9)


def test_tokens_are_exact_in_the_same_form(history: History) -> None:
    """All of the history, by type."""
    found = history.spent(TOKENS, WHOLE, by="token_type")
    used: Counter[str] = Counter()
    for record in history.records:
        for (_, kind), count in record.truth.tokens(record.target.start).items():
            used[kind] += count
    assert found == {(kind,): used[kind] for kind in TOKEN_TYPES}


@pytest.mark.parametrize("seconds", [300.0, 1200.0, HOUR, 6.5 * HOUR])
def test_windows_that_adjoin_add_up(seconds: float, history: History) -> None:
    """Nothing is lost between two of them, also not where a pod comes or goes. They do not begin at scrapes."""
    parts: Counter[tuple[str, ...]] = Counter()
    last = end = END - 37
    while end > END - 26 * HOUR:
        parts.update(history.spent(COST, Window(end, seconds)))
        end -= seconds
    whole = history.spent(COST, Window(last, last - end))
    assert parts.keys() == whole.keys()
    for key, usd in whole.items():
        assert parts[key] == pytest.approx(usd, abs=1e-9)


def test_pods_that_came_and_went_within_the_window_count(history: History) -> None:
    """Each with all it spent, to its last message: none is there any more at the end of the window."""
    window, found = Window(NOON + 6 * HOUR, 8 * HOUR), {}
    for record in history.records[2:]:
        assert window.begin < record.scrapes[0] < record.scrapes[-1] < window.end - 600
        found[record.target.instance,] = record.truth.pico().total() / PICO
    assert min(found.values()) > 0.1
    assert history.spent(COST, window, by="instance", where='job="jobs"') == pytest.approx(found, abs=1e-9)


def test_increase_does_not_give_amounts(history: History) -> None:
    """Why it is not used for them: it extrapolates to the edges of a window, and misses what lies between two.

    Windows that begin and end right at a scrape are the exception: there is nothing to extrapolate to.
    """
    hours = [Window(BEGIN + hour * HOUR + 23, HOUR) for hour in range(1, 12)]
    truths = [sum(history.truth(window).values()) for window in hours]
    errors = [history.increase(window) - truth for window, truth in zip(hours, truths, strict=True)]
    assert sum(abs(error) > 0.01 for error in errors) >= 8
    assert abs(sum(errors)) > 0.01


def test_what_prometheus_adds_to_a_scrape_is_there(history: History) -> None:
    """`up` of each target at its scrapes, with the labels of the scrape config."""
    found = history.server.query(f"count_over_time(up[{WHOLE.seconds:.0f}s])", END)
    by_instance = {one["metric"]["instance"]: (one["metric"]["job"], float(one["value"][1])) for one in found}
    for record in history.records:
        assert by_instance[record.target.instance] == (record.target.job, len(record.scrapes))
    pods = history.server.query('coding_agent_cost_usd_total{pod="job-1",namespace="agents"}', NOON + 300)
    assert pods


def test_what_has_vanished_is_soon_out_of_sight(history: History) -> None:
    """Blocks made this way have no staleness markers; the server looks back for two and a half intervals instead."""
    last = history.records[2].scrapes[-1]
    up = f'up{{instance="{history.records[2].target.instance}"}}'
    assert history.server.query(up, last + 2 * INTERVAL)
    assert history.server.query(up, last + 3 * INTERVAL) == []


def test_the_pictures_of_the_documentation_can_be_drawn(history: History, tmp_path: Path) -> None:
    """From the dashboards as they are: every panel that is drawn is there, and its query has an answer."""
    from grafana import pictures

    pictures.draw(history.server, pictures.HERE / "dashboards", tmp_path, now=START + 16 * HOUR)
    for name in ("fleet", "spend", "turns"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert struct.unpack(">4xI", content[12:20]) == (1600,)
        assert 30_000 < len(content) < 250_000
