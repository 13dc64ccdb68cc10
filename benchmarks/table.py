"""Takes measured rows, gives an aligned table for the terminal or a Markdown one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `target` is DESIGN's, where there is one; `note` says what it was taken on."""

    what: str
    result: str
    target: str = ""
    note: str = ""


_HEAD = Row("what", "result", "target", "note")


def text(title: str, rows: Iterable[Row]) -> str:
    cells = [(row.what, row.result, row.target, row.note) for row in (_HEAD, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines, ""])


def markdown(title: str, rows: Iterable[Row]) -> str:
    lines = [f"## {title}", "", "| what | result | target | note |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.result} | {row.target} | {row.note} |" for row in rows]
    return "\n".join([*lines, ""])
