"""Takes the kinds of made-up agents, gives the cast of the demo: agents that work fast and without end, and tell of it.

Within the first minute everything happens that a dashboard shows: a context fills and is compacted, an agent is killed,
another comes and goes, money is spent on several models, by a subscription and for nobody knows how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coding_agent_exporter.demo.agents import Agent, Omp, Pi, Role
from coding_agent_exporter.demo.logged import Claude, Codex, OpenCode
from coding_agent_exporter.demo.simulation import Fleet
from coding_agent_exporter.demo.work import CODEX, FLASH, GPT, HAIKU, OPUS, PREVIEW, QWEN, SONNET, SYSTEM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coding_agent_exporter.demo.agents import Steps

FIRST_PID = 2**22
"""More than any Linux or macOS gives a process: nobody takes an agent of the demo for one of this machine."""

LEVELS = ((95.0, "near the limit"), (85.0, "approaching the limit"))


@dataclass(frozen=True)
class Part(Role):
    """A role on the stage. Times are seconds.

    `enters`: after the start. `filled`: the share of its context window that an earlier day has filled. `stays`: after
    so long it leaves, once it has answered, and is `away` for a while; 0: it never leaves. `killed`: it does not leave,
    its process is killed, in the middle of whatever it does; each time it lives twice as long. `forks`: after so many
    prompts a session is forked, and again after as many.
    """

    enters: float = 0.5
    filled: float = 0.0
    stays: float = 0.0
    away: float = 40.0
    killed: bool = False
    forks: int = 0


CAST = (
    Part("pi", "checkout", (OPUS, SONNET), turns=30, think=0.03, pace=8, filled=0.9),
    Part("pi", "search", (SONNET, HAIKU), turns=8, think=0.2, pace=4, logged=True, forks=3),
    Part("pi", "payments", (HAIKU, SONNET), turns=24, think=0.1, pace=4, enters=1, stays=14, away=30, killed=True),
    Part("pi", "review", (HAIKU,), turns=3, pace=4, enters=4, stays=0.1, away=50),
    Part("pi", "migration", (OPUS,), turns=60, think=0.01, pace=8, enters=20, filled=0.3, stays=150, away=300),
    Part("omp", "ledger", (SONNET, GPT), turns=10, think=0.3, pace=3, filled=0.2),
    Part("opencode", "catalog", (GPT, FLASH, QWEN), turns=8, think=0.3, pace=3, enters=2, forks=2),
    Part("claude", "website", (OPUS,), turns=8, think=0.2, pace=3, subscription=True),
    Part("codex", "infra", (CODEX,), turns=8, think=0.3, pace=4, enters=2),
    Part("codex", "preview", (PREVIEW,), turns=4, think=0.5, pace=4, enters=3),
)
"""`migration` loops, and is what a budget is for."""


class Player(Agent):
    """What all kinds do on the stage. Its role is a `Part`."""

    @property
    def part(self) -> Part:
        assert isinstance(self.role, Part)
        return self.role

    def run(self, start: int) -> Iterator[int]:
        at = start + round(1000 * self.part.enters)
        yield at
        self._enter(at, self.part.filled)
        end = self._end(at, 0)
        prompts = lives = 0
        while True:
            prompts += 1
            at = yield from self._prompt_until(at, end if self.part.killed else math.inf)
            if at >= end:
                yield at
                at, lives = self._exit(at), lives + 1
                yield at
                self._enter(at, resumed=self.part.killed)
                end = self._end(at, lives)
                continue
            at += self.thinks() + 500
            yield at
            if self.part.forks and prompts % self.part.forks == 0:
                self._tell(at, "its session is forked: what the copy repeats is not spent again")
                self.fork(at)
            elif prompts > 4 and not self.part.filled and self.chance.random() < 0.05:
                self._tell(at, "begins a new session")
                self.new_session(at)

    def _end(self, at: int, lives: int) -> float:
        if not self.part.stays:
            return math.inf
        return at + round(1000 * self.part.stays) * (2 ** min(lives, 10) if self.part.killed else 1)

    def _enter(self, at: int, filled: float = 0.0, *, resumed: bool = False) -> None:
        self.arrive(at, resume=resumed)
        model = self.context.model
        used = f", its context {100 * filled:.0f} % full" if filled else ""
        self._tell(at, f"{'is back' if resumed else 'starts'} with {model.full}{used}")
        self.context.add(max(0, int(filled * model.window) - SYSTEM_TOKENS))

    def _exit(self, at: int) -> int:
        """Returns when it comes back, in epoch milliseconds."""
        if self.part.killed:
            self._tell(at, "is killed: its heartbeat stops, and it counts as lost after --telemetry.stale-after")
            self.crash(at)
        else:
            self._tell(at, "is done and leaves")
            self.leave(at)
        return at + round(1000 * self.part.away)

    def _prompt_until(self, at: int, limit: float) -> Steps:
        """A prompt, or what is done of it before `limit`."""
        steps = self.prompt(at)
        shown = self._level()
        while True:
            try:
                due = next(steps)
            except StopIteration as answered:
                done: int = answered.value
                return done
            shown = self._notice(at, shown)
            if due >= limit:
                return int(limit)
            yield (at := due)

    def _level(self) -> str:
        """How full the context is, in the words of pi-telemetry; empty where nothing shows it."""
        percent = self.context.percent if isinstance(self, Pi) else 0.0
        return "unknown" if percent is None else next((name for least, name in LEVELS if percent >= least), "")

    def _notice(self, at: int, before: str) -> str:
        level = self._level()
        if level != before:
            if level == "unknown":
                self._tell(at, "compacted its context")
            elif level:
                self._tell(at, f"is {level}: {self.context.percent:.1f} % of {self.context.model.window:,} tokens")
        return level

    def _tell(self, at: int, what: str) -> None:
        if self.host.tell is not None:
            self.host.tell(at, self.role.name, what)


class PiPlayer(Player, Pi):
    """pi on the stage."""


class OmpPlayer(Player, Omp):
    """oh-my-pi on the stage."""


class OpenCodePlayer(Player, OpenCode):
    """OpenCode on the stage."""


class ClaudePlayer(Player, Claude):
    """Claude Code on the stage. Its rate limits have been used before: a demo lasts minutes, the windows do not."""

    used = (0.6, 0.35)

    def arrive(self, at: int, *, resume: bool = False) -> None:
        if not self._windows:
            for share, (name, length, most) in zip(self.used, self.limits, strict=True):
                self._windows[name] = (at + length // 2, int(share * most))
        super().arrive(at, resume=resume)


class CodexPlayer(Player, Codex):
    """Codex on the stage."""


PLAYERS: dict[str, type[Agent]] = {
    "pi": PiPlayer, "omp": OmpPlayer, "opencode": OpenCodePlayer, "claude": ClaudePlayer, "codex": CodexPlayer,
}


class Stage(Fleet):
    """The demo's agents in one home directory.

    `speed`: how many times as fast all goes. Heartbeats, and how long a context stays full, keep their times: they are
    what is shown. `tell` is called with (epoch ms, whom, what).
    """

    def __init__(
        self, directory: Path, seed: int = 1, *, start: float, speed: float = 1.0,
        tell: Callable[[int, str, str], None] | None = None,
    ) -> None:
        cast = [
            replace(part, pace=part.pace * speed, enters=part.enters / speed, stays=part.stays / speed,
                    away=part.away / speed)
            for part in CAST
        ]
        super().__init__(directory, seed, start=start, cast=cast, host="demo", kinds=PLAYERS)
        self._host.tell, self._host.first_pid = tell, FIRST_PID
