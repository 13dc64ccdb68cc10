"""Takes the settings, gives `check` what lies in the configured directories. Reads all of it, stores nothing."""

from __future__ import annotations

import os.path
from collections import Counter
from typing import TYPE_CHECKING

from coding_agent_exporter.decode import session as session_files
from coding_agent_exporter.decode import usage as usage_logs
from coding_agent_exporter.decode.lines import whole
from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.heartbeat import InstanceDir
from coding_agent_exporter.model import Root, RootReport, SessionMessage
from coding_agent_exporter.tail import Tail, Unreadable

if TYPE_CHECKING:
    from coding_agent_exporter.config import Settings

MAX_PROBLEMS = 20
"""So many files are named for each directory; the rest is counted."""


def inspect(settings: Settings) -> list[RootReport]:
    """One report for each configured directory, in their order."""
    return [_telemetry(root) if root.kind == "telemetry" else _logs(root, settings) for root in settings.roots]


def _telemetry(root: Root) -> RootReport:
    scan = InstanceDir(root).scan()
    found = {"agents": scan.states["ok"]}
    problems = [f"{path}: {rejected.reason}" for path, rejected in zip(scan.paths, scan.rejected, strict=True)]
    return RootReport(root, _is_there(root), found, _few(problems))


def _logs(root: Root, settings: Settings) -> RootReport:
    found = Discovery([root]).scan()
    problems = [f"{path}: {reason}" for _, path, reason in found.unreadable]
    rejected: Counter[str] = Counter()
    accepted = 0
    tail = Tail(max_line=settings.input_max_line_size)
    for file in found.files:
        cursor = None
        try:
            while (chunk := tail.read(file.path, cursor, root.path)) is not None:
                data = chunk.data
                if chunk.eof:
                    data += chunk.partial[:whole(chunk.partial)]
                if root.kind == "usage":
                    events, wrong = usage_logs.decode(data)
                    accepted += len(events)
                else:
                    records, wrong, _ = session_files.decode(data)
                    accepted += sum(isinstance(record, SessionMessage) for record in records)
                rejected += wrong
                rejected["oversized"] += chunk.oversized
                cursor = chunk.cursor
                if chunk.eof:
                    break
        except Unreadable as error:
            problems.append(f"{file.path}: {error.reason}")
    problems += [
        f"{count} lines or parts of lines rejected: {reason}" for reason, count in sorted(rejected.items()) if count
    ]
    what = ("usage logs", "events") if root.kind == "usage" else ("session files", "messages")
    return RootReport(root, _is_there(root), {what[0]: len(found.files), what[1]: accepted}, _few(problems))


def _is_there(root: Root) -> bool:
    # Where a directory above may not be entered, Path.is_dir raises instead.
    return os.path.isdir(root.path)  # noqa: PTH112


def _few(problems: list[str]) -> tuple[str, ...]:
    if len(problems) > MAX_PROBLEMS:
        return (*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more")
    return tuple(problems)
