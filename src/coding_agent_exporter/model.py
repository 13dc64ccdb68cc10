"""Takes nothing, gives every other module the frozen types they exchange."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

PICO = 10**12
"""Money inside the program is an integer number of pico-USD; this many make a dollar."""

RootKind = Literal["telemetry", "usage", "sessions"]
FileKind = Literal["usage", "sessions"]
"""As `RootKind`: what lies below a root of that kind."""


@dataclass(frozen=True, slots=True)
class Root:
    """One configured directory. `alias` is the value of the label `root`."""

    kind: RootKind
    alias: str
    path: Path

    @property
    def prefix(self) -> str:
        """How the paths in it begin, as the waker names them: links and all."""
        return os.path.abspath(self.path) + os.sep  # noqa: PTH100  a Path would resolve more, or less


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One append-only file that discovery found below a root.

    `log` names the logical log across rotation and moves: `<agent>/<source>` for usage logs (the same for
    the live log, its rotated parts and the copy under `preserved/`), the path below the root for session files.
    `source` is the harness (`pi-coding`, `claude`, ...); empty for session files until their first line
    tells. `order` sorts files into the order in which they were written.
    """

    kind: FileKind
    root: str
    path: Path
    log: str
    source: str = ""
    agent: str = ""
    order: tuple[str, ...] = ()

    @property
    def precedence(self) -> tuple[bool, tuple[str, ...], Path]:
        """What sorts files into the order in which they have to be read: usage logs first, all as they were written."""
        return self.kind != "usage", self.order, self.path


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a file has been read.

    `offset` is the first byte not yet consumed; `check` a digest of the last bytes before it (see
    `tail.fingerprint`), which proves on the next read that the file is still the one that was read.
    `exempt` bytes at the start are left out of the digest: oh-my-pi rewrites its title line in place.
    `skipping` says that `offset` stands inside a line that is too long: it was counted already, and what is
    left of it is dropped. `changed` is the file's change time (ns) when it was read: while that stands still,
    an equal size means equal content; 0 is not known (it is not stored).
    """

    dev: int
    ino: int
    offset: int = 0
    check: bytes = b""
    exempt: int = 0
    skipping: bool = False
    changed: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Input that was thrown away, and why. `reason` is a value of the label `reason`."""

    reason: str
    count: int = 1


class Activity(StrEnum):
    WORKING = "working"
    WAITING_INPUT = "waiting_input"
    UNKNOWN = "unknown"


class Pressure(StrEnum):
    NORMAL = "normal"
    APPROACHING_LIMIT = "approaching_limit"
    NEAR_LIMIT = "near_limit"
    AT_LIMIT = "at_limit"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One reading of one instance file: what its writer said, typed, nothing derived.

    Times are epoch seconds. A field that the file lacks, or has of another type, is None (or "" for text).
    """

    pid: int
    started_at: float | None
    updated_at: float
    heartbeat_seconds: float
    activity: Activity
    has_pending_messages: bool
    last_event: str
    session_id: str = ""
    session_name: str = ""
    host: str = ""
    cwd: str = ""
    git_branch: str = ""
    provider: str = ""
    model: str = ""
    thinking_level: str = ""
    context_percent: float | None = None
    context_tokens: float | None = None
    context_window: float | None = None
    pressure: Pressure | None = None
    close_to_limit: bool | None = None
    near_limit: bool | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """What is shown of one agent process. Times are epoch seconds.

    A stale instance shows only that it is stale: activity, context and pressure of a process that may be
    dead would be a guess, and would keep alerts firing.
    """

    root: str
    heartbeat: Heartbeat
    stale: bool
    activity: Activity
    activity_since: float
    context_percent_peak: float | None


CounterKey = tuple[str, tuple[str, ...]]
"""A counter series: family name and label values, in the order of `families.py`."""


@dataclass(slots=True)
class Delta:
    """What a step adds to one counter series, in the family's integer unit (pico-USD for money).

    `baseline` is the part of `amount` that was spent before this exporter's time (see docs/operating.md).
    """

    amount: int = 0
    baseline: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """What an exemplar shows: an observation (in the unit of its histogram), when it was, and its span (hex ids)."""

    value: float
    at: float
    trace: str
    span: str


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One rate-limit window as a source last reported it. `resets_at` is epoch seconds."""

    used_percent: float
    resets_at: float | None = None
    window_seconds: float | None = None
    seen_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class RootReport:
    """What `check` says of one configured directory."""

    root: Root
    exists: bool
    found: dict[str, int]
    """Counts by what was found, in the order to print: `{"usage logs": 3, "events": 120}`."""
    problems: tuple[str, ...] = ()
    """One sentence each; a problem makes `check` exit with 1. A missing directory is not one."""


MAX_COUNT = 2**53
"""Token counts above this are no counts: a float in the exposition could not hold them exactly."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]

MAX_ID = 256
"""Names of sessions and messages are remembered: longer ones end in a digest (see `decode.lines.identifier`)."""

Name = Annotated[str, msgspec.Meta(max_length=MAX_ID)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Reported money in US dollars."""

    total_cost_usd: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """Token counts; the buckets do not overlap."""

    input: Count | None = None
    output: Count | None = None
    cache_read: Count | None = None
    cache_creation: Count | None = None


class UsageEvent(msgspec.Struct, frozen=True, gc=False):
    """One line of a usage log, as it is written (see docs/inputs.md). `timestamp` is aware, in UTC."""

    timestamp: Annotated[datetime, msgspec.Meta(tz=True)]
    session_id: Text
    event_id: Name | None = None
    message_id: Name | None = None
    cost: Cost | None = None
    tokens: Tokens | None = None
    model: str | None = None
    cost_mode: Name | None = None
    rate_limits: dict[str, Any] | None = None
    type: Literal["cost_snapshot"] = "cost_snapshot"


@dataclass(frozen=True, slots=True)
class SessionHeader:
    """First record of a session file. `created` is epoch milliseconds; `parent` the session it was forked from."""

    session: str
    created: int
    parent: str = ""


@dataclass(frozen=True, slots=True)
class SessionMessage:
    """One assistant message of a session file.

    `started` and `recorded` are epoch milliseconds: when the model call began, when the entry was written.
    `cost` is in pico-USD, None when the file does not say. Token counts are None when there are none.
    """

    entry: str
    started: int
    recorded: int
    provider: str
    model: str
    cost: int | None
    tokens: tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class SessionCompaction:
    """A compaction entry of a session file; `recorded` is epoch milliseconds."""

    entry: str
    recorded: int


SessionRecord = SessionHeader | SessionMessage | SessionCompaction


@dataclass(slots=True, eq=False)
class FileRow:
    """A file that has been read: its cursor, and what is known of it that its later lines do not repeat.

    `session`, `created` (epoch milliseconds) and `parent` are a session file's header. `replay`: everything read
    of the file so far had been counted from another file of the same log. `seen` is the epoch second at which the
    file was last on disk, to the day. `number` is the state file's; 0 until stored.
    """

    kind: FileKind
    log: str
    path: str
    cursor: Cursor | None = None
    source: str = ""
    session: str = ""
    created: int = 0
    parent: str = ""
    replay: bool = False
    seen: int = 0
    number: int = 0
    size: int = 0
    mtime: float = 0.0
