"""Takes every line of the logs as the ledger counts it, gives `top` what a session spent today and of late."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from coding_agent_exporter.ledger import PI, pi_session
from coding_agent_exporter.ledger.book import CACHE_CREATION, CACHE_READ, ESTIMATED, INPUT, OUTPUT, REPORTED
from coding_agent_exporter.pricing import Prices
from coding_agent_exporter.usageperiod import Calendar, Period
from coding_agent_exporter.usagetally import Attributing, Tally

if TYPE_CHECKING:
    from coding_agent_exporter.ledger import SessionMeta, Storage
    from coding_agent_exporter.model import SessionMessage, SessionRecord, SourceFile, UsageEvent

WINDOW = 300
"""Seconds over which rates are taken: long enough for several model calls, short enough to be about now."""

RECENT = 900
"""Seconds for which a session without a heartbeat is shown after its log last grew."""

MAX_TEXT = 200
"""Characters that are kept of a model's name."""

TOKENS = (INPUT, OUTPUT, CACHE_READ, CACHE_CREATION)


class Use(NamedTuple):
    """What was counted at an epoch second; money in pico-USD."""

    second: int
    session: int
    mode: str
    pico: int
    tokens: int


class Today(Tally):
    """A tally of each session's days from today on, and of what was used in the last minutes."""

    def __init__(self, calendar: Calendar, now: float) -> None:
        super().__init__(("day", "session"), Period(since=calendar.midnight(calendar.today(now))), calendar)
        self.uses: deque[Use] = deque()
        self.horizon = now - WINDOW
        self._session = -1
        self._rows: list[tuple[int, int, list[int]]] = []

    def at(self, session: int, account: str = "") -> None:
        self._session = session
        super().at(session, account)

    def row(self, number: int, second: int) -> list[int]:
        row = super().row(number, second)
        if second >= self.horizon:
            self._rows.append((number, second, row))
        return row

    def settle(self) -> None:
        """What turns out to be imputed after all stays billed in the rates, for the few minutes that they cover."""
        for number, second, row in self._rows:
            tokens, pico = sum(row[slot] for slot in TOKENS), row[REPORTED] + row[ESTIMATED]
            if tokens or pico:
                self.uses.append(Use(second, self._session, self.keys[number][4], pico, tokens))
        self._rows.clear()
        super().settle()

    def advance(self, now: float) -> None:
        """Let go of what is older than the window. Lines come nearly in the order of their times, so look at all."""
        self.horizon = now - WINDOW
        if any(use.second < self.horizon for use in self.uses):
            self.uses = deque(use for use in self.uses if use.second >= self.horizon)


class Seen(NamedTuple):
    """The latest use of a session, epoch seconds, and of what."""

    at: float
    model: str
    root: str


class Journal(Attributing):
    """The ledger; it also notes when each session was last used, with what, and whose sub-agent it is."""

    def __init__(self, storage: Storage, tally: Today) -> None:
        super().__init__(storage, Prices().estimate, tally, self)
        self.seen: dict[int, Seen] = {}
        self.lately: set[int] = set()
        """Sessions that were used in the last `RECENT` seconds, and perhaps some more."""
        self.below: dict[int, set[int]] = {}
        """The sessions that a session started as its sub-agents (oh-my-pi)."""
        self.above: dict[int, int] = {}
        """The other way round."""
        self._numbers = tally
        self._root = ""

    def apply_session(
        self, file: SourceFile, source: str, meta: SessionMeta, records: list[SessionRecord], *, fallback: str = ""
    ) -> None:
        self._root = file.root
        super().apply_session(file, source, meta, records, fallback=fallback)
        # A file in a folder that is named after its parent is a sub-agent's; any other one is a fork.
        parent = pi_session(file.path.parent.name)
        if parent and parent == meta.parent:
            child, above = self.session(meta.session or fallback), self.session(parent)
            self.below.setdefault(above, set()).add(child)
            self.above[child] = above

    def session(self, uuid: str) -> int:
        """The number of a session of pi or oh-my-pi."""
        return self._numbers.session((PI, uuid), uuid)

    def event(self, file: SourceFile, session: int, event: UsageEvent) -> None:
        model = event.model or ""
        self._note(session, event.timestamp.timestamp(), model.partition("/")[2] or model, file.source, file.root)

    def message(self, source: str, session: int, message: SessionMessage) -> None:
        self._note(session, max(message.started, message.recorded) / 1000, message.model, source, self._root)

    def _note(self, session: int, at: float, model: str, source: str, root: str) -> None:
        """Where no model is named (Claude Code), the harness says more than nothing."""
        before = self.seen.get(session)
        if before is None or at >= before.at:
            self.seen[session] = Seen(at, model[:MAX_TEXT] or (before.model if before else source), root)
            if at > self.now - RECENT:
                self.lately.add(session)
