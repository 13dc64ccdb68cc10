"""What `grafana/queries.py` reads from dashboards and rules, and that every query in the shipped ones is answered.

The queries are run by a real Prometheus that scrapes the real exporter, while the recordings of real agents happen
again below it and a collector takes its spans.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from grafana.queries import Query, names, of_dashboard, of_rules, of_variables, seconds

import replay_support
from coding_agent_exporter import families
from otlp_receiver import HttpReceiver, http_receiver
from process_support import Exporter, free_port, wait_for
from prometheus_support import Prometheus, prometheus
from replay_support import Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GRAFANA = Path(__file__).parent.parent / "grafana"
RANGE, STEP = 3600.0, 15.0
"""Seconds that a dashboard shows, and between its points."""
PATIENCE = 90.0
"""Seconds, for what takes a few on a machine that does nothing else."""

EMPTY = {
    "alerts.yaml: CodingAgentBudgetHard": "less than a dollar is spent",
    "alerts.yaml: CodingAgentBudgetSoft": "less than a dollar is spent",
    "alerts.yaml: CodingAgentExporterDown": "it answers",
    "alerts.yaml: CodingAgentExporterNotReading": "it reads",
    "alerts.yaml: CodingAgentExporterNotStoring": "its state file can be written",
    "alerts.yaml: CodingAgentExporterRejectingInput": "the few lines that are rejected are copies",
    "alerts.yaml: CodingAgentExporterSeriesDropped": "there are fewer series than the cap allows",
    "alerts.yaml: CodingAgentExporterSpansDropped": "the collector takes all spans",
    "alerts.yaml: CodingAgentExporterSpansNotLeaving": "the collector takes all spans",
    "alerts.yaml: CodingAgentExporterUnreadableFiles": "all files can be read",
    "alerts.yaml: CodingAgentRateLimitNearlyUsedUp": "46 % are used",
    "alerts.yaml: CodingAgentSpendRateHigh": "there is no week before this to compare with",
    "alerts.yaml: CodingAgentStuck": "nobody works for half an hour",
    "alerts.yaml: CodingAgentWaitingForInput": "nobody waits for a quarter of an hour",
    "exporter: Files read again": "no log is truncated or replaced",
    "recording.yaml: root:coding_agent_cost_usd:spent1h_p90_7d": "there is no day before this",
}
"""Queries that return nothing over the recordings, and why that is as it should be."""
SPENT = {("pi-coding", "api_key"): 0.0597913 + 0.0424509, ("omp", "api_key"): 0.58487835,
         ("opencode", "api_key"): 0.185294525, ("claude", "api_key"): 0.2332907, ("claude", "subscription"): 0.0223122}
"""US dollars: each message of the recordings once. Of pi they are two, the processes and the cases of tools."""


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))]


def rules() -> dict[str, dict[str, Any]]:
    """The rule files by name."""
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted((GRAFANA / "rules").glob("*.yaml"))}


def shipped() -> list[Query]:
    """Every query of every dashboard and rule."""
    found: list[Query] = []
    for document in dashboards():
        found += of_dashboard(document, range_seconds=RANGE, step_seconds=STEP)
        found += of_variables(document)
    for name, document in rules().items():
        found += of_rules(document, where=name)
    return found


def hastened(home: Path) -> list[Path]:
    """The rule files without intervals and waiting times, in `home`: a test has seconds."""
    paths = []
    for name, document in rules().items():
        for group in document["groups"]:
            group.pop("interval", None)
            for rule in group["rules"]:
                rule.pop("for", None)
        paths.append(home / name)
        paths[-1].write_text(json.dumps(document))  # JSON is YAML
    return paths


@dataclass
class Stage:
    """Where everything has happened, and living agents go on beating."""

    server: Prometheus
    receiver: HttpReceiver
    began: float

    def answer(self, query: Query) -> list[dict[str, Any]]:
        """The series of a query, asked as its panel asks, that have a number."""
        now = time.time()
        if query.instant:
            found = self.server.query(query.expr, now)
        else:
            step = max(STEP, query.step or 0)
            # The last point is now, as the dashboard's is: longer steps than the test go back to before it.
            found = self.server.query_range(query.expr, now - step * max(1, RANGE // step), now, step)
        return [series for series in found if any(
            not math.isnan(float(value)) for _, value in series.get("values", [series.get("value")]))]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Iterator[Stage]:
    """All recordings at once, in 23 seconds."""
    program, home, port = tool("prometheus"), tmp_path_factory.mktemp("stage"), free_port()
    replay = Replay(
        home, replay_support.pi(), replay_support.tools(), replay_support.oh_my_pi(2.5),
        replay_support.oh_my_pi_sessions(30), replay_support.opencode(30), replay_support.claude_code(12),
        replay_support.made_up())
    with (
        http_receiver() as receiver,
        Exporter(home, f"--web.listen-address=127.0.0.1:{port}", f"--otlp.endpoint={receiver.url}",
                 "--telemetry.stale-after=5s", *replay.flags) as exporter,
        prometheus(program, home / "prometheus", port, "1s", job="coding-agent-exporter", rules=hastened(home),
                   flags=["--enable-feature=exemplar-storage"]) as server,
        replay,
    ):
        began = time.time()
        replay.wait_until_played()
        wait_for(lambda: server.query("sum(coding_agent_instances_lost_total) >= 3"), "three agents to be lost",
                 deadline=PATIENCE)
        wait_for(lambda: server.query("coding_agent_exporter_spans_pending == 0"), "the spans to leave",
                 deadline=PATIENCE)
        evaluated(server)
        yield Stage(server, receiver, began)
        assert not exporter.ended


def evaluated(server: Prometheus) -> None:
    """Wait until every rule has been evaluated over what has been scraped so far, and over what that recorded."""
    def times() -> set[tuple[str, str]]:
        return {(rule["name"], rule["lastEvaluation"]) for rule in server.rules()}

    def later(before: set[tuple[str, str]]) -> bool:
        return not before & times()

    for _ in range(2):
        wait_for(partial(later, times()), "every rule to be evaluated", every=0.2, deadline=PATIENCE)


def test_every_query_is_answered(stage: Stage) -> None:
    """Without an error or a warning, and with data but for the queries of which `EMPTY` says why not."""
    queries = shipped()
    assert len({query.where for query in queries}) == len(queries) > 0
    nothing = {query.where for query in queries if not stage.answer(query)}
    assert nothing - EMPTY.keys() == set()
    assert EMPTY.keys() - nothing == set()


def test_labels_that_legends_show_are_there(stage: Stage) -> None:
    """Each label that a legend or a drop-down list names is on some series that the query returns."""
    missing = []
    for query in shipped():
        if query.legend_labels and (answer := stage.answer(query)):
            having = {label for series in answer for label in series["metric"]}
            missing += [f"{query.where}: {label}" for label in sorted(query.legend_labels - having)]
    assert missing == []


def test_tables_arrange_what_is_there(stage: Stage) -> None:
    """A table's columns are the labels and values of its queries: none that it names is missing, none is left over."""
    tables = defaultdict[tuple[str, str], list[Query]](list)
    for query in shipped():
        if query.columns:
            tables[query.dashboard, query.title].append(query)
    assert len(tables) > 0
    for queries in tables.values():
        answers = [series["metric"] for query in queries for series in stage.answer(query)]
        values = {f"Value #{query.ref}" for query in queries} if len(queries) > 1 else {"Value"}
        assert queries[0].columns == {"Time", *values, *(label for metric in answers for label in metric)}


def test_what_was_spent_is_shown(stage: Stage) -> None:
    """To a billionth of a dollar, in the raw samples, in the recorded series, and on the dashboard."""
    cost = 'coding_agent_cost_usd_total{provenance="reported"}'
    for expr in (f"max_over_time({cost}[1h]) - min_over_time({cost}[1h])",
                 'usage:coding_agent_cost_usd:spent1h{provenance="reported"}'):
        found = stage.server.query(f"sum by (source, cost_mode) ({expr})")
        spent = {(one["metric"]["source"], one["metric"]["cost_mode"]): float(one["value"][1]) for one in found}
        assert spent == pytest.approx(SPENT, abs=1e-9)
    (panel,) = (query for query in shipped() if query.where == "spend: By source")
    reported = [one for one in stage.answer(panel) if "mark" not in one["metric"]]
    shown = {(one["metric"]["source"], "api_key"): float(one["value"][1]) for one in reported}
    assert shown == pytest.approx({key: usd for key, usd in SPENT.items() if key[1] == "api_key"}, abs=1e-9)


def test_rules_are_healthy(stage: Stage) -> None:
    """Prometheus has loaded and evaluated every rule, and filled in the texts of those alerts that fire."""
    loaded = stage.server.rules()
    assert len(loaded) == sum(len(group["rules"]) for document in rules().values() for group in document["groups"])
    assert [(rule["name"], rule.get("lastError")) for rule in loaded if rule["health"] != "ok"] == []
    texts = [text for rule in loaded for alert in rule.get("alerts", []) for text in alert["annotations"].values()]
    assert [text for text in texts if not text or "<error" in text] == []
    assert len(texts) > 0


def test_exemplars_lead_to_traces(stage: Stage) -> None:
    """The trace of every exemplar is one that the collector has."""
    traces = {span.trace_id.hex() for span in list(stage.receiver.spans)}
    for family in (families.TURN_SECONDS, families.FIRST_TOKEN_SECONDS, families.TOOL_SECONDS):
        found = stage.server.exemplars(f"{family.name}_bucket", stage.began, time.time())
        assert {exemplar["labels"]["trace_id"] for exemplar in found} <= traces
        assert found


def test_no_alert_without_a_reason(tmp_path: Path, tool: Callable[[str], str]) -> None:
    """A fresh exporter over directories that are empty, or missing, fires nothing, however long it would take."""
    port = free_port()
    (tmp_path / "sessions" / "pi").mkdir(parents=True)
    with (
        Exporter(tmp_path, f"--web.listen-address=127.0.0.1:{port}", *Replay(tmp_path).flags),
        prometheus(tool("prometheus"), tmp_path / "prometheus", port, "1s", job="coding-agent-exporter",
                   rules=hastened(tmp_path)) as server,
    ):
        wait_for(lambda: server.query("count_over_time(up[1m]) >= 3 and up == 1"), "three scrapes", every=0.2,
                 deadline=PATIENCE)
        evaluated(server)
        alerts = {rule["name"]: rule["state"] for rule in server.rules() if rule["type"] == "alerting"}
        assert len(alerts) > 0
        assert {name: state for name, state in alerts.items() if state != "inactive"} == {}


def test_metrics_of_dashboards_and_rules_exist() -> None:
    """Every name is in the catalogue, standard, or recorded by the shipped rules."""
    known = {"up", "ALERTS", "ALERTS_FOR_STATE"}
    for family in families.FAMILIES:
        if family.type == "histogram" and not family.otlp:
            known |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        elif not family.otlp:
            known.add(family.name)
    known |= {rule["record"] for document in rules().values()
              for group in document["groups"] for rule in group["rules"] if "record" in rule}
    unknown = {query.where: found for query in shipped()
               if (found := {name for name in names(query.expr) if not name.startswith("process_")} - known)}
    assert unknown == {}


@pytest.mark.parametrize(("expr", "found"), [
    ('sum by (root, model) (rate(x_total{root=~".*", y="z # no, {q}"}[5m])) # y > 3\n> bool 3', {"x_total"}),
    ('{__name__=~"a|b:c", job="x"} or on (pid) group_left (model) foo{} offset 10m', {"a", "b:c", "foo"}),
    ('{__name__=~"^(a|b)$"} + {__name__="c"} + {"d.e", f="g"}', {"a", "b", "c", "d.e"}),
    ("max_over_time(x[1h:5m] @ end()) - (last_over_time(x[10m] offset 1h) or min_over_time(y[1h]))", {"x", "y"}),
    ("SUM(a) BY (b) / COUNT without(c) (d) unless ignoring(e) f == bool Inf", {"a", "d", "f"}),
    ('label_replace(up, "a", "$1", "b", \'(c"d)\') * 1e3 + 0x1F - .5', {"up"}),
    ("time() - vector(1) > -NaN", set()),
    (r'count_values("a\"b", `c`)', set()),
])
def test_names(expr: str, found: set[str]) -> None:
    """Metrics only: no labels, functions, keywords, and no words in strings and comments."""
    assert names(expr) == found


@pytest.mark.parametrize("expr", [
    '{__name__=~"coding_agent_context_percent_peak.*"}', '{__name__!="a"}', "{__name__", "{__name__=~",
    "a $b", 'a{b="}',
])
def test_names_that_cannot_be_known(expr: str) -> None:
    """What does not list its metrics, or is no PromQL, is refused."""
    with pytest.raises(ValueError, match=r"."):
        names(expr)


def dashboard(*panels: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A dashboard as Grafana stores it."""
    return {"uid": "d", "panels": list(panels), **changes, "templating": {"list": [
        {"name": "datasource", "type": "datasource", "current": {"value": "x"}},
        {"name": "root", "type": "query", "multi": True, "includeAll": True, "allValue": ".*",
         "query": {"query": "label_values(m{a=\"b\"}, root)"}, "current": {"value": ["$__all"]}},
        {"name": "top", "type": "custom", "current": {"value": "5"}},
    ]}}


def panel(*targets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"title": "p", "type": "stat", "targets": list(targets), **changes}


def asked(*panels: dict[str, Any], **changes: str) -> list[Query]:
    return list(of_dashboard(dashboard(*panels), range_seconds=3600, step_seconds=30, variables=changes))


def test_variables_are_filled_in() -> None:
    """Grafana's own, all of those with several values, the current one of others; unless the caller says otherwise."""
    expr = 'topk($top, a{r=~"${root:regex}"}[$__range] + b[$__rate_interval] + c[${__interval}] + $__range_s)'
    assert [query.expr for query in asked(panel({"expr": expr}))] == [
        'topk(5, a{r=~".*"}[3600s] + b[60s] + c[30s] + 3600)']
    assert [query.expr for query in asked(panel({"expr": "$root $top"}), root="pi|omp")] == ["pi|omp 5"]
    for unknown in ("$tpo", "${datasource}"):
        with pytest.raises(ValueError, match="unknown variable"):
            asked(panel({"expr": unknown}))


def test_kinds_of_queries() -> None:
    """Range by default, instant where it says so, both where both are asked for; other data sources are left out."""
    queries = asked(panel({"expr": "a"}, title="one"),
                    panel({"expr": "b", "refId": "A", "instant": True}, {"expr": "c", "refId": "B", "range": True}),
                    panel({"query": "{}", "queryType": "traceql"}, {"expr": "d", "instant": True, "range": True},
                          type="table"))
    assert [(query.where, query.expr, query.instant) for query in queries] == [
        ("d: one", "a", False), ("d: p (stat) (A)", "b", True), ("d: p (stat) (B)", "c", False),
        ("d: p (table) (instant)", "d", True), ("d: p (table) (range)", "d", False)]


def test_ranges_and_steps_of_panels() -> None:
    """A panel's own window, and its shortest step, take the place of the dashboard's."""
    (bars,) = asked(panel({"expr": "a[$__interval] b[$__rate_interval] c[$__range]"}, interval="1d", timeFrom="7d"))
    assert (bars.expr, bars.step, bars.range) == (
        "a[86400s] b[86415s] c[604800s]", 86400, ("now-7d", "now"))
    (today,) = asked(panel({"expr": "a[$__interval] c[$__range]", "interval": "1s"}, interval="1d", timeFrom="now/d"))
    assert (today.expr, today.step, today.range) == ("a[30s] c[3600s]", 1, ("now/d", "now"))


def test_panels_in_rows_and_annotations() -> None:
    """A collapsed row holds its panels; an annotation is a range query."""
    row = {"type": "row", "title": "r", "panels": [panel({"expr": "a", "legendFormat": "{{ b }} {{c}}"})]}
    alerts = {"name": "alerts", "expr": 'ALERTS{r=~"$root"}', "titleFormat": "{{d}}"}
    document = dashboard(row, annotations={"list": [alerts]})
    inner, annotation = of_dashboard(document, range_seconds=60, step_seconds=1)
    assert (inner.where, inner.dashboard, inner.legend_labels) == ("d: p", "d", {"b", "c"})
    assert (annotation.where, annotation.expr, annotation.legend_labels) == (
        "d: annotation alerts", 'ALERTS{r=~".*"}', {"d"})


def test_columns_of_tables() -> None:
    """All that the table names, however."""
    organize = {"excludeByName": {"Time": True}, "indexByName": {"a": 0}, "renameByName": {"a": "A", "Value": "B"}}
    (found,) = asked(panel({"expr": "a"}, transformations=[{"id": "merge", "options": {}},
                                                           {"id": "organize", "options": organize}]))
    assert found.columns == {"Time", "a", "Value"}


def test_lists_of_variables() -> None:
    """A drop-down list is a series for each of its values."""
    (found,) = of_variables(dashboard())
    assert (found.where, found.expr, found.legend_labels) == (
        "d: variable root", 'group by (root) (m{a="b"})', {"root"})


def test_rules_of_a_file() -> None:
    """Alerts by their name, recorded series by name and labels."""
    document = {"groups": [{"name": "g", "rules": [
        {"alert": "A", "expr": "a > 1", "labels": {"severity": "info"}},
        {"record": "r:a:b", "expr": "sum(a)", "labels": {"period": "day"}}, {"record": "r:a:b", "expr": "sum(b)"}]}]}
    assert [(query.where, query.expr, query.instant) for query in of_rules(document, where="f.yaml")] == [
        ("f.yaml: A", "a > 1", True), ('f.yaml: r:a:b{period="day"}', "sum(a)", True),
        ("f.yaml: r:a:b", "sum(b)", True)]


@pytest.mark.parametrize(("text", "wanted"), [("15s", 15), ("1h30m", 5400), ("250ms", 0.25), ("1d", 86400)])
def test_durations(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "15", "s", "1h 5m", "-1m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        seconds(text)
