"""Takes whole lines of a usage log from tail, gives typed events to the ledger and a count of what was rejected.

The fast path decodes the lines of a chunk in one go; it is strict, so that a chunk with anything odd in it is gone
through again, and a line that is odd field by field, where only what is malformed is dropped.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import msgspec

from coding_agent_exporter.decode.lines import (
    LONG,
    MALFORMED,
    Members,
    decode_each,
    decode_line,
    identifier,
    is_json,
    objects,
)
from coding_agent_exporter.model import MAX_COUNT, Cost, Tokens, UsageEvent

_strict = msgspec.json.Decoder(UsageEvent)
_members = Members(*UsageEvent.__struct_fields__)

_COUNTS = ("input", "output", "cache_read", "cache_creation")


def decode(data: bytes) -> tuple[list[UsageEvent], Counter[str]]:
    """Decode complete lines (separated by newlines alone; a trailing carriage return is tolerated).

    Returns the accepted events in order, and the rejected lines and blocks by reason: `not_json`, `not_object`,
    `other_type`, `no_session`, `bad_timestamp` drop the line; `bad_cost` and `bad_tokens` only that block.
    """
    if len(data) <= LONG or max(map(len, data.split(b"\n"))) <= LONG:
        try:
            return decode_each(_strict.decode, data), Counter()
        except MALFORMED:
            pass
    events: list[UsageEvent] = []
    rejected: Counter[str] = Counter()
    for line in data.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            events.append(_decode(line))
        except MALFORMED:
            for piece in objects(line):
                events += _odd(piece, rejected)
    return events, rejected


def _decode(line: bytes) -> UsageEvent:
    if len(line) > LONG:
        raise ValueError
    return decode_line(_strict.decode, line)


def _odd(line: bytes, rejected: Counter[str]) -> list[UsageEvent]:
    try:
        return [_decode(line)]
    except MALFORMED:
        return _lenient(line, rejected)


def _lenient(line: bytes, rejected: Counter[str]) -> list[UsageEvent]:
    try:
        raw = _members.read(line)
    except msgspec.ValidationError:
        rejected["not_object" if is_json(line) else "not_json"] += 1
        return []
    except MALFORMED:
        rejected["not_json"] += 1
        return []
    if raw.get("type", "cost_snapshot") != "cost_snapshot":
        rejected["other_type"] += 1
        return []
    timestamp = _timestamp(raw.get("timestamp"))
    if timestamp is None:
        rejected["bad_timestamp"] += 1
        return []
    session = raw.get("session_id")
    if not isinstance(session, str) or not session:
        rejected["no_session"] += 1
        return []
    cost, tokens = raw.get("cost"), raw.get("tokens")
    limits = raw.get("rate_limits")
    return [UsageEvent(
        timestamp=timestamp,
        session_id=identifier(session),
        event_id=_name(raw.get("event_id")),
        message_id=_name(raw.get("message_id")),
        cost=None if cost is None else _cost(cost, rejected),
        tokens=None if tokens is None else _tokens(tokens, rejected),
        model=_text(raw.get("model")),
        cost_mode=_name(raw.get("cost_mode")),
        rate_limits=limits if isinstance(limits, dict) else None,
    )]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _name(value: Any) -> str | None:
    text = _text(value)
    return None if text is None else identifier(text)


def _timestamp(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        parsed = datetime.fromisoformat(value)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _cost(block: Any, rejected: Counter[str]) -> Cost | None:
    try:
        return msgspec.convert(block, Cost)
    except MALFORMED:
        rejected["bad_cost"] += 1
        return None


def _tokens(block: Any, rejected: Counter[str]) -> Tokens | None:
    """Keep the counts that are counts; a block of another type is dropped whole."""
    if not isinstance(block, dict):
        rejected["bad_tokens"] += 1
        return None
    counts: dict[str, int | None] = {}
    for name in _COUNTS:
        value = block.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            rejected["bad_tokens"] += 1
            return None
        counts[name] = value
    return Tokens(**counts)
