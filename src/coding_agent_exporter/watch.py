"""Takes directories from pipeline, gives it a hint that something in them may have changed.

A hint and never a fact: a wake can come for nothing, and a change can come without one (network mounts,
overflowing queues). What is true, a scan finds out; a waker only says when one is worth its while.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from coding_agent_exporter.inotify import Inotify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STEP_MS = 25
"""How often the notifier is asked, in ms: a change is known after this long at the latest, and as often the
process uses a little CPU (0.2 % of a core). A burst is over when a step brings nothing more."""

DEBOUNCE_MS = 45
"""A burst that goes on is reported after this long all the same, so that a wake is never 100 ms late."""

MAX_DIRECTORIES = 4096
"""Past this many, a notifier of watchfiles is not used: registering takes 50 us each, for which the interpreter stands
still, and starts over with every new directory."""

CHECK_SECONDS = 10.0
"""How often it is looked whether what is watched is still what is there."""

MAX_FAILURES = 5
"""A notifier that fails this many times in a row is given up."""

POLLED = "cannot be notified of file changes, directories are polled instead: %s"

logger = logging.getLogger(__name__)


class Waker(Protocol):
    """Says when to look again. `wait` is for one thread; the others are safe from any."""

    polling: bool
    """True while changes are not notified, and `wait` returns True after each poll interval instead."""

    changes: frozenset[str] | None
    """Paths that changed before the last `wait` returned True; None: anything may have."""

    def wait(self, timeout: float) -> bool:
        """Block for up to `timeout` seconds. True: something may have changed, or wake() or close() came."""
        ...

    def watch(self, dirs: frozenset[Path]) -> None:
        """Wake from now on for changes directly in these directories. A new set wakes once by itself."""
        ...

    def wake(self) -> None:
        """End a wait in another thread, or else the next one."""
        ...

    def close(self) -> None:
        """Release what is held. A blocked wait, and every later one, returns True at once."""
        ...


class Notifier(Protocol):
    """What is used of watchfiles.RustNotify."""

    def watch(self, debounce_ms: int, step_ms: int, timeout_ms: int, stop_event: threading.Event) -> object:
        """Give a set of changes, or one of "stop", "timeout", "signal"."""
        ...


Notify = Callable[[list[str]], Notifier]


class TimerWaker:
    """Wakes every `poll_interval` seconds, whether or not something changed."""

    polling = True
    changes: frozenset[str] | None = None

    def __init__(self, poll_interval: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = poll_interval
        self._clock = clock
        self._last = clock()
        self._event = threading.Event()
        self._dirs: frozenset[Path] = frozenset()
        self._closed = False

    def wait(self, timeout: float) -> bool:
        if self._closed:
            return True
        left = self._last + self._interval - self._clock()
        if not self._event.wait(max(0.0, min(timeout, left))) and timeout < left:
            return False
        self._event.clear()
        self._last = self._clock()
        return True

    def watch(self, dirs: frozenset[Path]) -> None:
        if dirs is not self._dirs and dirs != self._dirs:
            self._dirs = dirs
            self._event.set()

    def wake(self) -> None:
        self._event.set()

    def close(self) -> None:
        self._closed = True
        self._event.set()


class NotifiedWaker:
    """Wakes for changes that watchfiles reports, where there is no inotify; falls back to a TimerWaker without.

    `notify` makes a notifier for a list of directories. It raises FileNotFoundError when one is gone, and
    another OSError or RuntimeError when notification does not work here (limits, unsupported file system).
    """

    def __init__(self, poll_interval: float, *, notify: Notify | None = None) -> None:
        self._notify = notify or rust_notifier
        self._timer = TimerWaker(poll_interval)
        self._event = threading.Event()
        self._dirs: frozenset[Path] = frozenset()
        self._notified: frozenset[Path] | None = None
        self._notifier: Notifier | None = None
        self._failures = 0
        self._closed = threading.Event()
        self.polling = False
        self.changes: frozenset[str] | None = None

    def wait(self, timeout: float) -> bool:
        self.changes = None
        while not (self.polling or self._closed.is_set()):
            dirs = self._dirs
            if dirs is not self._notified:
                # Before the wake: what the caller then looks at has not changed unnoticed since.
                self._start(dirs)
                self._event.clear()
                if self._closed.is_set():
                    self._notifier = None
                return True
            if self._event.is_set():
                self._event.clear()
                return True
            notifier = self._notifier
            if notifier is None:  # closed just now
                break
            try:
                result = notifier.watch(DEBOUNCE_MS, STEP_MS, max(1, int(timeout * 1000)), self._event)
            except RuntimeError as error:
                # A file name that is not UTF-8 breaks a notifier for good. It did see a change.
                self._notified = None
                self._failures += 1
                if self._failures >= MAX_FAILURES:
                    self._fall_back(error)
                return True
            self._failures = 0
            if result == "signal":
                # A signal handler has raised; the notifier has swallowed what.
                raise KeyboardInterrupt
            if isinstance(result, set):
                self.changes = frozenset(path for _, path in result)
                return True
            if result == "timeout":
                return False
        return self._closed.is_set() or self._timer.wait(timeout)

    def watch(self, dirs: frozenset[Path]) -> None:
        if dirs is not self._dirs and dirs != self._dirs:
            self._dirs = dirs
            self._event.set()
            self._timer.wake()

    def wake(self) -> None:
        self._event.set()
        self._timer.wake()

    def close(self) -> None:
        self._closed.set()
        self._notifier = None
        self._event.set()
        self._timer.close()

    def _start(self, dirs: frozenset[Path]) -> None:
        # The old one first: both together could be more than the system's limit on watches allows.
        self._notifier = None
        self._notified = dirs
        if len(dirs) > MAX_DIRECTORIES:
            self._fall_back(f"{len(dirs)} directories are too many")
            return
        for attempt in range(1, MAX_FAILURES + 1):
            # Those that are gone since the scan, or not ours to list, are left to the next scan.
            names = [str(path) for path in dirs if os.access(path, os.R_OK)]
            try:
                self._notifier = self._notify(names)
            except (OSError, RuntimeError) as error:
                if not isinstance(error, FileNotFoundError) or attempt == MAX_FAILURES:
                    self._fall_back(error)
                    return
            else:
                return

    def _fall_back(self, why: object) -> None:
        self.polling = True
        self._notifier = None
        logger.warning(POLLED, why)


class InotifyWaker:
    """Wakes for changes that inotify reports. What it has no watch for is polled, all of it where there is no inotify.

    `open_queue` makes the queue; it raises OSError where the system has none to give.
    """

    def __init__(
        self, poll_interval: float, *, open_queue: Callable[[], Inotify] = Inotify,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = poll_interval
        self._clock = clock
        self._timer = TimerWaker(poll_interval)
        self._dirs: frozenset[Path] = frozenset()
        self._watched: frozenset[Path] | None = None
        self._closed = False
        self._warned = False
        self._last = self._checked = clock()
        self._queue: Inotify | None = None
        self.polling = False
        self.changes: frozenset[str] | None = None
        try:
            self._queue = open_queue()
        except OSError as error:
            self._fall_back(error)

    def wait(self, timeout: float) -> bool:
        self.changes = None
        queue = self._queue
        if queue is None or self._closed:
            return self._closed or self._timer.wait(timeout)
        if self._clock() - self._checked >= CHECK_SECONDS:
            self._checked = self._clock()
            queue.check()
        dirs = self._dirs
        if dirs is not self._watched or queue.outdated:
            # Before the wake: what the caller then looks at has not changed unnoticed since.
            self._watch(queue, dirs)
            return True
        if queue.wake_came():
            return True
        left = self._last + self._interval - self._clock() if self.polling else timeout
        changes = queue.read(min(timeout, left))
        if changes is None or changes:
            self.changes = changes
            return True
        if queue.wake_came():
            return True
        if self.polling and self._clock() >= self._last + self._interval:
            self._last = self._clock()
            return True
        return False

    def watch(self, dirs: frozenset[Path]) -> None:
        if dirs is not self._dirs and dirs != self._dirs:
            self._dirs = dirs
            self.wake()

    def wake(self) -> None:
        self._timer.wake()
        if (queue := self._queue) is not None:
            queue.wake()

    def close(self) -> None:
        self._closed = True
        self._timer.close()
        if self._queue is not None:
            self._queue.close()

    def _watch(self, queue: Inotify, dirs: frozenset[Path]) -> None:
        queue.wake_came()  # that there is a new set is known now
        self._watched = dirs
        try:
            queue.watch(dirs)
        except OSError as error:
            self._queue = None
            queue.close()
            self._fall_back(error)
            return
        self.polling = bool(queue.left_out)
        if self.polling and not self._warned:
            self._warned = True
            logger.warning(POLLED, f"{len(queue.left_out)} of {len(dirs)} are beyond fs.inotify.max_user_watches")

    def _fall_back(self, why: object) -> None:
        self.polling = True
        logger.warning(POLLED, why)


def create(
    poll_interval: float, *, force_polling: bool = False, environ: Mapping[str, str] | None = None,
) -> Waker:
    """Make the waker for this system. `poll_interval` is seconds, for where only polling works.

    WATCHFILES_FORCE_POLLING, which watchfiles itself knows, forces polling like the argument.
    """
    forced = (os.environ if environ is None else environ).get("WATCHFILES_FORCE_POLLING", "")
    if force_polling or forced.lower() not in {"", "0", "false", "disable", "disabled"}:
        return TimerWaker(poll_interval)
    return InotifyWaker(poll_interval) if os.uname().sysname == "Linux" else NotifiedWaker(poll_interval)


def rust_notifier(dirs: list[str]) -> Notifier:
    """Make a notifier of watchfiles for these directories, without what is below them.

    Only the extension module is loaded. The package around it imports anyio, for 5 MB that nothing here uses.
    Raises OSError or RuntimeError when notification does not work.
    """
    name = "watchfiles._rust_notify"
    module = sys.modules.get(name)
    if module is None:
        package = importlib.util.find_spec("watchfiles")
        places = package.submodule_search_locations if package else None
        spec = importlib.machinery.PathFinder.find_spec(name, places)
        if spec is None or spec.loader is None:
            raise RuntimeError("watchfiles is not installed")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    # Ignoring denied permissions would ignore the limit on watches too.
    notifier: Notifier = module.RustNotify(
        dirs, debug=False, force_polling=False, poll_delay_ms=300, recursive=False,
        ignore_permission_denied=False,
    )
    return notifier
