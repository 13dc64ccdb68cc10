"""Takes a path and the cursor of its last read from pipeline, gives it the whole lines appended since.

A tail keeps nothing between two reads: all it knows of a file is in the cursor, so that a read after a
restart is the same as any other. Neither an inode number nor a modification time proves that a file is the
one that was read (inodes are reused, times are set back by backups); the bytes before the offset do.
"""

# ruff: noqa: PTH116, PTH118, PTH206
# PTH: a file is looked at on every scrape, mostly to find nothing new. Path objects would double the cost.

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from coding_agent_exporter.model import Cursor

if TYPE_CHECKING:
    from pathlib import Path

Reason = Literal["permission", "not_regular", "outside_root", "vanished", "io"]

WINDOW = 1024
"""So many bytes before the offset go into a cursor's digest."""

TITLE = b'{"type":"title"'
"""How a line begins that oh-my-pi rewrites in place. Only a file's first line is one."""

# A FIFO put in the place of a log would block without O_NONBLOCK; a terminal become ours without O_NOCTTY.
_OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# O_PATH (Linux) walks through a directory that may be entered but not listed.
_OPEN_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class Unreadable(OSError):  # noqa: N818 - an adjective, like the label value it turns into
    """A file that cannot be read now. `reason` is a label value; `__cause__` is the system's error, if any.

    permission: may not be opened. not_regular: a directory, FIFO, socket or device. outside_root: a link
    leads out of the configured directory. vanished: is not there (any more). io: anything else.
    """

    def __init__(self, reason: Reason, path: Path | str) -> None:
        super().__init__(f"{reason}: {path}")
        self.reason = reason


@dataclass(slots=True)
class Chunk:
    """What one read found. Sizes are bytes.

    `restarted`: the file was truncated or replaced since the cursor, and this chunk begins at offset 0.
    `oversized`: lines found to be too long in this read; each line is counted in one chunk only.
    `size`: of the file, when it was read. `eof`: the read came to the end: a further read at once would find
    nothing more, though `partial` may be left. `window`: the bytes that the cursor's digest covers.
    """

    data: bytes
    """Whole lines, each ending in a newline; may be empty."""
    partial: bytes
    """The line without newline at the end of the file, unless it is too long or the end was not reached."""
    cursor: Cursor
    """After `data`, not after `partial`."""
    restarted: bool
    oversized: int
    size: int
    eof: bool
    window: bytes

    @property
    def lag(self) -> int:
        """Bytes on disk that the cursor has not passed, those of an unfinished line included."""
        return self.size - self.cursor.offset


class Tail:
    """Reads what was appended to files.

    `chunk_bytes` is the most that one read takes in, apart from a single longer line; `max_line` the longest
    line, in bytes without its newline, that is given out. Longer ones are passed over a chunk at a time.
    """

    def __init__(self, *, chunk_bytes: int = 1 << 18, max_line: int = 4 << 20) -> None:
        self._max_line = max_line
        # A chunk no longer than a line may be cannot hide a line that is too long: no need to look at each.
        self._chunk_bytes = min(chunk_bytes, max_line)
        # Used again and again: the allocator would give so much memory back at once, to get it anew page by page.
        self._buffer = bytearray(WINDOW + self._chunk_bytes)

    def read(
        self, path: Path | str, cursor: Cursor | None, within: Path | None = None, inode: tuple[int, int] | None = None,
    ) -> Chunk | None:
        """Give the lines after `cursor` (None: from the start), or None when the file has not grown.

        With `within`, the file must lie below that directory after resolving links; with `inode`, be that one: another
        one there is as good as vanished. Raises Unreadable.
        A file that was rewritten, to the very size it had, while nobody was reading it (a cursor that does
        not know when its file last changed) is noticed when it next grows.
        """
        try:
            status = os.stat(path)
            if (cursor is not None and status.st_size == cursor.offset and status.st_ino == cursor.ino
                    and status.st_dev == cursor.dev and cursor.changed in {0, status.st_ctime_ns}):
                return None
            # Opening a device can do something; fstat below is for what came in its place meanwhile.
            _require_regular(status, path)
            descriptor = os.open(path, _OPEN_FILE) if within is None else _open_below(path, within)
            try:
                status = os.fstat(descriptor)
                _require_regular(status, path)
                if inode is not None and inode != (status.st_dev, status.st_ino):
                    raise Unreadable("vanished", path)
                return self._read(descriptor, status, cursor)
            finally:
                os.close(descriptor)
        except Unreadable:
            raise
        except OSError as error:
            raise Unreadable(_reason(error), path) from error

    def _read(self, descriptor: int, status: os.stat_result, cursor: Cursor | None) -> Chunk:
        limit, restarted = self._chunk_bytes, False
        cursor = cursor or Cursor(status.st_dev, status.st_ino)
        # In the buffer: up to `head` the bytes before the offset, from there to `stop` those after it.
        head = cursor.offset - _window_start(cursor)
        buffer, stop = self._fill(descriptor, cursor.offset - head, head + limit)
        if not _continues(cursor, buffer[: min(head, stop)]):
            cursor, restarted, head = Cursor(status.st_dev, status.st_ino), True, 0
            buffer, stop = self._fill(descriptor, 0, limit)
        offset, skipping, oversized = cursor.offset, cursor.skipping, 0

        passed = head  # behind the rest of a line that is too long
        if skipping:
            passed = buffer.find(b"\n", head, stop) + 1 or stop
            skipping = buffer[passed - 1 : passed] != b"\n" or passed == head
        end = buffer.rfind(b"\n", head, stop) + 1
        if end == 0 and not skipping and stop - head == limit:
            # One line is longer than a chunk. One byte more than it may have tells whether it is too long.
            limit = self._max_line + 1
            buffer, stop = self._fill(descriptor, offset - head, head + limit)
            end = buffer.rfind(b"\n", head, stop) + 1
            if end == 0 and stop - head == limit:
                oversized, skipping, passed = 1, True, stop
        end = max(end, passed)
        eof = stop - head < limit
        view = memoryview(buffer)
        data = bytes(view[passed:end])
        partial = bytes(view[end:stop]) if eof and offset + stop - head >= status.st_size else b""

        exempt = cursor.exempt
        if offset == 0 and data.startswith(TITLE):
            exempt = data.index(b"\n") + 1
        # What the digest may go back to: not beyond a title line, which can be another one next time.
        begin = head + exempt - offset if offset in {exempt, 0} else 0
        window = bytes(view[max(begin, end - WINDOW) : end])
        after = Cursor(status.st_dev, status.st_ino, offset + end - head, fingerprint(window), exempt, skipping,
                       status.st_ctime_ns)
        size = max(status.st_size, offset + stop - head)
        return Chunk(data, partial, after, restarted, oversized, size, eof, window)

    def _fill(self, descriptor: int, start: int, limit: int) -> tuple[bytearray, int]:
        """Read up to `limit` bytes. Gives a buffer, of which only so many are of the file, until the next call."""
        buffer = self._buffer if limit <= len(self._buffer) else bytearray(limit)
        with memoryview(buffer) as view:
            return buffer, os.preadv(descriptor, [view[:limit]], start)


def accept_partial(chunk: Chunk) -> Cursor:
    """Give the cursor after `chunk.data` and `chunk.partial`.

    For a caller who cut `partial` to what is whole JSON objects, left by writers that died before their newline.
    If the newline comes after all, it is read as an empty line; an object that another writer appends right behind
    is read as a line of its own. A title record waits for its newline: there is
    nothing in it to count, and only the newline tells how many bytes are exempt.
    """
    cursor, partial = chunk.cursor, chunk.partial
    if not partial or (cursor.offset == 0 and partial.startswith(TITLE)):
        return cursor
    window = _window(chunk.window, partial)
    return replace(cursor, offset=cursor.offset + len(partial), check=fingerprint(window))


def fingerprint(window: bytes | bytearray) -> bytes:
    """Give the digest (8 bytes) of the bytes before an offset, that a cursor carries."""
    return hashlib.blake2b(window, digest_size=8).digest()


def _require_regular(status: os.stat_result, path: Path | str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not_regular", path)


def _window_start(cursor: Cursor) -> int:
    # At the end of the title record nothing else proves that the file is the same: take the record itself.
    if cursor.offset == cursor.exempt:
        return 0
    return max(cursor.exempt, cursor.offset - WINDOW)


def _window(before: bytes, new: bytes) -> bytes:
    return new[-WINDOW:] if len(new) >= WINDOW else (before + new)[-WINDOW:]


def _continues(cursor: Cursor, before: bytes | bytearray) -> bool:
    if cursor.offset == cursor.exempt:
        return cursor.offset == 0 or (before.startswith(TITLE) and before.find(b"\n") + 1 == cursor.offset)
    return len(before) == cursor.offset - _window_start(cursor) and fingerprint(before) == cursor.check


def _open_below(path: Path | str, root: Path) -> int:
    """Open a file that lies below `root`, whatever links are put in its path while this runs.

    Every step down is taken on an open directory and through no link. A path with links in it is resolved
    first, and must still lead below the root.
    """
    prefix, name = os.path.join(root, ""), os.fspath(path)
    if name.startswith(prefix) and os.pardir not in name.split(os.sep):
        try:
            return _open_beneath(root, name[len(prefix) :])
        except OSError as error:
            # What O_NOFOLLOW says of a link: ELOOP, and ENOTDIR where a directory was asked for.
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
    prefix, name = os.path.join(os.path.realpath(root), ""), os.path.realpath(path)
    if not name.startswith(prefix):
        raise Unreadable("outside_root", path)
    return _open_beneath(prefix, name[len(prefix) :])


def _open_beneath(root: Path | str, inside: str) -> int:
    *directories, name = inside.split(os.sep)
    descriptor = os.open(root, _OPEN_DIRECTORY)
    try:
        for directory in directories:
            parent = descriptor
            descriptor = os.open(directory, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            os.close(parent)
        return os.open(name, _OPEN_FILE | os.O_NOFOLLOW, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> Reason:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return "permission"
        case errno.ENOENT | errno.ENOTDIR | errno.ESTALE:
            return "vanished"
        case errno.ENXIO | errno.EISDIR:  # a socket; a device without a driver
            return "not_regular"
        case _:
            return "io"
