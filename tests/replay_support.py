"""Takes the recordings of real agents, gives tests a directory in which all of it happens again, now.

The recordings lie in the past; an exporter would take them for history, and their agents for dead. A `Replay` writes
the same files with all times in them moved, each change when it is due: instance files are replaced by renaming, logs
and session files grow line by line. What is short in the recording, such as a peak of 300 ms, is as short again.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from process_support import DEADLINE
from support import CAPTURES, DATA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_EPOCH = range(1_790_000_000, 1_800_000_000)
"""Seconds; the recordings and the ends of their rate limits lie in it, and none of their other numbers."""
_ALIVE = 3.0
"""An instance file that was written so many seconds before the end of a recording, or later, has a living process."""
_LIVE = "43a9-7458-b46a-e7da51bc947c"
"""In the paths of the session files of oh-my-pi whose processes were recorded too."""
_BEAT = 1.0
"""Seconds between the heartbeats that follow a recording."""


@dataclass(frozen=True)
class Change:
    """One write, at epoch seconds of the recording. An instance file is replaced, and removed without a document."""

    at: float
    path: str
    document: dict[str, Any] | None

    @property
    def replaces(self) -> bool:
        return self.path.endswith(".json")


@dataclass(frozen=True)
class Recording:
    """What agents wrote; to be played `speed` times as fast."""

    changes: tuple[Change, ...]
    speed: float = 1.0

    @cached_property
    def start(self) -> float:
        return min(change.at for change in self.changes)

    @cached_property
    def end(self) -> float:
        return max(change.at for change in self.changes)

    @property
    def seconds(self) -> float:
        """How long it takes to play."""
        return (self.end - self.start) / self.speed

    def played(self, at: float) -> float:
        """Seconds after the beginning of the replay. Before and after the recording, time passes as it does."""
        within = min(max(at, self.start), self.end)
        return (within - self.start) / self.speed + at - within

    def where(self, wanted: Callable[[Change], bool]) -> Recording:
        """A part of it."""
        return replace(self, changes=tuple(filter(wanted, self.changes)))


def pi(speed: float = 1.0) -> Recording:
    """Five processes; a peak of 97 % that lasts 300 ms; one is killed, and one shuts down before the others."""
    heartbeats = list(_heartbeats("pi", "telemetry/pi"))
    return Recording((
        *heartbeats, Change(heartbeats[0].at + 15.5, "telemetry/pi/10644.json", None),
        *_logs("pi/sessions", "sessions/pi"), *_logs("pi/agents", "mngr/agents"),
    ), speed)


def oh_my_pi(speed: float = 1.0) -> Recording:
    """A minute: three processes and a sub-agent, 102 % context; one is killed, one terminated, one shuts down."""
    return Recording((*_heartbeats("oh-my-pi", "telemetry/omp"),
                      *(change for change in _oh_my_pi_logs() if _LIVE in change.path)), speed)


def oh_my_pi_sessions(speed: float = 1.0) -> Recording:
    """What was done in the three minutes before it, and the four after it."""
    return Recording(tuple(change for change in _oh_my_pi_logs() if _LIVE not in change.path), speed)


def opencode(speed: float = 1.0) -> Recording:
    """Nine minutes."""
    return Recording(tuple(_logs("opencode/agents", "mngr/agents")), speed)


def claude_code(speed: float = 1.0) -> Recording:
    """Four minutes, in the end under a subscription."""
    return Recording(tuple(_logs("claude-code/agents", "mngr/agents")), speed)


def tools(speed: float = 1.0) -> Recording:
    """Two sessions of pi with parallel tools, failed, retried and aborted calls."""
    return Recording(tuple(_logs(DATA / "spans" / "cases", "sessions/pi/--srv-cases--")), speed)


def made_up() -> Recording:
    """What no recording has: a session with a name, at a thinking level, whose context is full for seconds; it waits.

    And messages whose cost nobody reported, of a model whose price is known, and of one whose price is not.
    """
    at = 1795225188

    def heartbeat(percent: int, pressure: str, activity: str, event: str) -> dict[str, Any]:
        return {
            "schemaVersion": 2,
            "process": {"pid": 777, "startedAt": at * 1000, "updatedAt": at * 1000, "heartbeatMs": 1500},
            "session": {"id": "made-up", "name": "tidy up"}, "state": {"activity": activity}, "lastEvent": event,
            "model": {"provider": "anthropic", "id": "claude-sonnet-4-5", "thinkingLevel": "high"},
            "context": {"tokens": 2000 * percent, "contextWindow": 200_000, "percent": percent, "pressure": pressure},
        }

    def message(model: str, cost_mode: str) -> dict[str, Any]:
        return {
            "source": "pi-coding/usage", "type": "cost_snapshot", "event_id": f"evt-{model}-{cost_mode}",
            "timestamp": "2026-11-21T01:39:50.000Z", "session_id": "made-up", "cost": None, "cost_mode": cost_mode,
            "tokens": {"input": 1000, "output": 500, "cache_read": 0, "cache_creation": 0}, "model": model,
        }

    process, log = "telemetry/pi/777.json", "mngr/agents/made-up/events/pi-coding/usage/events.jsonl"
    return Recording((
        Change(at, process, heartbeat(101, "at_limit", "working", "turn_end")),
        Change(at + 2, log, message("anthropic/claude-sonnet-4-5", "API_KEY")),
        Change(at + 2, log, message("anthropic/claude-sonnet-4-5", "SUBSCRIPTION")),
        Change(at + 2, log, message("nobody/knows-its-price", "API_KEY")),
        Change(at + 5, process, heartbeat(25, "normal", "waiting_input", "agent_end")),
    ))


class Replay:
    """Plays recordings below `home`, all from the same moment on; then agents that still live go on beating.

    With `hold`, time stands still after so many seconds, but for heartbeats, until `release`.
    """

    def __init__(self, home: Path, *recordings: Recording, hold: float = float("inf")) -> None:
        self._home, self._recordings, self._hold = home, recordings, hold
        self._held = 0.0
        self._began = self._clock = 0.0
        self._beating: dict[Path, dict[str, Any]] = {}
        self._beaten = 0.0
        self._released, self._holding, self._played = threading.Event(), threading.Event(), threading.Event()
        self._stop = threading.Event()
        self._failure: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def flags(self) -> list[str]:
        """What makes an exporter read it."""
        return [*(f"--{kind}.dir={agent}={self._home / kind / agent}"
                  for kind in ("telemetry", "sessions") for agent in ("pi", "omp")),
                f"--usage.root=mngr={self._home / 'mngr'}"]

    def __enter__(self) -> Self:
        self._began, self._clock = time.time(), time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)

    def wait_until_held(self) -> None:
        self._wait(self._holding)

    def release(self) -> None:
        self._released.set()

    def wait_until_played(self) -> None:
        self._wait(self._played)

    def _wait(self, event: threading.Event) -> None:
        longest = max(recording.seconds for recording in self._recordings)
        assert event.wait(longest + 2 * DEADLINE), "the replay does not get on"
        if self._failure:
            raise self._failure[0]

    def _run(self) -> None:
        try:
            self._play()
        except Exception as error:  # noqa: BLE001 -- for the thread that waits
            self._failure.append(error)
        finally:
            self._holding.set()
            self._played.set()

    def _play(self) -> None:
        due = sorted(((recording.played(change.at), recording, change)
                      for recording in self._recordings for change in recording.changes), key=lambda one: one[0])
        for played, recording, change in due:
            if played > self._hold and not self._holding.is_set():
                self._until(self._hold)
                held = time.monotonic()
                self._holding.set()
                while not self._released.is_set() and not self._stop.is_set():
                    self._beat()
                    self._released.wait(_BEAT / 10)
                self._held = time.monotonic() - held
            self._until(played)
            if self._stop.is_set():
                return
            self._write(recording, change)
        self._played.set()
        while not self._stop.wait(_BEAT / 10):
            self._beat()

    def _until(self, played: float) -> None:
        self._stop.wait(max(0.0, self._clock + self._held + played - time.monotonic()))

    def _now(self, recording: Recording, at: float) -> float:
        """Epoch seconds at which a moment of the recording happens again."""
        played = recording.played(at)
        return self._began + played + (self._held if played > self._hold else 0.0)

    def _write(self, recording: Recording, change: Change) -> None:
        path = self._home / change.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if change.document is None:
            path.unlink()
            self._beating.pop(path, None)
            return
        document = self._moved(recording, change.document)
        if not change.replaces:
            with path.open("a") as file:
                file.write(_line(document))
            return
        _swap(path, document)
        last = max(one.at for one in recording.changes if one.path == change.path)
        if change.at == last < recording.end - _ALIVE:
            self._beating.pop(path, None)  # killed
        else:
            self._beating[path] = document

    def _beat(self) -> None:
        """What an idle agent does: the last snapshot again, under a new time."""
        if time.monotonic() - self._beaten < _BEAT:
            return
        self._beaten = time.monotonic()
        for path, document in self._beating.items():
            document["process"]["updatedAt"] = round(time.time() * 1000)
            _swap(path, document)

    def _moved(self, recording: Recording, value: Any) -> Any:
        """A document with the times in it moved: ISO 8601, and epochs in seconds or milliseconds."""
        match value:
            case dict():
                return {name: self._moved(recording, inner) for name, inner in value.items()}
            case list():
                return [self._moved(recording, inner) for inner in value]
            case str() if _ISO.fullmatch(value):
                moved = datetime.fromtimestamp(self._milliseconds(recording, _seconds(value)) / 1000, UTC)
                return moved.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            case int() if value in _EPOCH:
                return round(self._now(recording, value))
            case int() if value // 1000 in _EPOCH:
                return self._milliseconds(recording, value / 1000)
            case _:
                return value

    def _milliseconds(self, recording: Recording, at: float) -> int:
        """The same for a time that is written in both ways: it may be what tells that two messages are one."""
        return round(self._now(recording, round(at, 3)) * 1000)


def _oh_my_pi_logs() -> Iterator[Change]:
    return _logs("oh-my-pi/sessions", "sessions/omp")


def _heartbeats(name: str, target: str) -> Iterator[Change]:
    for line in (DATA / "heartbeats" / f"{name}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        yield Change(entry["t"], f"{target}/{entry['name']}", entry.get("doc"))


def _logs(source: Path | str, target: str) -> Iterator[Change]:
    """The lines of all logs below a directory, each at its own time, but never before the line above it."""
    top = CAPTURES / source
    for path in sorted(top.rglob("*.jsonl")):
        documents = [json.loads(line) for line in path.read_text().split("\n") if line]
        at = _own(documents)[0]
        for document in documents:
            at = max([at, *_own([document])])
            yield Change(at, f"{target}/{path.relative_to(top)}", document)


def _own(documents: Iterable[dict[str, Any]]) -> list[float]:
    return [_seconds(document["timestamp"]) for document in documents if "timestamp" in document]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"


def _swap(path: Path, document: dict[str, Any]) -> None:
    scratch = path.with_name(f"{path.name}.tmp-{path.stem}")
    scratch.write_text(json.dumps(document))
    scratch.rename(path)
