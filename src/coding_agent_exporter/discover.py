"""Takes the configured roots from pipeline, gives it the log files below them, in the order to read them.

A scan runs before every scrape and looks only where a log can be: an agent's state directory may hold a
whole work tree. What was found is kept per unit (an agent, the sessions of a project) together with what
`stat` said of the directories that it rests on; while they say the same, nothing is listed again.
"""

# ruff: noqa: PTH100, PTH116, PTH118, PTH119, PTH120
# PTH: with 10,000 agents a scan makes tens of thousands of calls; Path objects would double what they cost.

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter.listing import Unit, is_dir, reason_of
from coding_agent_exporter.model import Root, SourceFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RELIST_SECONDS = 60.0
"""How long a listing is trusted. Some network and object-store mounts never change a directory's times."""

RELIST_SECONDS_PER_UNIT = 0.05
"""Added to that for each unit: listing again costs the same share of time whatever their number."""

RETRY_SECONDS = 1.0
"""How long an error of the system (not a denied permission) is trusted: it can pass without a trace in any time."""

RETRY_SECONDS_PER_UNIT = 0.005
"""Added to that for each unit with one, as above."""

SESSION_DEPTH = 4
"""Session files lie at most this many levels below their root."""

_LOG = re.compile(r"events\.jsonl(?:\.([0-9]+))?")
_STARTED = re.compile(r"(?<![^/])[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9-]+Z?_")
_UNDATED = "~"  # sorts behind every date: a file that does not say when it began may be a copy of any other


@dataclass(frozen=True, slots=True)
class Found:
    """What one scan found; the same object as before when nothing changed.

    `files`: usage logs before session files, a log's parts as they were written, a session before its forks.
    `watch`: existing directories in which a change may mean a new or a longer file. `unreadable`: each path
    once that should be an input and cannot be one, and why. `missing`: roots that do not exist (yet).
    `inodes`: device and inode number of each of `files`.
    """

    files: list[SourceFile]
    watch: frozenset[Path]
    unreadable: list[tuple[Root, Path, str]]
    missing: list[Root]
    inodes: list[tuple[int, int]] = field(default_factory=list)


class Discovery:
    """Finds the logs below `roots`. `clock` gives epoch seconds, by the clock that stamps the files."""

    def __init__(self, roots: Sequence[Root], *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._trees = [_TREES[root.kind](root) for root in roots]
        self._found: Found | None = None
        self.breathe: Callable[[], None] = lambda: None
        """Called now and then in a scan."""

    def scan(self) -> Found:
        """Look for logs. Raises nothing: what cannot be read is in `unreadable`."""
        now = self._clock()
        changed = [tree.scan(now, self.breathe) for tree in self._trees]
        if self._found is None or any(changed):
            self._found = self._collect()
        return self._found

    def _collect(self) -> Found:
        unreadable: dict[Path, tuple[Root, Path, str]] = {}
        known: dict[tuple[int, int], SourceFile] = {}
        for tree in self._trees:
            for unit in tree.units():
                for path, reason in unit.problems:
                    unreadable.setdefault(path, (tree.root, path, reason))
                for identity, file in unit.files:
                    other = known.setdefault(identity, file)
                    # Of two ways within a root, the longer one is the one through a link.
                    if other.root == file.root and len(file.path.parts) < len(other.path.parts):
                        known[identity] = file
        ordered = sorted(known.items(), key=lambda item: item[1].precedence)
        return Found(
            files=[file for _, file in ordered],
            inodes=[inode for inode, _ in ordered],
            watch=frozenset(path for tree in self._trees for unit in tree.units() for path in unit.watch),
            unreadable=list(unreadable.values()),
            missing=[tree.root for tree in self._trees if not tree.exists],
        )


class _Tree:
    """A telemetry root: nothing below it is a log. Base of those where logs are."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.exists = False
        self.path = os.path.abspath(root.path)
        self._home = ""
        self._now = 0.0
        self._breathe: Callable[[], None] = lambda: None
        self._failed = 0
        self._changed = False
        self._top = Unit("", 0.0, 0.0)
        self._units: dict[str, Unit] = {}
        self._seen: dict[str, Unit] = {}

    def units(self) -> Iterator[Unit]:
        yield self._top
        yield from self._units.values()

    def scan(self, now: float, breathe: Callable[[], None]) -> bool:
        """Look again where something changed. True when that made a difference."""
        try:
            self._home = os.path.join(os.path.realpath(self.path), "")
        except OSError:  # as in `inside`
            self._home = os.path.join(self.path, "")
        self._now, self._seen, self._breathe = now, {}, breathe
        self._failed = sum(unit.failed for unit in self._units.values())
        for number, unit in enumerate(self._units.values()):
            unit.check(now)
            if number % 256 == 255:
                breathe()
        top = Unit(self._home, now, now)
        self.exists = self._look_at_top(top)
        self._changed, self._top = top != self._top, top
        if not self._changed and not any(unit.stale for unit in self._units.values()):
            return False
        if self.exists and not top.problems:
            self.walk()
        changed = self._changed or len(self._seen) != len(self._units)
        self._units = self._seen
        return changed

    def walk(self) -> None:
        """Visit every place below the root where logs can be."""

    def visit(self, path: str, look: Callable[[Unit, str], None]) -> Unit:
        """Give what is at `path`: what was found there before, while that still holds."""
        known = unit = self._units.get(path)
        if unit is None or unit.stale:
            # Spread, so that what was found together is not listed again all at once.
            spread = 0.5 + (len(self._seen) % 64) / 128
            lifetime = RELIST_SECONDS + RELIST_SECONDS_PER_UNIT * max(len(self._units), len(self._seen))
            unit = Unit(self._home, self._now, self._now + lifetime * spread)
            look(unit, path)
            self._breathe()
            if unit.failed:
                unit.expires = min(unit.expires, self._now + RETRY_SECONDS + RETRY_SECONDS_PER_UNIT * self._failed)
            self._changed = self._changed or unit != known
        self._seen[path] = unit
        return unit

    def _look_at_top(self, top: Unit) -> bool:
        place = self.path
        while True:
            try:
                status = os.stat(place)
            except (FileNotFoundError, NotADirectoryError):
                # Where it, or the first part of the way to it, will appear.
                place = os.path.dirname(place)
                continue
            except OSError as error:
                top.problems.append((Path(self.path), reason_of(error)))
                return True
            if stat.S_ISDIR(status.st_mode):
                top.watch.append(Path(place))
            elif place == self.path:
                top.problems.append((Path(place), "not_directory"))
            return place == self.path


class _UsageTree(_Tree):
    """`agents/<agent id>/events/<source>/usage/`, `preserved/<name>--<agent id>/...`, or one agent itself."""

    def walk(self) -> None:
        own = os.path.basename(self.path) or self.root.alias
        self.visit(self.path, partial(self._look_at_agent, agent=own, preserved=False))
        # Live agents first, and all of them: one that is moved away meanwhile is then met twice, not never.
        agents = os.path.join(self.path, "agents")
        for name in self.visit(agents, self._look_at_parent).children:
            self.visit(f"{agents}/{name}", partial(self._look_at_agent, agent=name, preserved=False))
        preserved = os.path.join(self.path, "preserved")
        for name in self.visit(preserved, self._look_at_parent).children:
            _, separator, agent = name.rpartition("--")
            if separator and agent:
                self.visit(f"{preserved}/{name}", partial(self._look_at_agent, agent=agent, preserved=True))

    def _look_at_parent(self, unit: Unit, path: str) -> None:
        above = unit.stat(self.path)
        entries = unit.list(path, unit.stat(path))
        if entries is None:
            unit.rest_on(self.path, above, watch=True)
        unit.children = [entry.name for entry in entries or () if is_dir(entry)]

    def _look_at_agent(self, unit: Unit, path: str, *, agent: str, preserved: bool) -> None:
        # Only the deepest directories that exist are watched and asked about again. Nobody writes any more to
        # what is preserved: no watch there.
        above, events = unit.stat(path), os.path.join(path, "events")
        sources = unit.list(events, above and unit.stat(events), watch=not preserved)
        if sources is None:
            unit.rest_on(path, above, watch=not preserved)
            return
        for source in sources:
            above, usage = unit.stat(source.path), os.path.join(source.path, "usage")
            logs = unit.list(usage, above and unit.stat(usage), watch=not preserved)
            if logs is None:
                if above:
                    unit.rest_on(source.path, above, watch=not preserved)
                continue
            for log in logs:
                if (match := _LOG.fullmatch(log.name)) and (found := unit.file(log)):
                    name = f"{agent}/{source.name}"
                    order = (name, *_usage_order(found.st_mtime_ns, match[1], preserved=preserved))
                    unit.files.append(((found.st_dev, found.st_ino), SourceFile(
                        "usage", self.root.alias, Path(log.path), name, source.name, agent, order)))


class _SessionTree(_Tree):
    """`*.jsonl` below, as `<project>/<start>_<uuid>.jsonl` and `<project>/<session>/<name>.jsonl`."""

    def __init__(self, root: Root) -> None:
        super().__init__(root)
        self._source = "omp" if ".omp" in root.path.parts else ""

    def walk(self) -> None:
        for name in self.visit(self.path, self._look_at_root).children:
            self.visit(os.path.join(self.path, name), self._look_at_project)

    def _look_at_root(self, unit: Unit, path: str) -> None:
        unit.children = self._files_of(unit, path, unit.stat(path))

    def _look_at_project(self, unit: Unit, path: str) -> None:
        level = [path]
        known: set[tuple[int, int]] = set()  # against links that lead round in a circle
        for _ in range(2, SESSION_DEPTH + 1):
            below: list[str] = []
            for place in level:
                status = unit.stat(place)
                if status and (status.st_dev, status.st_ino) not in known:
                    known.add((status.st_dev, status.st_ino))
                    below += [os.path.join(place, name) for name in self._files_of(unit, place, status)]
                elif place == path:
                    unit.rest_on(path, None, watch=False)
            level = below

    def _files_of(self, unit: Unit, path: str, status: os.stat_result | None) -> list[str]:
        """Take the session files in one directory, give the names of the directories in it."""
        directories = []
        for entry in unit.list(path, status) or ():
            if is_dir(entry):
                directories.append(entry.name)
            elif entry.name.endswith(".jsonl") and (found := unit.file(entry)):
                log = entry.path[len(self.path.rstrip("/")) + 1 :]
                file = SourceFile(
                    "sessions", self.root.alias, Path(entry.path), log, self._source, order=_session_order(log))
                unit.files.append(((found.st_dev, found.st_ino), file))
        return directories


_TREES: dict[str, type[_Tree]] = {"telemetry": _Tree, "usage": _UsageTree, "sessions": _SessionTree}


def _usage_order(modified: int, digits: str | None, *, preserved: bool) -> tuple[str, ...]:
    """Sort what is preserved before what is live, and rotated parts, oldest first, before the log itself."""
    stage = "0" if preserved else "1"
    if digits is None:
        return (stage, "1")
    # Where the times are the same: .2 is older than .1, but a time stamp in the name grows.
    age = f"{10**6 - int(digits):07d}" if len(digits) <= 6 else f"1{len(digits):03d}{digits}"
    return (stage, "0", f"{max(0, modified):020d}", age)


def _session_order(log: str) -> tuple[str, ...]:
    """Sort by the time in the name; what lies in a session's directory comes after the session itself."""
    started, name = _STARTED.search(log), log.removesuffix(".jsonl")
    return (name[started.start() :] if started else _UNDATED + name,)
