"""Takes directories from watch, gives the paths in them that change. Linux only.

The system's own calls, because only they add one directory to ten thousand without registering all of them anew, say
when changes were dropped, and wait without asking 40 times a second. What does not fit into the system's limit on
watches is left to polling: the directories in which something happened last are watched.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MODIFY, _ATTRIB, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _UNMOUNT, _OVERFLOW, _IGNORED, _ONLYDIR = 0x400, 0x800, 0x2000, 0x4000, 0x8000, 0x1000000
_MASK = _MODIFY | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR
_ISDIR = 0x40000000
_GONE = _DELETE_SELF | _MOVE_SELF | _UNMOUNT | _IGNORED
_EVENT = struct.Struct("iIII")

BURST_SECONDS = 0.02
"""So long after the first change others are waited for: a file is written, then renamed, in about a millisecond."""

READ_BYTES = 1 << 16

CHECKED = 200
"""So many watches are proved at once: nothing tells when another directory is mounted over a watched one."""

PATHS = 1000
"""So many changed paths are told apart; more of them, and anything may have changed."""


class Inotify:
    """Watches directories, without what is below them. `read` and `watch` are for one thread, the rest for any.

    Raises OSError where the system has no instance to give.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._queue: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._queue < 0:
            raise _error("no inotify instance")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._queue, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._burst = select.poll()
        self._burst.register(self._wake, select.POLLIN)
        self._numbers: dict[Path, int] = {}  # those with the latest change last
        self._paths: dict[int, Path] = {}
        self._uses: Counter[int] = Counter()
        self.left_out: frozenset[Path] = frozenset()
        """Directories beyond the system's limit."""
        self.outdated = False
        """Whether another directory may be at a watched path by now: `watch` finds out."""
        self._unchecked: list[Path] = []
        self._using = threading.Lock()
        self._closing = threading.RLock()  # a signal handler may wake while its thread is waking
        self._closed = False

    def watch(self, dirs: frozenset[Path]) -> None:
        """Watch these directories and no others. Those that are gone, or may not be listed, are passed over.

        Raises OSError when not a single one can be watched though there are some.
        """
        self.outdated = False
        gone = self._numbers.keys() - dirs
        for path in gone:
            self._remove(path)
        left_out = self.left_out & dirs
        if left_out and gone:
            left_out -= set(sorted(left_out, key=_changed)[-len(gone):])  # there is room again
        limit = None
        for path in sorted(dirs - self._numbers.keys() - left_out, key=_changed):
            error = self._add(path)
            while error == errno.ENOSPC and self._numbers:
                limit = error
                oldest = next(iter(self._numbers))
                self._remove(oldest)
                left_out |= {oldest}
                error = self._add(path)
            if error == errno.ENOSPC:
                limit, left_out = error, left_out | {path}
        self.left_out = left_out
        if limit is not None and not self._numbers:
            raise OSError(limit, os.strerror(limit))

    def read(self, timeout: float) -> frozenset[str] | None:
        """Wait up to `timeout` seconds for changes, and give the paths that changed; empty when there were none, or
        `wake` was called. None: anything may have changed."""
        with self._using:
            if self._closed:
                return frozenset()
            ready = dict(self._poll.poll(max(0, timeout) * 1000))
            if not ready or self._wake in ready:
                return frozenset()
            self._burst.poll(BURST_SECONDS * 1000)
            return self._drain()

    def check(self) -> None:
        """Find out, for some of the watched paths in turn, whether another directory is there now: see `outdated`."""
        if not self._unchecked:
            self._unchecked = list(self._numbers)
        checked, self._unchecked = self._unchecked[:CHECKED], self._unchecked[CHECKED:]
        for path in checked:
            before = self._numbers.get(path)
            if before is None:
                continue
            number: int = self._libc.inotify_add_watch(self._queue, os.fsencode(path), _MASK)
            if number == before or (number < 0 and ctypes.get_errno() == errno.ENOSPC):
                continue
            if number >= 0 and number not in self._paths:
                self._libc.inotify_rm_watch(self._queue, number)  # `watch` adds it again, with its books
            self._forget(before, kept=True)
            self.outdated = True

    def wake_came(self) -> bool:
        """Whether `wake` was called since this was last asked, or the queue is closed."""
        with self._closing:
            if self._closed:
                return True
            try:
                return os.eventfd_read(self._wake) > 0
            except BlockingIOError:
                return False

    def wake(self) -> None:
        """End a read in another thread, or else the next one."""
        with self._closing:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            os.eventfd_write(self._wake, 1)
            self._closed = True
        with self._using:
            os.close(self._queue)
            os.close(self._wake)

    def _drain(self) -> frozenset[str] | None:
        changed: set[str] = set()
        everything = False
        while True:
            try:
                data = os.read(self._queue, READ_BYTES)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                at += _EVENT.size + length
                if mask & _OVERFLOW:
                    everything = True
                    continue
                path = self._paths.get(number)
                if path is None:
                    continue
                if mask & _GONE:
                    self.outdated = everything = True
                    self._forget(number, kept=not mask & _IGNORED)
                    continue
                if path in self._numbers:
                    self._numbers[path] = self._numbers.pop(path)
                if mask & _ISDIR and mask & (_MOVED_FROM | _MOVED_TO):
                    self._forget_below(f"{path}/{os.fsdecode(name)}/")
                if len(changed) < PATHS:
                    changed.add(f"{path}/{os.fsdecode(name)}" if name else str(path))
                else:
                    everything = True
        return None if everything else frozenset(changed)

    def _add(self, path: Path) -> int:
        number: int = self._libc.inotify_add_watch(self._queue, os.fsencode(path), _MASK)
        if number < 0:
            return ctypes.get_errno()
        self._numbers[path] = number
        self._paths[number] = path
        self._uses[number] += 1
        return 0

    def _remove(self, path: Path) -> None:
        number = self._numbers.pop(path)
        self._uses[number] -= 1
        if self._uses[number] <= 0:  # not another path to the same directory
            del self._uses[number], self._paths[number]
            self._libc.inotify_rm_watch(self._queue, number)

    def _forget(self, number: int, *, kept: bool) -> None:
        """What is watched under this number is not where it was."""
        if self._uses[number] > 1:
            for path in [path for path, other in self._numbers.items() if other == number]:
                del self._numbers[path]
        else:
            self._numbers.pop(self._paths[number], None)
        del self._uses[number], self._paths[number]
        if kept:
            self._libc.inotify_rm_watch(self._queue, number)

    def _forget_below(self, prefix: str) -> None:
        """A directory came or went: no watch below it says so itself."""
        for number in {number for path, number in self._numbers.items() if str(path).startswith(prefix)}:
            self._forget(number, kept=True)
            self.outdated = True


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
