"""Takes flags, gives the tests the exporter as a process of its own, and a client of it.

Nothing here sleeps for a fixed time in the hope that it will do: what has to happen is waited for, and `DEADLINE`
is far beyond what a slow machine takes.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from support import Samples, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEADLINE = 30.0
"""Seconds after which a test gives up; nothing that works takes nearly as long."""

_LISTENING = re.compile(r"127\.0\.0\.1:(\d+)")
_OWN = "coding_agent_"
_INTERNAL = "coding_agent_exporter_"


@dataclass(frozen=True)
class Reply:
    """An HTTP reply; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def get(port: int, path: str = "/metrics", headers: Mapping[str, str] | None = None) -> Reply:
    """One request on a connection of its own. Raises OSError when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def wait_for(condition: Callable[[], object], what: str, *, every: float = 0.02, deadline: float = DEADLINE) -> None:
    """Return once the condition holds; fail the test with `what` when it never does."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"still waiting for: {what}"
        time.sleep(every)


def free_port() -> int:
    """A port on 127.0.0.1 for what has to come back at the same address.

    Below those that the system hands out: while its owner is away nobody else gets it by chance.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process needs, and nothing of what the person who runs the tests has set for agents or exporters."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **(extra or {})}


class Exporter:
    """The exporter as a process, on a free port of 127.0.0.1. State lies in `home`, unless a flag says otherwise.

    `start` may be called again after the process has ended: on the same state.
    """

    def __init__(self, home: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.flags = list(flags)
        self.lines: list[str] = []
        """What all processes so far have written to standard error."""
        self.port = 0
        self.program = [sys.executable]
        """The interpreter, or what stands in for it."""
        self._env = environment(home, env)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._listening = threading.Event()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        print("\n".join(self.lines))  # pytest shows it with a test that failed

    def start(self, *, wait: bool = True) -> Self:
        """Start a process; `wait` until it listens. Fails the test when it ends instead."""
        given = " ".join(self.flags)
        defaults = [
            flag for name, flag in (
                ("--web.listen-address", "--web.listen-address=127.0.0.1:0"),
                ("--state.path", f"--state.path={self.home / 'state.db'}"),
            ) if name not in given
        ]
        self._listening = threading.Event()
        self._process = subprocess.Popen(
            [*self.program, "-m", "coding_agent_exporter", *defaults, *self.flags],
            env=self._env, cwd=self.home, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._listening), daemon=True)
        self._reader.start()
        if wait:
            self.wait_until_listening()
        return self

    def wait_until_listening(self) -> None:
        """Returns as soon as the process that was started last listens; fails the test when it ends instead."""
        wait_for(lambda: self._listening.is_set() or self.ended, "the exporter to listen", every=0.001)
        assert self._listening.is_set(), "\n".join(self.lines)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def get(self, path: str = "/metrics", headers: Mapping[str, str] | None = None) -> Reply:
        return get(self.port, path, headers)

    def scrape(self) -> Samples:
        """One delivered scrape in the classic text format."""
        reply = self.get()
        assert reply.status == 200, reply.text
        return parse(reply.text)

    def signal(self, number: int = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Exit code of the process, negative for a signal; fails the test when it does not end."""
        assert self._process is not None
        try:
            code = self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the exporter does not end:\n" + "\n".join(self.lines)) from None
        assert self._reader is not None
        self._reader.join(DEADLINE)
        return code

    def terminate(self) -> int:
        """Ask it to stop; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: no last step, nothing flushed."""
        self.signal(signal.SIGKILL)
        self.wait()

    def logged(self, text: str) -> list[str]:
        """The lines on standard error that hold this text."""
        return [line for line in list(self.lines) if text in line]

    def peak_memory(self) -> int:
        """The most resident memory that the process has had, in bytes (Linux)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def _read(self, process: subprocess.Popen[str], listening: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.lines.append(line.rstrip("\n"))
                if not listening.is_set() and "listening" in line and (found := _LISTENING.search(line)):
                    self.port = int(found[1])
                    listening.set()


def run(home: Path, *flags: str) -> tuple[int, list[str]]:
    """Run the exporter where it must refuse to start: exit code and the lines on standard error."""
    exporter = Exporter(home, *flags).start(wait=False)
    try:
        return exporter.wait(), exporter.lines
    finally:
        exporter.__exit__()


def counters(samples: Samples) -> Samples:
    """The counters that must never fall: all of ours but those of the exporter itself, which start over."""
    return {
        key: value for key, value in samples.items()
        if key[0].endswith("_total") and key[0].startswith(_OWN) and not key[0].startswith(_INTERNAL)
    }


def fallen(before: Samples, after: Samples) -> list[str]:
    """Counters that were higher in an earlier scrape, or are not there any more."""
    return [
        f"{key}: {value} -> {after.get(key)}"
        for key, value in counters(before).items() if after.get(key, -1.0) < value
    ]


class Scrapes:
    """Scrapes in a thread of its own until the block ends; notes every counter that ever falls.

    An exporter that is not there, or goes away in the middle of a reply, is a scrape that failed: not an error.
    """

    def __init__(self, exporter: Exporter, *, every: float = 0.02) -> None:
        self._exporter, self._every = exporter, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.fallen: list[str] = []
        self.last: Samples = {}
        self.count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)

    def note(self, samples: Samples) -> None:
        self.fallen += fallen(self.last, samples)
        self.last = samples
        self.count += 1

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                reply = self._exporter.get()
            except OSError:
                continue
            if reply.status == 200:
                self.note(parse(reply.text))
