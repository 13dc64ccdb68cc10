"""Alerts fire when they should, stay silent when they should, end when it is over, and are all documented.

What the rules do is in `tests/data/rules`, in the format of `promtool test rules`. Here are promtool's verdict on those
files, and the questions that promtool does not ask: whether each alert was seen to fire, to end and to stay silent.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from coding_agent_exporter import families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
RULES = sorted((ROOT / "grafana" / "rules").glob("*.yaml"))
CASES = sorted((ROOT / "tests" / "data" / "rules").glob("*.yaml"))
RUNBOOKS = ROOT / "docs" / "runbooks.md"
ALERTS_PAGE = ROOT / "docs" / "alerts.md"
REPOSITORY = "https://github.com/coding-agent-exporter/coding-agent-exporter"

THRESHOLD = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?) # ([a-z_]+)$", re.MULTILINE)
"""A number that may be changed, and its name."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in read(path)["groups"]:
            yield from group["rules"]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}

on_every_alert = pytest.mark.parametrize("name", ALERTS)


def thresholds(rule: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, number) of each threshold of an alert, in the order of its expression."""
    return [(name, number) for number, name in THRESHOLD.findall(rule["expr"])]


def queries(rule: dict[str, Any]) -> list[str]:
    """The expression of a rule, and those that its annotations ask."""
    texts = "\n".join(rule.get("annotations", {}).values())
    return [rule["expr"], *re.findall(r'printf "([^"]*\{[^"]*)"', texts)]


def metric_names(query: str) -> set[str]:
    """The names of series in PromQL, by taking away all else that looks like a name."""
    bare = re.sub(r"#.*", "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|'[^']*'", "", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    names = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare)
    return {*names} - {"and", "or", "unless", "offset", "bool", "sum", "max", "min", "count"}


def seconds(text: str) -> int:
    """A duration as promtool writes it."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhd])", text))


def promtool(path: str, *arguments: str | Path) -> str:
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- what promtool says


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_each_file_is_valid_alone(path: Path, tool: Callable[[str], str]) -> None:
    """promtool takes each file of rules as it is."""
    count = sum(len(group["rules"]) for group in read(path)["groups"])
    assert f"SUCCESS: {count} rules found" in promtool(tool("promtool"), "check", "rules", path)


def test_all_files_are_valid_together(tool: Callable[[str], str], tmp_path: Path) -> None:
    """One server takes them all, and no rule is there twice."""
    config = tmp_path / "prometheus.yml"
    config.write_text("rule_files:\n" + "".join(f"  - {path}\n" for path in RULES), encoding="utf-8")
    said = promtool(tool("promtool"), "check", "config", config)
    assert said.count("rules found") == len(RULES)
    assert "duplicate" not in said
    groups = Counter(group["name"] for path in RULES for group in read(path)["groups"])
    assert groups.most_common(1)[0][1] == 1
    assert all(name.startswith("coding-agent-") for name in groups)


@on_every_alert
def test_each_alert_is_valid_alone(name: str, tool: Callable[[str], str], tmp_path: Path) -> None:
    """Every other alert can be left out: an expression names no other, and a file with one rule is valid."""
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [ALERTS[name]]}]}), encoding="utf-8")
    promtool(tool("promtool"), "check", "rules", file)
    assert not re.search(r"\bALERTS(?:_FOR_STATE)?\b", ALERTS[name]["expr"])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_rules_do_what_their_cases_say(path: Path, tool: Callable[[str], str]) -> None:
    """Every case of the file comes out as promtool works it out: alerts with all labels and annotations, samples."""
    promtool(tool("promtool"), "test", "rules", path)


# -- what the cases cover


def asked() -> dict[str, list[list[tuple[int, bool]]]]:
    """For each alert: for each case with it, (second, whether it fires) in the order of time."""
    found: dict[str, list[list[tuple[int, bool]]]] = defaultdict(list)
    for path in CASES:
        for case in read(path)["tests"]:
            times: dict[str, list[tuple[int, bool]]] = defaultdict(list)
            for each in case.get("alert_rule_test", ()):
                times[each["alertname"]].append((seconds(str(each["eval_time"])), bool(each.get("exp_alerts"))))
            for name, evaluations in times.items():
                found[name].append(sorted(evaluations))
    return found


def test_cases_name_alerts_that_exist() -> None:
    """A case about a name that is none would pass for ever."""
    assert asked().keys() - ALERTS.keys() == set()


@on_every_alert
def test_each_alert_is_seen_to_fire_and_to_end(name: str) -> None:
    """In one case at least the alert is silent, then fires, then is silent again."""
    courses = [[fires for fires, _ in groupby(fires for _, fires in case)] for case in asked()[name]]
    assert any(course[:3] == [False, True, False] for course in courses), courses


@on_every_alert
def test_each_alert_is_silent_on_a_healthy_system(name: str) -> None:
    """It is asked for at the first scrape, in the first minutes and for hours, and fires never."""
    (healthy,) = [path for path in CASES if path.stem == "healthy"]
    (case,) = read(healthy)["tests"]
    times = [seconds(each["eval_time"]) for each in case["alert_rule_test"] if each["alertname"] == name]
    assert min(times) == 0
    assert max(times) >= 6 * 3600
    assert not any(each.get("exp_alerts") for each in case["alert_rule_test"])


@on_every_alert
def test_the_healthy_system_has_what_the_alert_looks_at(name: str) -> None:
    """An alert that is silent because its series are missing proves nothing."""
    (healthy,) = [path for path in CASES if path.stem == "healthy"]
    shown = {re.split(r"\{", each["series"])[0] for each in read(healthy)["tests"][0]["input_series"]}
    assert metric_names(ALERTS[name]["expr"]) - shown - RECORDED == set()


# -- what an alert carries


@on_every_alert
def test_each_alert_says_what_to_do(name: str) -> None:
    """Severity, summary and description are there, and the runbook is the alert's own section."""
    rule = ALERTS[name]
    assert name.startswith("CodingAgent")
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "$value" in notes["description"] or "ExporterDown" in name or "ExporterNotStoring" in name
    assert not notes["summary"].endswith(".")
    assert notes["runbook_url"] == f"{REPOSITORY}/blob/main/docs/runbooks.md#{name.lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    """docs/runbooks.md has the alerts as its sections, in the order of the rules."""
    assert re.findall(r"^## (.*)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE) == list(ALERTS)


@on_every_alert
def test_thresholds_can_be_told_apart(name: str) -> None:
    """Each name stands once in its alert, and every comment in an expression is one: what replaces it finds it."""
    rule = ALERTS[name]
    names = [threshold for threshold, _ in thresholds(rule)]
    assert len(names) == len(set(names))
    assert len(names) == rule["expr"].count("#")
    assert names or name == "CodingAgentExporterDown"  # it has only its `for`


def test_the_documentation_lists_alerts_and_thresholds_as_they_are() -> None:
    """The table in docs/alerts.md has severity, `for` and thresholds of every alert."""
    rows = re.findall(r"^\| \[(CodingAgent\w+)\]\((\S+)\) \| (\w+) \| (\w+) \| (.*?) \|",
                      ALERTS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [
        (name, f"runbooks.md#{name.lower()}", rule["labels"]["severity"], rule["for"],
         ", ".join(f"`{threshold}` {number}" for threshold, number in thresholds(rule)) or "-")
        for name, rule in ALERTS.items()
    ]
    assert rows == expected


# -- what rules look at


def test_every_metric_exists() -> None:
    """Rules, and what their annotations ask, name metrics of this exporter, recorded series, or `up`."""
    shown = {f"{family.name}{suffix}" for family in families.FAMILIES if not family.otlp
             for suffix in (("_bucket", "_sum", "_count") if family.type == "histogram" else ("",))}
    named = {name for rule in rules() for query in queries(rule) for name in metric_names(query)}
    assert named - shown - RECORDED == {"up"}
    assert len(named) > 20


@on_every_alert
def test_no_alert_hangs_on_the_name_of_a_job(name: str) -> None:
    """Jobs are called as people like: where a job's name is looked at, there is another way to fire. And nothing names
    an instance or a namespace."""
    parts = re.split(r"\bor\b", ALERTS[name]["expr"])
    assert any("job=" not in re.sub(r"\s", "", part) for part in parts)
    assert not re.search(r"\b(?:instance|namespace|pod|cluster)\s*[=!]", ALERTS[name]["expr"])


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_series_are_named_by_level_metric_and_operation(name: str) -> None:
    """The level says which labels are left, the metric is one of ours or a budget."""
    level, metric, operation = name.split(":")
    assert level in {"usage", "root", "period"}
    assert f"{metric}_total" in families.BY_NAME or metric == "coding_agent_budget_usd"
    assert operation


def test_only_real_money_goes_into_budgets_and_baselines() -> None:
    """What is summed over cost modes is api_key alone: a subscription is imputed, and in no total."""
    for rule in rules():
        if rule.get("record", "").startswith(("root:coding_agent_cost_usd:spent1h", "period:coding_agent_cost_usd")):
            for selector in re.findall(r"usage:coding_agent_cost_usd:\w+(\{[^}]*\})?", rule["expr"]):
                assert selector == '{cost_mode="api_key"}', rule["record"]
        elif rule.get("record", "").startswith("usage:"):
            assert "cost_mode" in rule["expr"].split("(")[1]


# -- the examples in docs/alerts.md


def example(opening: str) -> str:
    """The YAML block of docs/alerts.md that begins with a word."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", ALERTS_PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(opening)]
    return str(block)


def test_the_example_for_prometheus_is_taken(tool: Callable[[str], str], tmp_path: Path) -> None:
    """promtool takes the snippet, with the files of rules where it says that they are, and finds them all."""
    text = example("rule_files:")
    for path in RULES:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "prometheus.yml"
    config.write_text(re.sub(r"/etc/prometheus/\S*/", "", text), encoding="utf-8")
    assert promtool(tool("promtool"), "check", "config", config).count("rules found") == len(RULES)


def test_the_example_for_alertmanager_is_taken(tool: Callable[[str], str], tmp_path: Path) -> None:
    """amtool takes the snippet, its matchers match alerts that exist, and severities go where it says."""
    config = tmp_path / "alertmanager.yml"
    config.write_text(example("route:"), encoding="utf-8")
    promtool(tool("amtool"), "check-config", config)
    named = re.findall(r'alertname\s*=\s*"?(\w+)', config.read_text(encoding="utf-8"))
    assert named
    assert set(named) - ALERTS.keys() == set()
    for name, rule in ALERTS.items():
        severity = rule["labels"]["severity"]
        routed = promtool(tool("amtool"), "config", "routes", "test", f"--config.file={config}",
                          f"alertname={name}", f"severity={severity}")
        assert routed.strip() == {"critical": "page", "warning": "chat", "info": "nobody"}[severity]
