"""Takes settings and what an inspection of the roots found, gives the report that `check` prints."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coding_agent_exporter import webconfig
from coding_agent_exporter.export.target import resolve
from coding_agent_exporter.web import access

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.model import RootReport


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting that matters and what is wrong with it. `detail` says what is right."""

    name: str
    value: str
    detail: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    settings: tuple[Finding, ...]
    roots: tuple[RootReport, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """All that makes `check` fail, each naming what it is about."""
        return (*(f"{finding.name}: {finding.problem}" for finding in self.settings if finding.problem),
                *(f"{report.root.kind} {report.root.alias}: {problem}"
                  for report in self.roots for problem in report.problems))


def examine(settings: Settings, roots: Sequence[RootReport]) -> Report:
    """Looks at what the settings point to besides the roots. Changes nothing."""
    return Report((
        Finding("listen address", " ".join(map(str, settings.web_listen_address))),
        Finding("metrics path", settings.web_telemetry_path),
        Finding("config file", str(settings.config_file or "none")),
        _web_config(settings.web_config_file),
        _state(settings.state_path),
        _otlp(settings),
    ), tuple(roots))


def _web_config(file: Path | None) -> Finding:
    if file is None:
        return Finding("web config file", "none")
    try:
        access.ssl_context(webconfig.load(file))
    except (OSError, ValueError) as error:
        return Finding("web config file", str(file), problem=str(error))
    return Finding("web config file", str(file), "valid")


def _otlp(settings: Settings) -> Finding:
    """Where spans go: flags and the standard variables decide together."""
    try:
        target = resolve(os.environ, **settings.collector)
    except ValueError as error:
        return Finding("otlp collector", settings.otlp_endpoint, problem=str(error))
    return Finding("otlp collector", "none" if target is None else target.url)


def _state(file: Path) -> Finding:
    """Whether the state file can be written, or made, together with directories that are missing."""
    nearest = next(parent for parent in file.parents if os.path.lexists(parent))
    problem = detail = ""
    if not nearest.is_dir():
        problem = f"{nearest} is not a directory"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        # SQLite needs the directory too: its journal lies beside the file.
        problem = f"{nearest} cannot be written to"
    elif not os.path.lexists(file):
        detail = "will be made"
    elif not file.is_file():
        problem = "not a regular file"
    elif not os.access(file, os.R_OK | os.W_OK):
        problem = "the file cannot be written to"
    else:
        detail = f"{file.stat().st_size} bytes"
    return Finding("state file", str(file), detail, problem)


def as_text(report: Report) -> str:
    """Aligned lines for people, ending in a verdict."""
    rows = [(f.name, f.value, f"PROBLEM: {f.problem}" if f.problem else f.detail) for f in report.settings]
    lines = [*_align(rows), ""]
    roots = ((each.root, _found(each)) for each in report.roots)
    aligned = _align([(root.kind, root.alias, str(root.path), found) for root, found in roots])
    for each, line in zip(report.roots, aligned, strict=True):
        lines += [line, *(f"    PROBLEM: {problem}" for problem in each.problems)]
    if not report.roots:
        lines.append("no directories are configured: nothing would be exported")
    count = len(report.problems)
    lines += ["", f"{count} problem{'s' if count > 1 else ''} found" if count else "no problems found"]
    return "".join(f"{_printable(line)}\n" for line in lines)


def as_json(report: Report) -> str:
    """The same for programs: `{"settings": {...}, "roots": [...], "problems": [...]}`."""
    document = {
        "settings": {f.name.replace(" ", "_"): f.value for f in report.settings},
        "roots": [{**dataclasses.asdict(each.root), "path": str(each.root.path), "exists": each.exists,
                   "found": each.found, "problems": each.problems} for each in report.roots],
        "problems": report.problems,
    }
    return json.dumps(document, indent=2) + "\n"


def _found(report: RootReport) -> str:
    if not report.exists:
        return "not there yet"
    return ", ".join(f"{count} {what}" for what, count in report.found.items() if count) or "nothing yet"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def _printable(line: str) -> str:
    """Names of files come from elsewhere; they must not steer somebody's terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
