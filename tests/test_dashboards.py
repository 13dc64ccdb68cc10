"""The Grafana dashboards: what is committed is what is built, and every query names what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
import yaml
from grafana import __main__ as command
from grafana.board import explore
from grafana.queries import names as metrics_of

from coding_agent_exporter import families, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Document = dict[str, Any]

NAMES = ("exporter", "fleet", "spend", "turns")
DASHBOARDS: dict[str, Document] = {
    name: json.loads((command.DASHBOARDS / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
RULES = Path(command.__file__).parent / "rules"
SUFFIXES = ("_bucket", "_count", "_sum")
FOREIGN = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds"}
RECORDED = re.compile(r"(usage|root|period):coding_agent_\w+:\w+")
BUILT_IN = {"__range", "__range_s", "__interval", "__rate_interval", "__from", "__to", "__url_time_range",
            "__all_variables", "__data"}
OF_PROMETHEUS = {"job", "instance"}
MADE = {"le", "mark", "period"}
"""Labels of buckets, of label_replace, and of recorded series."""


def panels(document: Document) -> list[Document]:
    """The panels that show data; the rows are none."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def titled(name: str, title: str) -> Document:
    (found,) = [each for each in panels(DASHBOARDS[name]) if each["title"] == title]
    return found


def queries(document: Document) -> Iterator[tuple[str, str]]:
    """Title of a panel, and an expression."""
    for panel in panels(document):
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])


def variables(document: Document) -> dict[str, Document]:
    return {variable["name"]: variable for variable in document["templating"]["list"]}


def selectors(expr: str) -> Iterator[tuple[str, str]]:
    """Name and matchers of each selector that has matchers."""
    yield from re.findall(r'([a-zA-Z_:][\w:]*)\{((?:[^}"]|"[^"]*")*)\}', expr)


def names(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\boffset\s+-?[\w$]+|\$\w+", "", bare)
    found = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", bare)
    return set(found) - {"and", "or", "unless", "bool"}


def family_of(name: str) -> families.Family | None:
    """The family that a sample's name belongs to."""
    base = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    for candidate in (name, base):
        family = families.BY_NAME.get(candidate)
        if family and not family.otlp and (candidate == name or family.type == "histogram"):
            return family
    return None


def links(document: Document) -> Iterator[str]:
    """Every address that a panel or a cell leads to."""
    for panel in panels(document):
        yield from (link["url"] for link in panel.get("links", ()))
        config = panel["fieldConfig"]
        for override in config["overrides"]:
            for entry in override["properties"]:
                if entry["id"] == "links":
                    yield from (link["url"] for link in entry["value"])


def on_every_dashboard(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.parametrize("document", DASHBOARDS.values(), ids=DASHBOARDS)(test)
    return marked


def test_the_committed_files_are_what_is_built() -> None:
    """A change of the code without `python -m grafana` fails, and so does an edit of the JSON by hand."""
    committed = {path.name: path.read_text(encoding="utf-8") for path in command.DASHBOARDS.glob("*")}
    assert committed == command.rendered()


def test_check_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and the file's name for one that was edited, is missing, or is one too many; 0 after writing."""
    assert command.main([f"--dir={tmp_path}"]) == 0
    assert command.main([f"--dir={tmp_path}", "--check"]) == 0
    assert capsys.readouterr() == ("", "")
    (tmp_path / "fleet.json").write_text("{}")
    (tmp_path / "spend.json").unlink()
    (tmp_path / "more.json").write_text("{}")
    assert command.main([f"--dir={tmp_path}", "--check"]) == 1
    said = capsys.readouterr().err
    assert [line.split()[0].rpartition("/")[2] for line in said.splitlines()] == [
        "fleet.json", "more.json", "spend.json"]
    assert (tmp_path / "fleet.json").read_text() == "{}"


@on_every_dashboard
def test_it_can_be_imported_anywhere(document: Document) -> None:
    """No id of an instance of Grafana, no inputs to ask for, no absolute time; found again by its uid."""
    assert document["id"] is None
    assert "__inputs" not in document
    assert document["editable"] is True
    assert document["tags"] == ["coding-agent"]
    assert document["time"]["to"] == "now"
    assert document["time"]["from"].startswith("now-")
    assert document["uid"] in {f"coding-agent-{name}" for name in NAMES}
    assert re.search(r"\b20\d\d-\d\d|\b1[5-9]\d{8}", json.dumps(document)) is None


@on_every_dashboard
def test_every_panel_explains_itself(document: Document) -> None:
    """Title, description, unit, a word on why it is empty, and a data source that the user chooses."""
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(document):
        defaults = panel["fieldConfig"]["defaults"]
        texts = [panel["title"], panel["description"], defaults["unit"], defaults["noValue"]]
        assert all(text.strip() for text in texts), panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [
            chosen] * (len(panel["targets"]) + 1)
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


@on_every_dashboard
def test_panels_are_numbered_and_lie_beside_each_other(document: Document) -> None:
    """Ids and titles are unique; no two panels share a cell of the grid, and none reaches over its 24 columns."""
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    for titles in ([panel["title"] for panel in panels(document)],
                   [panel["title"] for panel in document["panels"] if panel["type"] == "row"]):
        assert len(set(titles)) == len(titles)
    taken: dict[tuple[int, int], int] = {}
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]


@on_every_dashboard
def test_rows_of_the_grid_are_full(document: Document) -> None:
    """Grafana pulls panels up into holes: what lies there would not be what was meant."""
    cells = [(panel["gridPos"]["w"] * panel["gridPos"]["h"], panel["gridPos"]) for panel in document["panels"]]
    height = max(place["y"] + place["h"] for _, place in cells)
    assert sum(area for area, _ in cells) == 24 * height


@on_every_dashboard
def test_variables_are_defined_and_used(document: Document) -> None:
    """A query with an unknown variable matches nothing; a variable that is used nowhere misleads."""
    defined = variables(document)
    everything = json.dumps({key: value for key, value in document.items() if key != "templating"}) + json.dumps(
        [{key: variable.get(key) for key in ("query", "datasource")} for variable in defined.values()])
    used = {first or second for first, second in re.findall(r"\$(?:\{(\w+)[^}]*\}|(\w+))", everything)}
    assert used - BUILT_IN == set(defined)


@on_every_dashboard
def test_variables_take_all_and_follow_the_time_range(document: Document) -> None:
    """Several can be chosen, All also matches series that lack the label, and pods of another time are found."""
    for name, variable in variables(document).items():
        if variable["type"] == "datasource":
            continue
        assert (variable["multi"], variable["includeAll"], variable["allValue"], variable["refresh"]) == (
            True, True, ".*", 2), name
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked, name
        for metric in metrics_of(asked[1]):
            family = family_of(metric)
            assert family, name
            assert asked[2] in {*family.labels, *OF_PROMETHEUS}, name


def test_what_has_only_money_or_only_tokens_can_be_chosen() -> None:
    """Claude Code's log tells no tokens, and a model in no price list has no money: the lists of Spend have both."""
    for name in ("source", "model"):
        series = variables(DASHBOARDS["spend"])[name]["query"]["query"].removeprefix("label_values(").rpartition(",")[0]
        assert metrics_of(series) == {families.COST.name, families.TOKENS.name}


def test_bars_begin_where_their_time_begins_and_cells_of_a_heat_map_end_there() -> None:
    """Grafana draws them so; a query for the other side would show everything one interval too early or too late."""
    seen = set()
    for document in DASHBOARDS.values():
        for each in panels(document):
            custom = each["fieldConfig"]["defaults"].get("custom", {})
            if each["type"] == "heatmap" or custom.get("drawStyle") == "bars":
                ahead = each["type"] != "heatmap"
                seen.add(ahead)
                assert not ahead or custom["barAlignment"] == 1
                for query in each["targets"]:
                    assert ("[$__interval] offset -$__interval" in query["expr"]) is ahead, each["title"]
                    assert "[$__interval]" in query["expr"], each["title"]
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["fleet", "spend"])
def test_the_burn_rate_is_that_of_15_minutes_in_any_time_range(name: str) -> None:
    """$__rate_interval is as long as a point of the panel, which is hours where the range is a month."""
    (query,) = titled(name, "Burn rate per hour")["targets"]
    assert set(re.findall(r"\[([^]]*)\]", query["expr"])) == {"15m"}


def test_no_number_of_now_is_0_where_no_exporter_says_so() -> None:
    """An exporter that was there an hour ago knows nothing of who works, waits or is stale now."""
    for title in ("Working", "Waiting for input", "Longest wait", "Stale", "Burn rate per hour"):
        (query,) = titled("fleet", title)["targets"]
        assert re.search(r"\nor\n0 \* max\(coding_agent_exporter_build_info\{[^}]*\}\)$", query["expr"]), title


def test_a_context_of_more_than_100_percent_is_not_cut_off() -> None:
    """Percentages go above 100; the axis reaches to 100 and, where something is higher, above."""
    for title in ("Context", "Peaks of context"):
        assert "max" not in titled("fleet", title)["fieldConfig"]["defaults"]


@on_every_dashboard
def test_metrics_exist(document: Document) -> None:
    """Every name in a query is of the catalogue, of every Prometheus client, or recorded by a rule."""
    rules = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES.glob("*.yaml")]
    recorded = {rule["record"] for file in rules for group in file["groups"] for rule in group["rules"]
                if "record" in rule}
    for title, expr in queries(document):
        found = names(expr)
        assert found, title
        for name in found - FOREIGN:
            if rules and ":" in name:
                assert name in recorded, title
            else:
                assert family_of(name) or RECORDED.fullmatch(name), f"{title}: {name}"


@on_every_dashboard
def test_selectors_name_labels_of_their_family(document: Document) -> None:
    """A matcher on a label that a metric lacks selects nothing, or everything."""
    for title, expr in queries(document):
        for name, matchers in selectors(expr):
            family = family_of(name)
            if family is None:
                continue
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', "", matchers)))
            allowed = {*family.labels, *OF_PROMETHEUS}
            assert labels <= allowed, f"{title}: {name}{{{matchers}}}"
            assert labels >= OF_PROMETHEUS, f"{title}: {name}"


@on_every_dashboard
def test_what_is_grouped_by_and_shown_is_there(document: Document) -> None:
    """Labels of groupings and joins are of a metric in the query; those of a legend are left over at its end."""
    grouping = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
    for panel in panels(document):
        for target in panel["targets"]:
            expr = target["expr"]
            metrics = [family for name in names(expr) if (family := family_of(name))]
            there = {*OF_PROMETHEUS, *MADE, *(label for family in metrics for label in family.labels)}
            grouped = {label for found in grouping.findall(expr) for label in found.split(", ")}
            assert grouped <= there, panel["title"]
            shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert shown <= (grouped or there), panel["title"]


@on_every_dashboard
def test_amounts_are_not_extrapolated(document: Document) -> None:
    """`increase()` is off by some percent; amounts are differences of raw samples."""
    assert [title for title, expr in queries(document) if re.search(r"\b(increase|delta|idelta|irate)\b", expr)] == []


@on_every_dashboard
def test_real_and_imputed_money_are_never_added(document: Document) -> None:
    """Each query of money is of one cost_mode."""
    for title, expr in queries(document):
        modes = []
        for name, matchers in selectors(expr):
            if name == families.COST.name:
                mode = re.search(r'cost_mode="(api_key|subscription)"', matchers)
                assert mode, title
                modes.append(mode[1])
        assert len(set(modes)) <= 1, title
        assert names(expr).isdisjoint({families.COST.name}) or modes, title


@on_every_dashboard
def test_joins_are_of_one_agent_each(document: Document) -> None:
    """Every join of agents is on all that tells them apart, and its right side has one series for each."""
    for title, expr in queries(document):
        if "group_left" not in expr:
            continue
        keys = "job, instance, root, pid"
        assert f"* on ({keys}) group_left (" in expr, title
        assert f"topk by ({keys}) (1, max by ({keys}, " in expr, title


@on_every_dashboard
def test_links_lead_to_dashboards_that_exist(document: Document) -> None:
    """Links name uids, and carry the time range; those to traces are searches by attributes that spans have."""
    uids = {other["uid"] for other in DASHBOARDS.values()}
    for url in links(document):
        if url.startswith("/d/"):
            uid, _, carried = url.removeprefix("/d/").partition("?")
            assert uid in uids
            assert uid != document["uid"]
            assert carried == "${__url_time_range}&${__all_variables}"
        else:
            panes = json.loads(unquote(url.removeprefix("/explore?schemaVersion=1&panes=")))
            asked = panes["traces"]["queries"][0]["query"]
            attributes = re.findall(r"span\.([\w.]+)", asked)
            assert attributes
            assert set(attributes) <= spans.ALLOWED, asked
    (among,) = document["links"]
    assert (among["type"], among["tags"]) == ("dashboards", ["coding-agent"])
    assert among["includeVars"]
    assert among["keepTime"]


def test_an_address_of_traces_keeps_variables_and_escapes_the_rest() -> None:
    """Grafana replaces `${...}` in the address as it stands; a quote or brace beside it must not end anything."""
    url = explore('span.gen_ai.tool.name = "${__data.fields.Tool}" && status = error')
    assert re.fullmatch(r"/explore\?schemaVersion=1&panes=(?:[\w.%~-]|\$\{[\w.]+\})*", url)
    panes = json.loads(unquote(url).partition("panes=")[2])
    (query,) = panes["traces"]["queries"]
    assert query["query"] == '{ span.gen_ai.tool.name = "${__data.fields.Tool}" && status = error }'
    assert query["datasource"] == {"type": "tempo", "uid": "${tempo}"}


def test_a_state_has_one_colour() -> None:
    """In tables, timelines and charts of all dashboards."""
    seen: dict[str, set[str]] = {}

    def look(node: object) -> None:
        if isinstance(node, dict):
            if node.get("type") == "value" and isinstance(node.get("options"), dict):
                for result in node["options"].values():
                    seen.setdefault(result["text"].replace("waiting for input", "waiting_input"), set()).add(
                        result["color"])
            if node.get("matcher", {}).get("id") == "byName":
                for entry in node["properties"]:
                    if entry["id"] == "color" and "fixedColor" in entry["value"]:
                        seen.setdefault(node["matcher"]["options"], set()).add(entry["value"]["fixedColor"])
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(list(DASHBOARDS.values()))
    assert {"working", "waiting_input", "unknown", "stale", "near_limit", "error"} <= seen.keys()
    assert {state: colours for state, colours in seen.items() if len(colours) > 1} == {}
