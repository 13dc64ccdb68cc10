"""Takes panels, gives a dashboard: variables, links, numbered panels in rows, and its JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from grafana.panels import DATASOURCE
from grafana.promql import TARGET, select

if TYPE_CHECKING:
    from collections.abc import Iterable

    from grafana_foundation_sdk.cog.builder import Builder

FLEET, SPEND, TURNS, EXPORTER = (f"coding-agent-{name}" for name in ("fleet", "spend", "turns", "exporter"))
"""The uids. Links and bookmarks hold them: never change one."""
TAG = "coding-agent"
FILES = "coding_agent_exporter_files"
COST = "coding_agent_cost_usd_total"

TRACES = "Traces of this session, in the time range shown"


class Board:
    """A dashboard. Panels are numbered in the order in which they are added, and fill rows of 24 columns."""

    def __init__(
        self, uid: str, title: str, description: str, variables: Iterable[dashboards.QueryVariable], *,
        since: str, refresh: str, tempo: bool = False,
    ) -> None:
        self._board = dashboards.Dashboard(title).uid(uid).description(description).tags([TAG])
        self._board.editable().timezone("browser").time(since, "now").refresh(refresh)
        self._board.tooltip(model.DashboardCursorSync.CROSSHAIR)
        self._board.timepicker(dashboards.TimePicker().refresh_intervals(["15s", "30s", "1m", "5m", "15m"]))
        self._board.link(dashboards.DashboardLink("Coding agents").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
                         .include_vars(include_vars=True).keep_time(keep_time=True))
        # "default" is the default data source where that is a Prometheus, else the first Prometheus there is.
        self._board.with_variable(_source("datasource", "Data source", "prometheus").current(
            model.VariableOption(selected=True, text="default", value="default")))
        if tempo:
            self._board.with_variable(_source("tempo", "Traces", "tempo"))
        for variable in variables:
            self._board.with_variable(variable)

    def row(self, title: str, *panels: Builder[model.Panel]) -> None:
        """A heading, open, and the panels below it."""
        self._board.with_row(dashboards.Row(title))
        for panel in panels:
            self._board.with_panel(panel)

    def json(self) -> str:
        """What Grafana imports. The id of the dashboard is null: Grafana gives one."""
        built = self._board.build()
        for number, panel in enumerate(built.panels or [], 1):
            panel.id_val = number
        document: dict[str, Any] = json.loads(json.dumps(built, cls=JSONEncoder))
        document["id"] = None
        # Defaults of the SDK that are of no use: settings of interval variables on all kinds of variables, and a
        # footer of tables that newer versions of Grafana have elsewhere.
        for variable in document["templating"]["list"]:
            for name in ("auto", "auto_count", "auto_min"):
                del variable[name]
        for panel in document["panels"]:
            panel.get("options", {}).pop("footer", None)
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def chosen(*more: dashboards.QueryVariable) -> list[dashboards.QueryVariable]:
    """The variables that every dashboard has, job and instance, and more."""
    build = "coding_agent_exporter_build_info"
    return [
        _variable("job", "Job", f"label_values({build}, job)"),
        _variable("instance", "Instance", f"label_values({build}{{{TARGET[0]}}}, instance)"),
        *more,
    ]


def root(name: str, kinds: str) -> dashboards.QueryVariable:
    """Aliases of configured directories. Those of other kinds are other directories, hence the names."""
    return _variable(name, "Root", f'label_values({select(FILES, f"kind=~{json.dumps(kinds)}")}, root)')


def by_label(name: str, label: str, series: str) -> dashboards.QueryVariable:
    """The values of a label."""
    return _variable(name, label, f"label_values({series}, {name})")


def explore(condition: str) -> str:
    """The address of a TraceQL search; `condition` may hold Grafana's variables."""
    query = {"refId": "A", "datasource": {"type": "tempo", "uid": "${tempo}"}, "queryType": "traceql",
             "query": f"{{ {condition} }}", "limit": 50, "tableType": "traces"}
    panes = {"traces": {"datasource": "${tempo}", "queries": [query], "range": {"from": "${__from}", "to": "${__to}"}}}
    text = json.dumps(panes, separators=(",", ":"))
    # Grafana looks for ${...} in the address as it stands; all else is escaped. `${` never opens anything else here.
    parts = text.split("${")
    escaped = [quote(parts[0], safe="")]
    for part in parts[1:]:
        name, _, rest = part.partition("}")
        escaped.append(f"${{{name}}}{quote(rest, safe='')}")
    return f"/explore?schemaVersion=1&panes={''.join(escaped)}"


def _source(name: str, label: str, kind: str) -> dashboards.DatasourceVariable:
    return dashboards.DatasourceVariable(name).label(label).type(kind)


def _variable(name: str, label: str, query: str) -> dashboards.QueryVariable:
    variable = dashboards.QueryVariable(name).label(label).datasource(DATASOURCE)
    variable.query({"qryType": 1, "query": query, "refId": name}).sort(model.VariableSort.ALPHABETICAL_ASC)
    variable.multi(multi=True).include_all(include_all=True).all_value(".*").refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
