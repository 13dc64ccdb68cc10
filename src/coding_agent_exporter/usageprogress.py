"""Takes how far a long read has come, shows it on a terminal; elsewhere, and of a short one, nothing."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 0.5
"""Seconds after which it is worth showing."""

EVERY = 0.1
"""Seconds between two frames."""

_CLEAR = "\r\x1b[K"


class ProgressBar:
    """One line on a terminal, rewritten in place and gone at the end, also when Ctrl-C is the end.

    `clock` gives seconds that only grow.
    """

    def __init__(self, stream: TextIO, *, dumb: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._wanted = stream.isatty() and not dumb
        self._clock = clock
        self._next = clock() + PATIENCE
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._write(_CLEAR)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` bytes of `total` have been read."""
        now = self._clock()
        if not self._wanted or now < self._next:
            return
        self._next, self._shown = now + EVERY, True
        share = done / total if total else 1.0
        says = f" {share:4.0%}  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        # One column stays free: a terminal that wraps a full line would keep the old one above.
        width = max(0, min(40, shutil.get_terminal_size().columns - len("reading []") - len(says) - 1))
        self._write(f"{_CLEAR}reading [{'#' * round(width * share):<{width}}]{says}")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # A terminal that went away: nothing is lost but the sight of it.
            self._wanted = self._shown = False
