"""Takes heartbeats as they are read, gives the state of every agent process and counters of what befell them.

A scrape sees the file as it happens to be; this module remembers what was in it between scrapes: the highest
context percent, every rise of the context pressure, compactions, and processes that died without a word.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from math import inf
from typing import Annotated, Literal

import msgspec

from coding_agent_exporter.families import COMPACTIONS, CROSSINGS, LOST
from coding_agent_exporter.model import Activity, CounterKey, Heartbeat, Instance, Pressure

_LEVELS = tuple(Pressure)
_COMPACT = "session_compact"
# After these the context is that of another place in the session tree: unknown again, but not compacted.
_MOVES = frozenset({"session_tree", "session_fork", "session_switch"})
_MAX_POINTS = 64
_MAX_WRITERS = 16


class _Record(msgspec.Struct):
    """What the next exporter has to know of one file. Stored: names and meanings stay as they are."""

    root: str
    name: str
    started: float
    session: str
    activity: Activity
    since: float
    rank: Annotated[int, msgspec.Meta(ge=0, lt=len(_LEVELS))]
    known: bool  # the context percent was a number
    compacted: bool  # the last event was a compaction, which has been counted
    updated: float
    lag: float
    alive: bool


class _Peaks(deque[tuple[float, float]]):
    """Readings as (clock, value), kept while one can still be the highest of a trailing window."""

    def push(self, clock: float, value: float) -> None:
        while self and self[-1][1] <= value:
            self.pop()
        if len(self) == _MAX_POINTS:
            # Bounded by showing the lowest peak for longer rather than by forgetting one.
            value = self.pop()[1]
        self.append((clock, value))

    def highest(self, since: float) -> float | None:
        """`since` must not go back from call to call: what lies before it is dropped."""
        while self and self[0][0] < since:
            self.popleft()
        return self[0][1] if self else None


@dataclass(slots=True)
class _Writer:
    """One writer of a file, known by its `started_at`."""

    reading: Heartbeat
    activity: Activity
    since: float
    seen: float  # when it was read last, on our own clock
    first_look: float  # the last look at the file before it was first read, on our own clock
    rank: int = 0  # of the pressure, in _LEVELS
    peaks: _Peaks = field(default_factory=_Peaks)
    owed: dict[CounterKey, int] = field(default_factory=dict)  # its increments, until it is the owner

    def state(self) -> tuple[object, ...]:
        """What is worth persisting when it changes."""
        return (self.reading.session_id, self.activity, self.rank, self.reading.context_percent is None,
                self.reading.last_event == _COMPACT)


@dataclass(slots=True)
class _File:
    """One instance file."""

    writers: dict[float, _Writer] = field(default_factory=dict)
    owner: float = inf
    last: float = inf  # the writer that was read last
    run: int = 0  # readings of others since the owner was read
    updated_at: float = 0.0
    lag: float = 0.0
    expires: float = -inf  # when it goes stale, on our own clock
    alive: bool = False  # seen alive, and not lost since
    stale: bool = False  # what the last tick found
    record: _Record | None = None  # what an earlier run knew of a writer not read yet


class Instances:
    """All instance files of all roots. Not thread-safe.

    Call per look at the directories: `observe` for what changed, `gone` for what was removed, then `tick`.
    `now` is epoch seconds by the exporter's clock; durations are in seconds.

    **Alive or not.** A file is stale when its `updated_at` is more than `stale_after` ago; where the writer's
    clock differs from ours, when its `updated_at` has not moved for that long. A process that was fresh and
    went stale is lost, once, until it is fresh again. When our own clock is set back, ages stand still.

    **Writers.** A file can have several, told apart by `started_at`. The oldest owns the gauges and counters,
    the others (sub-agents inside the process) only prove life. But pi loads its extension anew for `/new`,
    resume and fork: a younger writer appears, the older never writes again. And a container's pid is used
    again after a crash. So a younger writer takes over when the older has fallen silent; what it did since
    then counts. The older process was lost unless both wrote in turn, or the younger started within a second
    and two heartbeats of the older one's last word, or nobody looked in between.

    **Crossings.** Each rise of the pressure within a session counts once for every level passed. An unknown
    percent (after a compaction) and the start of a session are below all levels.

    **Compactions** are counted when a snapshot with last event `session_compact` appears, or when the percent
    of a session turns from a number into unknown (the event was overwritten before it was seen). Missed are:
    a compaction whose effect was overwritten too; the second of two with nothing in between; one that ends
    after its session was replaced (pi-telemetry writes nothing then); one before the file was first seen.
    """

    def __init__(self, *, stale_after: float = 10.0, forget_after: float = 3600.0,
                 peak_window: float = 60.0) -> None:
        self._stale_after = stale_after
        self._forget_after = forget_after
        self._peak_window = peak_window
        self._files: dict[tuple[str, str], _File] = {}
        self._memory: dict[tuple[str, str], _Record] = {}
        self._memory_until = inf
        self._due: dict[CounterKey, int] = {}
        self._clock = -inf
        self._offset = 0.0
        self._looked = -inf
        self._scraped = -inf
        self._dirty = False

    @property
    def dirty(self) -> bool:
        """Something worth persisting changed since the last `dump` or `load`; a mere heartbeat is not."""
        return self._dirty

    def observe(self, root: str, name: str, hb: Heartbeat, now: float,
                count_compactions: bool = True) -> None:
        """Take one reading of the file `name` below `root`."""
        clock = self._elapse(now)
        key = hb.started_at or 0.0
        file = self._files.get((root, name)) or self._meet((root, name), key)
        self._freshen(file, key, hb, now, clock)
        writer = file.writers.get(key)
        before = writer.state() if writer and key == file.owner else None
        if writer is None:
            writer = self._enlist(file, key, hb, clock)
        _read(writer, hb, clock, root, quiet=not file.alive, compactions=count_compactions)
        file.last = key
        if key <= file.owner:
            file.owner, file.run = key, 0
        else:
            file.run += 1
            self._maybe_hand_over(root, file, key, clock)
        if key == file.owner:
            self._settle(writer)
            self._dirty |= writer.state() != before

    def gone(self, root: str, name: str, now: float) -> None:
        """The file was removed: a graceful end, or a process that is replacing its session."""
        self._elapse(now)
        self._memory.pop((root, name), None)
        file = self._files.pop((root, name), None)
        if file is not None:
            self._settle_last(file)
            self._dirty = True

    def tick(self, now: float) -> None:
        """Take note of what went stale. To be called after each look at the directories."""
        clock = self._elapse(now)
        for (root, _), file in self._files.items():
            file.stale = clock > file.expires
            if file.stale and file.alive:
                file.alive = False
                self._settle_last(file)
                self._lose(root)
        self._looked = clock
        self._memory_until = min(self._memory_until, clock + self._forget_after)
        if self._memory and clock > self._memory_until:
            self._memory.clear()
            self._dirty = True

    def view(self, now: float) -> list[Instance]:
        """All processes by (root, pid), without those that have been stale for longer than `forget_after`.

        The heartbeat is the owner's last, with the time of the file's last. A stale instance comes with what
        it last said; it is for the caller not to show it.
        """
        clock = self._elapse(now)
        since = min(clock - self._peak_window, self._scraped)
        shown = []
        for (root, _), file in self._files.items():
            if clock - file.expires > self._forget_after:
                continue
            owner = file.writers[file.owner]
            reading, peak = owner.reading, owner.peaks.highest(since)
            if reading.updated_at != file.updated_at:
                reading = replace(reading, updated_at=file.updated_at)
            if reading.context_percent is not None:
                peak = max(peak or 0.0, reading.context_percent)
            shown.append(Instance(root, reading, clock > file.expires, owner.activity, owner.since, peak))
        return sorted(shown, key=lambda instance: (instance.root, instance.heartbeat.pid))

    def counts(self, root: str) -> dict[Activity, int]:
        """How many fresh processes of this root do what, as of the latest call with a time."""
        counts = dict.fromkeys(Activity, 0)
        for (own, _), file in self._files.items():
            if own == root and self._clock <= file.expires:
                counts[file.writers[file.owner].activity] += 1
        return counts

    def take(self) -> dict[CounterKey, int]:
        """Increments of the families CROSSINGS, COMPACTIONS and LOST since the last call."""
        due, self._due = self._due, {}
        return due

    @property
    def clock(self) -> float:
        """The latest time that any call was given, on a clock that never goes back."""
        return self._clock

    def scraped(self, clock: float) -> None:
        """A scrape has seen the `view` of this `clock`: peaks before it need no longer be kept, but for the window."""
        self._scraped = max(self._scraped, clock)

    def dump(self) -> bytes:
        """What a restarted exporter has to know, as JSON; clears `dirty`."""
        records = {**self._memory}
        for (root, name), file in self._files.items():
            if self._clock - file.expires > self._forget_after:
                continue
            owner = file.writers[file.owner]
            records[root, name] = _Record(
                root, name, file.owner, owner.reading.session_id, owner.activity, owner.since, owner.rank,
                owner.reading.context_percent is not None, owner.reading.last_event == _COMPACT,
                file.updated_at, file.lag, file.alive)
        self._dirty = False
        return msgspec.json.encode((1, list(records.values())))

    def load(self, raw: bytes) -> None:
        """Take what `dump` of an earlier run gave. Raises ValueError, and takes nothing, when it is not that.

        It is used when a file is first seen: the process it remembers is then one that was seen alive.
        """
        try:
            _, records = msgspec.json.decode(raw, type=tuple[Literal[1], list[_Record]])
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"not a dump of instances: {error}") from error
        self._memory = {(record.root, record.name): record for record in records}
        self._memory_until = inf
        self._dirty = False

    def _elapse(self, now: float) -> float:
        """Our own clock: the caller's, but standing still where that goes back."""
        clock = now + self._offset
        if clock < self._clock:
            self._offset += self._clock - clock
            clock = self._clock
        self._clock = clock
        return clock

    def _meet(self, where: tuple[str, str], key: float) -> _File:
        """A file seen for the first time, with the memory of it if that concerns this writer."""
        file = self._files[where] = _File()
        record = self._memory.pop(where, None)
        # A writer that started before the remembered one's last word shared a process with it.
        if record is not None and (key == record.started or key < record.updated):
            file.record = record
            file.updated_at, file.lag, file.alive = record.updated, record.lag, record.alive
        self._dirty = True
        return file

    def _freshen(self, file: _File, key: float, hb: Heartbeat, now: float, clock: float) -> None:
        """Work out from a reading for how long it proves that the process lives."""
        if hb.updated_at == file.updated_at and file.expires > -inf:
            return
        known = key in file.writers if file.writers else file.record is not None
        lag = now - hb.updated_at
        behind, proof = max(lag, 0.0), abs(lag) <= self._stale_after
        if known and not proof:
            # Its clock differs from ours by the lag it has always had, and what is more is the time for which
            # we have not looked; unless its clock was set back.
            behind = max(lag - file.lag, 0.0) if hb.updated_at >= file.updated_at else 0.0
            proof = behind <= self._stale_after
        file.expires = max(file.expires, clock + self._stale_after - behind)
        file.updated_at, file.lag = hb.updated_at, lag
        if proof:
            self._dirty |= not file.alive
            file.alive = True
            # A new writer has yet to be told from the silent one: see _maybe_hand_over.
            file.stale = file.stale and not known

    def _enlist(self, file: _File, key: float, hb: Heartbeat, clock: float) -> _Writer:
        """Add a writer; one of which there is a record as it was when an earlier run last saw it."""
        writer = _Writer(hb, true_activity(hb), hb.updated_at, clock, self._looked)
        record = file.record
        if record is not None and record.started == key:
            file.record = None
            writer.activity, writer.since, writer.rank = record.activity, record.since, record.rank
            writer.reading = replace(
                hb, session_id=record.session, last_event=_COMPACT if record.compacted else "",
                context_percent=hb.context_percent or 0.0 if record.known else None)
        if len(file.writers) >= _MAX_WRITERS:
            others = (other for other in file.writers if other != file.owner)
            del file.writers[min(others, key=lambda other: file.writers[other].seen)]
        file.writers[key] = writer
        return writer

    def _maybe_hand_over(self, root: str, file: _File, key: float, clock: float) -> None:
        """Let the oldest writer that is still heard of take over from an owner that is not."""
        owner = file.writers[file.owner]
        last_word, grace = owner.reading.updated_at, 1.0 + 2 * owner.reading.heartbeat_seconds
        # It started after a look found the file stale: no need to wait for a sign of life of the owner.
        reborn = file.stale and key > last_word
        heard = [other for other, writer in file.writers.items()
                 if other != file.owner and clock - writer.seen <= _patience(writer)]
        # Time alone cannot tell where looks are rarer than heartbeats: each finds one writer by chance. So
        # the owner must also be missing from a number of readings, a greater one if it takes turns.
        missing = (16 if last_word > key else 4) * len(heard)
        if not reborn and (clock - owner.seen <= _patience(owner) or file.run < missing):
            return
        heir = key if reborn else min(heard)
        writer = file.writers[heir]
        lost = not reborn and heir - last_word > grace and writer.first_look - owner.seen > grace
        if lost:
            self._lose(root)
        if not lost and not reborn:
            points, writer.peaks = sorted((*writer.peaks, *owner.peaks)), _Peaks()
            for point in points:
                writer.peaks.push(*point)
        file.owner, file.run, file.stale = heir, 0, False
        self._settle(writer)
        self._dirty = True

    def _settle(self, writer: _Writer) -> None:
        while writer.owed:
            _add(self._due, *writer.owed.popitem())

    def _settle_last(self, file: _File) -> None:
        """The file ends: if its last writer started after the owner's last word, it was the next owner."""
        if file.writers[file.owner].reading.updated_at <= file.last:
            self._settle(file.writers[file.last])

    def _lose(self, root: str) -> None:
        _add(self._due, (LOST.name, (root,)))
        self._dirty = True


def _add(counters: dict[CounterKey, int], key: CounterKey, amount: int = 1) -> None:
    counters[key] = counters.get(key, 0) + amount


def true_activity(hb: Heartbeat) -> Activity:
    """What the agent does. pi clears its busy flag only after `agent_end`, at which it waits for input."""
    if hb.last_event == "agent_end" and hb.activity is Activity.WORKING and not hb.has_pending_messages:
        return Activity.WAITING_INPUT
    return hb.activity


def _patience(writer: _Writer) -> float:
    """Seconds of silence after which a writer counts as gone while others write."""
    return max(5.0, 4 * writer.reading.heartbeat_seconds)


def _read(writer: _Writer, hb: Heartbeat, clock: float, root: str, *, quiet: bool, compactions: bool) -> None:
    """Bring a writer up to date. A quiet reading is of a process that may be long dead: it counts nothing."""
    before = writer.reading
    activity = true_activity(hb)
    if activity is not writer.activity:
        writer.activity, writer.since = activity, hb.updated_at
    writer.reading, writer.seen = hb, clock
    same_session = hb.session_id == before.session_id
    if not same_session:
        writer.rank = 0
    if quiet:
        return
    rank = 0 if hb.context_percent is None or hb.pressure is None else _LEVELS.index(hb.pressure)
    for level in _LEVELS[writer.rank + 1:rank + 1]:
        _add(writer.owed, (CROSSINGS.name, (root, level.value)))
    writer.rank = rank
    if hb.context_percent is not None:
        writer.peaks.push(clock, hb.context_percent)
    if hb.last_event == _COMPACT:
        # A heartbeat repeats the whole snapshot; one that differs in more than its time is another event.
        compacted = replace(before, updated_at=hb.updated_at) != hb
    else:
        compacted = (same_session and before.context_percent is not None and hb.context_percent is None
                     and hb.context_window is not None and hb.last_event not in _MOVES)
    if compactions and compacted:
        _add(writer.owed, (COMPACTIONS.name, (root,)))
