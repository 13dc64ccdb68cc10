"""Takes telemetry directories, gives the instance files in them that changed since the last look, decoded.

Files are read whole: they are small, and their writers replace them by renaming. Anybody who may write to
the directory may put anything there: only regular files of a bounded size are read, and no links followed.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from coding_agent_exporter.decode.heartbeat import parse
from coding_agent_exporter.families import FILE_STATES
from coding_agent_exporter.model import Heartbeat, Rejected, Root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from coding_agent_exporter.instances import Instances

# Not the `<pid>.json.tmp-<pid>` that is about to be renamed.
_NAME = re.compile(r"[0-9]+\.json", re.ASCII)
# NONBLOCK: a FIFO of that name must not hang the exporter.
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

MAX_BYTES = 1 << 20

LIST_EVERY = 1.0
"""Seconds for which it is enough to look at the files that are known to have changed. Listing a directory costs more
than reading one of its files; but a notification can be missing, and what went unnoticed must not pass for silence."""

MAX_FILES = 1000
"""So many instance files of a directory are followed."""

TENURE = 60 * 10**9
"""A file that is followed gives way only to one that was written so much later (ns): those of living agents stay."""

_Stat = tuple[int, int, int]


@dataclass(slots=True)
class Scan:
    """What one look at the directory found.

    `states` counts the files now present: `ok`, `unreadable` (permission, not regular, too large), `invalid`, and
    `ignored` (one too many).
    `rejected` holds what is newly wrong: a bad file counts once per distinct content, not once per scan. `paths` are
    those that it is about, in the same order.
    """

    changed: list[tuple[str, Heartbeat]] = field(default_factory=list)
    present: frozenset[str] = frozenset()
    states: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILE_STATES, 0))
    rejected: list[Rejected] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Known:
    """What is remembered of a file. `version` is None where the next scan shall open it again."""

    version: _Stat | None
    state: str = "ok"
    complaint: tuple[str, bytes] | None = None
    """Reason and content digest of what was last wrong with it."""


class InstanceDir:
    """The instance files of one root, the `max_files` that were written last. Not thread-safe."""

    def __init__(self, root: Root, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._prefix = root.prefix
        self._known: dict[str, _Known] = {}
        self._complaint = ""
        self._ignored = 0

    def scan(self, changes: frozenset[str] | None = None) -> Scan:
        """Look once. A file that is unchanged since it was read (inode, mtime, size) is not opened again.

        `changes`: paths that are known to have changed since the last scan, which alone are looked at; None: all are.

        A missing directory is an empty one. A directory that cannot be listed now keeps the files it had:
        they have not been seen to go. A file that cannot be opened is tried again on every scan, one that was
        read and is no good only when it has changed. Rejected reasons: those of `decode.heartbeat.parse`,
        `too_large`, `not_regular`, `unreadable`, `wrong_pid` (the name says another pid: a copy), `too_many` (once,
        while there are files that are not followed).
        """
        found = Scan()
        names = self._list(found) if changes is None else self._revisit(changes, found)
        for name in self._known.keys() - names:
            del self._known[name]
        found.states["ignored"] = self._ignored
        for known in self._known.values():
            found.states[known.state] += 1
        found.present = frozenset(names)
        return found

    def _list(self, found: Scan) -> set[str]:
        """Look at every file. Returns the names of those that are there and followed."""
        names: set[str] = set()
        try:
            with os.scandir(self.root.path) as entries:
                for entry, status in self._latest(entries, found):
                    with suppress(FileNotFoundError):
                        self._look(entry.name, entry.path, status, found)
                        names.add(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            names.clear()
            self._complaint, self._ignored = "", 0
        except OSError:
            names.update(self._known)
            if not self._complaint:
                found.rejected.append(Rejected("unreadable"))
                found.paths.append(str(self.root.path))
            self._complaint = "unreadable"
        else:
            self._complaint = ""
        return names

    def _revisit(self, changes: frozenset[str], found: Scan) -> set[str]:
        """Look at these files alone. Returns the names of all that are there, as far as that is known."""
        names = set(self._known)
        for path in changes:
            name = path.removeprefix(self._prefix)
            if name == path or not _NAME.fullmatch(name):
                continue
            if name not in names and len(names) >= self._max_files:
                return self._list(found)  # which of them are followed, only a look at all tells
            try:
                self._look(name, path, os.lstat(path), found)
                names.add(name)
            except (FileNotFoundError, NotADirectoryError):
                names.discard(name)
            except OSError:
                continue  # listing the directory will tell
        return names

    def _latest(
        self, entries: Iterable[os.DirEntry[str]], found: Scan
    ) -> list[tuple[os.DirEntry[str], os.stat_result]]:
        """The instance files with their status, without those that are too many."""
        count = 0

        def ranked() -> Iterator[tuple[int, str, os.DirEntry[str], os.stat_result]]:
            nonlocal count
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    count += 1
                    tenure = TENURE if entry.name in self._known else 0
                    yield status.st_mtime_ns + tenure, entry.name, entry, status

        latest = heapq.nlargest(self._max_files, ranked(), key=lambda file: file[:2])
        ignored, self._ignored = self._ignored, count - len(latest)
        if self._ignored and not ignored:
            found.rejected.append(Rejected("too_many"))
            found.paths.append(str(self.root.path))
        return [(entry, status) for _, _, entry, status in latest]

    def _look(self, name: str, path: str, status: os.stat_result, found: Scan) -> None:
        """Read one file if it is new or changed. Raises FileNotFoundError."""
        known = self._known.get(name)
        if known is not None and known.version == _version(status):
            return
        known = known or _Known(None)
        result = self._read(name, path, status, known)
        self._known[name] = known
        if isinstance(result, Heartbeat):
            found.changed.append((name, result))
        elif result is not None:
            found.rejected.append(result)
            found.paths.append(path)

    def _read(self, name: str, path: str, status: os.stat_result,
              known: _Known) -> Heartbeat | Rejected | None:
        """One file that is new or changed; None when it is as wrong as it was. Raises FileNotFoundError."""
        known.version = _version(status)
        if not stat.S_ISREG(status.st_mode):
            return _complain(known, "unreadable", "not_regular")
        try:
            # The name may have been renamed over since it was listed: what counts is what was opened.
            raw, status = read(path, self._max_bytes)
            known.version = _version(status)
        except FileNotFoundError:
            raise
        except OSError:
            # Its permissions, or a shortage of descriptors, can change without a trace in version.
            known.version = None
            return _complain(known, "unreadable", "unreadable")
        if isinstance(raw, Rejected):
            return _complain(known, "unreadable", raw.reason)
        result = parse(raw)
        if isinstance(result, Rejected):
            return _complain(known, "invalid", result.reason, raw)
        if f"{result.pid}.json" != name:
            return _complain(known, "invalid", "wrong_pid", raw)
        known.state = "ok"
        known.complaint = None
        return result


class Heartbeats:
    """The instance files of all telemetry roots, as they change. Not thread-safe."""

    def __init__(self, roots: Iterable[Root]) -> None:
        self._dirs = [InstanceDir(root) for root in roots if root.kind == "telemetry"]
        self._present: dict[str, frozenset[str]] = {}
        self._listed = float("-inf")

    def read(self, instances: Instances, now: float,
             counts_compactions: Callable[[Heartbeat], bool] = lambda _: True, *,
             changes: frozenset[str] | None = None) -> list[tuple[str, Scan]]:
        """Tell `instances` what has changed since the last time. Returns what each root's scan found, by alias.

        `changes`: paths that are known to have changed; None: look at all. `now` is epoch seconds.
        """
        if changes is None or not 0 <= now - self._listed < LIST_EVERY:
            changes, self._listed = None, now
        scans = []
        for directory in self._dirs:
            root = directory.root.alias
            scan = directory.scan(changes)
            for name in self._present.get(root, frozenset()) - scan.present:
                instances.gone(root, name, now)
            self._present[root] = scan.present
            for name, heartbeat in scan.changed:
                instances.observe(root, name, heartbeat, now, count_compactions=counts_compactions(heartbeat))
            scans.append((root, scan))
        instances.tick(now)
        return scans


def read(path: str, max_bytes: int = MAX_BYTES) -> tuple[bytes | Rejected, os.stat_result]:
    """A whole instance file, or why it is not taken: `not_regular`, `too_large`; and the status of what was opened.

    Raises OSError. Follows no link.
    """
    descriptor = os.open(path, _OPEN)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Rejected("not_regular"), status
        if status.st_size > max_bytes:
            return Rejected("too_large"), status
        chunks: list[bytes] = []
        left = max_bytes + 1
        while left > 0 and (chunk := os.read(descriptor, min(left, 1 << 16))):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks) if left > 0 else Rejected("too_large"), status
    finally:
        os.close(descriptor)


def _version(status: os.stat_result) -> _Stat:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _complain(known: _Known, state: str, reason: str, content: bytes = b"") -> Rejected | None:
    complaint = (reason, blake2b(content, digest_size=16).digest())
    known.state = state
    if known.complaint == complaint:
        return None
    known.complaint = complaint
    return Rejected(reason)
