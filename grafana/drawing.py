"""Takes the answers to queries, gives panels on a dark page, arranged as a dashboard's are. The user of matplotlib.

Positions and sizes are those of Grafana: 24 columns, and rows of `ROW` pixels. Times are epoch seconds, shown in UTC.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

WIDTH, ROW, GAP = 1600, 38, 8
DPI = 100
PAGE, PANEL, EDGE, TEXT, MUTED, GRID = "#111217", "#181b1f", "#24282e", "#d5d6dd", "#8e909a", "#2a2d33"
CAPTION = "Rendering of the dashboard's queries over simulated agents; not a Grafana screenshot"
HEAD = 44
FONT = 9.0
LOG_TICKS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)
"""Seconds that are marked on a log axis."""

PALETTE = (
    "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#9A8CFF", "#7FD1AE", "#B3B3B3",
    "#C49A6C", "#6E7FD2",
)
"""Colours of series that have none of their own."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One series: its name, its colour, and its points as (epoch seconds, value)."""

    name: str
    colour: str
    points: Points


def colours(names: Sequence[str], fixed: Mapping[str, str]) -> dict[str, str]:
    """A colour for each name, the same whatever else is drawn as far as there are enough."""
    free = iter(PALETTE * (1 + len(names) // len(PALETTE)))
    return {name: fixed.get(name) or next(free) for name in names}


class Page:
    """A page of panels. `height` is in rows."""

    def __init__(self, title: str, note: str, height: float) -> None:
        self._height = HEAD + height * ROW + 30
        self._figure = Figure(figsize=(WIDTH / DPI, self._height / DPI), dpi=DPI, facecolor=PAGE)
        FigureCanvasAgg(self._figure)
        self._text(16, 25, title, size=14, colour=TEXT, weight="bold")
        self._text(WIDTH - 16, 25, note, size=10, colour=MUTED, ha="right")
        self._text(16, self._height - 14, CAPTION, size=9, colour=MUTED)

    def save(self, path: Path) -> None:
        """A PNG without a date or a version in it."""
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png", facecolor=PAGE)
        # 256 colours are enough for it, and a third of the size.
        image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="png", optimize=True)

    # -- panels; x and w are in columns, y and h in rows

    def number(self, x: float, y: float, w: float, h: float, title: str, text: str, colour: str) -> None:
        """One large number."""
        left, top, width, height = self._panel(x, y, w, h, title)
        self._text(left + width / 2, top + height / 2 + 8, text, size=21, colour=colour, ha="center")

    def lines(
        self, x: float, y: float, w: float, h: float, title: str, lines: Sequence[Line], *,
        unit: Callable[[float], str], span: tuple[float, float], limits: Mapping[float, str] | None = None,
        top: float | None = None, log: bool = False, gap: float = 0.0, columns: int = 4, legend: int = 1,
    ) -> None:
        """Lines over time; `limits` are dashed lines in their colours. A `gap` of more seconds is not bridged."""
        axes = self._axes(x, y, w, h, title, unit=unit, span=span, bottom=32 + 18 * legend)
        for line in lines:
            stamps, values = _broken(line.points, gap or float("inf"))
            axes.plot(stamps, values, color=line.colour, linewidth=1.5, label=line.name, solid_joinstyle="round")
        for at, colour in (limits or {}).items():
            axes.axhline(at, color=colour, linewidth=1.1, linestyle=(0, (5, 4)), alpha=0.9)
            axes.text(span[1], at, unit(at), color=colour, fontsize=FONT, va="bottom", ha="right")
        if log:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_locator(FixedLocator(LOG_TICKS))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
        else:
            axes.set_ylim(bottom=0)
        if top is not None:
            axes.set_ylim(top=top)
        if legend:
            self._legend(axes, columns)

    def columns(
        self, x: float, y: float, w: float, h: float, title: str, lines: Sequence[Line], *,
        unit: Callable[[float], str], span: tuple[float, float], step: float, columns: int = 4, legend: int = 1,
    ) -> None:
        """Stacked bars, each beginning where its time begins."""
        axes = self._axes(x, y, w, h, title, unit=unit, span=span, bottom=32 + 18 * legend)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        heights: dict[float, float] = {}
        for line in lines:
            below = [heights.get(at, 0.0) for at, _ in line.points]
            axes.bar([at for at, _ in line.points], [value for _, value in line.points], width=step * 0.86,
                     bottom=below, align="edge", color=line.colour, label=line.name, linewidth=0)
            for at, value in line.points:
                heights[at] = heights.get(at, 0.0) + value
        if step >= 86_400:
            for at, value in heights.items():
                if value > 0:
                    axes.text(at + step * 0.43, value, unit(value), ha="center", va="bottom", color=TEXT, fontsize=FONT)
            axes.set_ylim(top=max(heights.values(), default=1) * 1.12)
        axes.set_ylim(bottom=0)
        if legend:
            self._legend(axes, columns)

    def ranking(
        self, x: float, y: float, w: float, h: float, title: str, rows: Sequence[tuple[str, float, str]],
        *, unit: Callable[[float], str],
    ) -> None:
        """A bar for each row of (name, value, colour), with the name above."""
        left, top, width, height = self._panel(x, y, w, h, title)
        most = max((value for _, value, _ in rows), default=1) or 1
        step = min(44.0, (height - 38) / max(1, len(rows)))
        for place, (name, value, colour) in enumerate(rows):
            at = top + 36 + place * step
            self._text(left + 14, at + 4, name, size=FONT, colour=TEXT)
            self._text(left + width - 14, at + 4, unit(value), size=FONT, colour=TEXT, ha="right")
            self._bar(left + 14, at + 13, width - 28, step * 0.32, GRID)
            self._bar(left + 14, at + 13, (width - 28) * value / most, step * 0.32, colour)

    def table(
        self, x: float, y: float, w: float, h: float, title: str, heads: Sequence[tuple[str, float]],
        rows: Sequence[Sequence[tuple[str, str]]],
    ) -> None:
        """A table. `heads` are (heading, share of the width), cells (text, colour); what does not fit is left out."""
        left, top, width, height = self._panel(x, y, w, h, title)
        edges = [left + 14]
        for _, share in heads:
            edges.append(edges[-1] + share * (width - 28))
        for (name, _), edge in zip(heads, edges, strict=False):
            self._text(edge, top + 44, name, size=FONT, colour=MUTED, weight="bold")
        for place, row in enumerate(rows[: int((height - 56) // 25)]):
            at = top + 70 + place * 25
            self._bar(left + 10, at - 13, width - 20, 1, GRID)
            for (text, colour), edge in zip(row, edges, strict=False):
                self._text(edge, at, text, size=FONT + 0.5, colour=colour)

    def timeline(
        self, x: float, y: float, w: float, h: float, title: str, rows: Sequence[tuple[str, Points]], *,
        span: tuple[float, float], step: float, states: Mapping[float, tuple[str, str]], names: float = 300,
    ) -> None:
        """For each row its states over time: value -> (name, colour)."""
        axes = self._axes(x, y, w, h, title, unit=str, span=span, bottom=50, left=names)
        axes.grid(visible=False)
        for place, (_, points) in enumerate(reversed(rows)):
            for at, length, state in _runs(points, step):
                axes.broken_barh([(at, length)], (place - 0.38, 0.76), facecolors=states[state][1], linewidth=0)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=FONT)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        for name, colour in states.values():
            axes.bar([span[0]], [0], color=colour, label=name)
        self._legend(axes, len(states))

    def heat(
        self, x: float, y: float, w: float, h: float, title: str, rows: Sequence[tuple[str, Points]], *,
        span: tuple[float, float], step: float,
    ) -> None:
        """A histogram over time, each cell ending where its time is. `rows` are buckets from the lowest on, with the
        upper edge as name."""
        axes = self._axes(x, y, w, h, title, unit=str, span=span, bottom=32, left=62)
        axes.grid(visible=False)
        stamps = sorted({at for _, points in rows for at, _ in points})
        cells = [[max(0.0, dict(points).get(at, 0.0)) for at in stamps] for _, points in rows]
        shown = [[value if value >= 0.5 else math.nan for value in row] for row in cells]
        most = max((max(row, default=0.0) for row in cells), default=1.0)
        mesh = axes.pcolormesh([stamps[0] - step, *stamps], range(len(rows) + 1), shown, cmap="viridis",
                               norm=LogNorm(1, max(2.0, most)), edgecolors=PANEL, linewidth=0.4)
        mesh.set_rasterized(True)
        axes.set_yticks(range(1, len(rows) + 1), [name for name, _ in rows], fontsize=FONT)
        axes.set_ylim(0, len(rows))

    # -- pieces

    def _panel(self, x: float, y: float, w: float, h: float, title: str) -> tuple[float, float, float, float]:
        """Draws an empty panel; gives left, top, width and height in pixels."""
        column = (WIDTH - 2 * GAP) / 24
        left, top = GAP + x * column + GAP / 2, HEAD + y * ROW
        width, height = w * column - GAP, h * ROW - GAP
        self._figure.add_artist(FancyBboxPatch(
            (left / WIDTH, 1 - (top + height) / self._height), width / WIDTH, height / self._height,
            boxstyle="square,pad=0", facecolor=PANEL, edgecolor=EDGE, linewidth=1,
            transform=self._figure.transFigure, zorder=-2,
        ))
        self._text(left + 12, top + 16, title, size=10.5, colour=TEXT)
        return left, top, width, height

    def _axes(
        self, x: float, y: float, w: float, h: float, title: str, *, unit: Callable[[float], str],
        span: tuple[float, float], bottom: float, left: float = 62,
    ) -> Axes:
        at, top, width, height = self._panel(x, y, w, h, title)
        axes = self._figure.add_axes((
            (at + left) / WIDTH, 1 - (top + height - bottom) / self._height,
            (width - left - 26) / WIDTH, (height - bottom - 34) / self._height,
        ))
        axes.set_facecolor(PANEL)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(colors=MUTED, labelsize=FONT, length=0, pad=5)
        axes.grid(visible=True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(*span)
        if span[1] - span[0] > 2 * 86_400:
            midnights = [float(at) for at in range(math.ceil(span[0] / 86_400) * 86_400, int(span[1]) + 1, 86_400)]
            noons = [at + 43_200 for at in midnights if at < span[1] - 43_200]
            axes.set_xticks(midnights, [""] * len(midnights))
            shape = "{0:%a} {0.day} {0:%b}" if width > 700 else "{0:%a}"
            axes.set_xticks(noons, [shape.format(datetime.fromtimestamp(at, UTC)) for at in noons], minor=True)
            axes.tick_params(axis="x", which="minor", colors=MUTED, labelsize=FONT, length=0, pad=5)
        else:
            hours = [float(at) for at in range(math.ceil(span[0] / 3600) * 3600, int(span[1]) + 1, 3600)]
            axes.set_xticks(hours, [f"{datetime.fromtimestamp(at, UTC):%H:%M}" for at in hours])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
        return axes

    def _legend(self, axes: Axes, columns: int) -> None:
        handles, names = axes.get_legend_handles_labels()
        if names:
            box = axes.get_position().height * self._height
            axes.legend(
                handles, names, loc="upper left", bbox_to_anchor=(-0.005, -28 / box), ncols=columns, frameon=False,
                fontsize=FONT, labelcolor=TEXT, handlelength=1.1, handleheight=0.6, columnspacing=1.6,
                handletextpad=0.6, borderpad=0, labelspacing=0.35,
            )

    def _bar(self, left: float, top: float, width: float, height: float, colour: str) -> None:
        self._figure.add_artist(Rectangle(
            (left / WIDTH, 1 - (top + height) / self._height), max(0.0, width) / WIDTH, height / self._height,
            facecolor=colour, linewidth=0, transform=self._figure.transFigure, zorder=-1))

    def _text(
        self, x: float, y: float, text: str, *, size: float, colour: str, ha: str = "left", weight: str = "normal"
    ) -> None:
        self._figure.text(x / WIDTH, 1 - y / self._height, text.replace("$", r"\$"), fontsize=size, color=colour,
                          ha=ha, va="center", fontweight=weight)


def _broken(points: Points, gap: float) -> tuple[list[float], list[float]]:
    stamps: list[float] = []
    values: list[float] = []
    for at, value in points:
        if stamps and at - stamps[-1] > gap:
            stamps.append(at)
            values.append(math.nan)
        stamps.append(at)
        values.append(value)
    return stamps, values


def _runs(points: Points, step: float) -> list[tuple[float, float, float]]:
    """(begin, length, value) of each stretch with one value."""
    found: list[tuple[float, float, float]] = []
    for at, value in points:
        if found and found[-1][2] == value and at - (found[-1][0] + found[-1][1]) < step / 2:
            found[-1] = (found[-1][0], at + step - found[-1][0], value)
        else:
            found.append((at, step, value))
    return found
