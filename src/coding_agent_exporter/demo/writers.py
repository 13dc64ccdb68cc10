"""Takes what made-up agents do, gives the files that real agents write of it, and keeps the account of the truth.

The formats are those of the recordings in `tests/data`. All times are epoch milliseconds, money is pico-USD. What is
appended is kept until `flush`, so that a file is opened once however much happened.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from pathlib import Path

    from coding_agent_exporter.demo.work import Call, Context, Model, Tokens, Tool

PICO = 10**12
TOKEN_TYPES = ("input", "output", "cache_read", "cache_creation")
HEARTBEAT_MS = 1500
REPLY = "All done here, and the tests pass. " * 8


class Usage(NamedTuple):
    """What money and tokens are counted by. `root`: the alias of the directory for an exporter without settings."""

    root: str
    source: str
    provider: str
    model: str
    cost_mode: str


class Spend(NamedTuple):
    """What one line of a file added. `pico` is None where the agent reports tokens alone."""

    at: int
    usage: Usage
    pico: int | None
    tokens: Tokens


@dataclass
class Truth:
    """All that was spent, in the order in which the files said so."""

    spends: list[Spend] = field(default_factory=list)

    def add(self, at: int, usage: Usage, pico: int | None, tokens: Tokens = (0, 0, 0, 0)) -> None:
        self.spends.append(Spend(at, usage, pico, tokens))

    def pico(self, since: float = 0, until: float = float("inf")) -> Counter[Usage]:
        """Reported money of the window (since, until], epoch seconds."""
        spent: Counter[Usage] = Counter()
        for spend in self._within(since, until):
            if spend.pico is not None:
                spent[spend.usage] += spend.pico
        return spent

    def tokens(self, since: float = 0, until: float = float("inf")) -> Counter[tuple[Usage, str]]:
        """Tokens by type of the window (since, until]."""
        used: Counter[tuple[Usage, str]] = Counter()
        for spend in self._within(since, until):
            for kind, count in zip(TOKEN_TYPES, spend.tokens, strict=True):
                if count:
                    used[spend.usage, kind] += count
        return used

    def first(self, usage: Usage) -> float:
        """When a label set was first spent on, epoch seconds."""
        return min(spend.at for spend in self.spends if spend.usage == usage) / 1000

    def _within(self, since: float, until: float) -> Iterable[Spend]:
        return (spend for spend in self.spends if since * 1000 < spend.at <= until * 1000)


def iso(ms: int) -> str:
    """A time as the writers put it."""
    at = datetime.fromtimestamp(ms / 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def identifier(chance: random.Random, at: int) -> str:
    """A UUID of version 7."""
    high, low = 0x7000 | chance.getrandbits(12), 0x8000 | chance.getrandbits(14)
    return f"{at >> 16:08x}-{at & 0xFFFF:04x}-{high:04x}-{low:04x}-{chance.getrandbits(48):012x}"


class Log:
    """An append-only file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = False
        """Whether nothing more will be appended."""
        self._lines: list[str] = []
        self._at = 0

    def append(self, at: int, *documents: dict[str, Any]) -> None:
        """Lines that are written at this time."""
        self._lines += [json.dumps(document, separators=(",", ":")) + "\n" for document in documents]
        self._at = at

    def flush(self, _: int) -> None:
        if self._lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._lines))
            self._lines.clear()
            os.utime(self.path, ns=(self._at * 10**6, self._at * 10**6))


class Instance:
    """The instance file of one process, as pi-telemetry writes it: whole, by renaming, at events and as a heartbeat."""

    def __init__(
        self, directory: Path, pid: int, at: int, *, host: str, cwd: str, session: str, name: str, context: Context
    ) -> None:
        self.path = directory / f"{pid}.json"
        self._pid, self._started = pid, at
        self._host, self._cwd, self._session, self._name = host, cwd, session, name
        self._context = context
        self._figures = (context.tokens, context.percent)
        self._busy, self._event, self._at, self._events = False, "session_start", at, 0
        self._end: int | None = None
        self._removed = False
        self._written = (0, 0)

    def event(self, at: int, name: str, *, busy: bool = True) -> None:
        """Something happened, and the file is written."""
        self._at, self._event, self._busy, self._events = at, name, busy, self._events + 1
        self._figures = (self._context.tokens, self._context.percent)

    def exit(self, at: int) -> None:
        """The process ends and removes its file."""
        self._end, self._removed = at, True

    def kill(self, at: int) -> None:
        """The process ends at once and leaves its file behind."""
        self._end = at

    @property
    def ended(self) -> bool:
        return self._end is not None

    def flush(self, now: int) -> None:
        """Bring the file to where it is at `now`."""
        if self._removed:
            self.path.unlink(missing_ok=True)
            return
        now = now if self._end is None else min(now, self._end)
        beats = (now - self._started) // HEARTBEAT_MS
        updated = max(self._at, self._started + beats * HEARTBEAT_MS)
        if self._written == (updated, self._events):
            return
        self._written = (updated, self._events)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self._pid}.json.tmp-{self._pid}")
        part.write_text(json.dumps(self._document(updated, beats + self._events)), encoding="utf-8")
        os.utime(part, ns=(updated * 10**6, updated * 10**6))
        part.rename(self.path)

    def _document(self, updated: int, sequence: int) -> dict[str, Any]:
        model = self._context.model
        tokens, percent = self._figures
        left = None if tokens is None else model.window - tokens
        levels = ((100, "at_limit"), (95, "near_limit"), (85, "approaching_limit"), (0, "normal"))
        return {
            "schemaVersion": 2,
            "source": "pi-telemetry",
            "process": {
                "pid": self._pid, "ppid": 1, "startedAt": self._started, "updatedAt": updated,
                "uptimeMs": updated - self._started, "heartbeatSeq": sequence, "heartbeatMs": HEARTBEAT_MS,
            },
            "system": {"host": self._host, "user": "dev", "platform": "linux", "arch": "x64", "nodeVersion": "v22.0.0"},
            "workspace": {"cwd": self._cwd, "git": {"branch": "main", "commit": "0e405cc"}},
            "session": {"id": self._session, "name": self._name},
            "model": {"provider": model.provider, "id": model.name, "name": model.name, "thinkingLevel": "high"},
            "state": {
                "activity": "working" if self._busy else "waiting_input", "isIdle": not self._busy,
                "hasPendingMessages": False, "waitingForInput": not self._busy, "busy": self._busy,
            },
            "context": {
                "tokens": tokens, "contextWindow": model.window, "percent": percent, "remainingTokens": left,
                "remainingPercent": None if percent is None else 100 - percent,
                "pressure": None if percent is None else next(name for least, name in levels if percent >= least),
                "closeToLimit": None if percent is None else percent >= 85,
                "nearLimit": None if percent is None else percent >= 95,
            },
            "messages": {"lastAssistantText": REPLY, "lastAssistantUpdatedAt": self._at},
            "lastEvent": self._event,
        }


class Session(Log):
    """A session file of pi, or of oh-my-pi (`omp`), which adds a title, its own notes, and when calls ended."""

    def __init__(
        self, root: Path, at: int, chance: random.Random, *, cwd: str, omp: bool = False, parent: Session | None = None
    ) -> None:
        self.uuid = identifier(chance, at)
        self.name = f"{iso(at).replace(':', '-').replace('.', '-')}_{self.uuid}"
        dashed = cwd.strip("/").replace("/", "-")
        super().__init__(root / (f"-{dashed}" if omp else f"--{dashed}--") / f"{self.name}.jsonl")
        self._chance, self._omp = chance, omp
        self.last: str | None = None
        self.entries: list[dict[str, Any]] = []
        header = {"type": "session", "version": 3, "id": self.uuid, "timestamp": iso(at), "cwd": cwd}
        if omp:
            self.append(at, {"type": "title", "v": 1, "title": "", "updatedAt": iso(at), "pad": " " * 174})
        if parent is not None:
            header["parentSession"] = str(parent.path)
        self.append(at, header)
        if parent is not None:
            # A fork begins with what it was forked from, entry by entry.
            self.last, self.entries = parent.last, list(parent.entries)
            self.append(at, *self.entries)

    def user(self, at: int, sent: int) -> None:
        self._message(at, {"role": "user", "content": [{"type": "text", "text": "Please go on."}], "timestamp": sent})

    def call(self, at: int, model: Model, call: Call, stop: str, tools: list[Tool]) -> list[str]:
        """A model call that ended at `at`. Returns the ids of the tools that it asks for."""
        ids = [f"call_{self._chance.getrandbits(48):012x}" for _ in tools]
        usage = dict(zip(("input", "output", "cacheRead", "cacheWrite"), call.tokens, strict=True))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": [{"type": "text", "text": REPLY}, *(
                {"type": "toolCall", "id": name, "name": tool.name, "arguments": {"command": "make test"}}
                for name, tool in zip(ids, tools, strict=True))],
            "api": "openai-completions", "provider": model.provider, "model": model.name,
            "usage": {**usage, "totalTokens": sum(call.tokens), "cost": {"total": call.pico / PICO}},
            "stopReason": stop, "timestamp": at - call.duration,
            "responseId": f"msg_{self._chance.getrandbits(64):016x}",
        }
        if stop in {"error", "aborted"}:
            message["errorMessage"] = "Overloaded" if stop == "error" else "Request was aborted"
        if self._omp:
            message |= {"duration": float(call.duration), "ttft": float(call.first_token), "completedAt": at}
        self._message(at, message)
        return ids

    def start(self, at: int, name: str, tool: Tool) -> None:
        """oh-my-pi notes when a tool starts; pi does not."""
        if self._omp:
            data = {"toolCallId": name, "toolName": tool.name, "startedAt": iso(at), "args": {}}
            self._entry(at, {"type": "custom", "customType": "tool_execution_start", "data": data})

    def result(self, at: int, name: str, tool: Tool) -> None:
        self._message(at, {
            "role": "toolResult", "toolCallId": name, "toolName": tool.name,
            "content": [{"type": "text", "text": "ok"}], "isError": tool.failed, "timestamp": at,
        })

    def compaction(self, at: int, before: int) -> None:
        self._entry(at, {"type": "compaction", "summary": REPLY, "firstKeptEntryId": self.last, "tokensBefore": before})

    def exit(self, at: int) -> None:
        if self._omp:
            data = {"reason": "dispose", "kind": "normal", "recordedAt": iso(at)}
            self._entry(at, {"type": "custom", "customType": "session_exit", "data": data})

    def _message(self, at: int, message: dict[str, Any]) -> None:
        self._entry(at, {"type": "message", "message": message})

    def _entry(self, at: int, entry: dict[str, Any]) -> None:
        name = f"{self._chance.getrandbits(32):08x}"
        kind = entry.pop("type")
        entry = {"type": kind, "id": name, "parentId": self.last, "timestamp": iso(at), **entry}
        self.last = name
        self.entries.append(entry)
        self.append(at, entry)


class UsageLog(Log):
    """One agent's usage log below a directory of mngr."""

    def __init__(self, root: Path, agent: str, source: str) -> None:
        super().__init__(root / "agents" / agent / "events" / source / "usage" / "events.jsonl")
        self._source = source
        self._count = 0

    def event(self, at: int, session: str, *, timestamp: int = 0, **members: Any) -> None:
        """One line. `timestamp`: what the line says, where that is not when it is written."""
        self._count += 1
        self.append(at, {
            "source": f"{self._source}/usage", "type": "cost_snapshot", "event_id": f"evt-{self._count}",
            "timestamp": iso(timestamp or at), "session_id": session, **members,
        })


def figures(pico: int | None, tokens: Tokens) -> dict[str, Any]:
    """The members of an event that say what was used."""
    return {
        "cost": None if pico is None else {"total_cost_usd": pico / PICO},
        "tokens": dict(zip(TOKEN_TYPES, tokens, strict=True)),
    }
