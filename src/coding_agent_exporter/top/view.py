"""Takes nothing, gives the other modules of `top` what they exchange: what there is to be seen, and how one looks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from coding_agent_exporter.usagetable import Money

CLOSE, NEAR = 85, 95
"""Percent of the context window from which an agent is close to its limit, and near it; as pi-telemetry has them."""


class State(StrEnum):
    """What an agent does, as a word for people; in the order in which they are listed."""

    WORKING = "working"
    WAITING = "waiting"
    UNKNOWN = "unknown"
    RECENT = "recent"
    """Without a heartbeat: a session whose log grew lately."""
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Spend:
    """What was spent. Real and imputed money are never added up; None: nothing of that kind was used."""

    billed: Money | None = None
    imputed: Money | None = None
    tokens: int = 0


NOTHING = Spend()


@dataclass(frozen=True, slots=True)
class Agent:
    """One line of the screen. Times are epoch seconds; what is not known is None, or empty text.

    Text is as its writer chose it, and may hold anything. `since`: when the state began; of a stale agent, when it was
    last heard of. `peak` is the highest percent of late, the present one included. `today` is what the session spent
    since midnight, with those it started as sub-agents; `rate` its tokens per minute over the last minutes. `last` is
    the end of the latest model call, where its log tells, else its beginning.
    """

    root: str
    pid: int | None
    state: State
    since: float | None = None
    percent: float | None = None
    peak: float | None = None
    model: str = ""
    session: str = ""
    branch: str = ""
    today: Spend = NOTHING
    rate: float = 0.0
    last: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """All there is to be seen at one moment.

    `today` is what all sessions spent since midnight, shown or not. `billed` and `imputed` are what they spend in
    pico-USD per hour, and `rate` tokens per minute, both over the last `window` seconds. `reading` is how much of the
    logs has been read, from 0 to 1; None once they have been. `unreadable`: so many files cannot be used.
    `places` are the directories that are looked at.
    """

    agents: tuple[Agent, ...] = ()
    today: Spend = NOTHING
    billed: int = 0
    imputed: int = 0
    rate: float = 0.0
    window: int = 300
    reading: float | None = None
    unreadable: int = 0
    places: tuple[str, ...] = ()


Order = Literal["state", "context", "cost", "tokens", "last", "session", "pid"]
ORDERS: tuple[Order, ...] = ("state", "context", "cost", "tokens", "last", "session", "pid")

Only = Literal["all", "working", "waiting", "limit"]


@dataclass(frozen=True, slots=True)
class Controls:
    """What the person at the keys has asked for. `offset`: so many agents are scrolled out at the top."""

    order: Order = "state"
    reverse: bool = False
    only: Only = "all"
    filter: str = ""
    typing: bool = False
    help: bool = False
    offset: int = 0
