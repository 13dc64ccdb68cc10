"""What the tests of turns and spans share: a session file to write line by line, and recordings turned into spans."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coding_agent_exporter.decode.turns import decode
from coding_agent_exporter.spanmodel import Span
from coding_agent_exporter.spans import spans
from coding_agent_exporter.turnmodel import FinishedRun, FinishedTurn
from coding_agent_exporter.turns import Turns
from support import CAPTURES, DATA

if TYPE_CHECKING:
    from coding_agent_exporter.turnmodel import Finished

Found = list[FinishedTurn | FinishedRun]

SPANS = DATA / "spans"
LONG_AFTER = 1_900_000_000.0
"""Epoch seconds; every recording has been quiet for years by then."""

T0 = 1_795_000_000_000
"""Epoch milliseconds at which synthetic sessions begin."""


class SessionFile:
    """Writes a session file in pi's format. Times are milliseconds after `T0`; entries follow each other."""

    def __init__(self, session: str = "0001", created: int = 0, **header: Any) -> None:
        self.lines: list[str] = []
        self._count = 0
        self.last: str | None = None
        self._write({"type": "session", "version": 3, "id": session, "timestamp": iso(created), **header})

    def _write(self, document: dict[str, Any]) -> None:
        self.lines.append(json.dumps(document))

    def entry(self, kind: str, at: int, *, after: str | None = None, **fields: Any) -> str:
        """Append an entry; returns its id. `after`: its parent, if that is not the entry before."""
        self._count += 1
        name = f"{self._count:08x}"
        self._write({"type": kind, "id": name, "parentId": after or self.last, "timestamp": iso(at), **fields})
        self.last = name
        return name

    def user(self, at: int, sent: int | None = None, *, after: str | None = None, role: str = "user") -> str:
        message = {"role": role, "content": "SECRET", "timestamp": T0 + (at if sent is None else sent)}
        return self.entry("message", at, after=after, message=message)

    def call(
        self, started: int, ended: int, *tools: str, stop: str = "", after: str | None = None, **fields: Any
    ) -> str:
        """A model call. `tools`: `id` or `id:name` of each."""
        wanted = [tool.partition(":") for tool in tools]
        content = [{"type": "text", "text": "SECRET"}, *(
            {"type": "toolCall", "id": tool, "name": name or "bash", "arguments": {"command": "SECRET"}}
            for tool, _, name in wanted
        )]
        message = {
            "role": "assistant", "content": content, "provider": "loopback", "model": "sonnet-like",
            "usage": {"input": 10, "output": 20, "cacheRead": 3, "cacheWrite": 4, "cost": {"total": 0.25}},
            "stopReason": stop or ("toolUse" if tools else "stop"), "timestamp": T0 + started, **fields,
        }
        return self.entry("message", ended, after=after, message=message)

    def result(self, tool: str, at: int, *, failed: bool = False, after: str | None = None) -> str:
        message = {"role": "toolResult", "toolCallId": tool, "toolName": "bash", "isError": failed,
                   "content": [{"type": "text", "text": "SECRET"}], "timestamp": T0 + at}
        return self.entry("message", at, after=after, message=message)

    @property
    def data(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()


def iso(at: int) -> str:
    """Milliseconds after `T0` as session files write times."""
    return datetime.fromtimestamp((T0 + at) / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def recordings(agent: str) -> list[Path]:
    """The session files recorded of `pi`, `oh-my-pi`, or `cases` (pi: parallel tools, errors, steering, a fork)."""
    if agent == "cases":
        return sorted((SPANS / "cases").glob("*.jsonl"))
    # A sub-agent's file lies in a folder named after its parent's: the parent comes first.
    return sorted((CAPTURES / agent / "sessions").rglob("*.jsonl"), key=lambda path: (len(path.parts), path))


def feed(turns: Turns, data: bytes, now: float = LONG_AFTER) -> Found:
    return turns.apply(decode(data)[0], now)


def turns_of(found: Found) -> list[FinishedTurn]:
    return [one for one in found if isinstance(one, FinishedTurn)]


def runs_of(found: Found) -> list[FinishedRun]:
    return [one for one in found if isinstance(one, FinishedRun)]


def at(now_ms: int) -> float:
    """Epoch seconds of a time of a synthetic session."""
    return (T0 + now_ms) / 1000


def finished(data: bytes, *, now: float = LONG_AFTER) -> Found:
    """What one reading of a whole file gives, with the silence after it."""
    turns = Turns("no header")
    return [*feed(turns, data, now), *turns.tick(now)]


def recorded(agent: str) -> list[Span]:
    """All spans of a recording."""
    source = "omp" if agent == "oh-my-pi" else "pi-coding"
    known: dict[str, Turns] = {}
    found: list[Finished] = []
    for path in recordings(agent):
        turns = known[path.stem] = Turns(path.stem)
        parent = known.get(path.parent.name)
        records, rejected = decode(path.read_bytes())
        assert rejected == 0
        found += turns.apply(records, LONG_AFTER, parent.spawner if parent else None)
        found += turns.tick(LONG_AFTER)
    return [span for one in found for span in spans(one, source=source)]


def tree(made: list[Span]) -> list[dict[str, Any]]:
    """Spans as nested documents, in order of time; children below their parents."""
    by_parent: dict[str, list[Span]] = {}
    known = {span.span for span in made}
    for span in made:
        by_parent.setdefault(span.parent if span.parent in known else "", []).append(span)

    def node(span: Span) -> dict[str, Any]:
        found: dict[str, Any] = {"name": span.name, "kind": span.kind, "trace": span.trace, "span": span.span,
                                 "start": _time(span.start), "end": _time(span.end), "attributes": span.attributes}
        if span.error:
            found["error"] = span.error
        if span.events:
            found["events"] = [[event.name, _time(event.at)] for event in span.events]
        if span.links:
            found["links"] = [[link.trace, link.span] for link in span.links]
        children = sorted(by_parent.get(span.span, []), key=_order)
        if children:
            found["children"] = [node(child) for child in children]
        return found

    return [node(span) for span in sorted(by_parent.get("", []), key=_order)]


def _order(span: Span) -> tuple[int, str, str]:
    return span.start, span.name, span.span


def _time(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")
