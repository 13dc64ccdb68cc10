"""Takes the accepted events of one session of a usage log, gives one finished message for each model call to spans.

For sources without session files, where a session is the sum over its messages (pi and OpenCode). The other sources
log readings of a running total: they have no messages to make spans of.

The log says when a message changed, not when it is over:
- pi appends one line when the call has ended. The line's timestamp is the call's start; its end is when it arrived.
- OpenCode writes a message when it starts (zeros), when its figures are there, and then again, unchanged. That
  second reading, or the start of a later message, or `quiet_seconds` end it; its end is its last change. Without
  figures silence is no end: the call may take its time, so such a message waits for a later one, or `stuck_seconds`.
  A message of OpenCode lasts until the tools it asked for are done: they are in its span.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from coding_agent_exporter.model import PICO
from coding_agent_exporter.turnmodel import FinishedMessage, Tokens

if TYPE_CHECKING:
    from coding_agent_exporter.model import UsageEvent

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

AT_ONCE = frozenset({"pi-coding"})
"""Sources whose line is written when the call has ended."""


MAX_SENT = 1024


class _Open(msgspec.Struct, array_like=True):
    """A message that may change. Times are epoch milliseconds; `seen` is when its last event arrived."""

    key: str
    start: int
    end: int
    seen: int
    provider: str = ""
    model: str = ""
    mode: str = "api_key"
    cost: int | None = None
    tokens: Tokens | None = None

    @property
    def figures(self) -> bool:
        return bool(self.cost) or any(self.tokens or ())


class _State(msgspec.Struct, array_like=True):
    """`sent`: messages whose span left, with their start; up to `floor` (epoch milliseconds) all have."""

    open: _Open | None
    sent: dict[str, int]
    floor: int


class Messages:
    """The open message of one session. `session` is its id without what the source puts before it.

    pi's messages may be known to the ledger from a session file before their line is read: which of them were sent is
    remembered here.

    `counts`: `late` readings of messages whose span had left.
    """

    def __init__(
        self, session: str, source: str, *, quiet_seconds: float = 30, stuck_seconds: float = 3600
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._session = session
        self._at_once = source in AT_ONCE
        self._quiet = round(quiet_seconds * 1000)
        self._stuck = round(stuck_seconds * 1000)
        self._open: _Open | None = None
        self._sent: dict[str, int] = {}
        self._floor = 0

    def dump(self) -> bytes:
        """The open message, or the ones that left last; 100 bytes to 20 KB."""
        return msgspec.msgpack.encode(_State(self._open, self._sent, self._floor))

    def load(self, data: bytes) -> None:
        """Go on from what `dump` gave. Raises `msgspec.MsgspecError` on anything else."""
        state = msgspec.msgpack.decode(data, type=_State)
        self._open, self._sent, self._floor = state.open, state.sent, state.floor

    @property
    def waiting(self) -> bool:
        """Whether a message is open. If none is, there is nothing to store."""
        return self._open is not None

    def apply(self, key: str, event: UsageEvent, now: float, *, first: bool) -> list[FinishedMessage]:
        """Take one event, neither a copy nor a replay: the ledger knows.

        `key` is the message's identity, `first` whether this is its first event. `now` is the epoch second at which
        the line arrived; for lines that were there before, the time the file was last changed.
        """
        at, arrived = _ms(event.timestamp), round(now * 1000)
        known = self._open
        if self._at_once:
            first = key not in self._sent and at > self._floor
        if known is None or known.key != key:
            if not first:
                self.counts["late"] += 1
                return []
            return self._begin(key, event, at, arrived)
        before = (known.cost, known.tokens)
        _read(known, event)
        known.seen = max(known.seen, arrived)
        says = event.cost is not None or event.tokens is not None
        if says and known.figures and (known.cost, known.tokens) == before:
            return self._take()
        known.end = max(known.end, at)
        return []

    def tick(self, now: float) -> list[FinishedMessage]:
        """Finish a message that has been quiet. `now` is epoch seconds. Call it when the log is read to its end."""
        at = round(now * 1000)
        known = self._open
        if known is None or at - known.seen < (self._quiet if known.figures else self._stuck):
            return []
        return self._take()

    def _begin(self, key: str, event: UsageEvent, at: int, arrived: int) -> list[FinishedMessage]:
        message = _Open(key, at, at, arrived)
        _read(message, event)
        if self._at_once:
            message.end = max(at, arrived)
            self._sent[key] = at
            if len(self._sent) > MAX_SENT:
                oldest = next(iter(self._sent))
                self._floor = max(self._floor, min(self._sent.pop(oldest), min(self._sent.values()) - 1))
            return [self._finished(message)]
        # Messages of a session follow each other: what began before is over.
        over = self._take()
        self._open = message
        return over

    def _take(self) -> list[FinishedMessage]:
        known, self._open = self._open, None
        return [] if known is None else [self._finished(known)]

    def _finished(self, message: _Open) -> FinishedMessage:
        return FinishedMessage(
            session=self._session, key=message.key, start=message.start, end=message.end,
            provider=message.provider, model=message.model, mode=message.mode,
            cost=message.cost, tokens=message.tokens,
        )


def _read(message: _Open, event: UsageEvent) -> None:
    """Take over what an event says; what it leaves out stands."""
    provider, slash, name = (event.model or "").partition("/")
    if event.model:
        message.provider, message.model = (provider, name) if slash else ("", provider)
    if event.cost_mode or event.rate_limits:
        known = event.cost_mode or "SUBSCRIPTION"
        message.mode = "subscription" if known == "SUBSCRIPTION" else "api_key"
    if event.cost is not None and event.cost.total_cost_usd is not None:
        message.cost = round(event.cost.total_cost_usd * PICO)
    tokens = event.tokens
    if tokens is not None:
        message.tokens = (
            tokens.input or 0, tokens.output or 0, tokens.cache_read or 0, tokens.cache_creation or 0,
        )


def _ms(at: datetime) -> int:
    since = at - EPOCH
    return since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000
