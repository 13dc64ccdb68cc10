"""Wakers: they wake for changes, for wake() and for close(), never for nothing, and never fail for good."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter.watch import MAX_DIRECTORIES, NotifiedWaker, TimerWaker, Waker, create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 20.0
"""Seconds nobody waits for, unless the waker is broken."""
SHORT = 0.15

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")


@pytest.fixture
def waker(tmp_path: Path) -> Iterator[Waker]:
    """A waker that watches tmp_path and has settled."""
    made = create(LONG, environ={})
    made.watch(frozenset([tmp_path]))
    assert made.wait(LONG)
    yield made
    made.close()


def settle(waker: Waker) -> None:
    while waker.wait(SHORT):
        pass


class ScriptedNotifier:
    """Gives out what it was told to, then times out; remembers when it was let go."""

    def __init__(self, *results: object) -> None:
        self.results = list(results)

    def watch(self, debounce_ms: int, step_ms: int, timeout_ms: int, stop_event: threading.Event) -> object:
        result = self.results.pop(0) if self.results else "timeout"
        if isinstance(result, Exception):
            raise result
        return result


def append(path: Path) -> None:
    with (path / "log").open("a") as log:
        log.write("more\n")


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda path: (path / "new").write_text("x"),
    "append": append,
    "replace": lambda path: (path / "tmp").rename(path / "log"),
    "rename": lambda path: (path / "log").rename(path / "log.1"),
    "delete": lambda path: (path / "log").unlink(),
    "directory": lambda path: (path / "sub").mkdir(),
}


@linux
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_wakes(waker: Waker, tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Whatever happens to a file in a watched directory ends the wait."""
    (tmp_path / "log").write_text("first\n")
    (tmp_path / "tmp").write_text("other\n")
    settle(waker)
    change(tmp_path)
    assert waker.wait(LONG)
    assert not waker.polling


@linux
def test_a_change_during_the_wait_wakes(waker: Waker, tmp_path: Path) -> None:
    """A wait that has begun ends with the change."""
    threading.Timer(0.1, append, [tmp_path]).start()
    assert waker.wait(LONG)


@linux
def test_nothing_wakes_without_a_change(waker: Waker, tmp_path: Path) -> None:
    """Reading a log, and changes further below, are no reason to look again."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "log").write_text("x")
    settle(waker)
    (tmp_path / "log").read_text()
    list(tmp_path.iterdir())
    (tmp_path / "sub" / "deep").write_text("x")
    assert not waker.wait(SHORT)


@linux
def test_a_burst_wakes_once(waker: Waker, tmp_path: Path) -> None:
    """A hundred files written at once are one reason to look."""
    for number in range(100):
        (tmp_path / str(number)).write_text("x")
    assert waker.wait(LONG)
    assert not waker.wait(SHORT)


@linux
def test_changes_between_two_waits_are_kept(waker: Waker, tmp_path: Path) -> None:
    """What changes while nobody waits ends the next wait."""
    append(tmp_path)
    assert waker.wait(LONG)


@linux
def test_a_new_set_wakes_once_and_is_then_watched(waker: Waker, tmp_path: Path) -> None:
    """After watch() with another set the first wait returns at once, and only the new set counts."""
    other = tmp_path / "other"
    other.mkdir()
    settle(waker)
    waker.watch(frozenset([other]))
    assert waker.wait(LONG)
    assert not waker.wait(SHORT)
    append(tmp_path)
    assert not waker.wait(SHORT)
    append(other)
    assert waker.wait(LONG)


@linux
def test_the_same_set_again_is_free(tmp_path: Path) -> None:
    """An equal set makes no new notifier and wakes nobody."""
    made: list[list[str]] = []

    def notify(dirs: list[str]) -> ScriptedNotifier:
        made.append(dirs)
        return ScriptedNotifier()

    waker = NotifiedWaker(LONG, notify=notify)
    waker.watch(frozenset([tmp_path]))
    assert waker.wait(SHORT)
    waker.watch(frozenset([Path(str(tmp_path))]))
    assert not waker.wait(SHORT)
    assert made == [[str(tmp_path)]]


@linux
def test_a_directory_that_vanished_does_not_matter(tmp_path: Path) -> None:
    """A directory that is gone since the scan is left out, the others are watched."""
    waker = create(LONG, environ={})
    waker.watch(frozenset([tmp_path, tmp_path / "gone"]))
    assert waker.wait(LONG)
    assert not waker.polling
    append(tmp_path)
    assert waker.wait(LONG)
    waker.close()


@linux
def test_a_name_that_is_not_text_does_not_end_notification(waker: Waker, tmp_path: Path) -> None:
    """A file whose name is no UTF-8 wakes like any other, and so do the changes after it."""
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.json"), "w"):  # noqa: PTH118, PTH123 - bytes, on purpose
        pass
    assert waker.wait(LONG)
    settle(waker)
    assert not waker.polling
    append(tmp_path)
    assert waker.wait(LONG)


@pytest.mark.parametrize("kind", ["timer", "notified"])
def test_wake_ends_a_wait_in_another_thread(tmp_path: Path, kind: str) -> None:
    """wake() ends a wait that has begun, or else the next one, and only one."""
    waker = create(LONG, force_polling=kind == "timer", environ={})
    waker.watch(frozenset([tmp_path]))
    assert waker.wait(LONG)
    waker.wake()
    assert waker.wait(LONG)
    threading.Timer(0.1, waker.wake).start()
    assert waker.wait(LONG)
    assert not waker.wait(SHORT)
    waker.close()


@pytest.mark.parametrize("kind", ["timer", "notified", "fallen back"])
def test_close_ends_a_wait_for_good(tmp_path: Path, kind: str) -> None:
    """close() ends a wait that has begun; later waits do not block either."""
    waker = NotifiedWaker(LONG, notify=refuse) if kind == "fallen back" else create(
        LONG, force_polling=kind == "timer", environ={})
    waker.watch(frozenset([tmp_path]))
    assert waker.wait(LONG)
    threading.Timer(0.1, waker.close).start()
    assert waker.wait(LONG)
    assert waker.wait(LONG)
    assert waker.wait(LONG)


def refuse(dirs: list[str]) -> ScriptedNotifier:
    raise OSError(28, "No space left on device")


def test_without_notification_it_polls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the system's limit is reached, the waker polls and says so once, whatever sets come later."""
    waker = NotifiedWaker(0.05, notify=refuse)
    with caplog.at_level(logging.WARNING):
        waker.watch(frozenset([tmp_path]))
        assert waker.wait(LONG)
        assert waker.polling
        waker.watch(frozenset([tmp_path.parent]))
        assert waker.wait(LONG)
        assert waker.wait(LONG)
        assert waker.wait(LONG)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    waker.close()


def test_too_many_directories_are_polled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A set too large to register in good time is polled."""
    waker = NotifiedWaker(LONG, notify=lambda dirs: ScriptedNotifier())
    waker.watch(frozenset(tmp_path / str(number) for number in range(MAX_DIRECTORIES + 1)))
    assert waker.wait(LONG)
    assert waker.polling
    assert len(caplog.records) == 1


def test_a_notifier_that_keeps_failing_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Errors from the notifier are answered with a new one, but not for ever."""
    waker = NotifiedWaker(LONG, notify=lambda dirs: ScriptedNotifier(RuntimeError("broken")))
    waker.watch(frozenset([tmp_path]))
    waits = 0
    while not waker.polling and waits < 100:
        assert waker.wait(SHORT)
        waits += 1
    assert waker.polling
    assert waits < 20
    assert len(caplog.records) == 1


def test_a_signal_whose_handler_raised_is_not_lost(tmp_path: Path) -> None:
    """The notifier swallows what a signal handler raises; the wait raises in its place."""
    waker = NotifiedWaker(LONG, notify=lambda dirs: ScriptedNotifier("signal"))
    waker.watch(frozenset([tmp_path]))
    assert waker.wait(LONG)
    with pytest.raises(KeyboardInterrupt):
        waker.wait(LONG)


def test_a_timer_wakes_once_per_interval() -> None:
    """Time spent outside of wait() counts, and a wait shorter than what is left is a timeout."""
    now = 100.0
    waker = TimerWaker(10.0, clock=lambda: now)
    assert not waker.wait(0.01)
    now = 109.99
    assert waker.wait(LONG)
    assert not waker.wait(0.01)
    now = 130.0
    assert waker.wait(0.0)
    assert not waker.wait(0.0)


@pytest.mark.parametrize(("value", "polling"), [("1", True), ("true", True), ("false", False), ("", False)])
def test_polling_can_be_forced(value: str, polling: bool) -> None:
    """The variable that watchfiles knows, and the argument, make a waker that polls."""
    waker = create(1.0, environ={"WATCHFILES_FORCE_POLLING": value})
    assert waker.polling is polling
    assert create(1.0, force_polling=True, environ={}).polling
    waker.close()
