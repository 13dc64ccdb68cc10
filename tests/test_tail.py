"""Reading what was appended: lines are whole and given once, and a file that is another one is noticed."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.model import Cursor
from coding_agent_exporter.tail import Chunk, Tail, Unreadable, accept_partial, fingerprint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def read(tail: Tail, path: Path, cursor: Cursor | None, within: Path | None = None) -> Chunk:
    chunk = tail.read(path, cursor, within)
    assert chunk is not None
    return chunk


def drain(tail: Tail, path: Path, cursor: Cursor | None) -> tuple[list[Chunk], Cursor]:
    """Read to the end of the file, as a caller does."""
    chunks = []
    while (chunk := tail.read(path, cursor)) is not None:
        chunks.append(chunk)
        cursor = chunk.cursor
        if chunk.eof:
            break
    assert cursor is not None
    return chunks, cursor


LINES = b"".join(b'{"event":%d,"text":"%s"}\n' % (number, b"x" * 40) for number in range(100))
TITLE = b'{"type":"title","title":"%-20s"}\n'


def test_only_whole_lines_are_given(log: Path) -> None:
    """What stands after the last newline is left for the read that finds it finished."""
    log.write_bytes(b"one\ntwo\nthr")
    first = read(Tail(), log, None)
    assert (first.data, first.partial, first.lag, first.size) == (b"one\ntwo\n", b"thr", 3, 11)
    append(log, b"ee\n")
    second = read(Tail(), log, first.cursor)
    assert (second.data, second.partial, second.lag, second.restarted) == (b"three\n", b"", 0, False)


def test_nothing_new_is_none(log: Path) -> None:
    """A file that has not grown gives None, an empty one an empty chunk at first."""
    log.touch()
    chunk = read(Tail(), log, None)
    assert (chunk.data, chunk.cursor.offset, chunk.eof) == (b"", 0, True)
    assert Tail().read(log, chunk.cursor) is None
    append(log, b"one\n")
    assert Tail().read(log, read(Tail(), log, chunk.cursor).cursor) is None


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000, 1 << 18])
def test_a_file_is_read_in_chunks(log: Path, chunk_bytes: int) -> None:
    """Whatever the size of the chunks, the lines are those of the file, and none is cut in two."""
    log.write_bytes(LINES + b"rest")
    chunks, cursor = drain(Tail(chunk_bytes=chunk_bytes), log, None)
    assert b"".join(chunk.data for chunk in chunks) == LINES
    assert all(chunk.data.endswith(b"\n") for chunk in chunks if chunk.data)
    assert chunks[-1].partial == b"rest"
    assert [chunk.partial for chunk in chunks[:-1]] == [b""] * (len(chunks) - 1)
    assert cursor.offset == len(LINES)


def test_mtime_is_not_trusted(log: Path) -> None:
    """Growth counts though the time of modification has been set back."""
    log.write_bytes(b"one\n")
    cursor = read(Tail(), log, None).cursor
    append(log, b"two\n")
    os.utime(log, (1, 1))
    assert read(Tail(), log, cursor).data == b"two\n"


def rewrite(path: Path, data: bytes) -> None:
    """Truncate and write again: the inode stays."""
    path.write_bytes(data)


def replace_file(path: Path, data: bytes) -> None:
    """Rename another file over this one."""
    other = path.with_name("other")
    other.write_bytes(data)
    other.rename(path)


@pytest.mark.parametrize("change", [rewrite, replace_file])
@pytest.mark.parametrize("new", [b"", b"n\n", LINES.replace(b"x", b"y"), LINES.replace(b"x", b"y") + b"and more\n"])
def test_another_content_is_read_from_its_start(log: Path, change: object, new: bytes) -> None:
    """A file that was truncated (and has grown past the offset again) or replaced starts over."""
    log.write_bytes(LINES)
    cursor = read(Tail(), log, None).cursor
    assert callable(change)
    change(log, new)
    chunk = read(Tail(), log, cursor)
    assert (chunk.restarted, chunk.data, chunk.cursor.offset) == (True, new, len(new))
    assert Tail().read(log, chunk.cursor) is None


def test_a_touched_file_is_verified_once(log: Path) -> None:
    """A change of owner, mode or name is no change of content, and is not looked into twice."""
    log.write_bytes(LINES)
    cursor = replace(read(Tail(), log, None).cursor, changed=1)
    chunk = read(Tail(), log, cursor)
    assert (chunk.data, chunk.restarted, chunk.cursor, chunk.eof) == (b"", False, cursor, True)
    assert Tail().read(log, chunk.cursor) is None


def test_a_cursor_from_the_store_costs_no_read(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart an unchanged file is passed over with one look at its status."""
    log.write_bytes(LINES)
    cursor = replace(read(Tail(), log, None).cursor, changed=0)
    monkeypatch.setattr(os, "open", None)
    assert Tail().read(log, cursor) is None


def test_a_file_replaced_while_nobody_read_it_is_another_file(log: Path) -> None:
    """The store does not know change times; another inode is enough to look closer."""
    log.write_bytes(LINES)
    cursor = replace(read(Tail(), log, None).cursor, changed=0)
    replace_file(log, LINES.replace(b"x", b"y"))
    assert read(Tail(), log, cursor).restarted


def test_a_reused_inode_is_another_file(log: Path) -> None:
    """A cursor whose inode number now belongs to another file is not continued."""
    log.write_bytes(LINES.replace(b"x", b"y") + b"more\n")
    status = log.stat()
    stale = Cursor(status.st_dev, status.st_ino, len(LINES), fingerprint(LINES[-1024:]))
    assert read(Tail(), log, stale).restarted


def test_a_change_within_the_window_is_noticed_and_one_that_keeps_the_bytes_is_not(log: Path) -> None:
    """The digest covers exactly the last kilobyte before the offset."""
    log.write_bytes(LINES)
    cursor = read(Tail(), log, None).cursor
    for back, restarted in ((1025, False), (1024, True), (2, True)):
        changed = bytearray(LINES + b"new\n")
        changed[len(LINES) - back] ^= 1
        log.write_bytes(changed)
        assert read(Tail(), log, cursor).restarted is restarted, back


def test_a_copy_of_the_same_content_is_continued(log: Path) -> None:
    """A file restored from a copy has another inode, and nothing of it is given again."""
    log.write_bytes(LINES)
    cursor = read(Tail(), log, None).cursor
    copy = log.with_name("copy")
    shutil.copyfile(log, copy)
    copy.rename(log)
    chunk = read(Tail(), log, cursor)
    assert (chunk.restarted, chunk.data, chunk.cursor.ino) == (False, b"", log.stat().st_ino)
    assert Tail().read(log, chunk.cursor) is None
    append(log, b"new\n")
    assert read(Tail(), log, chunk.cursor).data == b"new\n"


@pytest.mark.parametrize("lines", [0, 1, 100])
def test_a_title_is_rewritten_in_place(log: Path, lines: int) -> None:
    """oh-my-pi rewrites its first line: no restart, nothing given again, whatever was read before."""
    tail = Tail(chunk_bytes=64)
    body = b"".join(LINES.splitlines(keepends=True)[:lines])
    log.write_bytes(TITLE % b"" + body)
    _, cursor = drain(tail, log, None)
    for title in (b"a name", b"another name"):
        with log.open("r+b") as file:
            file.write(TITLE % title)
        for unread in (cursor, replace(cursor, changed=0)):
            same = tail.read(log, unread)
            assert same is None or (same.data, same.restarted, same.cursor) == (b"", False, cursor)
        append(log, b'{"n":1}\n')
        chunk = read(Tail(), log, cursor)
        assert (chunk.restarted, chunk.data) == (False, b'{"n":1}\n')
        cursor = chunk.cursor


def test_a_title_of_another_length_is_another_file(log: Path) -> None:
    """Where only the title was read and a longer one took its place, no line is cut in two."""
    log.write_bytes(TITLE % b"short")
    cursor = read(Tail(), log, None).cursor
    longer = TITLE % (b"long " * 20) + b'{"n":1}\n'
    log.write_bytes(longer)
    chunk = read(Tail(), log, cursor)
    assert (chunk.restarted, chunk.data) == (True, longer)


@pytest.mark.parametrize("chunk_bytes", [10, 100, 1000])
def test_a_line_at_the_limit_is_given_and_one_past_it_is_not(log: Path, chunk_bytes: int) -> None:
    """max_line is the longest line given, without its newline; longer ones are counted once each."""
    tail = Tail(chunk_bytes=chunk_bytes, max_line=100)
    log.write_bytes(b"a\n" + b"b" * 100 + b"\n" + b"c" * 101 + b"\nd\n" + b"e" * 5000 + b"\nf\n")
    chunks, _ = drain(tail, log, None)
    assert b"".join(chunk.data for chunk in chunks) == b"a\n" + b"b" * 100 + b"\nd\nf\n"
    assert sum(chunk.oversized for chunk in chunks) == 2


def test_a_restart_inside_a_long_line_goes_on_skipping_it(log: Path) -> None:
    """The cursor knows that it stands inside a line that was counted already."""
    log.write_bytes(b"a\n" + b"b" * 5000 + b'{"spent":1}\nc\n')
    cursor: Cursor | None = None
    data, oversized, inside = b"", 0, 0
    while (chunk := Tail(chunk_bytes=64, max_line=100).read(log, cursor)) is not None:
        cursor, data, oversized = chunk.cursor, data + chunk.data, oversized + chunk.oversized
        inside += chunk.cursor.skipping
    assert (data, oversized) == (b"a\nc\n", 1)
    assert inside > 10


def test_a_long_line_is_skipped_while_it_is_written(log: Path) -> None:
    """A line that is too long before it has ended is never a partial, nor read twice."""
    tail = Tail(chunk_bytes=64, max_line=100)
    log.write_bytes(b"x" * 150)
    chunks, cursor = drain(tail, log, None)
    append(log, b"x" * 150)
    more, cursor = drain(tail, log, cursor)
    assert all(chunk.partial == b"" for chunk in chunks + more)
    assert cursor.offset == 300
    append(log, b"\nend\n")
    last, _ = drain(tail, log, cursor)
    assert b"".join(chunk.data for chunk in last) == b"end\n"
    assert sum(chunk.oversized for chunk in chunks + more + last) == 1


def test_a_long_line_is_not_held_in_memory(log: Path) -> None:
    """Skipping takes a chunk, and no more than a longest line, of memory."""
    with log.open("wb") as file:
        file.truncate(50_000_000)
    append(log, b"\nend\n")
    tail = Tail(chunk_bytes=1 << 16, max_line=1 << 20)
    tracemalloc.start()
    cursor: Cursor | None = None
    data = b""
    while (chunk := tail.read(log, cursor)) is not None:
        cursor, data = chunk.cursor, data + chunk.data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data == b"end\n"
    assert peak < 4 << 20


def test_a_truncated_file_is_not_skipped_any_more(log: Path) -> None:
    """A file that starts over while a long line was being skipped loses nothing of its new content."""
    tail = Tail(chunk_bytes=64, max_line=100)
    log.write_bytes(b"x" * 1000)
    _, cursor = drain(tail, log, None)
    assert cursor.skipping
    log.write_bytes(b"new\n")
    chunk = read(tail, log, cursor)
    assert (chunk.restarted, chunk.data, chunk.cursor.skipping) == (True, b"new\n", False)


@pytest.mark.parametrize("before", [b"", b"1\n", TITLE % b"t", LINES], ids=["none", "line", "title", "many"])
@pytest.mark.parametrize("behind", [b"\n", b"\r\n", b""], ids=["newline", "crlf", "none"])
def test_an_accepted_partial_is_not_given_again(log: Path, before: bytes, behind: bytes) -> None:
    """After accept_partial a late newline is an empty line, and an object right behind a line of its own."""
    log.write_bytes(before + b'{"last":1}')
    chunk = read(Tail(), log, None)
    cursor = accept_partial(chunk)
    assert cursor.offset == len(before) + len(b'{"last":1}')
    assert Tail().read(log, cursor) is None
    append(log, behind + b'{"next":2}\n')
    after = read(Tail(), log, cursor)
    assert (after.data, after.restarted) == (behind + b'{"next":2}\n', False)


def test_an_accepted_partial_that_changes_is_another_file(log: Path) -> None:
    """What was accepted counts for continuity like any other line."""
    log.write_bytes(b'{"last":1}')
    cursor = accept_partial(read(Tail(), log, None))
    log.write_bytes(b'{"lost":1}\n')
    assert read(Tail(), log, cursor).restarted


def test_an_unfinished_title_is_not_accepted(log: Path) -> None:
    """A title without its newline waits: how long it is, the newline tells."""
    log.write_bytes((TITLE % b"t")[:-1])
    chunk = read(Tail(), log, None)
    assert accept_partial(chunk) == chunk.cursor == replace(chunk.cursor, offset=0)


# What cannot be read


def reason(path: Path, within: Path | None = None) -> str:
    with pytest.raises(Unreadable) as caught:
        Tail().read(path, None, within)
    assert str(path) in str(caught.value)
    return str(caught.value.reason)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO does not block the reader; directories and devices are not read."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert reason(tmp_path / "fifo") == "not_regular"
    assert reason(tmp_path / "zero") == "not_regular"
    assert reason(tmp_path) == "not_regular"
    assert reason(tmp_path / "fifo", tmp_path) == "not_regular"


def test_a_missing_file_has_vanished(tmp_path: Path) -> None:
    """Neither a missing file nor a missing directory is more than that."""
    (tmp_path / "file").touch()
    assert reason(tmp_path / "gone") == "vanished"
    assert reason(tmp_path / "gone" / "gone", tmp_path) == "vanished"
    assert reason(tmp_path / "file" / "gone", tmp_path) == "vanished"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_a_matter_of_permission(log: Path) -> None:
    """A file of somebody else's is told from a missing one."""
    log.write_bytes(b"one\n")
    log.chmod(0)
    assert reason(log) == "permission"


def test_the_system_s_refusal_is_told(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EACCES is permission, an error of the medium is io; the system's error is the cause."""
    log.write_bytes(b"one\n")

    def fail_with(number: int) -> None:
        def fail(*_: object, **__: object) -> int:
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "open", fail)

    for number, expected in ((13, "permission"), (5, "io"), (2, "vanished")):
        fail_with(number)
        assert reason(log) == expected


def test_links_inside_the_root_are_followed_and_others_are_not(tmp_path: Path) -> None:
    """What counts is where the file really lies."""
    root, outside = tmp_path / "root", tmp_path / "rootless"
    (root / "deep").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "deep" / "log", outside / "log"):
        path.write_bytes(b"one\n")
    (root / "dir").symlink_to("deep")
    (root / "file").symlink_to(root / "dir" / "log")
    (root / "out").symlink_to(outside)
    (root / "leak").symlink_to("../rootless/log")
    (tmp_path / "alias").symlink_to("root")
    for inside in (root / "deep" / "log", root / "dir" / "log", root / "file"):
        assert read(Tail(), inside, None, root).data == b"one\n"
        assert read(Tail(), inside, None, tmp_path / "alias").data == b"one\n"
    assert read(Tail(), tmp_path / "alias" / "file", None, root).data == b"one\n"
    dotted = root / "deep" / ".." / ".." / "rootless" / "log"
    for escape in (root / "out" / "log", root / "leak", outside / "log", dotted):
        assert reason(escape, root) == "outside_root"


def test_a_link_put_in_the_way_while_opening_does_not_escape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A directory exchanged for a link after the path was resolved leads nowhere."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to("real")
    (root / "real" / "log").write_bytes(b"mine\n")
    (outside / "log").write_bytes(b"secret\n")
    resolve = os.path.realpath

    def exchange(path: str) -> str:
        resolved = resolve(path)
        if "log" in resolved:
            (root / "real").rename(tmp_path / "moved")
            (root / "real").symlink_to(outside)
        return resolved

    monkeypatch.setattr(os.path, "realpath", exchange)
    with pytest.raises(Unreadable):
        Tail().read(root / "link" / "log", None, root)
