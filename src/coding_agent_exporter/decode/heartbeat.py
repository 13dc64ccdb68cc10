"""Takes the bytes of a pi-telemetry instance file, gives a Heartbeat, or why they are none.

The file also holds the end of the last reply, the user's name and paths: fields are picked by an allowlist,
and what is not picked is gone when `parse` returns. Nothing in the file is trusted: a field that is missing
or has another type costs that field, not the reading.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

import msgspec

from coding_agent_exporter.model import Activity, Heartbeat, Pressure, Rejected

_TEXT_LIMIT = 200
_PID_LIMIT = 2**31 - 1
# The year 10000: later times break datetime and strftime in whatever shows them.
_TIME_LIMIT_MS = 253_402_300_800_000
_DAY_MS = 86_400_000
# What pi-telemetry does when PI_TELEMETRY_HEARTBEAT_MS is not set.
_DEFAULT_HEARTBEAT_SECONDS = 1.5
_ACTIVITIES: dict[object, Activity] = {activity.value: activity for activity in Activity}
_PRESSURES: dict[object, Pressure] = {pressure.value: pressure for pressure in Pressure}


def parse(raw: bytes) -> Heartbeat | Rejected:
    """Decode one whole instance file, schema version 2.

    Never raises. Rejected reasons: `not_json` (also a torn file), `too_deep`, `not_object`, `no_process` (no
    object `process` with a usable integer `pid`), `bad_time` (`process.updatedAt` is not a time in ms).
    """
    try:
        document = decode(raw)
    except RecursionError:
        return Rejected("too_deep")
    except ValueError:
        return Rejected("not_json")
    if not isinstance(document, dict):
        return Rejected("not_object")
    process = _section(document, "process")
    pid = process.get("pid")
    if type(pid) is not int or not 0 < pid <= _PID_LIMIT:
        return Rejected("no_process")
    updated_at = _seconds(process.get("updatedAt"))
    if updated_at is None:
        return Rejected("bad_time")

    state = _section(document, "state")
    session = _section(document, "session")
    workspace = _section(document, "workspace")
    model = _section(document, "model")
    context = _section(document, "context")
    percent = _quantity(context.get("percent"))
    heartbeat_ms = _quantity(process.get("heartbeatMs"))
    return Heartbeat(
        pid=pid,
        started_at=_seconds(process.get("startedAt")),
        updated_at=updated_at,
        heartbeat_seconds=heartbeat_ms / 1000 if heartbeat_ms and heartbeat_ms <= _DAY_MS
        else _DEFAULT_HEARTBEAT_SECONDS,
        activity=_ACTIVITIES.get(_text(state.get("activity")), Activity.UNKNOWN),
        has_pending_messages=state.get("hasPendingMessages") is True,
        last_event=_text(document.get("lastEvent")),
        session_id=_text(session.get("id")),
        session_name=_text(session.get("name")),
        host=_text(_section(document, "system").get("host")),
        cwd=_text(workspace.get("cwd")),
        git_branch=_text(_section(workspace, "git").get("branch")),
        provider=_text(model.get("provider")),
        model=_text(model.get("id")),
        thinking_level=_text(model.get("thinkingLevel")),
        context_percent=percent,
        context_tokens=_quantity(context.get("tokens")),
        context_window=_quantity(context.get("contextWindow")),
        pressure=_PRESSURES.get(_text(context.get("pressure"))) or derive_pressure(percent),
        close_to_limit=_flag(context.get("closeToLimit")),
        near_limit=_flag(context.get("nearLimit")),
    )


def derive_pressure(percent: float | None) -> Pressure | None:
    """The pressure pi-telemetry would report for this percent with its default thresholds.

    Used only where a writer reports none: its thresholds can be configured, so its own word comes first.
    """
    if percent is None:
        return None
    if percent >= 100:
        return Pressure.AT_LIMIT
    if percent >= 95:
        return Pressure.NEAR_LIMIT
    if percent >= 85:
        return Pressure.APPROACHING_LIMIT
    return Pressure.NORMAL


def decode(raw: bytes) -> object:
    """The document as it is, content included. Raises ValueError when it is not JSON, RecursionError when too deep."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # pi-telemetry cuts the last reply at a fixed length. A cut through an emoji leaves half a surrogate
        # pair, which msgspec refuses and the standard library lets pass: the agent must not vanish for it.
        return json.loads(raw.decode("utf-8", "replace"))


def _section(parent: dict[str, Any], name: str) -> dict[str, Any]:
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    cut = value[:_TEXT_LIMIT]
    # Half a surrogate pair cannot be encoded, and would break the whole exposition.
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode("utf-8")


def _quantity(value: object) -> float | None:
    """A finite number that is not negative; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) and number >= 0 else None


def _seconds(value: object) -> float | None:
    milliseconds = _quantity(value)
    return milliseconds / 1000 if milliseconds and milliseconds < _TIME_LIMIT_MS else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
