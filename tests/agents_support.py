"""Takes what an agent shall spend, gives the files that real agents write of it, and keeps the account of the truth.

The lines have the shape of the recordings. Money is an integer number of pico-USD here too: the truth is exact.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from coding_agent_exporter.model import PICO
from support import Samples, total

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

Usage = tuple[str, str, str, str]
"""(source, provider, model, cost mode)"""

TOKEN_TYPES = ("input", "output", "cache_read", "cache_creation")


@dataclass
class Truth:
    """What was really spent, as the writers meant it."""

    pico: Counter[Usage] = field(default_factory=Counter)
    tokens: Counter[tuple[Usage, str]] = field(default_factory=Counter)
    messages: Counter[Usage] = field(default_factory=Counter)

    def add(self, usage: Usage, pico: int, tokens: tuple[int, ...] = ()) -> None:
        """One message."""
        self.pico[usage] += pico
        self.messages[usage] += 1
        for kind, count in zip(TOKEN_TYPES, tokens, strict=bool(tokens)):
            self.tokens[usage, kind] += count

    @property
    def usd(self) -> float:
        return self.pico.total() / PICO

    def differences(self, samples: Samples) -> list[str]:
        """Where the values of a scrape differ: money beyond a millionth of a cent, tokens at all."""
        found = []
        for usage, pico in self.pico.items():
            source, provider, model, mode = usage
            labels = {"source": source, "provider": provider, "model": model, "cost_mode": mode}
            usd = total(samples, "coding_agent_cost_usd_total", **labels)
            if abs(usd - pico / PICO) > 1e-8:
                found.append(f"{usage}: {usd} USD instead of {pico / PICO}")
            for kind in TOKEN_TYPES:
                count = total(samples, "coding_agent_tokens_total", token_type=kind, **labels)
                if count != self.tokens[usage, kind]:
                    found.append(f"{usage}: {count} {kind} tokens instead of {self.tokens[usage, kind]}")
        if abs(total(samples, "coding_agent_cost_usd_total") - self.usd) > 1e-6:
            found.append(f"{total(samples, 'coding_agent_cost_usd_total')} USD in all instead of {self.usd}")
        return found


def iso(seconds: float, *, digits: int = 3) -> str:
    """A time as the writers put it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[: 20 + digits] + "Z"


class UsageLog:
    """One agent's usage log below a directory of mngr, and what can befall it. One writer at a time."""

    source = ""

    def __init__(self, root: Path, agent: str, truth: Truth | None = None) -> None:
        self.root, self.agent = root, agent
        self.truth = truth or Truth()
        self.home = root / "agents" / agent
        self._lines = itertools.count()
        self._last = 0

    @property
    def path(self) -> Path:
        return self.home / "events" / self.source / "usage" / "events.jsonl"

    def write(self, data: bytes) -> None:
        """Append these bytes, whatever they are."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(data)

    def append(self, *events: dict[str, Any]) -> None:
        self.write(b"".join(json.dumps(event).encode() + b"\n" for event in events))

    def rotate(self) -> None:
        """As logrotate does: `events.jsonl.1` is the latest part."""
        older = sorted(self.path.parent.glob("events.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
        for path in older:
            path.rename(path.with_suffix(f".{int(path.suffix[1:]) + 1}"))
        if self.path.exists():
            self.path.rename(self.path.with_suffix(".jsonl.1"))

    def replay(self, read: Callable[[], object]) -> None:
        """Truncate the log, let somebody `read` it, and write the same bytes again."""
        content = self.path.read_bytes()
        os.truncate(self.path, 0)
        read()
        self.path.write_bytes(content)

    def preserve(self) -> None:
        """As mngr does with the files of an agent that is destroyed."""
        target = self.root / "preserved" / f"name--{self.agent}"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.home.rename(target)
        self.home = target

    def delete(self) -> None:
        shutil.rmtree(self.home)

    def _event(self, at: float, session: str, model: str | None = None, **members: Any) -> dict[str, Any]:
        return {
            "source": f"{self.source}/usage", "type": "cost_snapshot", "event_id": f"evt-{next(self._lines)}",
            "timestamp": iso(at), "session_id": session, **({"model": model} if model else {}), **members,
        }

    def _now(self, at: float | None) -> float:
        """The given time, or now; never the same millisecond twice, nor a whole second."""
        if at is not None:
            return at
        self._last = max(int(time.time() * 1000), self._last + 1)
        self._last += self._last % 1000 == 0
        return self._last / 1000


def figures(pico: int, tokens: tuple[int, int, int, int]) -> dict[str, Any]:
    """The members of an event that say what was used."""
    return {
        "cost": {"total_cost_usd": pico / PICO},
        "tokens": dict(zip(TOKEN_TYPES, tokens, strict=True)),
        "cost_mode": "API_KEY",
    }


class PiLog(UsageLog):
    """pi's log: one line a message."""

    source = "pi-coding"

    def __init__(self, root: Path, agent: str, truth: Truth | None = None) -> None:
        super().__init__(root, agent, truth)
        self.session = ""
        self.new_session()

    def new_session(self) -> None:
        self.session = f"{iso(time.time()).replace(':', '-').replace('.', '-')}_{uuid.uuid4()}"

    def event(self, model: str, pico: int, tokens: tuple[int, int, int, int] = (3, 5, 7, 11),
              at: float | None = None) -> dict[str, Any]:
        """One message's line, counted in the truth; for the caller to append."""
        provider, _, name = model.partition("/")
        self.truth.add((self.source, provider, name, "api_key"), pico, tokens)
        return self._event(self._now(at), self.session, model, **figures(pico, tokens))

    def message(self, model: str, pico: int, tokens: tuple[int, int, int, int] = (3, 5, 7, 11),
                at: float | None = None) -> None:
        self.append(self.event(model, pico, tokens, at))


class OpenCodeLog(UsageLog):
    """OpenCode's log: zeros when a message starts, its final figures two or more times when it ends."""

    source = "opencode"

    def message(self, model: str, pico: int, tokens: tuple[int, int, int, int] = (3, 5, 7, 11)) -> None:
        for event in self.events(model, pico, tokens):
            self.append(event)

    def events(self, model: str, pico: int, tokens: tuple[int, int, int, int]) -> Iterator[dict[str, Any]]:
        """The lines of one message; it counts in the truth once its final figures are asked for."""
        session, message = f"ses_{self.agent}", f"msg_{uuid.uuid4().hex}"
        provider, _, name = model.partition("/")
        yield self._event(self._now(None), session, model, message_id=message, **figures(0, (0, 0, 0, 0)))
        self.truth.add((self.source, provider, name, "api_key"), pico, tokens)
        for _ in range(3):
            yield self._event(self._now(None), session, model, message_id=message, **figures(pico, tokens))

    def corrected(self, model: str, pico: int) -> Iterator[dict[str, Any]]:
        """The lines of a message that is first said to have cost twice what it did."""
        first, last, *_ = self.events(model, pico, (1, 1, 1, 1))
        yield first
        yield {**last, **figures(2 * pico, (2, 2, 2, 2))}
        yield last


class ClaudeLog(UsageLog):
    """Claude Code's log: the running total of a process, which starts over in the next one. No tokens."""

    source = "claude"

    def __init__(self, root: Path, agent: str, truth: Truth | None = None, *, subscription: bool = False) -> None:
        super().__init__(root, agent, truth)
        limits = {"five_hour": {"used_percentage": 12.5, "resets_at": time.time() + 9000}}
        self._limits = limits if subscription else None
        self._mode = "subscription" if subscription else "api_key"
        self._process()

    def _process(self) -> None:
        self.session, self._total = str(uuid.uuid4()), 0

    def restart(self) -> None:
        """The process ends; the next one starts with its first reading, which is lower than the last."""
        self._process()
        self._read("opus")

    def clear(self) -> None:
        """`/clear`: another session, the same total."""
        self.session = str(uuid.uuid4())

    def spend(self, model: str, pico: int) -> None:
        """The total rises by this much; the reading is written twice, as a status line is."""
        self._total += pico
        self.truth.pico[self.source, "anthropic", model, self._mode] += pico
        self._read(model)
        self._read(model)

    def _read(self, model: str) -> None:
        self.append(self._event(
            self._now(None), self.session, f"anthropic/{model}",
            cost={"total_cost_usd": self._total / PICO, "total_duration_ms": 862}, rate_limits=self._limits,
        ))


class PiSession:
    """A session file of pi."""

    def __init__(self, directory: Path, truth: Truth | None = None) -> None:
        self.truth = truth or Truth()
        started = time.time()
        self.uuid = str(uuid.uuid4())
        name = f"{iso(started).replace(':', '-').replace('.', '-')}_{self.uuid}.jsonl"
        self.path = directory / "--srv-project--" / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last = int(started * 1000)
        self._append({"type": "session", "version": 3, "id": self.uuid, "timestamp": iso(started)})

    def message(self, provider: str, model: str, pico: int, tokens: tuple[int, int, int, int] = (3, 5, 7, 11)) -> None:
        """A prompt and the assistant's reply to it."""
        self._last = max(self._last + 1, int(time.time() * 1000))
        at = iso(self._last / 1000)
        self._append({"type": "message", "id": uuid.uuid4().hex[:8], "timestamp": at,
                      "message": {"role": "user", "content": "do it", "timestamp": self._last}})
        usage = dict(zip(("input", "output", "cacheRead", "cacheWrite"), tokens, strict=True))
        self._append({"type": "message", "id": uuid.uuid4().hex[:8], "timestamp": at, "message": {
            "role": "assistant", "content": [{"type": "text", "text": "done"}], "provider": provider, "model": model,
            "usage": {**usage, "cost": {"total": pico / PICO}}, "stopReason": "stop", "timestamp": self._last,
        }})
        self.truth.add(("pi-coding", provider, model, "api_key"), pico, tokens)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class PiInstance:
    """The instance file of one process: written beside and renamed, as pi-telemetry does."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.path = directory / f"{pid}.json"
        self._pid, self._started = pid, int(time.time() * 1000)

    def write(self, percent: float | None, *, activity: str = "working", event: str = "turn_end") -> None:
        levels = (("at_limit", 100), ("near_limit", 95), ("approaching_limit", 85), ("normal", 0))
        pressure = next((name for name, least in levels if percent is not None and percent >= least), "normal")
        document = {
            "schemaVersion": 2, "source": "pi-telemetry",
            "process": {"pid": self._pid, "startedAt": self._started, "updatedAt": int(time.time() * 1000),
                        "heartbeatMs": 250},
            "session": {"id": f"session-of-{self._pid}"},
            "model": {"provider": "anthropic", "id": "opus"},
            "state": {"activity": activity, "hasPendingMessages": False},
            "context": {"percent": percent, "tokens": None if percent is None else int(percent * 2000),
                        "contextWindow": 200_000, "pressure": None if percent is None else pressure,
                        "nearLimit": percent is not None and percent >= 95,
                        "closeToLimit": percent is not None and percent >= 85},
            "lastEvent": event,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self._pid}.json.tmp-{self._pid}")
        beside.write_text(json.dumps(document))
        beside.rename(self.path)

    def remove(self) -> None:
        self.path.unlink()


def some_money(chance: random.Random) -> int:
    """An amount that does not come out even: nano-dollars up to a few dollars."""
    return chance.randrange(1, 3_000_000_000) * 1000


def some_tokens(chance: random.Random) -> tuple[int, int, int, int]:
    return (chance.randrange(1, 9000), chance.randrange(1, 9000), chance.randrange(90_000), chance.randrange(9000))
