"""Takes the part of an agent that runs below mngr, gives what it does: OpenCode, Claude Code and Codex.

All that is seen of them is a usage log: what each call, session or process has come to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coding_agent_exporter.demo.agents import DAY, HOUR, Agent
from coding_agent_exporter.demo.work import Context, tools
from coding_agent_exporter.demo.writers import PICO, Usage, UsageLog, figures, identifier

if TYPE_CHECKING:
    import random

    from coding_agent_exporter.demo.agents import Host, Role, Steps
    from coding_agent_exporter.demo.work import Call, Tokens

COPIED = 12
"""So many messages of its parent a forked session repeats."""


class Logged(Agent):
    """An agent with a usage log. What its source writes when a call starts and ends is up to `started` and `ended`."""

    root = "mngr"

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        super().__init__(host, role, chance)
        self.log = host.add(UsageLog(host.home / ".mngr", f"agent-{role.name}", self.source))
        self.session = ""

    def arrive(self, at: int, *, resume: bool = False) -> None:
        if not resume:
            self.new_session(at)

    def new_session(self, at: int) -> None:
        self.context = Context(self.choose(), self.role.pace)
        self.session = identifier(self.chance, at)

    def prompt(self, at: int) -> Steps:
        yield (at := at + 60)
        self.context.add(self.between(40, 900))
        for left in reversed(range(self.calls())):
            self.started(at)
            call = self.context.call(self.chance, at)
            yield (at := at + call.duration)
            self.ended(at, call)
            asked = tools(self.chance, self.role.pace) if left else []
            for tool in asked:
                self.context.add(tool.tokens)
            yield (at := at + 50 + max((tool.duration for tool in asked), default=0))
            self.context.settle()
            if (self.context.percent or 0) >= 90:
                self.context.compact(self.chance)
        return at

    def started(self, at: int) -> None:
        """A model call starts."""

    def ended(self, at: int, call: Call) -> None:
        """It has ended."""
        raise NotImplementedError


class OpenCode(Logged):
    """Zeros when a message starts, its final figures twice when it ends."""

    source = "opencode"

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        super().__init__(host, role, chance)
        self._message = ""
        self._past: list[tuple[int, Tokens]] = []

    def new_session(self, at: int) -> None:
        super().new_session(at)
        self.session = f"ses_{self.chance.getrandbits(80):020x}"
        self._past = []

    def fork(self, at: int) -> None:
        """The copy's messages come at once, each under another name."""
        self.session = f"ses_{self.chance.getrandbits(80):020x}"
        for pico, tokens in self._past[-COPIED:]:
            self._message = f"msg_{self.chance.getrandbits(80):020x}"
            self._write(at, pico, tokens)

    def started(self, at: int) -> None:
        self._message = f"msg_{self.chance.getrandbits(80):020x}"
        self._write(at, 0, (0, 0, 0, 0))

    def ended(self, at: int, call: Call) -> None:
        self._write(at, call.pico, call.tokens)
        self._write(at, call.pico, call.tokens)
        self._past.append((call.pico, call.tokens))
        self.spend(at, call.pico, call.tokens)

    def _write(self, at: int, pico: int, tokens: Tokens) -> None:
        self.log.event(at, self.session, message_id=self._message, **figures(pico, tokens),
                       model=self.context.model.full, cost_mode="API_KEY")


class Claude(Logged):
    """The running total of a process, which starts over in the next one; no model, no tokens, but rate limits.

    A new session (`/clear`) goes on with the same total.
    """

    source = "claude"
    limits = (("five_hour", 5 * HOUR, 34 * PICO), ("seven_day", 7 * DAY, 300 * PICO))

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        super().__init__(host, role, chance)
        self._total = 0
        self._windows: dict[str, tuple[int, int]] = {}

    def arrive(self, at: int, *, resume: bool = False) -> None:
        super().arrive(at, resume=resume)
        self._total = 0
        self._read(at)

    def ended(self, at: int, call: Call) -> None:
        self._total += call.pico
        mode = "subscription" if self.role.subscription else "api_key"
        self.host.truth.add(at, Usage(self.root, self.source, "unknown", "unknown", mode), call.pico)
        for name, length, _ in self.limits:
            end, used = self._windows.get(name, (0, 0))
            self._windows[name] = (end, used + call.pico) if at < end else (at - at % HOUR + length, call.pico)
        self._read(at)
        if self.chance.random() < 0.4:
            self._read(at)

    def _read(self, at: int) -> None:
        shown: dict[str, Any] | None = None
        if self.role.subscription:
            shown = {
                name: {"used_percentage": round(min(100.0, 100 * used / most), 1), "resets_at": end // 1000}
                for name, _, most in self.limits for end, used in [self._windows.get(name, (0, 0))] if at < end
            }
        self.log.event(at, self.session, cost={"total_cost_usd": self._total / PICO}, rate_limits=shown or None)


class Codex(Logged):
    """The running total of a session, in tokens alone."""

    source = "codex"

    def __init__(self, host: Host, role: Role, chance: random.Random) -> None:
        super().__init__(host, role, chance)
        self._total: Tokens = (0, 0, 0, 0)

    def new_session(self, at: int) -> None:
        super().new_session(at)
        self._total = (0, 0, 0, 0)

    def ended(self, at: int, call: Call) -> None:
        before, more = self._total, call.tokens
        self._total = (before[0] + more[0], before[1] + more[1], before[2] + more[2], before[3] + more[3])
        self.spend(at, None, more)
        self.log.event(at, self.session, **figures(None, self._total), model=self.context.model.full,
                       cost_mode="SUBSCRIPTION" if self.role.subscription else "API_KEY")
