"""Takes the configured roots, gives the ledger every line that was appended below them, once and in order."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.decode import session as session_files
from coding_agent_exporter.decode import turns as turn_lines
from coding_agent_exporter.decode import usage as usage_logs
from coding_agent_exporter.decode.lines import lines_of, whole
from coding_agent_exporter.discover import Discovery, Found
from coding_agent_exporter.ledger import Ledger, SessionMeta
from coding_agent_exporter.registry import Registry
from coding_agent_exporter.tail import Chunk, Tail, Unreadable, accept_partial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coding_agent_exporter.model import CounterKey, FileRow, Root, SourceFile
    from coding_agent_exporter.runs import Runs

log = logging.getLogger(__name__)

PI, OMP = "pi-coding", "omp"

STEP_BYTES = 8 << 20
"""So much is read before a commit: bounds the memory that one transaction takes."""

MAX_WARNED = 10_000
"""So many paths are named in the log; the metrics go on counting."""

MAX_LOOKS = 5
"""So often a step lists again what was renamed since it was listed."""

MAX_WAITS = 5
"""So many steps in a row a log waits whose parts are being renamed. On a file system that makes up its inode numbers at
each look, nothing is ever found as it was listed."""

BREATH = 0.1
"""Seconds between two breaths: in a long step too, no heartbeat that holds for 250 ms goes unseen."""

_TITLE = re.compile(rb'\s*\{\s*"type"\s*:\s*"title"')


@dataclass(slots=True)
class _Look:
    """What one look at files found.

    `changed`: those that are not as they were left, with (device, inode) and status. `moved`: paths where not the
    listed file is, and what is there instead. `unsettled`: logs (root, log) that are being renamed all the time.
    """

    changed: list[tuple[SourceFile, tuple[int, int], os.stat_result]] = field(default_factory=list)
    moved: set[tuple[str, tuple[int, int] | None]] = field(default_factory=set)
    unsettled: set[tuple[str, str]] = field(default_factory=set)


class Inputs:
    """Reads usage logs and session files. Counts what it does in `stats`, what it sees in `states` and `lag`.

    Without `runs`, only what was spent is read. `breathe` is called now and then while a step takes long.
    """

    def __init__(
        self, roots: Sequence[Root], discovery: Discovery, tail: Tail, ledger: Ledger,
        runs: Runs | None, rows: Iterable[FileRow], breathe: Callable[[], None] = lambda: None,
    ) -> None:
        self.stats: Counter[CounterKey] = Counter()
        self.states: dict[tuple[str, str, str], int] = {}
        self.lag: dict[tuple[str, str], int] = {}
        self.found = Found(files=[], watch=frozenset(), unreadable=[], missing=[])
        self._roots = {(root.kind, root.alias): root.path for root in roots}
        self._telemetry = frozenset(root.prefix for root in roots if root.kind == "telemetry")
        self._discovery = discovery
        discovery.breathe = self._pause
        self._breathe = breathe
        self._breathed = 0.0
        self._tail = tail
        self._ledger = ledger
        self._runs = runs
        self._now = 0.0
        self.arrived = 0.0
        """When the lines that are being applied were written, as far as their file tells; epoch seconds."""
        self._registry = Registry(rows)
        self._files: dict[str, SourceFile] = {}
        self._listed: dict[str, tuple[int, int]] = {}
        self._present: Counter[tuple[str, str, str]] = Counter()
        self._changed: dict[int, FileRow] = {}
        self._warned: set[int] = set()
        self._sessions = self._named()
        self._today = 0
        self._expired = 0.0
        self._rest: dict[str, SourceFile] = {}
        """What the budget of the step before did not reach: the next one goes on there."""
        self._waits: dict[tuple[str, str], int] = {}
        """The logs (root, log) that the step before did not read, for they were being renamed, and how often by now."""

    def reads_session(self, session: str) -> bool:
        """Whether a session file of this session is among what is read."""
        return session in self._sessions

    def step(self, now: float, *, budget: int = STEP_BYTES, changes: frozenset[str] | None = None) -> bool:
        """Read what was appended, up to `budget` bytes (0: only look). Returns whether more is left.

        `changes` are the paths that are known to have changed since the last step; None: look at all.
        """
        self._now, self._breathed = now, time.monotonic()
        going_on = bool(self._rest)
        chosen = self._rest or (None if changes is None else self._choose(changes))
        states = Counter(self._present)
        look = _Look() if chosen is None else self._look(chosen, states)
        if chosen is None or look.moved or not all(self._is_same(file, inode) for file, inode, _ in look.changed):
            # Where one file took the place of another, only a look at all tells what became of the one before.
            chosen, states, look = self._look_at_all(now, look.moved)
        lag: Counter[tuple[str, str]] = Counter()
        rows = self._registry.resolve([(file, inode) for file, inode, _ in look.changed])
        self._rest = {}
        only_look = budget <= 0
        hold = {} if only_look else {
            log: times for log in look.unsettled if (times := self._waits.get(log, 0) + 1) <= MAX_WAITS}
        for (file, inode, status), row in zip(look.changed, rows, strict=True):
            self._pause()
            row.size, row.mtime = status.st_size, status.st_mtime
            log = (file.root, file.log)
            patient = self._waits.get(log, 0) < MAX_WAITS
            try:
                if log not in hold:
                    budget = self._read(file, row, budget, inode if patient else None)
            except Unreadable as error:
                if error.reason == "vanished" and patient:
                    # Renamed in between: what was in front of the rest of this log can be behind it now.
                    hold[log] = self._waits.get(log, 0) + 1
                self._note_unreadable(states, file, error.reason)
                if error.reason != "permission":
                    continue  # perhaps a link out of the root: not even the size of what it leads to gets out
            offset = 0 if row.cursor is None else row.cursor.offset
            if row.size > offset:
                lag[file.root, file.kind] += row.size - offset
                if budget <= 0 and not only_look:
                    self._rest[str(file.path)] = file
        if only_look and going_on:
            self._rest = chosen  # nothing of it has been read
        self._waits = hold
        if hold:
            self._rest = self._files
        if chosen is self._files:
            self.states = dict(states)
        if changes is None:
            self.lag = dict(lag)
        # What has come meanwhile, beside a rest that has been read, only a look at all tells.
        return bool(self._rest) or (going_on and chosen is not self._files)

    def take_changed(self, now: float) -> tuple[list[FileRow], list[FileRow]]:
        """The rows to store, and those to delete, once."""
        changed, self._changed = self._changed, {}
        gone: list[FileRow] = []
        if not 0 <= now - self._expired < 3600:
            self._expired = now
            gone = self._registry.expire(now)
            for row in gone:
                changed.pop(id(row), None)
            # A row whose file is gone can also have become another file's, with its inode.
            self._sessions = self._named()
        return list(changed.values()), [row for row in gone if row.number]

    def knows(self, changes: frozenset[str]) -> bool:
        """Whether each of these paths is a log that was found before, or lies in a telemetry directory."""
        return all(path in self._files or self._is_heartbeat(path) for path in changes)

    def untouched(self, changes: frozenset[str]) -> bool:
        """Whether no log is among these paths, and nothing is left to read: a step would find nothing."""
        return not self._rest and all(self._is_heartbeat(path) for path in changes)

    def _is_heartbeat(self, path: str) -> bool:
        # Logs may lie below a telemetry directory.
        return path not in self._files and path[: path.rfind(os.sep) + 1] in self._telemetry

    def _named(self) -> set[str]:
        """The sessions of all session files."""
        return {row.session or _by_name(Path(row.path), row.log) for row in self._registry if row.kind == "sessions"}

    def _is_same(self, file: SourceFile, inode: tuple[int, int]) -> bool:
        """Whether the file is, by its inode, the one that its path has a row about; or that was listed, before."""
        row = self._registry.row_at(str(file.path))
        if row is None or row.cursor is None:
            return self._listed.get(str(file.path)) == inode
        return (row.cursor.dev, row.cursor.ino) == inode

    def _choose(self, changes: frozenset[str]) -> dict[str, SourceFile] | None:
        """The known files among these paths; None when one of them may be a new file."""
        if not self.knows(changes):
            return None
        found = sorted((self._files[path] for path in changes if path in self._files),
                       key=lambda file: file.precedence)
        return {str(file.path): file for file in found}

    def _discover(self, now: float) -> None:
        found = self._discovery.scan()
        today = int(now) // 86_400 * 86_400
        if found is self.found and today == self._today:
            return
        self.found, self._today = found, today
        self._files = {str(file.path): file for file in found.files}
        self._listed = {str(file.path): inode for file, inode in zip(found.files, found.inodes, strict=True)}
        self._present = Counter((file.root, file.kind, "ok") for file in found.files)
        for root, path, reason in found.unreadable:
            self._present[root.alias, root.kind, "unreadable"] += 1
            self.warn(str(path), reason)
        for row in self._registry:
            if row.path in self._files and row.seen != today:
                row.seen = today
                if row.cursor is not None:
                    self._changed[id(row)] = row

    def _look_at_all(
        self, now: float, moved: set[tuple[str, tuple[int, int] | None]]
    ) -> tuple[dict[str, SourceFile], Counter[tuple[str, str, str]], _Look]:
        """List and look until nothing was renamed in between: a log would be read before its older part, and what the
        part says then be taken for a replay. `moved` was seen before."""
        for _ in range(MAX_LOOKS):
            self._discover(now)
            states = Counter(self._present)
            look = self._look(self._files, states)
            if look.moved <= moved:
                break
            look.unsettled.update((file.root, file.log) for path, _ in look.moved - moved
                                  if (file := self._files.get(path)) is not None)
            moved = look.moved
        return self._files, states, look

    def _look(self, files: dict[str, SourceFile], states: Counter[tuple[str, str, str]]) -> _Look:
        look = _Look()
        row_at, listed = self._registry.row_at, self._listed
        for number, (path, file) in enumerate(files.items()):
            if number % 256 == 255:
                self._pause()
            try:
                status = os.stat(path)  # noqa: PTH116  every file, at every scrape: a Path would double the cost
            except FileNotFoundError:
                look.moved.add((path, None))
                continue
            except OSError as error:
                self._note_unreadable(states, file, error.strerror or "io")
                continue
            row = row_at(path)
            at = None if row is None else row.cursor
            if (
                at is None or at.offset != status.st_size or at.ino != status.st_ino or at.dev != status.st_dev
                or at.changed not in {0, status.st_ctime_ns}
            ):
                inode = (status.st_dev, status.st_ino)
                look.changed.append((file, inode, status))
                if listed.get(path) != inode:
                    look.moved.add((path, inode))
        return look

    def _pause(self) -> None:
        if time.monotonic() - self._breathed >= BREATH:
            self._breathe()
            self._breathed = time.monotonic()

    def _note_unreadable(self, states: Counter[tuple[str, str, str]], file: SourceFile, reason: str) -> None:
        states[file.root, file.kind, "ok"] -= 1
        if reason != "vanished":
            states[file.root, file.kind, "unreadable"] += 1
            self.warn(str(file.path), reason)

    def _read(self, file: SourceFile, row: FileRow, budget: int, inode: tuple[int, int] | None) -> int:
        """Read one file to its end, or until the budget is used up. Returns what is left of the budget."""
        within = self._roots[file.kind, file.root]
        while budget > 0:
            chunk = self._tail.read(file.path, row.cursor, within, inode)
            if chunk is None:
                break
            if chunk.restarted:
                row.replay, row.source, row.session, row.created, row.parent = True, file.source, "", 0, ""
                self.stats[families.RESTARTED.name, (file.root, file.kind)] += 1
            data, cursor = chunk.data, chunk.cursor
            if chunk.partial and chunk.eof:
                chunk.partial = chunk.partial[:whole(chunk.partial)]
                cursor = accept_partial(chunk)
                if cursor != chunk.cursor:
                    data += chunk.partial
            before = 0 if row.cursor is None or chunk.restarted else row.cursor.offset
            self._count(file, chunk, cursor.offset - before)
            if data:
                self._ledger.written = chunk.cursor.changed / 1e9
                self._apply(file, row, data)
            moved = cursor != row.cursor
            row.cursor, row.size = cursor, chunk.size
            if moved:
                self._registry.read(row)
                self._changed[id(row)] = row
            budget -= max(len(data), cursor.offset - before)
            if chunk.eof:
                break
        return budget

    def _count(self, file: SourceFile, chunk: Chunk, consumed: int) -> None:
        where = (file.root, file.kind)
        self.stats[families.BYTES_READ.name, where] += max(0, consumed)
        self.stats[families.LINES_READ.name, where] += chunk.oversized
        if chunk.oversized:
            self.stats[families.REJECTED.name, (*where, "oversized")] += chunk.oversized
            self.warn(str(file.path), "a line is longer than --input.max-line-size and was skipped")

    def _apply(self, file: SourceFile, row: FileRow, data: bytes) -> None:
        if file.kind == "usage":
            events, rejected = usage_logs.decode(data)
            lines = len(events) + lines_of(rejected)
            self.arrived = min(self._now, row.mtime)
            row.replay = self._ledger.apply_usage(file, events, replay=row.replay)
        else:
            records, rejected, lines = session_files.decode(data)
            if not row.source:
                row.source = OMP if _TITLE.match(data) else PI
            meta = SessionMeta(row.session, row.created, row.parent)
            by_name = _by_name(file.path, file.log)
            self._ledger.apply_session(file, row.source, meta, records, fallback=by_name)
            if self._runs is not None:
                turns, _ = turn_lines.decode(data)  # what is malformed was counted above
                self._runs.apply_session(
                    file, row.source, row.session or by_name, turns, self._now, known=bool(row.session))
            row.session, row.created, row.parent = meta.session, meta.created, meta.parent
            self._sessions.add(row.session or by_name)
        self.stats[families.LINES_READ.name, (file.root, file.kind)] += lines
        self.stats[families.LINES_ACCEPTED.name, (file.root, file.kind)] += lines - lines_of(rejected)
        for reason, count in rejected.items():
            self.stats[families.REJECTED.name, (file.root, file.kind, reason)] += count

    def warn(self, path: str, reason: str) -> None:
        """Say it once for each path: the metrics say it all the time."""
        known = hash((path, reason))
        if known not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add(known)
            log.warning("cannot read input", extra={"fields": {"path": path, "reason": reason}})


def _by_name(path: Path, log: str) -> str:
    """What names a session whose header is not readable.

    Sub-agents are all called alike: only the place of their file tells them from others.
    """
    return session_files.session_key(path.stem) if "_" in path.stem else log
