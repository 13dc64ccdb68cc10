"""Takes dashboards and rule files, gives every query in them, as Grafana or Prometheus would send it.

For tests, which run all of them, and for pictures, which draw some. Nothing is read from disk here, and nothing asked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCRAPE_SECONDS = 15.0
"""What Grafana takes for the scrape interval where the data source does not say."""

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "M": 2629800.0, "y": 31557600.0}
_DURATION = re.compile(r"(\d+)(ms|[smhdwMy])")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::\w+)?\})")
_LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_LABEL_VALUES = re.compile(r"label_values\((?:(.+),\s*)?(\w+)\)", re.DOTALL)

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*|\[[^\]]*\])
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
      | (?P<word>[a-zA-Z_:][\w:]*)
      | (?P<number>\d[\w.]*|\.\d\w*)
      | (?P<sign>=~|!~|!=|[=<>]=?|[-+*/%^@(){},])""",
    re.VERBOSE,
)
_LABELS_FOLLOW = frozenset(["by", "without", "on", "ignoring", "group_left", "group_right"])
_NO_METRIC = _LABELS_FOLLOW | {"and", "or", "unless", "bool", "offset", "atan2", "inf", "nan"}
_LISTED = re.compile(r"\^?\(?([a-zA-Z_:][\w:]*(?:\|[a-zA-Z_:][\w:]*)*)\)?\$?")


@dataclass(frozen=True)
class Query:
    """One query, and where it is from. A panel's queries differ in `ref`."""

    where: str
    """For people, and unique: "fleet: Agents working"; "alerts.yaml: Name".

    The dashboard is its uid without "coding-agent-". The panel's type follows where another panel has the same title,
    the ref where the panel has several queries.
    """
    expr: str
    """PromQL, with the variables filled in."""
    instant: bool
    """Asked at the end of the range; else over the range."""
    step: float | None = None
    """Seconds between points, at the least, where the panel says so."""
    range: tuple[str, str] | None = None
    """Grafana's from and to, where the panel does not take those of the dashboard: ("now/d", "now")."""
    title: str = ""
    """Of the panel; of a rule the name of its alert or series."""
    dashboard: str = ""
    """The dashboard's uid; empty for rules."""
    ref: str = ""
    legend: str = ""
    columns: frozenset[str] = frozenset()
    """Labels and values ("Value #A") that the panel's table arranges, renames or hides."""

    @property
    def legend_labels(self) -> set[str]:
        """Labels that the legend shows."""
        return set(_LEGEND.findall(self.legend))


def of_dashboard(document: Mapping[str, Any], *, range_seconds: float, step_seconds: float,
                 variables: Mapping[str, str] | None = None, scrape_seconds: float = SCRAPE_SECONDS,
                 ) -> Iterator[Query]:
    """The queries of all panels, in rows too, collapsed or not, and of annotations; hidden ones as well.

    `variables` goes before the dashboard's own values: all of a variable that has several, else its current one.
    `range_seconds` is `$__range`, but in a panel with a duration of its own ("7d"); whoever needs the exact one of
    "now/d" asks again with that. `step_seconds` is `$__interval`, where a panel does not ask for a longer one.
    A target that is asked both ways is two queries. Raises ValueError for a variable that the dashboard does not have.
    """
    uid, short = str(document["uid"]), _short(document)
    own = _values(document) | dict(variables or {})
    panels = [panel for panel in _panels(document.get("panels", [])) if panel.get("targets")]
    titles = Counter(panel["title"] for panel in panels)
    for panel in panels:
        targets = [target for target in panel["targets"] if target.get("expr")]
        window, columns = _window(panel.get("timeFrom")), _columns(panel)
        for target in targets:
            ref = target.get("refId", "")
            marks = [panel["type"]] * (titles[panel["title"]] > 1) + [ref] * (len(targets) > 1)
            where = " ".join([f"{short}: {panel['title']}", *(f"({mark})" for mark in marks)])
            length = target.get("interval") or panel.get("interval")
            step = seconds(_filled(length, own, where)) if length else None
            times = _times(_length(window) or range_seconds, max(step_seconds, step or 0), scrape_seconds)
            expr = _filled(target["expr"], own | times, where)
            kinds = [kind for kind in ("instant", "range") if target.get(kind)] or ["range"]
            for kind in kinds:
                yield Query(f"{where} ({kind})" if len(kinds) > 1 else where, expr, kind == "instant", step, window,
                            panel["title"], uid, ref, target.get("legendFormat", ""), columns)
    for annotation in document.get("annotations", {}).get("list", []):
        text = annotation.get("expr") or annotation.get("target", {}).get("expr")
        if text:
            where = f"{short}: annotation {annotation['name']}"
            expr = _filled(text, own | _times(range_seconds, step_seconds, scrape_seconds), where)
            shown = f"{annotation.get('titleFormat', '')} {annotation.get('textFormat', '')}"
            yield Query(where, expr, instant=False, title=annotation["name"], dashboard=uid, legend=shown)


def of_variables(document: Mapping[str, Any]) -> Iterator[Query]:
    """What fills the dashboard's drop-down lists: each as PromQL that has a series for each value.

    `label_values(metric, label)` becomes `group by (label) (metric)`, with `{{label}}` as legend. A query of another
    form raises ValueError.
    """
    uid, own = str(document["uid"]), _values(document)
    for variable in document.get("templating", {}).get("list", []):
        if variable["type"] != "query":
            continue
        where = f"{_short(document)}: variable {variable['name']}"
        asked = variable["query"]
        text = asked["query"] if isinstance(asked, dict) else asked
        found = _LABEL_VALUES.fullmatch(_filled(text.strip(), own, where))
        if not found or not found[1]:
            raise ValueError(f"{where}: not label_values(metric, label): {text}")
        yield Query(where, f"group by ({found[2]}) ({found[1]})", instant=True, title=variable["name"], dashboard=uid,
                    legend=f"{{{{{found[2]}}}}}")


def of_rules(document: Mapping[str, Any], *, where: str) -> Iterator[Query]:
    """The expression of each rule in the `groups` of a rule file; `where` is the file's name.

    A recorded series is told from others of its name by the labels that the rule adds.
    """
    for group in document["groups"]:
        for rule in group["rules"]:
            title = rule.get("alert") or rule["record"]
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(rule.get("labels", {}).items()))
            shown = f"{title}{{{labels}}}" if labels and "record" in rule else title
            yield Query(f"{where}: {shown}", rule["expr"], instant=True, title=title)


def names(expr: str) -> set[str]:
    """Names of the metrics in an expression whose variables are filled in.

    Raises ValueError for what is no PromQL, and for a matcher of `__name__` that does not list names ("a|b").
    """
    tokens = [*_tokens(expr), ("end", ""), ("end", "")]
    found: set[str] = set()
    inside = ""  # of "{": matchers, of "by": labels
    for number, (kind, text) in enumerate(tokens):
        before = tokens[number - 1][1] if number else ""
        after = tokens[min(number + 1, len(tokens) - 1)][1]
        if text == "{":
            inside = "{"
        elif text == "(" and before.lower() in _LABELS_FOLLOW:
            inside = "by"
        elif text in {"}", ")"}:
            inside = ""
        elif inside == "{":
            if kind == "string" and before in {"{", ","}:
                found.add(text[1:-1])  # {"a metric"}
            elif text == "__name__":
                found |= _matched(after, tokens[number + 2][1][1:-1], expr)
        elif (kind == "word" and not inside and text.lower() not in _NO_METRIC and after != "("
              and after.lower() not in {"by", "without"}):
            found.add(text)
    return found


def seconds(duration: str) -> float:
    """Seconds of a duration as Grafana and Prometheus write it: "15s", "1h30m". Raises ValueError."""
    parts = _DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(f"not a duration: {duration!r}")
    return sum(int(number) * _SECONDS[unit] for number, unit in parts)


def _short(document: Mapping[str, Any]) -> str:
    return str(document["uid"]).removeprefix("coding-agent-")


def _panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", []))


def _columns(panel: Mapping[str, Any]) -> frozenset[str]:
    organized = [one["options"] for one in panel.get("transformations", []) if one["id"] == "organize"]
    return frozenset(name for options in organized for kind in ("excludeByName", "indexByName", "renameByName")
                     for name in options.get(kind, {}))


def _values(document: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for variable in document.get("templating", {}).get("list", []):
        current = variable.get("current", {}).get("value")
        if variable["type"] in {"datasource", "adhoc"}:
            continue
        if variable.get("multi") or variable.get("includeAll"):
            found[variable["name"]] = variable.get("allValue") or ".*"
        elif isinstance(current, str):
            found[variable["name"]] = current
        elif variable["type"] in {"constant", "textbox"}:
            found[variable["name"]] = variable.get("query", "")
    return found


def _times(range_seconds: float, step: float, scrape: float) -> dict[str, str]:
    whole, interval = round(range_seconds), max(1, round(step))
    rate = round(max(step + scrape, 4 * scrape))
    return {"__range": f"{whole}s", "__range_s": f"{whole}", "__range_ms": f"{whole * 1000}",
            "__interval": f"{interval}s", "__interval_ms": f"{interval * 1000}", "__rate_interval": f"{rate}s"}


def _filled(text: str, values: Mapping[str, str], where: str) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in values:
            raise ValueError(f"{where}: unknown variable {found[0]}")
        return values[name]

    return _VARIABLE.sub(value, text)


def _window(time_from: str | None) -> tuple[str, str] | None:
    if not time_from:
        return None
    return (time_from if time_from.startswith("now") else f"now-{time_from}"), "now"


def _length(window: tuple[str, str] | None) -> float | None:
    """Seconds of a window whose length does not depend on the time of day."""
    if window is None or "/" in window[0]:
        return None
    return seconds(window[0].removeprefix("now-"))


def _tokens(expr: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expr):
        found = _TOKEN.match(expr, at)
        if not found:
            raise ValueError(f"not PromQL from here on: {expr[at:at + 40]!r}")
        if found.lastgroup != "skip":
            yield str(found.lastgroup), found[0]
        at = found.end()


def _matched(operator: str, pattern: str, expr: str) -> set[str]:
    if operator == "=":
        return {pattern}
    listed = _LISTED.fullmatch(pattern)
    if operator != "=~" or not listed:
        raise ValueError(f"a matcher of __name__ that lists no names: {pattern!r} in {expr}")
    return set(listed[1].split("|"))
