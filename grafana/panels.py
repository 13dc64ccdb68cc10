"""Takes titles, texts and PromQL, gives panels that look alike, and a dashboard to put them on.

A state has the same colour wherever it is shown. The colours are those of Okabe and Ito, which people who do not see
all colours can tell apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    gauge,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import (
    common as options,
)
from grafana_foundation_sdk.builders import (
    dashboard as dashboards,
)
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmaps
from grafana_foundation_sdk.models import prometheus as queries

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#999999"

COLOURS = {
    "working": BLUE, "waiting_input": PURPLE, "unknown": GREY, "stale": RED,
    "normal": GREEN, "approaching_limit": YELLOW, "near_limit": ORANGE, "at_limit": RED,
    "input": BLUE, "output": ORANGE, "cache_read": GREEN, "cache_creation": SKY,
    "ok": GREEN, "error": RED, "failed": RED, "aborted": ORANGE, "length": YELLOW, "stop": GREEN, "toolUse": BLUE,
    "other": GREY, "unreadable": RED, "invalid": ORANGE,
}
"""Values of labels that name a state or a kind."""
STATES = (("working", "working"), ("waiting_input", "waiting for input"), ("unknown", "unknown"), ("stale", "stale"))
"""Activities as numbers from 1 on, where a panel needs numbers."""

DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
CONTEXT = ((None, GREEN), (85, ORANGE), (95, RED))

P = TypeVar("P", stat.Panel, gauge.Panel, bargauge.Panel, timeseries.Panel, heatmap.Panel, table.Panel,
            statetimeline.Panel)
Steps = tuple[tuple[float | None, str], ...]
"""Where a colour begins; None is the lowest."""


def target(
    expr: str, legend: str = "", *, instant: bool = False, cells: bool = False, heat: bool = False,
    exemplars: bool = False,
) -> prometheus.Dataquery:
    """One query. `instant`: its value at the end of the time range; `cells`: a table of labels and value."""
    query = prometheus.Dataquery().expr(expr).datasource(DATASOURCE).editor_mode(queries.QueryEditorMode.CODE)
    query = query.instant() if instant or cells else query.range().exemplar(exemplars)
    if cells:
        return query.format(queries.PromQueryFormat.TABLE)
    return query.legend_format(legend or "__auto").format(
        queries.PromQueryFormat.HEATMAP if heat else queries.PromQueryFormat.TIME_SERIES)


def steps(values: Steps) -> dashboards.ThresholdsConfig:
    return dashboards.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(
        [model.Threshold(value, colour) for value, colour in values])


def _common(
    panel: P, title: str, description: str, targets: Iterable[prometheus.Dataquery], *, unit: str, empty: str,
    width: int, height: int,
) -> P:
    """What every panel has. `empty` says why there is nothing to see; width is in 24ths."""
    panel.title(title).description(description).datasource(DATASOURCE).unit(unit).no_value(empty)
    panel.span(width).height(height)
    for letter, query in zip("ABCDEFGHIJ", targets, strict=False):
        panel.with_target(query.ref_id(letter))
    return panel


def number(
    title: str, description: str, expr: str, *, unit: str, empty: str, thresholds: Steps = ((None, BLUE),),
    decimals: int | None = None, since: str = "", width: int = 4, height: int = 4,
    link: dashboards.DashboardLink | None = None,
) -> stat.Panel:
    """One large number. `since` is a time range of its own, up to now: `now/d` is today."""
    panel = _common(stat.Panel(), title, description, [target(expr, instant=True)], unit=unit, empty=empty,
                    width=width, height=height)
    panel.thresholds(steps(thresholds)).color_scheme(_by_thresholds()).reduce_options(_last())
    panel.graph_mode(common.BigValueGraphMode.NONE).color_mode(common.BigValueColorMode.VALUE)
    if decimals is not None:
        panel.decimals(decimals)
    if since:
        panel.time_from(since)
    if link:
        panel.links([link])
    return panel


def words(
    title: str, description: str, expr: str, legend: str, *, empty: str, width: int = 4, height: int = 4
) -> stat.Panel:
    """The names of series, where their value is always 1."""
    panel = _common(stat.Panel(), title, description, [target(expr, legend, instant=True)], unit="none", empty=empty,
                    width=width, height=height)
    panel.thresholds(steps(((None, BLUE),))).color_scheme(_by_thresholds()).reduce_options(_last())
    return panel.graph_mode(common.BigValueGraphMode.NONE).text_mode(common.BigValueTextMode.NAME)


def dial(
    title: str, description: str, expr: str, legend: str, *, unit: str, empty: str, thresholds: Steps, top: float,
    width: int, height: int,
) -> gauge.Panel:
    """How much of a limit is used, by series."""
    panel = _common(gauge.Panel(), title, description, [target(expr, legend, instant=True)], unit=unit, empty=empty,
                    width=width, height=height)
    return panel.thresholds(steps(thresholds)).color_scheme(_by_thresholds()).reduce_options(_last()).min(0).max(top)


def ranking(
    title: str, description: str, expr: str, legend: str, *, unit: str, empty: str, thresholds: Steps | None = None,
    top: float | None = None, width: int = 6, height: int = 8, decimals: int | None = None,
) -> bargauge.Panel:
    """A bar for each series, the highest first. Without thresholds a name has the same colour in every panel."""
    panel = _common(bargauge.Panel(), title, description, [target(f"sort_desc(\n{expr}\n)", legend, instant=True)],
                    unit=unit, empty=empty, width=width, height=height)
    panel.orientation(common.VizOrientation.HORIZONTAL).display_mode(common.BarGaugeDisplayMode.BASIC)
    panel.reduce_options(_last()).min(0).name_placement(common.BarGaugeNamePlacement.TOP)
    if thresholds:
        panel.thresholds(steps(thresholds)).color_scheme(_by_thresholds())
    else:
        panel.color_scheme(_by_name())
    if top is not None:
        panel.max(top)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def lines(
    title: str, description: str, *targets: prometheus.Dataquery, unit: str, empty: str,
    thresholds: Steps | None = None, width: int = 12, height: int = 8, calcs: tuple[str, ...] = ("lastNotNull", "max"),
    interval: str = "", log: bool = False, top: float | None = None, soft_top: float | None = None,
    stack: bool = False, names: Iterable[str] = (), link: dashboards.DashboardLink | None = None,
) -> timeseries.Panel:
    """Lines over time, with a table of `calcs` below. `thresholds` are drawn as dashed lines; `log` is a log axis.
    The axis ends at `top`; at `soft_top` while nothing is higher.

    Series that are named as one of `names`, states or kinds, have its colour.
    """
    panel = _common(timeseries.Panel(), title, description, targets, unit=unit, empty=empty, width=width,
                    height=height)
    panel.legend(_legend(calcs)).tooltip(_tooltip()).color_scheme(_by_name())
    if not log:
        panel.min(0)  # a log axis has no 0
    panel.line_width(1).fill_opacity(30 if stack else 5).show_points(common.VisibilityMode.AUTO)
    if stack:
        panel.stacking(options.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if thresholds:
        panel.thresholds(steps(((None, "transparent"), *thresholds[1:])))
        panel.thresholds_style(options.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    if interval:
        panel.interval(interval)
    if log:
        panel.scale_distribution(options.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10))
    if top is not None:
        panel.max(top)
    if soft_top is not None:
        panel.axis_soft_max(soft_top)
    if link:
        panel.links([link])
    for name in names:
        panel.override_by_name(name, [
            model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": COLOURS[name]})])
    return panel


def columns(
    title: str, description: str, *targets: prometheus.Dataquery, unit: str, empty: str, interval: str,
    since: str = "", width: int = 12, height: int = 8, decimals: int | None = None, names: Iterable[str] = (),
    link: dashboards.DashboardLink | None = None,
) -> timeseries.Panel:
    """Stacked bars of amounts, one for each `interval` or longer, each beginning where its time begins."""
    panel = lines(title, description, *targets, unit=unit, empty=empty, width=width, height=height, calcs=("sum",),
                  interval=interval, stack=True, names=names, link=link)
    panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(80).show_points(common.VisibilityMode.NEVER)
    panel.bar_alignment(common.BarAlignment.AFTER)
    if since:
        panel.time_from(since)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def grid(
    title: str, description: str, *targets: prometheus.Dataquery, empty: str, names: Mapping[str, str],
    hidden: Iterable[str] = (), sort: str, desc: bool = True, width: int = 24, height: int = 9,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> table.Panel:
    """A table: the targets' rows, merged where their labels agree.

    `names` are field -> heading, in the order of the columns; `overrides` are heading -> property -> value.
    """
    panel = _common(table.Panel(), title, description, targets, unit="short", empty=empty, width=width, height=height)
    panel.with_transformation(model.DataTransformerConfig("merge", options={}))
    panel.with_transformation(model.DataTransformerConfig("organize", options={
        "excludeByName": dict.fromkeys(("Time", *hidden), True),
        "indexByName": {name: place for place, name in enumerate(names)},
        "renameByName": {name: heading for name, heading in names.items() if name != heading},
    }))
    panel.sort_by([options.TableSortByFieldState().display_name(sort).desc(desc)])
    # The panel's text for no data at all would else stand in every empty cell.
    for kind in ("number", "string", "time"):
        panel.override_by_field_type(kind, [model.DynamicConfigValue("noValue", "-")])
    for heading, properties in (overrides or {}).items():
        panel.override_by_name(heading, [model.DynamicConfigValue(key, value) for key, value in properties.items()])
    return panel


def timeline(
    title: str, description: str, expr: str, legend: str, *, empty: str, width: int = 24, height: int = 9
) -> statetimeline.Panel:
    """The states of each series over time; values are places in STATES, from 1."""
    panel = _common(statetimeline.Panel(), title, description, [target(expr, legend)], unit="none", empty=empty,
                    width=width, height=height)
    panel.mappings([model.ValueMap({
        str(place): model.ValueMappingResult(text=text, color=COLOURS[state], index=place)
        for place, (state, text) in enumerate(STATES, 1)
    })])
    panel.color_scheme(_by_thresholds()).thresholds(steps(((None, GREY),)))
    panel.merge_values(merge_values=True).show_value(common.VisibilityMode.NEVER).row_height(0.8).per_page(20)
    return panel.legend(_legend(())).tooltip(_tooltip())


def heat(
    title: str, description: str, expr: str, *, unit: str, empty: str, interval: str, width: int = 12, height: int = 9
) -> heatmap.Panel:
    """A histogram over time, with exemplars; each cell is a count."""
    panel = _common(heatmap.Panel(), title, description, [target(expr, "{{le}}", heat=True, exemplars=True)],
                    unit="short", empty=empty, width=width, height=height)
    panel.interval(interval).calculate(calculate=False).cell_values(heatmap.CellValues().unit("short"))
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
    panel.color(heatmap.HeatmapColorOptions().mode(heatmaps.HeatmapColorMode.SCHEME).scheme("Viridis").steps(64))
    panel.rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.LE))
    return panel.exemplars_color(RED).filter_values(heatmap.FilterValueRange().le(1e-9)).show_legend()


def to_dashboard(title: str, uid: str) -> dashboards.DashboardLink:
    """A link of a panel to another dashboard, with the time range and the variables of this one."""
    return dashboards.DashboardLink(title).type(model.DashboardLinkType.LINK).url(
        f"/d/{uid}?${{__url_time_range}}&${{__all_variables}}")


def elsewhere(title: str, url: str) -> dashboards.DashboardLink:
    """A link of a panel to another page, which opens beside this one."""
    return dashboards.DashboardLink(title).type(model.DashboardLinkType.LINK).url(url).target_blank(target_blank=True)


def states(names: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """A value mapping of states to texts, each in its colour, for the properties of a column."""
    return [{"type": "value", "options": {
        state: {"text": text, "color": COLOURS[state], "index": place} for place, (state, text) in enumerate(names)}}]


def coloured(values: Steps) -> dict[str, Any]:
    """Properties of a column whose text is coloured by thresholds."""
    return {
        "thresholds": {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in values]},
        "color": {"mode": "thresholds"}, "custom.cellOptions": {"type": "color-text"},
    }


def filled(values: Steps, top: float) -> dict[str, Any]:
    """Properties of a column of bars from 0 to `top`, coloured by thresholds."""
    return {**coloured(values), "min": 0, "max": top,
            "custom.cellOptions": {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"}}


def _by_thresholds() -> dashboards.FieldColor:
    return dashboards.FieldColor().mode(model.FieldColorModeId.THRESHOLDS)


def _by_name() -> dashboards.FieldColor:
    return dashboards.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)


def _last() -> options.ReduceDataOptions:
    return options.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False)


def _tooltip() -> options.VizTooltipOptions:
    return options.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)


def _legend(calcs: tuple[str, ...]) -> options.VizLegendOptions:
    """A table when there is something to tabulate, else a list."""
    mode = common.LegendDisplayMode.TABLE if calcs else common.LegendDisplayMode.LIST
    return options.VizLegendOptions().show_legend(show_legend=True).display_mode(mode).placement(
        common.LegendPlacement.BOTTOM).calcs(list(calcs))
