"""Whatever happens to a log, a line that a read could have seen is given once, or again after a restart."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coding_agent_exporter.tail import Tail, Unreadable

if TYPE_CHECKING:
    from coding_agent_exporter.model import Cursor

MAX_LINE = 300
TITLE = b'{"type":"title","title":"%030d"}\n'


@dataclass
class Known:
    """What the reader of one file holds: its cursor, and what it was given since the file began."""

    cursor: Cursor | None = None
    given: list[bytes] = field(default_factory=list)
    oversized: int = 0
    another: bool = False
    """Another content was written since the last read: a restart is in order, and only then."""


class LogMachine(RuleBasedStateMachine):
    """A live log and its rotated parts, written in every way a writer has, read with a cursor per file.

    The model is the file itself: after a drain, what was given since the last restart is what a plain
    split of the file's bytes says. Lines carry serial numbers, so that a line too many shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.live = self.folder / "events.jsonl"
        self.known: dict[Path, Known] = {self.live: Known()}
        self.serial = 0
        self.tail = Tail()
        self.unfinished = b""
        self.titled = False

    @initialize(chunk_bytes=st.sampled_from([1, 13, 64, 200, 1 << 18]), title=st.booleans())
    def begin(self, chunk_bytes: int, title: bool) -> None:
        self.chunk_bytes = chunk_bytes
        self.restart()
        self.write_new(title=title)

    def write_new(self, *, title: bool) -> None:
        self.titled = title
        self.known[self.live].another = True
        self.live.write_bytes(TITLE % self.next() if title else b"")
        self.unfinished = b""

    def next(self) -> int:
        self.serial += 1
        return self.serial

    def line(self, size: int) -> bytes:
        return b'{"n":%d,"x":"%s"}\n' % (self.next(), b"x" * size)

    def append(self, data: bytes) -> None:
        with self.live.open("ab") as file:
            file.write(data)

    # What writers do

    @precondition(lambda self: self.live.exists())
    @rule(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8))
    def append_lines(self, sizes: list[int]) -> None:
        """Whole lines, some of them too long; what was unfinished is finished first."""
        self.append(self.unfinished + b"".join(map(self.line, sizes)))
        self.unfinished = b""

    @precondition(lambda self: self.live.exists())
    @rule(size=st.integers(0, 1000), share=st.floats(0, 1))
    def append_part(self, size: int, share: float) -> None:
        """A further part of a line, up to but without its newline."""
        self.unfinished = self.unfinished or self.line(size)
        cut = int(share * (len(self.unfinished) - 1))
        self.append(self.unfinished[:cut])
        self.unfinished = self.unfinished[cut:]

    @precondition(lambda self: self.live.exists() and self.titled)
    @rule()
    def rewrite_title(self) -> None:
        with self.live.open("r+b") as file:
            file.write(TITLE % self.next())

    # What administrators do

    @precondition(lambda self: self.live.exists())
    @rule(title=st.booleans())
    def rotate(self, title: bool) -> None:
        """By rename: the caller moves the cursor along with the inode."""
        part = self.live.with_name(f"events.jsonl.{self.next()}")
        self.live.rename(part)
        self.known[part] = self.known.pop(self.live)
        self.known[self.live] = Known()
        self.write_new(title=title)

    @precondition(lambda self: self.live.exists())
    @rule(title=st.booleans(), sizes=st.lists(st.integers(0, 60), max_size=8), replace=st.booleans())
    def start_over(self, title: bool, sizes: list[int], replace: bool) -> None:
        """Truncated (as copytruncate does) or replaced, and then perhaps grown past where the reader was."""
        if replace:
            self.live.rename(self.folder / "gone")
        self.write_new(title=title)
        self.append(b"".join(map(self.line, sizes)))
        self.tell_apart()

    @precondition(lambda self: self.live.exists())
    @rule()
    def copy_over(self) -> None:
        """A backup is restored, or an editor saves: the same bytes under another inode."""
        copy = self.folder / "copy"
        shutil.copyfile(self.live, copy)
        copy.rename(self.live)

    @precondition(lambda self: self.live.exists())
    @rule()
    def delete(self) -> None:
        self.live.unlink()

    @precondition(lambda self: not self.live.exists())
    @rule(title=st.booleans())
    def create(self, title: bool) -> None:
        self.write_new(title=title)
        self.append(self.line(3))
        self.tell_apart()

    def tell_apart(self) -> None:
        """Another content of the very same size shows by the change time, where that is known and has moved."""
        cursor, status = self.known[self.live].cursor, self.live.stat()
        if (cursor and (cursor.ino, cursor.offset) == (status.st_ino, status.st_size)
                and cursor.changed in {0, status.st_ctime_ns}):
            self.append(self.line(0))

    # What the exporter does

    @rule()
    def restart(self) -> None:
        """Only the cursors survive, without the change time, which is not stored."""
        for path, known in self.known.items():
            if known.cursor and path.exists() and path.stat().st_ctime_ns == known.cursor.changed:
                known.cursor = dataclasses.replace(known.cursor, changed=0)
        self.tail = Tail(chunk_bytes=self.chunk_bytes, max_line=MAX_LINE)

    @rule(reads=st.integers(1, 4))
    def read_a_little(self, reads: int) -> None:
        for path in list(self.known):
            self.read(path, reads)

    @rule()
    def drain(self) -> None:
        for path, known in self.known.items():
            if not path.exists():
                continue
            self.read(path, 100_000)
            lines = path.read_bytes().split(b"\n")[:-1]
            first = lines[0] if lines and lines[0].startswith(TITLE[:15]) else None
            # A title may have been given as it was before it was rewritten.
            given = [first if line.startswith(TITLE[:15]) else line for line in known.given]
            assert given == [line for line in lines if len(line) <= MAX_LINE]
            unended = path.read_bytes().rpartition(b"\n")[2]
            assert known.oversized == sum(len(line) > MAX_LINE for line in [*lines, unended])

    def read(self, path: Path, reads: int) -> None:
        known = self.known[path]
        for _ in range(reads):
            if not path.exists():
                with pytest.raises(Unreadable, match="vanished"):
                    self.tail.read(path, known.cursor)
                return
            chunk = self.tail.read(path, known.cursor)
            if chunk is None:
                return
            assert chunk.data == b"" or chunk.data.endswith(b"\n")
            assert chunk.size == path.stat().st_size
            if chunk.restarted:
                assert known.another
                known.given, known.oversized = [], 0
            known.another = False
            known.given += chunk.data.split(b"\n")[:-1]
            known.oversized += chunk.oversized
            known.cursor = chunk.cursor
            if chunk.eof:
                tail = path.read_bytes().rpartition(b"\n")[2]
                assert chunk.partial == (tail if len(tail) <= MAX_LINE else b"")
                return

    @invariant()
    def nothing_torn(self) -> None:
        """Every line that was ever given is one that a writer wrote."""
        for known in self.known.values():
            assert all(line.startswith(b"{") and line.endswith(b"}") for line in known.given)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestLog = LogMachine.TestCase
TestLog.settings = settings(
    max_examples=400, stateful_step_count=30, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
