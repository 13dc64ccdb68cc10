"""Takes the lines of session files and the messages of usage logs, gives finished spans and what metrics observe.

Keeps the open turns of each session, in memory while they are busy and in the state file otherwise: they are stored
in the transaction that moves the cursor past the lines they came from.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from coding_agent_exporter import families
from coding_agent_exporter.ledger import Saved, clean
from coding_agent_exporter.messages import Messages
from coding_agent_exporter.model import Mark
from coding_agent_exporter.spans import MAX_TEXT, observations, spans
from coding_agent_exporter.turnmodel import FinishedMessage, FinishedTurn, Header
from coding_agent_exporter.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coding_agent_exporter.families import Family
    from coding_agent_exporter.ledger import Book
    from coding_agent_exporter.model import CounterKey, SourceFile, UsageEvent
    from coding_agent_exporter.spanmodel import Span
    from coding_agent_exporter.spans import Observation
    from coding_agent_exporter.turnmodel import Finished, Record

TURNS, MESSAGES = "turns", "messages"
_encode = msgspec.msgpack.Encoder().encode

MAX_TOOLS = 200
"""Tool names of a root and source that get series of their own; the rest is "other"."""

CACHE = 16
OTHER, UNKNOWN = "other", "unknown"
TICK = 5.0
"""Seconds between two looks at what only the passing of time finishes."""
PATIENCE = {TURNS: 300, MESSAGES: 30}
"""Seconds for which a session was quiet before it is looked at for that."""
AT_ONCE = 200
"""So many sessions are looked at in one step."""


class Storage(Protocol):
    """Where sessions rest while they are not in memory."""

    def account(self, key: str) -> bytes | None: ...

    def quiet(self, kind: str, before: int, limit: int) -> list[str]:
        """Keys of what still waits for something and was last changed before an epoch second."""


class _Stored(msgspec.Struct, array_like=True):
    """A session at rest: where its first lines came from, and its open turns or message."""

    root: str
    source: str
    state: bytes


_decode = msgspec.msgpack.Decoder(_Stored).decode


@dataclass(slots=True)
class _Session:
    root: str
    source: str
    state: Turns | Messages


class Runs:
    """Sessions with their open turns.

    `wanted`: whether spans are made at all; without a collector only the metrics are. `since`: epoch seconds; what
    ended before gives no spans. `usage_sources`: those whose spans come from usage logs, not from session files.
    `mode_of` tells the cost mode of a session.
    """

    def __init__(
        self, storage: Storage, book: Book, mode_of: Callable[[str], str], *, wanted: bool, since: float,
        usage_sources: frozenset[str], max_models: int = 100,
    ) -> None:
        self.exemplars: dict[CounterKey, Mark] = {}
        self.skipped = 0
        """Finished turns, runs and messages without spans, since they had ended before `since`."""
        self._storage = storage
        self._book = book
        self._mode_of = mode_of
        self._wanted = wanted
        self._since = since
        self._usage_sources = usage_sources
        self._max_models = max_models
        self._models: set[tuple[str, ...]] = set()
        self._tools: dict[tuple[str, str], set[str]] = {}
        self._open: OrderedDict[str, _Session] = OrderedDict()
        self._dirty: set[str] = set()
        self._spans: list[Span] = []
        self._observed: dict[tuple[str, tuple[str, ...], bool], list[int]] = {}
        self._next_tick = 0.0

    # -- session files

    def apply_session(
        self, file: SourceFile, source: str, session: str, records: list[Record], now: float, *, known: bool = False
    ) -> None:
        """Take the records of a session file, in file order. `session` names it until its header was read; `known`:
        it was, and names what follows too."""
        headers = (place for place, record in enumerate(records) if isinstance(record, Header))
        first = None if known else next(headers, None)
        self._apply(file, source, session[:MAX_TEXT], "", records[:first], now)
        if first is not None:
            header = records[first]
            assert isinstance(header, Header), "it was looked for"
            self._apply(file, source, header.session, header.parent, records[first:], now)

    def _apply(
        self, file: SourceFile, source: str, name: str, parent: str, records: list[Record], now: float
    ) -> None:
        if not records:
            return
        key = f"{TURNS}\n{name}"
        turns = self._session(key, file.root, source)
        assert isinstance(turns.state, Turns), "the key says so"
        # A file in a folder that is named after its parent is a sub-agent's; any other one is a fork.
        spawner = None
        if parent and file.path.parent.name.endswith(parent):
            above = self._session(f"{TURNS}\n{parent}", file.root, source).state
            spawner = above.spawner if isinstance(above, Turns) else None
        for finished in turns.state.apply(records, now, spawner):
            self._finish(turns, finished)
        self._dirty.add(key)

    # -- usage logs

    def wants_messages(self, source: str) -> bool:
        """Whether spans of this source are made from its usage logs."""
        return self._wanted and source in self._usage_sources

    def apply_message(
        self, file: SourceFile, session: str, key: str, event: UsageEvent, now: float, *, first: bool
    ) -> None:
        """Take an event of a usage log that the ledger found to be neither a copy nor a replay."""
        name = f"{MESSAGES}\n{session}"
        messages = self._session(name, file.root, file.source)
        assert isinstance(messages.state, Messages), "the key says so"
        for finished in messages.state.apply(key, event, now, first=first):
            self._finish(messages, finished)
        self._dirty.add(name)

    # -- time

    def tick(self, now: float) -> None:
        """Finish what only the passing of time finishes. Call it when all input was read."""
        if 0 <= self._next_tick - now <= TICK:
            return
        self._next_tick = now + TICK
        for kind, patience in PATIENCE.items():
            for key in self._storage.quiet(kind, int(now) - patience, AT_ONCE):
                if key not in self._dirty:
                    session = self._session(key, "", "")
                    for finished in session.state.tick(now):
                        self._finish(session, finished)
                    self._dirty.add(key)  # looked at: others come first next time

    def flush(self, now: float) -> tuple[dict[str, Saved], list[Span]]:
        """The sessions to store and the spans to send, once. Counts what was observed: call it before the ledger's."""
        self._settle()
        saved = {}
        for key in self._dirty:
            session = self._open[key]
            blob = _encode(_Stored(session.root, session.source, session.state.dump()))
            saved[key] = Saved(blob, int(now), settled=not session.state.waiting)
        self._dirty.clear()
        finished, self._spans = self._spans, []
        return saved, finished

    def trim(self) -> None:
        """Let go of what the state file has. Call after the commit."""
        while len(self._open) > CACHE:
            self._open.popitem(last=False)

    # -- parts

    def _session(self, key: str, root: str, source: str) -> _Session:
        session = self._open.get(key)
        if session is not None:
            self._open.move_to_end(key)
            return session
        kind, name = key.split("\n", 1)
        blob = self._storage.account(key)
        stored = _Stored(root, source, b"") if blob is None else _decode(blob)
        state = Turns(name) if kind == TURNS else Messages(name, stored.source)
        if stored.state:
            state.load(stored.state)
        session = self._open[key] = _Session(stored.root, stored.source, state)
        return session

    def _finish(self, session: _Session, finished: Finished) -> None:
        root, source = session.root, session.source
        end = finished.end / 1000
        from_logs = isinstance(finished, FinishedMessage)
        wanted = self._wanted and from_logs == (source in self._usage_sources)
        sent = wanted and end >= self._since
        for observation in observations(finished):
            self._observe(root, source, observation, end, sent=sent)
        if isinstance(finished, FinishedTurn) and finished.call.tokens is not None:
            self._observe_tokens(root, source, finished, end)
        if sent:
            mode = finished.mode if isinstance(finished, FinishedMessage) else self._mode_of(finished.session)
            self._spans += spans(finished, source=source, mode=mode)
        elif wanted:
            self.skipped += 1

    def _observe(self, root: str, source: str, seen: Observation, at: float, *, sent: bool) -> None:
        mark = Mark(seen.seconds, at, seen.trace, seen.span) if sent else None
        if seen.kind == "turn":
            provider, model, stop = seen.labels
            provider, model = self._names(root, source, provider, model)
            self._book.count((families.TURNS.name, (root, source, provider, model, stop)), at)
            self._record(families.TURN_SECONDS, (root, source, provider, model), seen.seconds, at, mark)
        elif seen.kind == "tool":
            tool, outcome = self._tool(root, source, seen.labels[0]), seen.labels[1]
            self._book.count((families.TOOL_CALLS.name, (root, source, tool, outcome)), at)
            if outcome != "unknown":  # without a result nobody knows how long it ran
                self._record(families.TOOL_SECONDS, (root, source, tool), seen.seconds, at, mark)
        elif seen.kind == "call":
            provider, model, error = seen.labels
            provider, model = self._names(root, source, provider, model)
            self._record(families.GENAI_DURATION, (root, source, provider, model, error), seen.seconds, at, mark)
        else:
            provider, model = self._names(root, source, *seen.labels)
            self._record(families.FIRST_TOKEN_SECONDS, (root, source, provider, model), seen.seconds, at, mark)

    def _observe_tokens(self, root: str, source: str, turn: FinishedTurn, at: float) -> None:
        new, output, read, created = turn.call.tokens or (0, 0, 0, 0)
        provider, model = self._names(root, source, turn.call.provider, turn.call.model)
        for kind, count in (("input", new + read + created), ("output", output)):
            self._record(families.GENAI_TOKENS, (root, source, provider, model, kind), float(count), at, None)

    def _record(self, family: Family, labels: tuple[str, ...], value: float, at: float, mark: Mark | None) -> None:
        """Add an observation to a histogram. It reaches the counters, many at once, with `_settle`."""
        place = bisect_left(family.buckets, value)
        rows = self._observed.setdefault((family.name, labels, at < self._book.cutoff), [0] * (len(family.buckets) + 2))
        rows[place] += 1
        rows[-1] += round(value * family.scale)
        if mark is not None:
            self.exemplars[f"{family.name}_bucket", (*labels, families.bounds(family)[place])] = mark

    def _settle(self) -> None:
        """Turn what was observed into the counters that a histogram is kept as (see `families.HISTOGRAMS`)."""
        for (name, labels, old), row in self._observed.items():
            at, total = -math.inf if old else math.inf, 0
            for bound, count in zip(families.bounds(families.BY_NAME[name]), row[:-1], strict=True):
                total += count
                self._book.count((f"{name}_bucket", (*labels, bound)), at, total)
            self._book.count((f"{name}_sum", labels), at, row[-1])
        self._observed.clear()

    def restore(self, keys: Iterable[CounterKey]) -> None:
        """Take over the names that have series: the caps outlive a restart."""
        for family, labels in keys:
            if family == families.TOOL_CALLS.name:
                self._tools.setdefault((labels[0], labels[1]), set()).add(labels[2])
            elif family == families.TURNS.name:
                self._models.add(labels[:4])

    def _tool(self, root: str, source: str, name: str) -> str:
        known = self._tools.setdefault((root, source), set())
        name = clean(name)
        if name not in known and len(known) >= MAX_TOOLS:
            self._book.overflowed["tools"] += 1
            return OTHER
        known.add(name)
        return name

    def _names(self, root: str, source: str, provider: str, model: str) -> tuple[str, str]:
        """Provider and model as labels. A histogram has many series for each: the cap is lower than that of usage."""
        if not provider or provider == UNKNOWN:  # as usage series do, so that both can be joined
            before, slash, after = model.partition("/")
            provider, model = (before, after) if slash else (provider, model)
        labels = (root, source, clean(provider), clean(model))
        if labels not in self._models and len(self._models) >= self._max_models:
            self._book.overflowed["turn_models"] += 1
            return OTHER, OTHER
        self._models.add(labels)
        return labels[2], labels[3]
