"""Takes a seed, gives the crash tests a fleet of agents with the truth of them, and what a process can be killed by."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from agents_support import (
    ClaudeLog,
    OpenCodeLog,
    PiInstance,
    PiLog,
    Truth,
    UsageLog,
    figures,
    some_money,
    some_tokens,
)
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.store import Store
from process_support import Exporter, Scrapes, counters
from spans_process_support import LiveSession
from support import Samples, drain, exact, settings, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coding_agent_exporter.spanmodel import Span

HISTORY = ("--counters.baseline-age=1d", "--otlp.backfill")
"""Nothing a test does is too old to be counted as new, or to give spans."""
CORRECTED = "anthropic/corrected"
SETTLED = ("coding_agent_cost_usd_total", "coding_agent_tokens_total", "coding_agent_messages_total",
           "coding_agent_unpriced_tokens_total", "coding_agent_sessions_total", "coding_agent_turns_total",
           "coding_agent_tool_calls_total", "coding_agent_turn_duration_seconds_bucket",
           "coding_agent_turn_duration_seconds_sum", "coding_agent_tool_duration_seconds_bucket",
           "coding_agent_tool_duration_seconds_sum", "gen_ai_client_token_usage_bucket")
"""What follows from the logs alone, not from when heartbeats were read."""


class CodexLog(UsageLog):
    """Codex's log: the running total of a session, with tokens."""

    source = "codex"

    def __init__(self, root: Path, agent: str, truth: Truth | None = None) -> None:
        super().__init__(root, agent, truth)
        self.new_session()

    def new_session(self) -> None:
        self.session, self._pico, self._tokens = str(uuid.uuid4()), 0, [0, 0, 0, 0]

    def spend(self, model: str, pico: int, tokens: tuple[int, int, int, int]) -> None:
        """The totals rise by this much."""
        self._pico += pico
        self._tokens = [before + more for before, more in zip(self._tokens, tokens, strict=True)]
        self.truth.add((self.source, "openai", model, "api_key"), pico, tokens)
        all_tokens = (self._tokens[0], self._tokens[1], self._tokens[2], self._tokens[3])
        self.append(self._event(
            self._now(None), self.session, f"openai/{model}", **figures(self._pico, all_tokens)))


class Fleet:
    """Agents of every kind below `home`; `act` lets one of them do something, `finish` all that was begun.

    Lines are torn, logs rotated, truncated and written again, agents destroyed; one model's messages are corrected
    downwards, until the last one, which is larger than any correction. As a block, a thread that acts on and on.
    """

    def __init__(self, home: Path, seed: int, *, every: float = 0.01) -> None:
        self.home, self.root, self.truth = home, home / ".mngr", Truth()
        self.actions = 0
        self._every, self._chance = every, random.Random(seed)
        self._names = map("agent-{}".format, itertools.count())
        self._pi = PiLog(self.root, next(self._names), self.truth)
        self._opencode = OpenCodeLog(self.root, next(self._names), self.truth)
        self._claude = ClaudeLog(self.root, next(self._names), self.truth)
        self._codex = CodexLog(self.root, next(self._names), self.truth)
        self.sessions = [self._session(), self._session()]
        self._corrections = OpenCodeLog(self.root, "corrected", self.truth)
        self._corrected = self._all_corrections()
        self._instances = [PiInstance(home / ".pi/agent/telemetry/instances", pid) for pid in (11, 12, 13)]
        self.burst = threading.Event()
        """Set it to have a lot written at once: a commit of many pages."""
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def flags(self) -> list[str]:
        return [f"--usage.root=mngr={self.root}", f"--sessions.dir=pi={self.home / '.pi/agent/sessions'}",
                f"--telemetry.dir=pi={self.home / '.pi/agent/telemetry/instances'}", *HISTORY]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._every):
                self.act()
                if self.burst.is_set():
                    self.burst.clear()
                    self._write_much()
        except BaseException as failure:  # noqa: BLE001  for the thread that waits
            self._failure = failure
        self.finish()

    def finish(self) -> None:
        """The last correction, and the message that makes up for all of them."""
        self._stop.set()
        for event in self._corrected:
            self._corrections.append(event)

    def act(self) -> None:
        self.actions += 1
        chance = self._chance
        model = f"anthropic/model-{int(chance.paretovariate(0.7)) % 60}"
        match chance.randrange(48):
            case 0:
                log = self._any()
                if len(list(log.path.parent.glob("events.jsonl.*"))) < 5:
                    log.rotate()
            case 1:
                self._rewrite(self._any())
            case 2:
                self._replace()
            case 3:
                self._pi.new_session()
                self._codex.new_session()
            case 4:
                chance.choice((self._claude.restart, self._claude.clear))()
            case 5:
                self.sessions.append(self._session())
            case 6 | 7 | 8:
                self._corrections.append(next(self._corrected))
            case number if number < 15:
                self._claude.spend(f"claude-{number % 3}", some_money(chance))
            case number if number < 22:
                self._codex.spend(f"codex-{number % 2}", some_money(chance), some_tokens(chance))
            case number if number < 29:
                self._opencode.message(model, some_money(chance), some_tokens(chance))
            case number if number < 33:
                chance.choice(self._instances).write(chance.choice((None, 12, 86, 97, 101)))
            case number if number < 37:
                self.sessions[-chance.randrange(1, 3)].anything(chance)
            case _:
                events = [self._pi.event(model, some_money(chance), some_tokens(chance)) for _ in range(5)]
                self._torn(self._pi, "".join(f"{json.dumps(event)}\n" for event in events).encode())

    def _write_much(self) -> None:
        """Sessions enough for some hundred pages."""
        lines = []
        for _ in range(60):
            self._pi.new_session()
            lines += [json.dumps(self._pi.event(f"anthropic/much-{number % 5}", 10**9)) + "\n" for number in range(40)]
        self._pi.write("".join(lines).encode())

    def _session(self) -> LiveSession:
        return LiveSession(self.home / ".pi/agent/sessions")

    def _any(self) -> UsageLog:
        return self._chance.choice((self._pi, self._opencode, self._claude, self._codex))

    def _torn(self, log: UsageLog, data: bytes) -> None:
        cut = self._chance.randrange(len(data))
        log.write(data[:cut])
        log.write(data[cut:])

    def _rewrite(self, log: UsageLog) -> None:
        """Truncate a log and write the same again, in parts."""
        if log.path.exists():
            content = log.path.read_bytes()
            os.truncate(log.path, 0)
            self._torn(log, content)

    def _replace(self) -> None:
        """An agent is destroyed: its files are preserved, and another one of its kind begins."""
        log = self._any()
        if not log.home.exists():
            return
        log.preserve()
        new = type(log)(self.root, next(self._names), self.truth)
        for name in ("_pi", "_opencode", "_claude", "_codex"):
            if getattr(self, name) is log:
                setattr(self, name, new)

    def _all_corrections(self) -> Iterator[dict[str, object]]:
        while not self._stop.is_set():
            yield from self._corrections.corrected(CORRECTED, 10**9)
        yield from self._corrections.events(CORRECTED, 10**15, (10**6,) * 4)

    def differences(self, samples: Samples) -> list[str]:
        """Where a scrape differs from the truth, of usage logs and of session files."""
        found = self.truth.differences({key: value for key, value in samples.items() if ("root", "mngr") in key[1]})
        calls = sum('"role": "assistant"' in line for session in self.sessions for line in session.lines)
        for name, each, labels in (("coding_agent_cost_usd_total", 0.25, {}), ("coding_agent_messages_total", 1, {}),
                                   ("coding_agent_tokens_total", 20, {"token_type": "output"})):
            shown = total(samples, name, root="pi", **labels)
            if shown != calls * each:
                found.append(f"sessions: {name} is {shown} instead of {calls * each}")
        return found

    def spans(self) -> dict[str, Span]:
        """Those of the session files, by id."""
        return {span.span: span for session in self.sessions for span in session.spans}


class Watch(Scrapes):
    """Compares each scrape with the most that any before has shown of a counter. One at 0 may be away for a while."""

    def __init__(self, exporter: Exporter, *, every: float) -> None:
        super().__init__(exporter, every=every)
        self._most: Samples = {}

    def note(self, samples: Samples) -> None:
        shown = counters(samples)
        self.fallen += [f"scrape {self.count}, {key}: {value} -> {shown.get(key)}"
                        for key, value in self._most.items() if value > shown.get(key, 0)]
        self._most |= shown
        self.count += 1


def settled(counted: dict[tuple[str, tuple[str, ...]], int]) -> dict[tuple[str, tuple[str, ...]], int]:
    """Exact totals that follow from the logs alone."""
    return {key: amount for key, amount in counted.items() if key[0] in SETTLED and amount}


def uninterrupted(fleet: Fleet, home: Path) -> tuple[dict[tuple[str, tuple[str, ...]], int], set[str]]:
    """What one run over all there is comes to: exact totals, and the ids of its spans."""
    home.mkdir()
    pipeline = Pipeline(settings(home, *fleet.flags), spans=True)
    drain(pipeline)
    found = settled(exact(pipeline)), {span.span for _, span in pipeline._store.spans(10**6)}
    pipeline.close()
    return found


def stored(state: Path) -> dict[tuple[str, tuple[str, ...]], int]:
    """The exact totals in a state file that nobody uses."""
    store = Store(state)
    try:
        return settled({key: series.exact for key, series in store.counters()})
    finally:
        store.close()


def copy_state(state: Path, target: Path) -> None:
    """What a kill would leave now: the file and its log, and nothing of what only memory holds."""
    target.mkdir(parents=True)
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{state}{suffix}", target / f"{state.name}{suffix}")


def end_of_log(state: Path) -> tuple[int, bool]:
    """Where the pages of the write-ahead log end, and whether the last ones are of a transaction without its end."""
    try:
        log = state.with_name(f"{state.name}-wal").read_bytes()
    except FileNotFoundError:
        log = b""
    if len(log) < 32:
        return len(log), bool(log)
    # A log that is used again has older pages behind its end, under other salts.
    page, salts, place, whole = struct.unpack(">I", log[8:12])[0], log[16:24], 32, True
    while log[place + 8:place + 16] == salts:
        whole = len(log) - place >= 24 + page and log[place + 4:place + 8] != b"\0\0\0\0"
        place += 24 + page
    return place, not whole


_KILLER = """
import os, signal, sys, time
pid, path, end = int(sys.argv[1]), sys.argv[2], time.monotonic() + float(sys.argv[3])
first = os.stat(path).st_mtime_ns
print("ready", flush=True)
while time.monotonic() < end and os.stat(path).st_mtime_ns == first:
    pass
os.kill(pid, signal.SIGKILL)
"""


def kill_at_write(pid: int, path: Path, begin: Callable[[], None], *, seconds: float) -> None:
    """`begin` something, and kill as soon as a file is seen to change; at last anyway.

    A process of its own looks: a thread of this one would wait for the others' turns.
    """
    command = [sys.executable, "-S", "-E", "-c", _KILLER, str(pid), str(path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killer:
        assert killer.stdout is not None
        killer.stdout.readline()
        begin()
    assert killer.returncode == 0


def kill_in_commit(pid: int, state: Path, begin: Callable[[], None], room: int, *, seconds: float) -> None:
    """`begin` something, and kill once the next `room` bytes of the write-ahead log are written, and no more.

    A limit on the place in files ends the write within a page: what a kill at that very moment leaves.
    """
    limit = end_of_log(state)[0] + room
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))
    begin()
    end = time.monotonic() + seconds
    while not end_of_log(state)[1] and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def as_text(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())
