"""Takes the files that discovery found with their inodes, gives the row that knows how far each has been read.

A log keeps its row when it is renamed (rotation, a move to `preserved/`), and a path gets a new one when another
file appears under it. Whether a file really continues where its row says is for the tail to prove.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coding_agent_exporter.model import FileRow, SourceFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Inode = tuple[int, int]

FORGET_AFTER = 7 * 24 * 3600
"""Seconds after which the row of a file that is gone is dropped. A file that comes back later is a replay."""


class Registry:
    """The rows of all files, by path and by inode."""

    def __init__(self, rows: Iterable[FileRow] = ()) -> None:
        self._by_path: dict[str, FileRow] = {}
        self._by_inode: dict[Inode, FileRow] = {}
        self._inodes: dict[int, Inode] = {}
        for row in rows:
            self._by_path[row.path] = row
            self.read(row)

    def __iter__(self) -> Iterator[FileRow]:
        return iter(self._by_path.values())

    def row_at(self, path: str) -> FileRow | None:
        """The row of a path, without asking what lies there now."""
        return self._by_path.get(path)

    def resolve(self, found: list[tuple[SourceFile, Inode]]) -> list[FileRow]:
        """The row of each file, in the same order. New rows have no cursor yet.

        `found` has all files whose path or inode is not what it was; others may be left out.
        """
        present = None
        rows = []
        for file, inode in found:
            path = str(file.path)
            row = self._by_path.get(path)
            if row is None or row.cursor is None or (row.cursor.dev, row.cursor.ino) != inode:
                moved = self._by_inode.get(inode)
                # Another kind of file on a number that was free again: nothing of the row would be true of it.
                if moved is not None and moved is not row and moved.kind == file.kind:
                    self._detach(moved)
                    if moved.cursor is not None:
                        # Inode numbers are used again at once: a new file of the old one's very size must not pass
                        # for it. No time of change is this one, so the tail looks at the bytes.
                        moved.cursor = replace(moved.cursor, changed=-1)
                    moved.path, moved.log = path, file.log
                    row = self._by_path[path] = moved
                elif row is None or row.cursor is not None:
                    if present is None:
                        present = {other for _, other in found}
                    if row is None or (row.cursor is not None and (row.cursor.dev, row.cursor.ino) in present):
                        # The file that was here was rotated away and keeps its row; this one is new.
                        row = self._by_path[path] = FileRow(file.kind, file.log, path, source=file.source, replay=True)
            rows.append(row)
        return rows

    def read(self, row: FileRow) -> None:
        """Note where a row's cursor stands now: one row has one inode."""
        if row.cursor is None:
            return
        inode = (row.cursor.dev, row.cursor.ino)
        before = self._inodes.get(id(row))
        if before != inode:
            if before is not None and self._by_inode.get(before) is row:
                del self._by_inode[before]
            self._inodes[id(row)] = inode
        self._by_inode[inode] = row

    def expire(self, now: float) -> list[FileRow]:
        """Drop and return the rows of files that have been gone for long."""
        gone = [row for row in self._rows() if row.seen and row.seen < now - FORGET_AFTER]
        for row in gone:
            self._detach(row)
            inode = self._inodes.pop(id(row), None)
            if inode is not None and self._by_inode.get(inode) is row:
                del self._by_inode[inode]
        return gone

    def _rows(self) -> Iterator[FileRow]:
        yield from {id(row): row for row in (*self._by_path.values(), *self._by_inode.values())}.values()

    def _detach(self, row: FileRow) -> None:
        if self._by_path.get(row.path) is row:
            del self._by_path[row.path]
