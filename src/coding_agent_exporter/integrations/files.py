"""Takes an agent's state and usage, gives the files that pi-telemetry and mngr's writer keep of them.

What is read by others is either whole or not there: instance files are renamed into place, lines of a log are
appended by one write.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coding_agent_exporter.integrations.agent import Agent, Usage

SOURCE = "pi-coding"
AGENT = "pi-rpc"
"""The agent's name where nobody gives it a directory."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to write, and as whom. Times are ms, percentages 0 to 100."""

    telemetry: Path
    agent: Path
    heartbeat_ms: int
    close_percent: float
    near_percent: float

    @classmethod
    def of(cls, environ: Mapping[str, str], *, telemetry_dir: str | os.PathLike[str] | None = None,
           agent_dir: str | os.PathLike[str] | None = None, heartbeat_ms: float | None = None) -> Places:
        """What is given, else what the variables of pi-telemetry and mngr say, else where an exporter looks."""
        home = home_of(environ)
        telemetry = telemetry_dir or environ.get("PI_TELEMETRY_DIR", "").strip()
        host = environ.get("MNGR_HOST_DIR") or home / ".mngr"
        agent = agent_dir or environ.get("MNGR_AGENT_STATE_DIR") or Path(host, "agents", AGENT)
        asked = heartbeat_ms or _number(environ.get("PI_TELEMETRY_HEARTBEAT_MS"), 0)
        return cls(
            telemetry=Path(telemetry or home / ".pi" / "agent" / "telemetry" / "instances").absolute(),
            agent=Path(agent).absolute(),
            heartbeat_ms=max(250, int(asked)) if asked > 0 else 1500,
            close_percent=_number(environ.get("PI_TELEMETRY_CLOSE_PERCENT"), 85),
            near_percent=_number(environ.get("PI_TELEMETRY_NEAR_PERCENT"), 95),
        )


class InstanceFile:
    """`<pid>.json`, schema version 2. It yields to pi's own extension, which knows more."""

    def __init__(self, places: Places, pid: int, started_ms: int, cwd: str) -> None:
        self.path = places.telemetry / f"{pid}.json"
        self._places, self._pid, self._started, self._cwd = places, pid, started_ms, cwd
        self._host = socket.gethostname()
        self._sequence = 0
        self._last: dict[str, Any] = {}

    def write(self, agent: Agent, now_ms: int) -> None:
        """Write the state. Raises OSError; what was there before then stays."""
        if self._is_foreign():
            return
        self._sequence += 1
        document = self._document(agent, now_ms)
        data = json.dumps(document, separators=(",", ":")).encode()
        # Agents whose pid is not known share the driver's: each is written by a thread of its own.
        beside = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}-{threading.get_native_id()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                descriptor = os.open(beside, flags, 0o644)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(beside, flags, 0o644)
            except FileExistsError:
                # Left by one that died in the middle of this.
                beside.unlink()
                descriptor = os.open(beside, flags, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            beside.replace(self.path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        self._last = document["process"]

    def remove(self) -> None:
        """Take the file away, if it is the one written here."""
        with suppress(FileNotFoundError):
            if self._last and self._written() == self._last:
                self.path.unlink()

    def _is_foreign(self) -> bool:
        """Whether somebody else in the same process writes this file: pi-telemetry, loaded by pi."""
        try:
            process = self._written()
            # A process that had the pid before this one does not write any more. When a writer started says nothing:
            # pi may have loaded its extension before the driver's `start` was over.
            return process != self._last and bool(process["updatedAt"] >= self._started)
        except (OSError, TypeError, KeyError):
            return False

    def _written(self) -> Any:
        """The part of the file that differs between any two that were written. Raises OSError.

        Not the inode: its number is used again for the file that takes the place of the one before.
        """
        try:
            return json.loads(self.path.read_bytes())["process"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _document(self, agent: Agent, now_ms: int) -> dict[str, Any]:
        model = {"provider": agent.provider, "id": agent.model, "name": agent.model_name or agent.model,
                 **({"thinkingLevel": agent.thinking} if agent.thinking else {})}
        branch = _branch(self._cwd)
        context = self._context(agent)
        return {
            "schemaVersion": 2,
            "source": "coding-agent-exporter",
            "process": {
                "pid": self._pid, "startedAt": self._started, "updatedAt": now_ms,
                "uptimeMs": now_ms - self._started, "heartbeatSeq": self._sequence,
                "heartbeatMs": self._places.heartbeat_ms,
            },
            "system": {"host": self._host, "platform": platform.system().lower(), "arch": platform.machine()},
            "workspace": {"cwd": self._cwd, **({"git": {"branch": branch}} if branch else {})},
            "session": {
                "id": agent.session_id, **({"file": agent.session_file} if agent.session_file else {}),
                **({"name": agent.session_name} if agent.session_name else {}),
            },
            **({"model": model} if agent.model else {}),
            "state": {
                "activity": "working" if agent.working else "waiting_input", "isIdle": not agent.working,
                "hasPendingMessages": agent.pending > 0, "waitingForInput": not agent.working, "busy": agent.working,
            },
            **({"context": context} if context else {}),
            "capabilities": {"hasUI": False},
            "lastEvent": agent.last_event,
        }

    def _context(self, agent: Agent) -> dict[str, Any] | None:
        window, tokens = agent.window, agent.tokens
        if window is None:
            return None
        percent = None if tokens is None else tokens / window * 100
        at, near, close = (percent is not None and percent >= least
                           for least in (100, self._places.near_percent, self._places.close_percent))
        return {
            "tokens": tokens, "contextWindow": window, "percent": percent,
            "remainingTokens": None if tokens is None else max(window - tokens, 0),
            "remainingPercent": None if percent is None else max(100 - percent, 0),
            "pressure": "at_limit" if at else "near_limit" if near else "approaching_limit" if close else "normal",
            "closeToLimit": close, "nearLimit": near,
        }


class UsageLog:
    """`events/pi-coding/usage/events.jsonl` below an agent's directory. Several processes may append to one."""

    def __init__(self, agent: Path) -> None:
        self.path = agent / "events" / SOURCE / "usage" / "events.jsonl"

    def append(self, line: bytes) -> None:
        """Append a line, without its end. Raises OSError: the line is then not there, or torn and to be repeated."""
        # Opened each time: the log can be rotated or moved away in between.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, flags, 0o644)
        try:
            data = (b"\n" if _is_torn(descriptor) else b"") + line + b"\n"
            if os.write(descriptor, data) < len(data):
                raise OSError(28, "no space left for a whole line", str(self.path))
        finally:
            os.close(descriptor)


def _is_torn(descriptor: int) -> bool:
    """Whether a file ends in half a line, ours or another writer's, as a disk that was full leaves it."""
    size = -1
    while True:
        before, size = size, os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return False
        if size == before:
            return True
        # Or another writer is in the middle of a line just now.
        time.sleep(0.01)


def home_of(environ: Mapping[str, str]) -> Path:
    """The home directory; `/` where a user has none, as in containers with a user id of their own."""
    try:
        return Path(environ.get("HOME") or "~").expanduser()
    except RuntimeError:
        return Path("/")


def usage_line(usage: Usage, session: str) -> bytes:
    """One message as mngr's pi writer logs it. `session` is the base name of its session file."""
    name = f"{usage.provider}/{usage.model}" if usage.provider else usage.model
    return json.dumps({
        "source": f"{SOURCE}/usage", "type": "cost_snapshot", "event_id": f"evt-pi-usage-{uuid.uuid4().hex}",
        "timestamp": iso(usage.started), "session_id": session,
        "cost": None if usage.cost is None else {"total_cost_usd": usage.cost},
        "tokens": {"input": usage.input, "output": usage.output, "cache_read": usage.cache_read,
                   "cache_creation": usage.cache_creation},
        **({"model": name} if name else {}),
    }, separators=(",", ":")).encode()


def iso(ms: int) -> str:
    """Epoch milliseconds as the writers put them."""
    at = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def _number(text: str | None, otherwise: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return otherwise
    return value if abs(value) < 1e9 else otherwise


def _branch(cwd: str) -> str:
    """The branch that is checked out, read from git's own files; empty where there is none."""
    with suppress(OSError, ValueError):
        for place in (Path(cwd), *Path(cwd).parents):
            git = place / ".git"
            if git.is_file():  # a worktree, or a submodule
                git = place / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
            if git.is_dir():
                head = (git / "HEAD").read_text(encoding="utf-8").strip()
                return head.removeprefix("ref: refs/heads/") if head.startswith("ref: ") else "HEAD"
    return ""
