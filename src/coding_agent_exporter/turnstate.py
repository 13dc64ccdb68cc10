"""Takes nothing, gives turns what it keeps of a session between two reads; stored as it is."""

from __future__ import annotations

from itertools import pairwise

import msgspec

from coding_agent_exporter.spanmodel import SpanLink
from coding_agent_exporter.turnmodel import Call, FinishedTool, Prompt, Tokens

APART_MS = 100
"""Results of one reply further apart than this were not written together: their tools ran one after another."""

MAX_SUM = 2**60
"""Sums stop here (a million dollars, in pico-USD): no more fits through the formats that carry them."""


class Tool(msgspec.Struct, array_like=True):
    """A tool call that was asked for. Times are epoch milliseconds, 0 while not known."""

    call: str
    name: str
    started: int = 0
    ended: int = 0
    failed: bool = False


class Turn(msgspec.Struct, array_like=True):
    """A model call whose tools are running."""

    call: Call
    start: int
    tools: list[Tool]

    def timed(self, end: int) -> list[FinishedTool]:
        """The tools with their times, once the turn is over; `end` stands for results that are not there."""
        ends = [tool.ended for tool in self.tools if tool.ended]
        apart = any(after - before > APART_MS for before, after in pairwise(ends))
        tools = []
        before = self.call.ended
        for tool in self.tools:
            start = tool.started or (before if apart else self.call.ended)
            outcome = "unknown" if not tool.ended else "error" if tool.failed else "ok"
            tools.append(FinishedTool(tool.call, tool.name, start, max(start, tool.ended or end), outcome))
            before = tool.ended or before
        return tools


class Run(msgspec.Struct, array_like=True):
    """A prompt and what it set off.

    `ready`: when its prompt entered the conversation. `tip`: its last entry. `seen`: its last sign of life.
    `settled`: its entries say that it is over. `sent`: its span has left. `next`: what the next call answers, once
    it is settled. `unresolved`: tool calls whose span left without a result.
    """

    trace: str
    span: str
    parent: str
    start: int
    ready: int
    tip: str
    seen: int
    end: int
    turns: int = 0
    turn: Turn | None = None
    settled: bool = False
    sent: bool = False
    error: str = ""
    provider: str = ""
    model: str = ""
    cost: int | None = None
    tokens: Tokens | None = None
    compactions: list[int] = []
    links: list[SpanLink] = []
    next: Prompt | None = None
    unresolved: list[str] = []

    def add(self, call: Call) -> None:
        """Take the call of a finished turn into the run's sums."""
        if not self.turns:
            self.provider, self.model = call.provider, call.model
        elif (self.provider, self.model) != (call.provider, call.model):
            self.model = ""
            self.provider = self.provider if self.provider == call.provider else ""
        if call.cost is not None:
            self.cost = min((self.cost or 0) + call.cost, MAX_SUM)
        if call.tokens is not None:
            had = self.tokens or (0, 0, 0, 0)
            one, two, three, four = (min(a + b, MAX_SUM) for a, b in zip(had, call.tokens, strict=True))
            self.tokens = (one, two, three, four)


class State(msgspec.Struct, array_like=True):
    """A session.

    `place`: the span that started it, in another session. `compactions`: those that wait for a run. `known`: the
    latest prompts, calls and compactions, (recorded, entry); what was recorded up to `floor` is known too. `spawns`:
    what can have started other sessions: time, trace, span.
    """

    session: str
    created: int = 0
    origin: str = ""
    place: SpanLink | None = None
    runs: list[Run] = []
    compactions: list[int] = []
    known: list[tuple[int, str]] = []
    floor: int = 0
    spawns: list[tuple[int, str, str]] = []
