"""Takes a collector and a terminal, gives a person the live screen of `top` until they have seen enough.

The collector works in a thread of its own, so that keys are answered while a long history is read. The terminal is
put back as it was whatever ends the screen: a key, a signal, an exception; and while the program is suspended.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text
from rich.theme import Theme

from coding_agent_exporter.top.frame import Frame, frame
from coding_agent_exporter.top.keys import Keyboard, press
from coding_agent_exporter.top.view import Controls, View
from coding_agent_exporter.top.words import speaks_unicode
from coding_agent_exporter.usagetable import columns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from coding_agent_exporter.top.collect import Collector
    from coding_agent_exporter.top.table import Line
    from coding_agent_exporter.watch import Waker

MIN_STEP = 0.1
"""Seconds between steps that changes cause: catches a 250 ms peak, and bounds what busy agents cost."""

FULL_LOOK = 10.0
"""Seconds after which everything is looked at, for what no notification told of; as the daemon does."""

MIN_FRAME = 0.5
"""Seconds between frames that changes cause: what is new is seen at once, and drawing costs most of what the screen
costs. A key is answered without waiting."""

ESC_PATIENCE = 0.05
"""Seconds within which the rest of a key's sequence follows its Esc."""

# The sixteen colours of the terminal's own palette: they suit its background, dark or light.
_THEME = Theme({
    "title": "bold", "dim": "dim", "good": "green", "warn": "yellow", "bad": "bold red", "key": "bold cyan",
    "head": "reverse", "sorted": "reverse bold underline", "cursor": "reverse",
}, inherit=False)


class Feed(threading.Thread):
    """Steps a collector when something changes, and at least every `interval` seconds; `notify` is called after each.

    `view` is the latest view, None before the first. `error` is what ended the thread, if anything did.
    """

    def __init__(self, collector: Collector, waker: Waker, notify: socket.socket, *, interval: float) -> None:
        super().__init__(name="collector", daemon=True)
        self.view: View | None = None
        self.error: Exception | None = None
        self._collector, self._waker, self._notify, self._interval = collector, waker, notify, interval
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 (for the thread that waits: it raises it)
            self.error = error
        self._say()

    def end(self) -> None:
        """End the thread, and wait until it is out of the step that it may be in."""
        self._ended.set()
        self._waker.wake()
        self.join()

    def _run(self) -> None:
        more, looked, changes = False, time.monotonic(), None
        while not self._ended.is_set():
            began = time.monotonic()
            more = self._collector.step(changes)
            self.view = self._collector.view()
            self._say()
            if not more:
                self._waker.watch(self._collector.watch)
                self._ended.wait(max(0.0, MIN_STEP - (time.monotonic() - began)))
                # Time alone can make an agent stale. It changes no log.
                changes = self._waker.changes if self._waker.wait(self._interval) else frozenset()
                if looked <= time.monotonic() - FULL_LOOK:
                    changes = None
            looked = time.monotonic() if changes is None else looked

    def _say(self) -> None:
        with suppress(OSError):  # full: the other side has enough reason to look
            self._notify.send(b"\0")


def run(collector: Collector, waker: Waker, controls: Controls, *, interval: float) -> int:
    """Show frames until a key or a signal ends it. Returns the exit code: 0, or 128 and the signal's number.

    SIGINT is a way to quit like any other. Raises what the collector raises, OSError when the terminal is gone.
    """
    with ExitStack() as stack:
        inbox, outbox = (stack.enter_context(end) for end in socket.socketpair())
        outbox.settimeout(0)
        stack.enter_context(_signals(outbox))
        feed = Feed(collector, waker, outbox, interval=interval)
        feed.start()
        stack.callback(feed.end)
        with Terminal(sys.stdin, sys.stdout) as terminal:
            return _loop(terminal, feed, inbox, controls, interval)


def show(made: Frame) -> None:
    """Print a frame where the cursor is."""
    console = _console(sys.stdout)
    for line in made.lines:
        console.print(Text.assemble(*line), soft_wrap=True)


def _console(stream: TextIO) -> Console:
    """NO_COLOR and the colours that the terminal has are left to the library."""
    return Console(file=stream, theme=_THEME, highlight=False, markup=False, emoji=False, force_terminal=True)


def _loop(terminal: Terminal, feed: Feed, inbox: socket.socket, controls: Controls, interval: float) -> int:
    keyboard = Keyboard()
    made: Frame | None = None
    drawn, wait = 0.0, 0.0
    while True:
        now = time.monotonic()
        if made is None or now - drawn >= wait:
            width, height = terminal.size
            view = feed.view or View(reading=0.0)
            made = frame(view, controls, now=time.time(), width=width, height=height, unicode=terminal.unicode)
            terminal.draw(made)
            drawn, wait = now, interval
            page, most = made.page, made.most
            controls = replace(controls, offset=min(controls.offset, most))
        patience = ESC_PATIENCE if keyboard.waiting else max(0.0, drawn + wait - now)
        ready, _, _ = select.select([inbox.fileno(), *terminal.inputs], [], [], patience)
        keys = [] if ready else keyboard.flush()
        if inbox.fileno() in ready:
            wait = min(MIN_FRAME if view.reading is None else MIN_STEP, interval)
            for number in inbox.recv(4096):
                if number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
                    return 0 if number == signal.SIGINT else 128 + number
                if number == signal.SIGTSTP:
                    terminal.suspend()
                if number:  # another size, or back from the background
                    terminal.forget()
                    made = None
        if feed.error is not None:
            raise feed.error
        if any(one in ready for one in terminal.inputs):
            data = terminal.read()
            if not data:
                return 0
            keys = keyboard.feed(data)
        for key in keys:
            pressed = press(controls, key, page=page, most=most)
            if pressed is None:
                return 0
            controls, made = pressed, None


class Terminal:
    """The alternate screen of a terminal, its cursor hidden, keys delivered one by one and not echoed."""

    def __init__(self, keys: TextIO, screen: TextIO) -> None:
        self.unicode = speaks_unicode(screen)
        self._console = _console(screen)
        self._keys = keys.fileno() if keys.isatty() else None
        self._mode: list[Any] | None = None
        self._lines: tuple[Line, ...] = ()

    @property
    def inputs(self) -> list[int]:
        """What to wait on for keys; nothing when they come from elsewhere than a terminal."""
        return [] if self._keys is None else [self._keys]

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except OSError:
            size = os.terminal_size((0, 0))
        return size.columns or 80, size.lines or 24

    def __enter__(self) -> Self:
        if self._keys is not None:
            self._mode = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        self._console.set_alt_screen(enable=True)
        self.forget()
        self._console.show_cursor(show=False)
        return self

    def __exit__(self, *_: object) -> None:
        # A terminal that went away has nothing to be restored.
        with suppress(OSError):
            self._console.show_cursor(show=True)
            self._console.set_alt_screen(enable=False)
        if self._keys is not None and self._mode is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._mode)

    def read(self) -> bytes:
        """What was typed; nothing when the terminal is gone."""
        assert self._keys is not None
        try:
            return os.read(self._keys, 1024)
        except OSError:
            return b""

    def draw(self, made: Frame) -> None:
        """Put a frame on the screen. Only lines that changed are sent: that is what a slow line can take."""
        width, _ = self.size
        with self._console:  # one write for all of it
            for number, line in enumerate(made.lines):
                if number < len(self._lines) and self._lines[number] == line:
                    continue
                text = Text.assemble(*line, end="")
                self._console.control(Control.move_to(0, number))
                self._console.print(text, soft_wrap=True, end="")
                if sum(columns(text) for text, _ in line) < width:  # in the last column, it would be erased itself
                    self._console.control(Control((ControlType.ERASE_IN_LINE, 0)))
        self._lines = made.lines

    def forget(self) -> None:
        """What is on the screen is not what was drawn: the next frame covers all of it."""
        self._lines = ()

    def suspend(self) -> None:
        """Stop, as Ctrl-Z asks for, with the terminal as it was; return when the program is continued."""
        self.__exit__()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.__enter__()


@contextmanager
def _signals(outbox: socket.socket) -> Iterator[None]:
    """Signals arrive as bytes at the other end of the socket, each its number, so that a select waits for them too."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
    wakeup = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def _note(_: int, __: FrameType | None) -> None:
    """The number is in the socket; a handler has to be there for it to get there."""
