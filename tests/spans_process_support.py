"""Takes what a collector received and what an agent does, gives end-to-end tests both as spans, to be compared.

What has to arrive is computed from the whole session file, read once: kills, refusals and the order in which the
running program saw its parts must leave no trace in what it sends.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
import uuid
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, Self

from agents_support import iso as clock_time
from coding_agent_exporter.spanmodel import Span, SpanEvent, SpanLink, Value
from coding_agent_exporter.spans import spans
from process_support import DEADLINE, Exporter, wait_for
from spans_support import SPANS, T0, SessionFile, finished
from support import Samples, reseal, total

if TYPE_CHECKING:
    from pathlib import Path

    from otlp_receiver import Receiver

PENDING = "coding_agent_exporter_spans_pending"
DROPPED = "coding_agent_exporter_spans_dropped_total"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}

POISON = "poison"
"""A model whose calls the collector refuses."""

_KINDS: dict[int, Literal["internal", "client"]] = {1: "internal", 3: "client"}
_ERROR = 2


class LiveSession(SessionFile):
    """A session of pi that goes on now: each entry is appended to its file below `directory`, with the time it is.

    `ago`: all of it happened so many seconds earlier.
    """

    def __init__(self, directory: Path, *, ago: float = 0.0, **header: Any) -> None:
        self.session = str(uuid.uuid4())
        self._ago = round(ago * 1000)
        self._sent = 0
        started = clock_time(time.time() - ago).replace(":", "-").replace(".", "-")
        self.path = directory / "--srv-project--" / f"{started}_{self.session}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(self.session, self.now(), **header)

    def _write(self, document: dict[str, Any]) -> None:
        super()._write(document)
        line = self.lines[-1].encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            # In two parts: whoever reads in between sees a line that is not whole.
            file.write(line[: len(line) // 2])
            file.write(line[len(line) // 2:])

    def now(self) -> int:
        """Milliseconds after T0; later each time."""
        self._sent = max(self._sent + 1, round(time.time() * 1000) - T0 - self._ago)
        return self._sent

    def prompt(self, *turns: tuple[str, ...], model: str = "sonnet-like", failed: str = "") -> None:
        """A user's message, a turn for each tuple of tools (`id:name`), and the answer. `failed`: a tool's id."""
        self.user(self.now())
        for tools in turns:
            self.call(self.now(), self.now(), *tools, model=model)
            for tool in tools:
                name = tool.partition(":")[0]
                self.result(name, self.now(), failed=name == failed)
        self.call(self.now(), self.now(), model=model)

    def anything(self, chance: random.Random) -> None:
        """One of the things that a session is made of, each of them finished when this returns."""
        what = chance.randrange(6)
        if what == 0:
            self.prompt()
        elif what == 1:
            self.prompt(("1:read", "2:bash", "3:bash"), ("1:edit",), failed="2")
        elif what == 2:
            self.prompt(*((f"{number}:read",) for number in range(chance.randint(1, 5))))
        elif what == 3:
            self.user(self.now())
            self.call(self.now(), self.now(), stop="error", errorMessage="overloaded")
            self.call(self.now(), self.now())
        elif what == 4:
            self.user(self.now())
            self.call(self.now(), self.now(), "1:bash", stop="aborted")
        else:
            self.user(self.now())
            self.call(self.now(), self.now(), "1:bash")
            self.entry("compaction", self.now(), summary="SECRET")
            self.result("1", self.now())
            self.call(self.now(), self.now())

    def fork(self, directory: Path) -> Self:
        """A session that begins with copies of this one's entries."""
        copies = self.lines[1:]
        forked = type(self)(directory, parentSession=str(self.path))
        with forked.path.open("a") as file:
            file.writelines(f"{line}\n" for line in copies)
        forked.lines += copies
        forked._count, forked.last = self._count, self.last
        return forked

    @property
    def spans(self) -> list[Span]:
        """What its file holds, once it is read."""
        return [span for one in finished(self.data, now=time.time()) for span in spans(one, source="pi-coding")]


def by_id(made: list[Span]) -> dict[str, Span]:
    """Spans by their id, each of which is there once."""
    found = {span.span: span for span in made}
    assert len(found) == len(made)
    return found


def received(receiver: Receiver) -> dict[str, Span]:
    """What the collector has, by span id. It may have got one several times, but then the same each time."""
    with receiver.arrived:
        messages = list(receiver.spans)
    found: dict[str, Span] = {}
    for message in messages:
        span = decoded(message)
        assert found.setdefault(span.span, span) == span
    return found


def decoded(message: Any) -> Span:
    """A span of the protocol as the program's own type."""
    assert (message.status.code == _ERROR) == bool(message.status.message)
    return Span(
        trace=message.trace_id.hex(), span=message.span_id.hex(), parent=message.parent_span_id.hex(),
        name=message.name, kind=_KINDS[message.kind],
        start=message.start_time_unix_nano, end=message.end_time_unix_nano,
        attributes=attributes(message.attributes), error=message.status.message,
        events=[SpanEvent(event.name, event.time_unix_nano, attributes(event.attributes)) for event in message.events],
        links=[SpanLink(link.trace_id.hex(), link.span_id.hex()) for link in message.links],
    )


def attributes(pairs: Any) -> dict[str, Value]:
    """Attributes of the protocol as a dictionary."""
    found: dict[str, Value] = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


def wait_until_received(receiver: Receiver, wanted: dict[str, Span], *, deadline: float = DEADLINE) -> dict[str, Span]:
    """Wait until all of these have arrived; fail when they do not, or differ, or others arrived. What arrived."""
    wait_for(lambda: wanted.keys() <= {span.span_id.hex() for span in list(receiver.spans)},
             f"{len(wanted)} spans to arrive", deadline=deadline)
    found = received(receiver)
    assert found == wanted
    return found


def wait_for_pending(exporter: Exporter, least: int, most: int) -> Samples:
    """Wait until so many spans wait for the collector; the scrape that said so."""
    seen: list[Samples] = []

    def reached() -> bool:
        seen.append(exporter.scrape())
        return least <= total(seen[-1], PENDING) <= most

    wait_for(reached, f"{least} to {most} spans in the outbox", every=0.1)
    return seen[-1]


def age(exporter: Exporter, statement: str) -> None:
    """Let time pass: change, in the state file of an exporter that does not run, when something was stored."""
    assert exporter.ended
    with closing(sqlite3.connect(exporter.home / "state.db")) as state, state:
        changed = state.execute(statement).rowcount
        reseal(state)
    assert changed > 0


def golden(*agents: str) -> list[dict[str, Any]]:
    """The trees of recordings' spans."""
    return [tree for agent in agents for tree in json.loads((SPANS / f"{agent}.json").read_text())]


def flat(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All spans of trees."""
    return [found for tree in trees for found in (tree, *flat(tree.get("children", [])))]


def planted(value: Any, marker: str, keep: frozenset[str], field: str = "") -> Any:
    """A document with the marker in all texts except those of the fields to `keep`."""
    if isinstance(value, dict):
        called = value.get("type") == "toolCall"
        return {key: inner if called and key == "name" else planted(inner, marker, keep, key)
                for key, inner in value.items()}
    if isinstance(value, list):
        return [planted(inner, marker, keep, field) for inner in value]
    return f"{marker} {field} {value} {marker}" if isinstance(value, str) and field not in keep else value
