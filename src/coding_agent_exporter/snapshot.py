"""Takes one directory of instance files, gives the document that `snapshot` prints: what pi-telemetry-snapshot prints.

Raw values: nothing is corrected here, `state.activity` is what the agent wrote, and the documents are passed on whole,
with all they hold. This is a person's own machine, not an exposition.
"""

from __future__ import annotations

import errno
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coding_agent_exporter import heartbeat
from coding_agent_exporter.decode.heartbeat import decode
from coding_agent_exporter.ecmascript import is_number, key, member, number, truthy
from coding_agent_exporter.model import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PidCheck = Literal["auto", "on", "off"]

_ACTIVITIES = ("working", "waiting_input", "unknown")
_STARTED_WITHIN_MS = 10_000
"""The kernel notes a process's start before the process itself does: node takes a while to load."""

Document = dict[str, Any]


def snapshot(directory: str, *, now_ms: int, stale_ms: int, pid_check: PidCheck = "auto",
             processes: Processes | None = None) -> Document:
    """The state of the agents of a directory, schema version 2, keys in pi-telemetry's order.

    `instances` are those that are alive and not stale. A directory that is missing or cannot be listed has none; a
    file that is torn, too large or too deep to be read safely, or no instance, is left out. Times are epoch ms.
    """
    fresh = [instance for instance in _instances(directory)
             if math.isfinite(updated := number(member(instance["process"], "updatedAt")))
             and now_ms - updated <= stale_ms]
    alive = _alive(fresh, pid_check, processes or Processes())
    active = []
    for instance in sorted(fresh, key=lambda instance: number(instance["process"]["pid"])):
        if alive(instance["process"]["pid"]):
            age = now_ms - number(member(instance["process"], "updatedAt"))
            telemetry = {"file": instance["telemetry"], "alive": True, "stale": False, "ageMs": age}
            active.append({**instance, "telemetry": telemetry})
    counts = {"total": len(active), **{name: sum(_activity(one) == name for one in active) for name in _ACTIVITIES}}
    return {
        "schemaVersion": 2,
        "source": "coding-agent-exporter",
        "generatedAt": now_ms,
        "telemetryDir": directory,
        "staleMs": stale_ms,
        "aggregate": _aggregate(counts),
        "counts": counts,
        "context": {"reporting": sum(is_number(_context(one, "percent")) for one in active), **_pressure(active)},
        "sessions": _sessions(active),
        "instancesByPid": {key(one["process"]["pid"]): one for one in active},
        "instances": active,
    }


class Processes:
    """The processes of this machine, as far as this PID namespace shows them."""

    def exists(self, pid: int) -> bool:
        """Whether a signal could be sent to it: another user's process does not count, as with pi-telemetry."""
        try:
            os.kill(pid, 0)
        except (OSError, OverflowError):
            return False
        return True

    def started_ms(self, pid: int) -> float | None:
        """When it started, epoch ms (Linux), or None where that cannot be known."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return (self._booted + int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")) * 1000
        except (OSError, ValueError, IndexError):
            return None

    @cached_property
    def _booted(self) -> int:
        found = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
        if found is None:
            raise OSError(errno.ENODATA, "no boot time", "/proc/stat")
        return int(found[1])


def _instances(directory: str) -> Iterator[Document]:
    """What the instance files hold, with each file's own path as `telemetry`."""
    try:
        paths = sorted(str(path) for path in Path(directory).iterdir() if path.name.endswith(".json"))
    except OSError:
        return
    for path in paths:
        try:
            raw, _ = heartbeat.read(path)
            document = None if isinstance(raw, Rejected) else decode(raw)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(document, dict) and is_number(document.get("schemaVersion")) and document["schemaVersion"] == 2:
            process = document.get("process")
            if isinstance(process, dict) and _pid(process.get("pid")):
                yield {**document, "telemetry": path}


def _pid(value: object) -> int:
    """The process id that a value stands for; 0 when it is none."""
    pid = number(value)
    return int(pid) if math.isfinite(pid) and pid > 0 and pid == int(pid) else 0


def _alive(fresh: list[Document], pid_check: PidCheck, processes: Processes) -> Callable[[object], bool]:
    """Whether the process of a fresh heartbeat is there.

    `auto` looks for processes where it is certain that this namespace is theirs: one of them is here, and started
    when its heartbeat says. Elsewhere (a sidecar, another machine's directory) a fresh heartbeat is proof of life.
    """
    if pid_check == "auto":
        pid_check = "on" if any(_is_here(one["process"], processes) for one in fresh) else "off"
    if pid_check == "off":
        return lambda pid: _pid(pid) > 0
    return lambda pid: processes.exists(_pid(pid))


def _is_here(process: Document, processes: Processes) -> bool:
    pid = _pid(process["pid"])
    if not processes.exists(pid):
        return False
    started = processes.started_ms(pid)
    # Without start times (macOS) there are no PID namespaces either.
    return started is None or abs(number(member(process, "startedAt")) - started) <= _STARTED_WITHIN_MS


def _activity(instance: Document) -> object:
    return member(member(instance, "state"), "activity")


def _context(instance: Document, name: str) -> object:
    return member(member(instance, "context"), name)


def _aggregate(counts: dict[str, int]) -> str:
    if not counts["total"]:
        return "none"
    return next((name for name in ("working", "waiting_input") if counts[name] == counts["total"]), "mixed")


def _pressure(instances: list[Document]) -> Document:
    percents = [percent for one in instances if is_number(percent := _context(one, "percent"))]
    return {
        "closeToLimit": sum(truthy(_context(one, "closeToLimit")) for one in instances),
        "nearLimit": sum(truthy(_context(one, "nearLimit")) for one in instances),
        "atLimit": sum(_context(one, "pressure") == "at_limit" for one in instances),
        "maxPercent": max([0, *percents]),  # type: ignore[type-var] # is_number has seen that they are numbers
    }


def _sessions(active: list[Document]) -> Document:
    groups: dict[str, list[Document]] = {}
    ids: dict[str, object] = {}
    for instance in active:
        session = member(member(instance, "session"), "id")
        name = session if truthy(session) else "unknown"
        ids.setdefault(key(name), name)
        groups.setdefault(key(name), []).append(instance)
    return {
        name: {
            "sessionId": ids[name],
            "name": member(member(group[0], "session"), "name"),
            "file": member(member(group[0], "session"), "file"),
            "cwd": member(member(group[0], "workspace"), "cwd"),
            "pids": [one["process"]["pid"] for one in group],
            "activities": {activity: sum(_activity(one) == activity for one in group) for activity in _ACTIVITIES},
            "context": _pressure(group),
        }
        for name, group in groups.items()
    }
