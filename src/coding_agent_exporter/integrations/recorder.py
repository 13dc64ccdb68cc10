"""Takes the frames that one agent process exchanges with its driver, gives its instance file and usage log.

The driver's threads only drop what they see into a queue: a thread of its own reads, keeps the state, and writes.
Nothing here raises into the driver. What goes wrong is logged, once for each kind, and what could not be logged of
usage is tried again with the next heartbeat.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from coding_agent_exporter.integrations import frames
from coding_agent_exporter.integrations.agent import Agent, Usage
from coding_agent_exporter.integrations.files import InstanceFile, Places, UsageLog, iso, usage_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from coding_agent_exporter.integrations.agent import Outcome
    from coding_agent_exporter.integrations.frames import Frame
    from coding_agent_exporter.integrations.sessions import SessionFiles

log = logging.getLogger("coding_agent_exporter.integrations")

MAX_FRAMES = 10_000
MAX_BYTES = 32 << 20
MAX_UNWRITTEN = 10_000
"""Most frames and bytes that wait to be looked at, and most lines of usage that wait for a disk that is full."""

GRACEFUL = frozenset({0, 128 + 1, 128 + 2, 128 + 15})
"""Exit codes of an agent that ended as it should: pi leaves with these when it is told to go."""

_WAITS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds before each look for the session file: pi writes it right after it has sent the frame."""


class _Item(NamedTuple):
    content: Frame | bytes
    sent: bool
    gap: bool = False


class Recorder:
    """Writes the files of one agent process, from `start` to `close`. Any thread may call."""

    def __init__(self, places: Places, *, clock: Callable[[], float] = time.time) -> None:
        self._places, self._clock = places, clock
        self._owner = os.getpid()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        # Bytes put in and taken out, by direction: each number has one thread that changes it.
        self._put, self._taken = {False: 0, True: 0}, {False: 0, True: 0}
        self._gaps = {False: False, True: False}
        self._lines = {False: frames.Lines(), True: frames.Lines()}
        self._agent = Agent()
        self._own_session = ""
        self._usage = UsageLog(places.agent)
        self._unwritten: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)
        self._failed: set[str] = set()
        self._instance: InstanceFile | None = None
        self._sessions: SessionFiles | None = None
        self._exit_code: Callable[[], int | None] = _running
        self._code: int | None = None
        self._beating = False
        self._unseen = False
        self._thread: threading.Thread | None = None
        self._closed = self._exiting = False

    def start(self, pid: int | None, cwd: str, sessions: SessionFiles,
              exit_code: Callable[[], int | None] | None = None) -> None:
        """The process runs now. `pid` None: it is not known, and the driver's stands for it.

        `exit_code` is asked with each heartbeat: the process's, as subprocess has it, or None while it runs.
        """
        if self._thread is not None or self._closed or self._is_copy():
            return
        self._exit_code = exit_code or _running
        self._sessions = sessions
        self._agent.last_event = "session_start"
        self._instance = InstanceFile(self._places, pid or os.getpid(), int(self._clock() * 1000), cwd)
        self._beating = True
        self._thread = threading.Thread(target=self._run, name="coding-agent-exporter", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def frame(self, frame: object, *, sent: bool = False) -> None:
        """Note a frame, as an object or a line. Takes microseconds whatever its size; never raises."""
        try:
            if self._closed or self._is_copy():
                return
            found = frames.of_object(frame, sent=sent)
            if found is not None:
                if self._queue.qsize() >= MAX_FRAMES:
                    raise OverflowError("frames come faster than they can be noted")  # noqa: TRY301 (logged below)
                self._queue.put(_Item(found, sent))
        except Exception as error:  # noqa: BLE001 (the driver must not notice)
            self._fail("frames", error)

    def chunk(self, data: bytes, *, sent: bool = False) -> None:
        """Note a piece of the stream of lines. Never raises."""
        if self._closed or self._is_copy():
            return
        if self._put[sent] - self._taken[sent] + len(data) > MAX_BYTES:
            self._gaps[sent] = True
            self._fail("frames", OverflowError("frames come faster than they can be noted"))
            return
        self._put[sent] += len(data)
        gap, self._gaps[sent] = self._gaps[sent], False
        self._queue.put(_Item(data, sent, gap))

    def close(self, code: int | None = None) -> None:
        """The process has ended: with this exit code (as subprocess has it), or because the driver closed it.

        Returns at once; `join` waits until the files are in order.
        """
        if not self._closed and not self._is_copy():
            self._code = code
            self._closed = True
            self._queue.put(None)

    def join(self, timeout: float = 5.0) -> None:
        """Wait, seconds at most, until everything is written."""
        if self._thread is not None and not self._is_copy():
            self._thread.join(timeout)

    def _at_exit(self) -> None:
        self._exiting = True
        self.close()
        self.join()

    def _is_copy(self) -> bool:
        """Whether this is a fork of the driver: the agent is not its own, and there is no thread."""
        return os.getpid() != self._owner

    # -- in the thread

    def _run(self) -> None:
        period = self._places.heartbeat_ms / 1000
        self._write()
        due = time.monotonic() + period
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._beat()
                due = time.monotonic() + period
                continue
            if item is None:
                break
            try:
                self._look(item)
            except Exception as error:  # noqa: BLE001 (one frame must not end all telemetry)
                self._fail("frames", error)
        self._finish()
        if not self._exiting:
            atexit.unregister(self._at_exit)

    def _look(self, item: _Item) -> None:
        if not isinstance(item.content, bytes):
            self._note(self._agent.apply(item.content, sent=item.sent))
            return
        self._taken[item.sent] += len(item.content)
        lines = self._lines[item.sent]
        if item.gap:
            lines.skip()
        for line in lines.feed(item.content):
            frame = frames.of_line(line, sent=item.sent)
            if frame is not None:
                self._note(self._agent.apply(frame, sent=item.sent))

    def _note(self, outcome: Outcome) -> None:
        if outcome.usage is not None:
            self._unwritten.append(usage_line(outcome.usage, self._session(outcome.usage)))
            self._flush()
        if outcome.event:
            # In a flood only the last state is worth the disk's time.
            self._unseen = True
            if self._queue.qsize() < 100:
                self._write()

    def _session(self, usage: Usage) -> str:
        """The base name of the message's session file; one of our own making where there is none."""
        agent = self._agent
        if not agent.confirmed and self._sessions is not None and self._sessions.kept:
            self._locate(agent, usage, self._sessions)
        agent.confirmed = True
        if agent.session_file:
            return agent.session_file.rpartition("/")[2].removesuffix(".jsonl")
        if not agent.session_id:
            agent.session_id = str(uuid.uuid4())
        if not self._own_session.endswith(f"_{agent.session_id}"):
            started = iso(usage.started).replace(":", "-").replace(".", "-")
            self._own_session = f"{started}_{agent.session_id}"
        return self._own_session

    def _locate(self, agent: Agent, usage: Usage, sessions: SessionFiles) -> None:
        waits = _WAITS if not self._own_session else (0.0,)
        for wait in waits:
            time.sleep(wait)
            found = sessions.find(usage, known=agent.session_file, everywhere=wait == waits[-1])
            if found:
                name = found.rpartition("/")[2].removesuffix(".jsonl")
                agent.session_file, agent.session_id = found, name.rpartition("_")[2]
                return

    def _beat(self) -> None:
        try:
            code = self._exit_code()
        except Exception as error:  # noqa: BLE001 (the transport's; the thread must go on)
            self._fail("exit code", error)
            code = None
        if code is not None and self._beating:
            # A heartbeat would be a lie.
            self._end(code)
        self._flush()
        self._write()

    def _end(self, code: int | None) -> None:
        """Stop the heartbeat. The file goes when the agent went in peace, and stays, as that of any that crashed."""
        if self._beating and self._instance is not None:
            self._beating = False
            if code is None or code in GRACEFUL:
                try:
                    self._instance.remove()
                except OSError as error:
                    self._fail("instance file", error)

    def _finish(self) -> None:
        self._flush()
        if self._unseen:
            self._write()
        self._end(self._code)
        if self._unwritten:
            log.error("usage of an agent is lost: %d messages", len(self._unwritten))

    def _write(self) -> None:
        if not self._beating or self._instance is None:
            return
        try:
            self._instance.write(self._agent, int(self._clock() * 1000))
            self._unseen = False
        except Exception as error:  # noqa: BLE001 (the next heartbeat tries again)
            self._fail("instance file", error)

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._usage.append(self._unwritten[0])
                self._unwritten.popleft()
        except Exception as error:  # noqa: BLE001 (as in _write)
            self._fail("usage log", error)

    def _fail(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            log.warning("telemetry of an agent is incomplete: %s: %s", what, error)


def _running() -> None:
    return None
