"""Takes what was spent by session, gives `usage --format json --detail` the document of `mngr usage` of that format.

Scripts that read the one can read the other. Keys are mngr's (0.2), in its order; what they mean stands in
docs/usage.md, and where the two differ.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coding_agent_exporter.ledger import CUMULATIVE, INCREMENTAL
from coding_agent_exporter.ledger.book import ESTIMATED, REPORTED, SESSIONS, UNPRICED
from coding_agent_exporter.model import MAX_COUNT, PICO
from coding_agent_exporter.usagetable import TOKENS
from coding_agent_exporter.usagetally import API, SUBSCRIPTION, Dimension

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coding_agent_exporter.model import SessionMessage, SourceFile, UsageEvent
    from coding_agent_exporter.usagetally import Sum, Tally

BY: tuple[Dimension, ...] = ("source", "session")

DEFAULT_SECONDS = 86_400
STALE_SECONDS = 300
"""A source whose latest line is older than this is stale."""

MODES = {API: "API_KEY", SUBSCRIPTION: "SUBSCRIPTION"}
_UNKNOWN_COSTS = ("total_duration_ms", "total_api_duration_ms", "total_lines_added", "total_lines_removed")
_MAX_WINDOWS = 100


@dataclass(slots=True)
class _Seen:
    """What the lines of a session say besides amounts. Epoch seconds; `told` is when its model was named last.

    `spent`: whether any line speaks of cost or tokens. The others only show that the session was there.
    """

    first: float = math.inf
    last: float = -math.inf
    model: str | None = None
    told: float = -math.inf
    spent: bool = False

    def note(self, at: float, model: str | None, *, spent: bool) -> None:
        self.spent = self.spent or spent
        self.first, self.last = min(self.first, at), max(self.last, at)
        if model and at >= self.told:
            self.model, self.told = model, at


@dataclass(slots=True)
class _Source:
    """`windows` are the rate limits of its freshest line that has any, written at `limited`."""

    updated: int = -1
    limited: int = -1
    windows: dict[str, dict[str, Any]] = field(default_factory=dict)


class Detail:
    """What sums do not show of sessions and sources. True when there is anything."""

    def __init__(self) -> None:
        self.sessions: dict[int, _Seen] = {}
        self.sources: dict[str, _Source] = {}

    def __bool__(self) -> bool:
        return bool(self.sources)

    def event(self, file: SourceFile, session: int, event: UsageEvent) -> None:
        if file.source in INCREMENTAL and not (event.message_id or event.event_id):
            return
        at = math.floor(event.timestamp.timestamp())
        spent = event.cost is not None or event.tokens is not None
        source = self._note(file.source, session, at, event.model, spent=spent)
        if event.rate_limits and at > source.limited:
            windows = {name: window for name, value in list(event.rate_limits.items())[:_MAX_WINDOWS]
                       if (window := _window(value)) is not None}
            if windows:
                source.limited, source.windows = at, windows

    def message(self, source: str, session: int, message: SessionMessage) -> None:
        model = f"{message.provider}/{message.model}" if message.provider else message.model
        self._note(source, session, message.started // 1000, model, spent=True)

    def _note(self, name: str, session: int, at: int, model: str | None, *, spent: bool) -> _Source:
        self.sessions.setdefault(session, _Seen()).note(at, model, spent=spent)
        source = self.sources.setdefault(name, _Source())
        source.updated = max(source.updated, at)
        return source


def document(tally: Tally, detail: Detail, *, now: int, since_seconds: int) -> str:
    """`tally` is by source and session, and of all time: a session counts as a whole, if its last line is not older
    than `since_seconds`. `now` is epoch seconds."""
    sessions: dict[str, list[dict[str, Any]]] = {name: [] for name in detail.sources}
    for (source, number), row in tally.rows.items():
        seen = detail.sessions[number]
        if seen.spent and seen.last >= now - since_seconds:
            sessions.setdefault(source, []).extend(_sessions(source, tally.names[number], seen, row, now))
    found = [
        _source(name, source, sorted(sessions[name], key=lambda one: -one["last_event_at"]), now, since_seconds)
        for name, source in detail.sources.items() if source.windows or sessions[name]
    ]
    found.sort(key=lambda source: (source["updated_at"], source["source"]), reverse=True)
    return json.dumps({"now": now, "since_seconds": since_seconds, "sources": found}, indent=2) + "\n"


def _sessions(source: str, name: str, seen: _Seen, row: Sum, now: int) -> Iterable[dict[str, Any]]:
    """One record; two where a session was paid for in both ways."""
    used = [mode for mode, slots in row.modes.items() if any(slots[:SESSIONS])]
    # Only readings of running totals come without tokens: their writers know none.
    counted = source in INCREMENTAL or source in CUMULATIVE
    for mode in used or list(row.modes)[-1:]:
        slots = row.modes[mode]
        cost = slots[REPORTED] + slots[ESTIMATED]
        yield {
            "session_id": name,
            "cost": _cost(cost / PICO if cost or not slots[UNPRICED] else None),
            "cost_mode": MODES[mode],
            "cost_provenance": "ESTIMATED" if slots[ESTIMATED] or slots[UNPRICED] else "REPORTED",
            "model": seen.model,
            "tokens": {kind: slots[number] for kind, number in TOKENS.items()} if counted else None,
            "first_event_at": seen.first,
            "last_event_at": seen.last,
            "age_seconds": max(0, now - seen.last),
        }


def _source(
    name: str, source: _Source, sessions: list[dict[str, Any]], now: int, since_seconds: int
) -> dict[str, Any]:
    by_mode = {mode: [one for one in sessions if one["cost_mode"] == mode] for mode in MODES.values()}
    imputed, real = by_mode["SUBSCRIPTION"], by_mode["API_KEY"]
    past = any(window["resets_at"] is not None and window["resets_at"] < now for window in source.windows.values())
    record = {
        "source": name,
        "updated_at": source.updated,
        "is_stale": now - source.updated > STALE_SECONDS or past,
        "since_seconds": since_seconds,
        "session_count": len(sessions),
        "subscription_session_count": len(imputed),
        "api_session_count": len(real),
        "subscription_cost": _total_cost(imputed),
        "subscription_tokens": _total_tokens(imputed),
        "api_cost": _total_cost(real),
        "api_tokens": _total_tokens(real),
        "sessions": sessions,
    }
    # Windows have the names that their writer gave them: none of them may take the place of another key.
    shown = {key: _shown(window, now) for key, window in source.windows.items() if key not in record}
    return {**record, **shown}


def _cost(dollars: float | None) -> dict[str, Any]:
    return {"total_cost_usd": dollars, **dict.fromkeys(_UNKNOWN_COSTS)}


def _total_cost(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    known = [one["cost"]["total_cost_usd"] for one in sessions if one["cost"]["total_cost_usd"] is not None]
    estimated = any(one["cost_provenance"] == "ESTIMATED" for one in sessions)
    # Sums of many floats drift; what the parts stand for are whole pico-USD.
    total = sum(round(dollars * PICO) for dollars in known) / PICO if known else None
    return {**_cost(total), "is_estimated": estimated}


def _total_tokens(sessions: list[dict[str, Any]]) -> dict[str, int | None]:
    known = [one["tokens"] for one in sessions if one["tokens"] is not None]
    return {kind: sum(tokens[kind] for tokens in known) if known else None for kind in TOKENS}


def _window(value: Any) -> dict[str, Any] | None:
    """A rate-limit window as its writer gave it, with what is of another type left out; None when it is no object."""
    if not isinstance(value, dict):
        return None

    def number(name: str) -> float | None:
        found = value.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float):
            return None
        return float(found) if abs(found) <= MAX_COUNT else None

    def of(kind: type, name: str) -> Any:
        found = value.get(name)
        return found if isinstance(found, kind) else None

    resets, seconds = number("resets_at"), number("window_seconds")
    return {
        "used_percentage": number("used_percentage"),
        "resets_at": None if resets is None else int(resets),
        "window_seconds": None if seconds is None else int(seconds),
        "label": of(str, "label"),
        "status": of(str, "status"),
        "is_using_overage": of(bool, "is_using_overage"),
    }


def _shown(window: dict[str, Any], now: int) -> dict[str, Any]:
    resets, seconds = window["resets_at"], window["window_seconds"]
    left = None if resets is None else max(0, resets - now)
    elapsed = max(0, seconds - left) if left is not None and seconds and seconds > 0 else None
    return {
        **window,
        "seconds_until_reset": left,
        "elapsed_seconds": elapsed,
        "elapsed_percentage": None if elapsed is None else elapsed / seconds * 100,
        "is_present": window["used_percentage"] is not None or resets is not None,
    }
