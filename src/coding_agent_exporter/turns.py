"""Takes the records of one session in file order, gives its finished turns and runs to spans.

A prompt sets off a run; a run is a chain of turns; a turn is one model call and the tools it asked for. The entries
of a session form a tree, and two processes may append to one file: an entry belongs to the run whose last entry is
its parent, whatever lies between them in the file.

What is sent early, and what that means later:
- A turn is finished with its last tool result, or with its call when that asks for no tool.
- A run is finished when a call asks for no tool, when it was aborted, when the user's next message follows it, when
  the process leaves, or after `quiet_seconds`. After a failed call the agent usually tries again, and nothing says
  so until the next call has ended: such a run waits for `retry_seconds`.
- A turn that arrives in spite of that still belongs to its run's trace: ids depend on entries, never on time. Only
  the run's own span, once sent, keeps its end and its sums.

When tools ran: oh-my-pi records each start. pi starts all tools of a reply when the reply has ended and writes their
results when the last one is done, all within milliseconds; how long the quicker ones took is in no file. Tools that
must not overlap run one after another, and then the results lie apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from coding_agent_exporter.spanmodel import SpanLink
from coding_agent_exporter.turnmodel import (
    Call,
    Compaction,
    Entry,
    Exit,
    FinishedRun,
    FinishedTurn,
    Header,
    Prompt,
    Record,
    ToolResult,
    ToolStart,
    run_span,
    tool_span,
    trace_id,
    turn_span,
)
from coding_agent_exporter.turnstate import Run, State, Tool, Turn

if TYPE_CHECKING:
    from collections.abc import Iterable

Spawner = Callable[[int], SpanLink | None]
"""Epoch milliseconds -> the span of another session that started this one at that time."""

JOINED_MS = 1000
"""User messages recorded so close together, with no call between them, are one prompt (a queue let out at once)."""

SPAWNING = frozenset({"task"})
"""Tools that start sub-agents (oh-my-pi)."""

MAX_RUNS = 8
MAX_KNOWN = 1280
KEEP_KNOWN = 1024
MAX_SPAWNS = 256
MAX_COMPACTIONS = 64


class Turns:
    """The open turns of one session. Keep one for each session uuid, not for each path: a file that is moved, copied
    or read again gives nothing twice.

    `counts`: what was left out, by reason: `copied` (a fork's copies of its parent's entries), `known` (read again),
    `late` (a tool result after its turn had to be sent without), `reopened` (a turn after its run had been sent).
    """

    def __init__(self, session: str, *, quiet_seconds: float = 3600, retry_seconds: float = 300) -> None:
        self.counts: Counter[str] = Counter()
        self._quiet = round(quiet_seconds * 1000)
        self._retry = round(retry_seconds * 1000)
        self._state = State(session)
        self._known: set[str] = set()
        self._now = 0
        self._out: list[FinishedTurn | FinishedRun] = []

    def dump(self) -> bytes:
        """Everything needed to go on later; about 200 bytes and 20 for each of the latest calls."""
        return msgspec.msgpack.encode(self._state)

    def load(self, data: bytes) -> None:
        """Go on from what `dump` gave. Raises `msgspec.MsgspecError` on anything else."""
        self._state = msgspec.msgpack.decode(data, type=State)
        self._known = {entry for _, entry in self._state.known}

    @property
    def waiting(self) -> bool:
        """Whether `tick` may still have something to finish."""
        return any(not run.sent or run.turn is not None for run in self._state.runs)

    def spawner(self, at: int) -> SpanLink | None:
        """The span that started a sub-agent whose session began at epoch milliseconds: the latest `task` call, or
        its turn when that asked for several. Read this session as far as it goes before its sub-agents.
        """
        found = [spawn for spawn in self._state.spawns if spawn[0] <= at]
        return SpanLink(found[-1][1], found[-1][2]) if found else None

    def apply(
        self, records: Iterable[Record], now: float, spawner: Spawner | None = None
    ) -> list[FinishedTurn | FinishedRun]:
        """Take records as they follow in the file. `now` is epoch seconds.

        `spawner`: for a sub-agent's session, the method of that name of its parent's turns.
        """
        self._now = round(now * 1000)
        for record in records:
            if isinstance(record, Header):
                self._header(record, spawner)
            elif record.recorded < self._state.created and self._state.origin not in {"", self._state.session}:
                self.counts["copied"] += 1
            else:
                self._entry(record)
        return self._take()

    def tick(self, now: float) -> list[FinishedTurn | FinishedRun]:
        """Finish what only the passing of time finishes. `now` is epoch seconds.

        Call it when the file has been read to its end: before, its silence means nothing.
        """
        self._now = round(now * 1000)
        for run in self._state.runs:
            retrying = run.error == "error" and run.turn is None
            open_ = not run.sent or run.turn is not None  # a turn can begin after its run was sent
            if open_ and self._now - run.seen >= (self._retry if retrying else self._quiet):
                self._cut(run)
                self._send(run)
        return self._take()

    def _take(self) -> list[FinishedTurn | FinishedRun]:
        out, self._out = self._out, []
        return out

    def _header(self, header: Header, spawner: Spawner | None) -> None:
        state = self._state
        if state.created:
            return
        state.session, state.created, state.origin = header.session, header.created, header.parent
        if spawner is not None and header.created:
            state.place = spawner(header.created)

    def _entry(self, record: Entry) -> None:
        run = self._at(record.parent)
        if isinstance(record, Prompt | Call | Compaction) and not self._note(record):
            return
        if isinstance(record, Prompt):
            self._prompt(record, run)
        elif isinstance(record, Call):
            self._call(record, run)
        elif isinstance(record, ToolStart | ToolResult):
            self._tool(record, run)
        elif isinstance(record, Compaction):
            inside = run is not None and not run.settled and not run.sent and run.turns
            times = run.compactions if run is not None and inside else self._state.compactions
            if len(times) < MAX_COMPACTIONS:
                times.append(record.recorded)
        elif isinstance(record, Exit) and run is not None:
            self._close(run, record.recorded)
        if run is not None and not (isinstance(record, Prompt) and record.user):
            run.tip = record.entry
            run.seen = max(run.seen, min(record.recorded, self._now))

    def _note(self, record: Prompt | Call | Compaction) -> bool:
        """Whether a record is seen for the first time."""
        state = self._state
        if record.recorded <= state.floor or record.entry in self._known:
            self.counts["known"] += 1
            return False
        self._known.add(record.entry)
        state.known.append((record.recorded, record.entry))
        if len(state.known) > MAX_KNOWN:
            old, state.known = state.known[:-KEEP_KNOWN], state.known[-KEEP_KNOWN:]
            self._known = {entry for _, entry in state.known}
            # Not above what is kept: one line with an absurd time, or a clock that was set back, must not make
            # what is still to come look like the past.
            state.floor = max(state.floor, min(max(old)[0], min(state.known)[0]))
        return True

    def _at(self, parent: str) -> Run | None:
        """The run whose last entry this is; in files without a tree, the latest."""
        for run in reversed(self._state.runs):
            if not parent or run.tip == parent:
                return run
        return None

    def _prompt(self, prompt: Prompt, before: Run | None) -> None:
        if not prompt.user:
            # Inside a run it steers; after one, the next call answers it.
            if before is not None and before.settled and before.next is None:
                before.next = prompt
            return
        start = prompt.sent
        if before is not None:
            fresh = not before.turns and before.turn is None and not before.settled
            if fresh and prompt.recorded - before.ready <= JOINED_MS:
                before.tip, before.ready = prompt.entry, prompt.recorded
                return
            self._close(before)
            start = max(start, min(before.end, prompt.recorded))
        self._open(prompt.entry, start, prompt.recorded)

    def _open(self, prompt: str, start: int, ready: int, after: Run | None = None) -> Run:
        state = self._state
        place = state.place
        run = Run(
            trace=place.trace if place else trace_id(state.session, prompt),
            span=run_span(state.session, prompt),
            parent=place.span if place else "",
            start=start, ready=ready, tip=prompt, seen=min(ready, self._now), end=ready,
            links=[SpanLink(after.trace, after.span)] if after else [],
            compactions=state.compactions,
        )
        state.compactions = []
        state.runs.append(run)
        if len(state.runs) > MAX_RUNS:
            self._close(state.runs[0])
            del state.runs[0]
        return run

    def _call(self, call: Call, run: Run | None) -> None:
        if run is None and self._state.runs:
            run = self._state.runs[-1]
        if run is None:
            run = self._open(call.entry, call.started, call.started)
        elif run.next is not None:
            trigger, run.next = run.next, None
            run = self._open(trigger.entry, max(trigger.sent, min(run.end, trigger.recorded)), trigger.recorded, run)
        self._finish_turn(run)
        run.tip = call.entry
        run.seen = max(run.seen, min(call.recorded, self._now))
        start = call.started if run.turns else max(run.start, min(run.ready, call.started))
        # What a failed or aborted call asks for is not executed.
        wanted = [] if call.stop in {"error", "aborted"} else call.tools
        run.turn = Turn(call, start, [Tool(*tool) for tool in wanted])
        self._remember_spawns(run, call)
        if not wanted:
            self._finish_turn(run)

    def _remember_spawns(self, run: Run, call: Call) -> None:
        tasks = [(at, tool) for at, (tool, name) in enumerate(call.tools) if name in SPAWNING]
        if not tasks:
            return
        session = self._state.session
        at, tool = tasks[0]
        span = tool_span(session, call.entry, at, tool) if len(tasks) == 1 else turn_span(session, call.entry)
        self._state.spawns.append((call.ended, run.trace, span))
        del self._state.spawns[:-MAX_SPAWNS]

    def _tool(self, record: ToolStart | ToolResult, near: Run | None) -> None:
        runs = [run for run in (near, *reversed(self._state.runs)) if run is not None]
        for run in runs:
            if run.turn is None or (run is not near and record.recorded < run.turn.call.recorded):
                # Ids of tool calls may repeat: an older result, read again, is not this call's.
                continue
            for tool in run.turn.tools:
                if tool.call != record.call or tool.ended:
                    continue
                if isinstance(record, ToolStart):
                    tool.started = tool.started or record.started
                    return
                tool.ended, tool.failed = record.ended, record.failed
                run.tip, run.seen = record.entry, max(run.seen, min(record.recorded, self._now))
                if all(other.ended for other in run.turn.tools):
                    self._finish_turn(run)
                return
        for run in runs:
            if isinstance(record, ToolResult) and record.call in run.unresolved:
                run.unresolved.remove(record.call)
                self.counts["late"] += 1
                return

    def _finish_turn(self, run: Run, at: int = 0) -> None:
        """Send the open turn, if there is one. `at`: when what is unfinished in it was cut off, if that is known."""
        turn, run.turn = run.turn, None
        if turn is None:
            return
        call = turn.call
        end = max(at, call.ended, *(tool.ended for tool in turn.tools), 0)
        open_tools = [tool.call for tool in turn.tools if not tool.ended]
        error = call.stop if call.stop == "aborted" else "error" if call.failed else ""
        if open_tools and not error:
            error = "interrupted"
        run.unresolved = open_tools
        self._out.append(FinishedTurn(
            session=self._state.session, trace=run.trace, parent=run.span, index=run.turns,
            start=turn.start, end=end, call=call, tools=turn.timed(end), error=error,
        ))
        run.add(call)
        run.turns += 1
        run.end = max(run.end, end)
        run.error = error
        if run.sent:
            self.counts["reopened"] += 1
        if call.stop == "aborted" or (not call.tools and error != "error"):
            run.settled = True
            self._send(run)

    def _cut(self, run: Run, at: int = 0) -> None:
        """Send what is open of a run as cut off."""
        self._finish_turn(run, at)
        if not run.turns:
            run.error = "interrupted"
            run.end = max(run.end, at)

    def _close(self, run: Run, at: int = 0) -> None:
        """End a run from outside, for good."""
        if not run.settled or run.turn is not None:
            self._cut(run, at)
            run.settled = True
            self._send(run)

    def _send(self, run: Run) -> None:
        if run.sent:
            return
        run.sent = True
        self._out.append(FinishedRun(
            session=self._state.session, trace=run.trace, span=run.span, parent=run.parent,
            start=run.start, end=run.end, turns=run.turns, provider=run.provider, model=run.model,
            cost=run.cost, tokens=run.tokens, error=run.error,
            compactions=run.compactions, links=run.links, origin=self._state.origin,
        ))
