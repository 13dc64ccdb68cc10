"""Takes nothing, gives the types that the ledger and what stores it exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from coding_agent_exporter.ledger.book import Labels
    from coding_agent_exporter.model import CounterKey, Delta, RateLimit
    from coding_agent_exporter.spanmodel import Span


class Storage(Protocol):
    """Where accounts rest while they are not in memory."""

    def account(self, key: str) -> bytes | None: ...

    def has_figures(self, digest: int) -> bool:
        """Whether figures with this digest were stored with an earlier `Changes.figures`."""

    def archived(self, account: str, name: int | str) -> bytes | None:
        """A message that was stored by itself, with an earlier `Changes.archive`."""

    def quiet(self, kind: str, before: int, limit: int) -> list[str]:
        """Keys of accounts of a kind that are not settled and were last changed before an epoch second."""


@dataclass(slots=True)
class SessionMeta:
    """What a session file's header said; kept with the file's cursor."""

    session: str = ""
    created: int = 0
    parent: str = ""


@dataclass(slots=True)
class Saved:
    """One account to write. `touched` is the epoch second of this change; `settled` ones are not waited for."""

    blob: bytes
    touched: int
    settled: bool


class Archived(NamedTuple):
    """A message that its account has put away: it is stored by itself. `second`: the epoch second of its event."""

    account: str
    name: int | str
    second: int
    blob: bytes


@dataclass(slots=True)
class Changes:
    """All that one step changed, to be committed together."""

    deltas: dict[CounterKey, Delta] = field(default_factory=dict)
    accounts: dict[str, Saved] = field(default_factory=dict)
    labels: list[tuple[int, Labels]] = field(default_factory=list)
    figures: set[int] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)
    rate_limits: dict[tuple[str, str, str], RateLimit] | None = None
    archive: list[Archived] = field(default_factory=list)
    expired: dict[str, int] = field(default_factory=dict)
    """Accounts of which archived messages go that are not younger than an epoch second; before any are added."""

    @property
    def empty(self) -> bool:
        return not (self.deltas or self.accounts or self.labels or self.figures or self.spans or self.rate_limits)
