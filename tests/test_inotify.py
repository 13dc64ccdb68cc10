"""inotify: every change wakes wherever the directory went, what does not fit is polled, what is dropped is known."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.inotify import PATHS, Inotify
from coding_agent_exporter.watch import InotifyWaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 20.0
SHORT = 0.1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")


class Limited:
    """The C library on a system that grants so many watches."""

    def __init__(self, most: int) -> None:
        self._real = ctypes.CDLL(None, use_errno=True)
        self._left = most
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def inotify_add_watch(self, queue: int, path: bytes, mask: int) -> int:
        self.calls += 1
        if self._left <= 0:
            ctypes.set_errno(errno.ENOSPC)
            return -1
        self._left -= 1
        number: int = self._real.inotify_add_watch(queue, path, mask)
        return number

    def inotify_rm_watch(self, queue: int, number: int) -> int:
        self._left += 1
        result: int = self._real.inotify_rm_watch(queue, number)
        return result


@pytest.fixture
def queue() -> Iterator[Inotify]:
    made = Inotify()
    yield made
    made.close()


def touch(path: Path, name: str = "log") -> str:
    target = path / name
    target.write_text("x")
    return str(target)


def changed(queue: Inotify) -> frozenset[str] | None:
    """All that changed; None: anything may have."""
    seen: frozenset[str] = frozenset()
    while (more := queue.read(SHORT)) is None or more:
        if more is None:
            return None
        seen |= more
    return seen


def outdated(queue: Inotify) -> bool:
    return queue.outdated


def polls(waker: InotifyWaker) -> bool:
    return waker.polling


def told(waker: InotifyWaker) -> frozenset[str] | None:
    return waker.changes


def test_a_change_names_its_path_and_a_burst_is_one(queue: Inotify, tmp_path: Path) -> None:
    """Written beside and renamed, as heartbeats are: one answer, with both names."""
    queue.watch(frozenset([tmp_path]))
    (tmp_path / "tmp").write_text("x")
    (tmp_path / "tmp").rename(tmp_path / "1.json")
    assert queue.read(LONG) == frozenset([str(tmp_path / "tmp"), str(tmp_path / "1.json")])
    assert queue.read(0) == frozenset()


def test_one_more_directory_costs_one_call(queue: Inotify, tmp_path: Path) -> None:
    """Thousands that are watched already are left alone."""
    library = queue._libc = Limited(10_000)  # type: ignore[assignment]  # stands in for the library
    for number in range(2001):
        (tmp_path / str(number)).mkdir()
    dirs = [tmp_path / str(number) for number in range(2001)]
    queue.watch(frozenset(dirs[:2000]))
    library.calls = 0
    queue.watch(frozenset(dirs))
    assert library.calls == 1
    assert frozenset([touch(dirs[0]), touch(dirs[2000])]) == changed(queue)
    queue.watch(frozenset(dirs[1:]))
    touch(dirs[0])
    assert changed(queue) == frozenset()


def rename_and_replace(place: Path) -> None:
    place.rename(place.with_name("aside"))
    place.mkdir()


def rename_parent(place: Path) -> None:
    place.parent.rename(place.parent.with_name("aside"))
    place.mkdir(parents=True)


def delete_and_make(place: Path) -> None:
    place.rmdir()
    place.mkdir()


@pytest.mark.parametrize("replace", [rename_and_replace, rename_parent, delete_and_make])
def test_a_directory_that_was_replaced_is_watched_again(
    replace: Callable[[Path], None], queue: Inotify, tmp_path: Path
) -> None:
    """Under the same path lies another directory: anything may have changed, and the new one is what counts."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    dirs = frozenset([tmp_path, place])
    queue.watch(dirs)
    replace(place)
    changed(queue)
    assert outdated(queue)
    queue.watch(dirs)
    assert not outdated(queue)
    changed(queue)
    assert changed(queue) == frozenset()
    assert frozenset([touch(place)]) == changed(queue)


def test_a_directory_that_is_mounted_over_is_found_out(queue: Inotify, tmp_path: Path) -> None:
    """The system tells nobody: the watches are proved in turn."""
    place = tmp_path / "mounted"
    place.mkdir()
    dirs = frozenset([place])
    queue.watch(dirs)
    mount = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=False, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount here: {mount.stderr.strip()}")
    try:
        touch(place)
        assert changed(queue) == frozenset(), "so it would stay"
        queue.check()
        assert queue.outdated
        queue.watch(dirs)
        assert frozenset([touch(place)]) == changed(queue)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    changed(queue)
    queue.check()
    queue.watch(dirs)
    assert frozenset([touch(place)]) == changed(queue)


def test_what_is_checked_and_is_the_same_stays(queue: Inotify, tmp_path: Path) -> None:
    """Nothing is outdated for being looked at."""
    for name in "abc":
        (tmp_path / name).mkdir()
    queue.watch(frozenset(tmp_path / name for name in "abc"))
    for _ in range(3):
        queue.check()
    assert not queue.outdated
    assert frozenset([touch(tmp_path / "b")]) == changed(queue)


def test_an_overflow_says_that_anything_may_have_changed(queue: Inotify, tmp_path: Path) -> None:
    """More events than the system keeps; afterwards all is well again."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 50_000:
        pytest.skip(f"this system keeps {limit} events")
    queue.watch(frozenset([tmp_path]))
    one, other = (os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT) for name in "ab")
    for _ in range(limit // 2 + 10):  # alternating: the same event twice in a row is one
        os.write(one, b"x")
        os.write(other, b"x")
    assert queue.read(LONG) is None
    changed(queue)
    assert frozenset([touch(tmp_path)]) == changed(queue)


def test_more_names_than_are_told_apart_are_anything(queue: Inotify, tmp_path: Path) -> None:
    """A directory full of new files is looked at as a whole."""
    queue.watch(frozenset([tmp_path]))
    for number in range(PATHS + 1):
        touch(tmp_path, str(number))
    assert queue.read(LONG) is None


def test_beyond_the_limit_the_latest_directories_are_watched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is polled, and said once; a directory that is new takes the place of the quietest one."""
    now = [0.0]

    def limited() -> Inotify:
        made = Inotify()
        made._libc = Limited(5)  # type: ignore[assignment]  # stands in for the library
        return made

    dirs = [tmp_path / str(number) for number in range(21)]
    for age, place in enumerate(dirs[:20]):
        place.mkdir()
        os.utime(place, (1_700_000_000 - age, 1_700_000_000 - age))
    waker = InotifyWaker(LONG, open_queue=limited, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING):
        waker.watch(frozenset(dirs[:20]))
        assert waker.wait(LONG)
        assert polls(waker)
        for place in dirs[:5]:
            touch(place)
            assert waker.wait(LONG), place
            assert told(waker)
        touch(dirs[7])
        assert not waker.wait(SHORT), "it is polled"
        now[0] += LONG
        assert waker.wait(SHORT)
        assert told(waker) is None
        dirs[20].mkdir()
        waker.watch(frozenset(dirs))
        assert waker.wait(LONG)
        touch(dirs[20])
        assert waker.wait(LONG)
        assert told(waker) == frozenset([str(dirs[20] / "log")])
        waker.watch(frozenset(dirs[:3]))
        assert waker.wait(LONG)
        assert not polls(waker), "all fits now"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "max_user_watches" in caplog.text
    waker.close()


@pytest.mark.parametrize("most", ["no queue", "no watch"])
def test_where_the_system_gives_nothing_all_is_polled(
    most: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Instances or watches are used up by others: said once, and wakes go on."""
    def none_left() -> Inotify:
        if most == "no queue":
            raise OSError(errno.EMFILE, "Too many open files")
        made = Inotify()
        made._libc = Limited(0)  # type: ignore[assignment]  # stands in for the library
        return made

    waker = InotifyWaker(0.02, open_queue=none_left)
    waker.watch(frozenset([tmp_path]))
    for _ in range(5):
        assert waker.wait(LONG)
    assert waker.polling
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    waker.close()


def test_close_gives_the_descriptors_back(tmp_path: Path) -> None:
    """Also while another thread waits, and a wake that comes later hits nothing."""
    before = set(Path("/proc/self/fd").iterdir())
    waker = InotifyWaker(LONG)
    waker.watch(frozenset([tmp_path]))
    assert waker.wait(LONG)
    waits = threading.Thread(target=waker.wait, args=(LONG,))
    waits.start()
    time.sleep(0.02)
    waker.close()
    waits.join(LONG)
    waker.wake()
    waker.close()
    assert not waits.is_alive()
    assert set(Path("/proc/self/fd").iterdir()) == before
