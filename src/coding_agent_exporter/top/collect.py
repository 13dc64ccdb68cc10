"""Takes the settings, gives `top` what is to be seen now: who does what, from heartbeats; what it costs, from logs.

    discover -> tail -> decode -> ledger -> tally -> view <- instances <- heartbeats

The modules are the daemon's, and so are its rules; its state file is neither read nor written. What the ledger has to
remember lies in a temporary file.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.heartbeat import Heartbeats
from coding_agent_exporter.inputs import Inputs
from coding_agent_exporter.instances import Instances
from coding_agent_exporter.ledger import pi_session
from coding_agent_exporter.model import Activity
from coding_agent_exporter.store import Batch, Store
from coding_agent_exporter.tail import Tail
from coding_agent_exporter.top.journal import RECENT, TOKENS, WINDOW, Journal, Today
from coding_agent_exporter.top.view import Agent, Spend, State, View
from coding_agent_exporter.usageperiod import Calendar
from coding_agent_exporter.usagetable import money
from coding_agent_exporter.usagetally import API, SUBSCRIPTION, Sum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.model import Instance

_STATES = {Activity.WORKING: State.WORKING, Activity.WAITING_INPUT: State.WAITING, Activity.UNKNOWN: State.UNKNOWN}


class Collector:
    """All that `top` knows. Not thread-safe; `clock` gives epoch seconds.

    Raises StoreError, or another OSError, when there is no room for the temporary file.
    """

    def __init__(
        self, settings: Settings, *, clock: Callable[[], float] = time.time, calendar: Calendar | None = None
    ) -> None:
        self._clock = clock
        self._calendar = calendar or Calendar()
        self._places = tuple(str(root.path) for root in settings.roots)
        self._tally = Today(self._calendar, clock())
        self._folder = tempfile.TemporaryDirectory(prefix="coding-agent-exporter-")
        self._store = Store(Path(self._folder.name) / "top.db")
        self._journal = Journal(self._store, self._tally)
        self._inputs = Inputs(
            settings.roots, Discovery(settings.roots), Tail(max_line=settings.input_max_line_size), self._journal,
            None, ())
        self._heartbeats = Heartbeats(settings.roots)
        self._unreadable = 0
        self._instances = Instances(
            stale_after=settings.telemetry_stale_after, forget_after=settings.telemetry_forget_after,
            peak_window=settings.telemetry_peak_window)
        self._total = -1
        """Bytes that there were to read at the start; -1: not known yet."""
        self._caught_up = False

    @property
    def watch(self) -> frozenset[Path]:
        """The directories in which a change is worth a step."""
        return self._inputs.found.watch

    def step(self, changes: frozenset[str] | None = None) -> bool:
        """Take what the files say now. Returns whether more is left to read.

        `changes`: paths that are known to have changed since the last step; None: look at everything. The first step
        reads no logs, so that agents can be seen at once, however long a history there is.
        """
        if changes is not None and not self._inputs.knows(changes):
            changes = None
        now = self._journal.now = self._clock()
        self._tally.advance(now)
        self._unreadable = sum(
            scan.states["unreadable"] + scan.states["invalid"]
            for _, scan in self._heartbeats.read(self._instances, now, changes=changes))
        if self._total < 0:
            self._inputs.step(now, budget=0)
            self._total = sum(self._inputs.lag.values())
            return True
        more = self._inputs.step(now, changes=changes)
        self._caught_up = self._caught_up or not more
        batch = Batch(self._journal.flush(complete=self._caught_up, now=now))
        if not batch.empty:
            self._store.commit(batch)
            self._journal.trim()
        self._inputs.take_changed(now)
        return more

    def view(self) -> View:
        """What there is to be seen as of the last step."""
        now = self._journal.now
        day = self._calendar.day(now)
        sums = {key[1]: row for key, row in self._tally.rows.items() if key[0] == day}
        uses = self._tally.uses
        tokens: Counter[int] = Counter()
        for use in uses:
            tokens[use.session] += use.tokens
        journal = self._journal
        journal.lately = {session for session in journal.lately if journal.seen[session].at > now - RECENT}

        def spent(session: int) -> tuple[Spend, float, float | None]:
            """Today, tokens per minute, and the last sign of life, of a session and its sub-agents."""
            members = {session, *journal.below.get(session, ())}
            rate = sum(tokens[one] for one in members) * 60 / WINDOW
            last = max((journal.seen[one].at for one in members if one in journal.seen), default=None)
            return _spend(sums[one] for one in members if one in sums), rate, last

        agents, beating = [], set()
        for instance in self._instances.view(now):
            name = instance.heartbeat.session_id
            session = journal.session(name) if name else -1
            # The first reading of a file may be by a sub-agent in the agent's process.
            session = journal.above.get(session, session)
            beating.add(session)
            agents.append(_agent(instance, *spent(session)))
        # Otherwise peaks would be kept until a scrape that never comes.
        self._instances.scraped(self._instances.clock)
        for session in sorted({journal.above.get(session, session) for session in journal.lately} - beating):
            today, rate, last = spent(session)
            latest = max(
                journal.seen[one] for one in (session, *journal.below.get(session, ())) if one in journal.seen)
            name = self._tally.names[session]
            agents.append(Agent(latest.root, None, State.RECENT, model=latest.model, session=pi_session(name) or name,
                                today=today, rate=rate, last=last))
        done, total = self.read
        return View(
            agents=tuple(agents), today=_spend(sums.values()), window=WINDOW,
            billed=sum(use.pico for use in uses if use.mode == API) * 3600 // WINDOW,
            imputed=sum(use.pico for use in uses if use.mode != API) * 3600 // WINDOW,
            rate=sum(use.tokens for use in uses) * 60 / WINDOW,
            reading=None if self._caught_up else done / total if total > 0 else 0.0,
            unreadable=self._unreadable + sum(
                count for (_, _, state), count in self._inputs.states.items() if state == "unreadable"),
            places=self._places,
        )

    @property
    def read(self) -> tuple[int, int]:
        """How many bytes of the logs have been read, of how many that there were at the start."""
        done = sum(amount for (name, _), amount in self._inputs.stats.items() if name == families.BYTES_READ.name)
        return min(done, self._total), self._total

    def close(self) -> None:
        """Close and delete the temporary file."""
        self._store.close()
        self._folder.cleanup()


def _spend(sums: Iterable[Sum]) -> Spend:
    total = Sum()
    for one in sums:
        total.merge(one)
    return Spend(money(total, API), money(total, SUBSCRIPTION), sum(total.slot(slot) for slot in TOKENS))


def _agent(instance: Instance, today: Spend, rate: float, last: float | None) -> Agent:
    """A stale agent shows what it cost, not what it did: see `Instance`."""
    said = instance.heartbeat
    name = said.session_name or said.session_id
    if instance.stale:
        return Agent(instance.root, said.pid, State.STALE, said.updated_at, model=said.model, session=name,
                     branch=said.git_branch, today=today, rate=rate, last=last)
    return Agent(
        instance.root, said.pid, _STATES[instance.activity], instance.activity_since, said.context_percent,
        instance.context_percent_peak, said.model, name, said.git_branch, today, rate, last)
