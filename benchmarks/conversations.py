"""Takes sizes and a seed, gives session files as pi writes them, always the same, and what spans they make.

Lines have the shape of the recordings in `tests/data`; replies and tool results have the lengths that they have in
practice, as most of reading a session file is passing over texts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS, TURNS = 5, 6
"""Prompts of a session, and turns of a prompt."""

TOOLS = ("bash", "read", "edit", "write", "grep")


@dataclass
class Truth:
    """What the files hold. `messages` are model calls; every turn has one."""

    files: int = 0
    size: int = 0
    messages: int = 0
    spans: int = 0


def generate(root: Path, *, sessions: int, start: int, seed: int = 1) -> Truth:
    """Write so many sessions of `PROMPTS` prompts below `root`; the first begins at `start`, epoch milliseconds."""
    truth = Truth()
    for number in range(sessions):
        rng = random.Random(f"{seed}/{number}")  # noqa: S311  the same files every time, not a secret
        session = Session(rng, start + number * 1000)
        for _ in range(PROMPTS):
            truth.spans += session.prompt(TURNS)
            truth.messages += TURNS
        path = root / f"--srv-project-{number % 20}--" / session.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(session.take())
        truth.files += 1
        truth.size += path.stat().st_size
    return truth


class Session:
    """One session, entry by entry. Its time moves on by itself unless `now` (epoch milliseconds) is set."""

    def __init__(self, rng: random.Random, start: int) -> None:
        self.now = start
        self._rng = rng
        self._lines: list[str] = []
        self._last: str | None = None
        bits = rng.getrandbits(128)
        uuid = f"{bits >> 96:08x}-{bits >> 80 & 0xFFFF:04x}-7000-8000-{bits & 0xFFFFFFFFFFFF:012x}"
        moment = self._moment()
        self.name = f"{moment.replace(':', '-').replace('.', '-')}_{uuid}.jsonl"
        self._write({"type": "session", "version": 3, "id": uuid, "timestamp": moment, "cwd": "/srv/project"})

    def take(self) -> bytes:
        """The lines since the last time."""
        lines, self._lines = self._lines, []
        return "".join(lines).encode()

    def prompt(self, turns: int) -> int:
        """A prompt with so many turns, of which all but the last ask for tools. Returns how many spans that makes."""
        self.user()
        spans = 1
        for index in range(turns):
            spans += self.turn(0 if index == turns - 1 else self._rng.choice((1, 1, 1, 2, 3)))
        return spans

    def user(self) -> None:
        self._message({"role": "user", "content": [{"type": "text", "text": self._text(20, 400)}]})

    def turn(self, tools: int) -> int:
        """A model call and so many tools. Returns how many spans that makes."""
        rng = self._rng
        wanted = [(f"call_{rng.getrandbits(32):08x}", rng.choice(TOOLS)) for _ in range(tools)]
        tokens = {name: rng.randrange(most) for name, most in
                  (("input", 9000), ("output", 3000), ("cacheRead", 150_000), ("cacheWrite", 4000))}
        self._message({
            "role": "assistant", "api": "anthropic-messages", "provider": "anthropic", "model": "claude-opus-4-8",
            "content": [{"type": "text", "text": self._text(50, 1200)}, *(
                {"type": "toolCall", "id": call, "name": name, "arguments": {"command": self._text(20, 300)}}
                for call, name in wanted)],
            "usage": {**tokens, "totalTokens": sum(tokens.values()),
                      "cost": {"total": rng.randrange(1000, 500_000) / 10**7}},
            "stopReason": "toolUse" if tools else "stop", "responseId": f"msg_{rng.getrandbits(64):016x}",
        })
        for call, name in wanted:
            self._message({"role": "toolResult", "toolCallId": call, "toolName": name, "isError": False,
                           "content": [{"type": "text", "text": self._text(50, 6000)}]})
        return 2 + tools

    def _message(self, message: dict[str, Any]) -> None:
        began = self.now
        self.now += self._rng.randrange(200, 3000)
        name = f"{self._rng.getrandbits(32):08x}"
        self._write({"type": "message", "id": name, "parentId": self._last, "timestamp": self._moment(),
                     "message": {**message, "timestamp": began}})
        self._last = name

    def _write(self, entry: dict[str, Any]) -> None:
        self._lines.append(json.dumps(entry, separators=(",", ":")) + "\n")

    def _moment(self) -> str:
        at = datetime.fromtimestamp(self.now / 1000, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _text(self, least: int, most: int) -> str:
        return ("All done here, and the tests pass. " * (most // 35 + 1))[:self._rng.randrange(least, most)]
