"""Takes a path from discover, gives what was found there, and what `stat` said of the directories that this rests on.

While they say the same, nothing has to be listed again.
"""

# ruff: noqa: PTH116, PTH118
# PTH: with 10,000 agents a scan makes tens of thousands of calls; Path objects would double what they cost.

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from coding_agent_exporter.model import SourceFile

RACY_SECONDS = 2.0
"""A directory that changed this shortly before it was listed can change again under the same time stamp."""

MAX_LISTINGS = 5
"""So often a directory is listed again that changes meanwhile: what is renamed then may be in no listing at all."""

Reason = Literal["permission", "not_regular", "not_directory", "outside_root", "bad_name", "io"]
Stamp = tuple[int, int, int]
Entries = list[os.DirEntry[str]]


@dataclass(slots=True)
class Unit:
    """What was found in one place (this is what is compared), and what it rests on. `home`: the real root."""

    home: str = field(compare=False)
    now: float = field(compare=False)
    expires: float = field(compare=False)
    racy: bool = field(default=False, compare=False)
    failed: bool = field(default=False, compare=False)
    stale: bool = field(default=False, compare=False)
    probes: list[tuple[str, Stamp | None]] = field(default_factory=list, compare=False)
    files: list[tuple[tuple[int, int], SourceFile]] = field(default_factory=list)
    watch: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, Reason]] = field(default_factory=list)
    children: list[str] = field(default_factory=list)

    def check(self, now: float) -> None:
        """Find out whether what was found still holds."""
        self.stale = True
        if self.racy or not self.now <= now < self.expires:  # the clock may have been set back
            return
        for path, stamp in self.probes:
            try:
                status = os.stat(path)
            except OSError:
                if stamp is not None:
                    return
            else:
                if _stamp(status) != stamp:
                    return
        self.stale = False

    def stat(self, path: str) -> os.stat_result | None:
        """Give the status of a directory; None when it is none, is not there, or lies outside of the root."""
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                status = os.stat(path)
                if stat.S_ISDIR(status.st_mode) and not self.inside(path):
                    self.problem(path, "outside_root")
                    return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.problem(path, reason_of(error))
            return None
        return status if stat.S_ISDIR(status.st_mode) else None

    def rest_on(self, path: str, status: os.stat_result | None, *, watch: bool) -> None:
        """Look at the unit again when this directory, as it was before it was looked into, has changed."""
        stamp = None
        if status is not None:
            stamp = _stamp(status)
            self.racy = self.racy or max(stamp[:2]) > (self.now - RACY_SECONDS) * 1e9
            if watch:
                self.watch.append(Path(path))
        self.probes.append((path, stamp))

    def list(self, path: str, status: os.stat_result | None, *, watch: bool = True) -> Entries | None:
        """List what may count in a directory: not hidden, with a proper name. None: cannot be listed."""
        if status is None:
            return None
        try:
            for _ in range(MAX_LISTINGS):
                kept, nameless = _entries(path)
                before, status = status, os.stat(path)
                if _stamp(before) == _stamp(status):
                    break
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.rest_on(path, status, watch=False)
            self.problem(path, reason_of(error))
            return None
        for name in nameless:
            self.problem(name, "bad_name")
        self.rest_on(path, status, watch=watch)
        # Links last: what is also reachable without one is then listed under its own name.
        kept.sort(key=lambda entry: (entry.is_symlink(), entry.name))
        return kept

    def file(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        """Give the status of a log; None when it is no regular file inside the root."""
        try:
            status = entry.stat()
        except FileNotFoundError:
            # Renamed since it was listed, or a link into nothing: the next scan finds out.
            self.racy = self.racy or not entry.is_symlink()
            self.rest_on(entry.path, None, watch=False)
            return None
        except OSError as error:
            self.problem(entry.path, reason_of(error))
            return None
        if entry.is_symlink():
            # Where a link leads to can change without a change of the directory it is in.
            self.rest_on(entry.path, status, watch=False)
            if not self.inside(entry.path):
                self.problem(entry.path, "outside_root")
                return None
        if not stat.S_ISREG(status.st_mode):
            self.problem(entry.path, "not_regular")
            return None
        return status

    def inside(self, path: str) -> bool:
        try:
            return os.path.join(os.path.realpath(path), "").startswith(self.home)
        except OSError:  # what was a link a moment ago is none any more: realpath lets that out
            return False

    def problem(self, path: str, reason: Reason) -> None:
        self.failed = self.failed or reason == "io"
        # A name that is not text must not get out, into a log line or a label that would fail on it.
        self.problems.append((Path(os.fsencode(path).decode(errors="backslashreplace")), reason))


def is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle, or through what may not be entered
        return False


def reason_of(error: OSError) -> Reason:
    return "permission" if isinstance(error, PermissionError) else "io"


def _entries(path: str) -> tuple[Entries, list[str]]:
    """What may count in a directory, and the paths of what would if its name were text."""
    kept: Entries = []
    nameless: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or (".jsonl" not in name and not is_dir(entry)):
                continue
            if name.isascii() or name.encode(errors="ignore").decode() == name:
                kept.append(entry)
            else:
                nameless.append(entry.path)
    return kept, nameless


def _stamp(status: os.stat_result) -> Stamp:
    # The change time moves with permissions too, and no backup can set it back.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino
