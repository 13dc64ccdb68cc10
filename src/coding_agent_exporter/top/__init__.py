"""Takes the settings and what was asked for, gives the live screen of `top`, or one frame of it.

    collect -> view -> frame -> screen
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from coding_agent_exporter.top.collect import Collector
from coding_agent_exporter.top.frame import Frame, frame
from coding_agent_exporter.top.words import speaks_unicode
from coding_agent_exporter.usageprogress import ProgressBar
from coding_agent_exporter.watch import create

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.top.view import Controls


class MissingExtraError(Exception):
    """The live screen needs a library that is not installed. One line, which says what to do."""


def top(
    settings: Settings, controls: Controls, *, once: bool, interval: float, emit: Callable[[str], None],
) -> int:
    """Run the live screen until the person quits; or, with `once` or where there is no terminal, emit one frame.

    Returns the exit code. Raises MissingExtraError, and OSError (StoreError among them) when there is no room for a
    temporary file, or the terminal is gone.
    """
    dumb = os.environ.get("TERM", "dumb") in {"dumb", "unknown", ""}
    terminal = sys.stdout.isatty() and not dumb
    extra = find_spec("rich") is not None
    if terminal and not once and not extra:
        raise MissingExtraError("top: the live screen needs more: pip install 'coding-agent-exporter[tui]' "
                                "(--once does without)")
    collector = Collector(settings)
    try:
        if terminal and not once:
            from coding_agent_exporter.top import screen  # noqa: PLC0415 (needs the extra)

            waker = create(settings.watch_poll_interval, force_polling=settings.watch_force_polling)
            try:
                return screen.run(collector, waker, controls, interval=interval)
            finally:
                waker.close()
        made = _once(collector, controls, dumb=dumb)
        if terminal and extra:
            from coding_agent_exporter.top import screen  # noqa: PLC0415

            screen.show(made)
        else:
            emit(made.text)
    finally:
        collector.close()
    return 0


def _once(collector: Collector, controls: Controls, *, dumb: bool) -> Frame:
    """Read everything, then make the frame of it: all agents, however many lines that takes."""
    with ProgressBar(sys.stderr, dumb=dumb) as progress:
        while collector.step():
            progress(*collector.read)
    unicode = speaks_unicode(sys.stdout) and not (dumb and sys.stdout.isatty())
    return frame(collector.view(), controls, now=time.time(), width=shutil.get_terminal_size().columns, unicode=unicode)
