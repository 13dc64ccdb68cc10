"""Takes a command that speaks pi's RPC protocol, gives it our own standard input and output, and telemetry beside.

Bytes pass as they come; what is observed is a copy. The command need not be pi: then there is nothing to observe.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter.integrations.recorder import Recorder, log
from coding_agent_exporter.integrations.sessions import SessionFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from coding_agent_exporter.integrations.files import Places

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit codes of a command that cannot be started, as shells have them."""

_CHUNK = 1 << 16
_GRACE = 1.0
"""Seconds for which output of what the command has started is still passed on once the command has ended."""

_FORWARDED = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")
_FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH})


def wrap(command: Sequence[str], places: Places) -> int:
    """Run the command until it ends. Returns its exit code, 128 + n when signal n ended it; raises OSError if it
    cannot be started."""
    # A thread that waits for the interpreter's lock gets it within this many seconds: the default is 5 ms.
    sys.setswitchinterval(0.0002)
    _occupy()
    recorder = Recorder(places)
    idle = _Idle()
    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
        elif process.returncode is not None:
            idle.told_to_go = True
        elif not (number in _FROM_TERMINAL and _in_foreground()):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _forwarded()}
    try:
        # Signals are handled by Python, so the command does not inherit that they are. Descriptors it does inherit:
        # those that whoever started us has left open for it.
        process = subprocess.Popen(  # noqa: S603 (to run a command is what this is for)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, close_fds=False)
        for number in early:
            process.send_signal(number)
        _observe(recorder, process, command)
        return _run(process, recorder, idle)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _observe(recorder: Recorder, process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    try:
        try:
            cwd = str(Path.cwd())
        except FileNotFoundError:
            cwd = "/"  # it has been removed
        recorder.start(process.pid, cwd, SessionFiles(command, os.environ, cwd), lambda: process.returncode)
    except Exception as error:  # noqa: BLE001 (the command runs, and must not be left alone)
        log.warning("an agent runs without telemetry: %s", error)


def _run(process: subprocess.Popen[bytes], recorder: Recorder, idle: _Idle) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    inward = threading.Thread(target=_feed, args=(process.stdin.fileno(), process.stdin.close, recorder), daemon=True)
    outward = threading.Thread(target=_drain, args=(process.stdout.fileno(), recorder, idle), daemon=True)
    inward.start()
    outward.start()
    code = process.wait()
    # What it has started may keep its output open for ever.
    ended = time.monotonic()
    while outward.is_alive() and not idle.told_to_go and time.monotonic() - max(idle.since, ended) < _GRACE:
        outward.join(0.02)
    recorder.close(code)
    recorder.join()
    return 128 - code if code < 0 else code


def _feed(target: int, close: Callable[[], None], recorder: Recorder) -> None:
    """Our input to the command's, until one of them is closed; then so is the other."""
    try:
        while data := _read(0):
            _write(target, data)
            recorder.chunk(data, sent=True)
    except OSError:
        # The command does not read any more: whoever writes to us shall learn it.
        _discard(0)
    with suppress(OSError):
        close()


def _drain(source: int, recorder: Recorder, idle: _Idle) -> None:
    """The command's output to ours, until it is closed."""
    try:
        while True:
            idle.since = time.monotonic()
            data = _read(source)
            idle.since = math.inf
            if not data:
                break
            _write(1, data)
            recorder.chunk(data)
    except OSError:
        # Nobody reads us any more: the command shall learn it.
        _discard(source)
    _discard(1)


class _Idle:
    """Since when the command has been waited for to say something, and whether that has been cut short."""

    def __init__(self) -> None:
        self.since = math.inf
        self.told_to_go = False


def _read(source: int) -> bytes:
    while True:
        try:
            return os.read(source, _CHUNK)
        except BlockingIOError:
            # Somebody who shares our input with us has made it so.
            select.select([source], [], [])


def _write(target: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(target, data):]
        except BlockingIOError:
            select.select([], [target], [])


def _occupy() -> None:
    """Keep the numbers of standard streams that are closed from the pipes to the command: reads and writes fail."""
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, so this one.
            os.open(os.devnull, flags | os.O_CLOEXEC)


def _discard(descriptor: int) -> None:
    """Close a descriptor for the other side, without its number becoming somebody else's."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, descriptor, inheritable=False)
        os.close(null)


def _forwarded() -> list[signal.Signals]:
    """The signals of this system, but for those that we were started to ignore (nohup): so does the command."""
    found = [number for name in _FORWARDED if (number := getattr(signal, name, None)) is not None]
    return [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]


def _in_foreground() -> bool:
    """Whether a terminal sends its signals to our process group, and so to the command itself."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
