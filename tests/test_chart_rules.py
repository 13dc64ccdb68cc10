"""PrometheusRule and dashboards are the files of grafana/: unchanged by default, and changed as the values say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart_support import CASES, CHART, ROOT, Values, objects, only, refusal

RULES = sorted((ROOT / "grafana" / "rules").glob("*.yaml"))
DASHBOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
BUDGET = "period:coding_agent_budget_usd:limit"

Rule = dict[str, Any]


def of_files() -> list[dict[str, Any]]:
    return [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]


def of_chart(values: Values) -> list[dict[str, Any]]:
    """The groups of the PrometheusRule, with `values` below prometheusRule."""
    rendered = objects({"prometheusRule": {"enabled": True, **values}})
    groups: list[dict[str, Any]] = only(rendered, "PrometheusRule")["spec"]["groups"]
    return groups


def rules(groups: list[dict[str, Any]]) -> list[Rule]:
    return [rule for group in groups for rule in group["rules"]]


def alerts(groups: list[dict[str, Any]]) -> dict[str, Rule]:
    return {rule["alert"]: rule for rule in rules(groups) if "alert" in rule}


ALERTS = alerts(of_files())


def thresholds() -> Iterator[tuple[str, str, str]]:
    """Alert, name and number of each threshold, by the rule that they are written by."""
    for name, rule in ALERTS.items():
        for number, threshold in re.findall(r"(-?\d[\d.e+-]*) # (\w+)$", rule["expr"], re.MULTILINE):
            yield name, threshold, number


ALL_BUDGETS = {"day": 50, "week": 200, "month": 600}


def test_with_the_budgets_of_the_file_the_rules_are_those_of_the_files() -> None:
    """Group by group and rule by rule, with every template of Prometheus in an annotation as it was."""
    assert of_chart({"budgets": ALL_BUDGETS}) == of_files()
    assert "{{ $labels." in json.dumps(of_files())


def test_without_budgets_there_is_no_limit() -> None:
    """Nothing is recorded as a budget by default, so that no budget alert can fire; all else is there."""
    limits = [rule for rule in rules(of_files()) if rule.get("record") == BUDGET]
    assert of_chart({}) == [group for group in of_files() if group["rules"] != limits]


def test_budgets_are_those_of_the_values() -> None:
    """Each period that is set has its limit, and no other."""
    limits = [rule for rule in rules(of_chart({"budgets": {"day": 12.5, "week": None, "month": 1000000}}))
              if rule.get("record") == BUDGET]
    assert [(rule["labels"]["period"], rule["expr"]) for rule in limits] == [
        ("day", "vector(12.5)"), ("month", "vector(1e+06)")]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_can_be_switched_off_alone(name: str) -> None:
    """One is gone, and the others are as they were."""
    left = alerts(of_chart({"alerts": {name: {"enabled": False}}}))
    assert left == {other: rule for other, rule in ALERTS.items() if other != name}


def test_all_alerts_can_be_switched_off() -> None:
    """Recorded series stay; a group without rules goes."""
    left = of_chart({"alerts": {name: {"enabled": False} for name in ALERTS}})
    assert alerts(left) == {}
    assert left
    assert all(group["rules"] for group in left)


@pytest.mark.parametrize(("name", "threshold", "number"), list(thresholds()))
def test_a_threshold_is_replaced(name: str, threshold: str, number: str) -> None:
    """The number before its name changes, and nothing else of the expression."""
    changed = alerts(of_chart({"alerts": {name: {"thresholds": {threshold: 12345.5}}}}))
    before, after = ALERTS[name]["expr"], changed[name]["expr"]
    assert after == before.replace(f"{number} # {threshold}\n", f"12345.5 # {threshold}\n")
    assert after != before
    assert changed == {**ALERTS, name: {**ALERTS[name], "expr": after}}


def test_severity_duration_and_labels_are_replaced() -> None:
    """As the values say, for one alert; further labels are for all."""
    changed = alerts(of_chart({
        "alertLabels": {"team": "agents"},
        "alerts": {"CodingAgentLost": {"severity": "critical", "for": "7m"}}}))
    assert changed["CodingAgentLost"]["labels"] == {"severity": "critical", "team": "agents"}
    assert changed["CodingAgentLost"]["for"] == "7m"
    for name, rule in changed.items():
        if name != "CodingAgentLost":
            assert rule == {**ALERTS[name], "labels": {**ALERTS[name]["labels"], "team": "agents"}}


@pytest.mark.parametrize(("change", "sentence"), [
    ({"CodingAgentLots": {"enabled": False}}, 'there is no alert "CodingAgentLots"; there are CodingAgent'),
    ({"CodingAgentLost": {"thresholds": {"percents": 5}}}, 'there is no threshold "percents"; there is agents'),
    ({"CodingAgentExporterDown": {"thresholds": {"percent": 5}}}, 'there is no threshold "percent"; there is none'),
])
def test_unknown_names_are_refused_with_a_sentence(change: Values, sentence: str) -> None:
    """What would change nothing says so, and what there is."""
    assert sentence in refusal({"prometheusRule": {"enabled": True, "alerts": change}})


@pytest.mark.parametrize("values", [
    {}, {"budgets": ALL_BUDGETS, "alertLabels": {"team": "agents"}}, CASES["rules-and-dashboards"]["prometheusRule"],
    {"alerts": {name: {"severity": "info", "for": "1h30m", "thresholds": {
        threshold: 1500000 for alert, threshold, _ in thresholds() if alert == name}} for name in ALERTS}},
], ids=["default", "budgets", "case", "all-changed"])
def test_promtool_takes_the_rules(values: Values, tool: Callable[[str], str], tmp_path: Path) -> None:
    """The groups are a rule file, whatever was changed."""
    file, groups = tmp_path / "rules.yaml", of_chart(values)
    file.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    done = subprocess.run([tool("promtool"), "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules(groups))} rules found" in done.stdout


def test_dashboards_are_those_of_the_files() -> None:
    """One ConfigMap for each, so that none comes near the mebibyte that one may hold, with what Grafana looks for."""
    found = objects({"dashboards": {"enabled": True}})
    assert {name: text for one in found for name, text in one["data"].items()} == {
        path.name: path.read_text(encoding="utf-8").strip() + "\n" for path in DASHBOARDS}
    assert DASHBOARDS
    for one in found:
        assert one["kind"] == "ConfigMap"
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "Coding agents"}
        assert sum(len(text.encode()) for text in one["data"].values()) < 500_000


def test_the_files_are_there_once() -> None:
    """Rules and dashboards of the chart are links to those that Prometheus and Grafana load."""
    for name in ("rules", "dashboards"):
        link = CHART / "files" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / "grafana" / name
