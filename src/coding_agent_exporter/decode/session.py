"""Takes whole lines of a pi or oh-my-pi session file from tail, gives the records that money depends on to the ledger.

Only the fields below are ever materialised: prompts, replies, tool arguments and outputs are skipped by the decoder.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import msgspec

from coding_agent_exporter.decode.lines import LONG, MALFORMED, Members, decode_line, identifier, objects
from coding_agent_exporter.model import MAX_COUNT, PICO, SessionCompaction, SessionHeader, SessionMessage, SessionRecord

MAX_MS = 253_402_300_800_000
"""The year 10000 in epoch milliseconds: no time lies beyond what a datetime can hold."""

_UUID_AT_END = re.compile(r"(?:^|[_/\\])([^_/\\]+?)(?:\.jsonl)?$")


class _Message(msgspec.Struct, frozen=True, gc=False):
    role: Any = None
    provider: Any = None
    model: Any = None
    usage: Any = None
    timestamp: Any = None


class _Entry(msgspec.Struct, frozen=True, gc=False):
    type: str
    id: Any = None
    timestamp: Any = None
    parentSession: Any = None  # noqa: N815  the file's own spelling
    message: _Message | None = None


_decoder = msgspec.json.Decoder(_Entry)
_entry_members = Members("type", "id", "timestamp", "parentSession", raw=("message",))
_message_members = Members(*_Message.__struct_fields__)


def decode(data: bytes) -> tuple[list[SessionRecord], Counter[str], int]:
    """Decode complete lines.

    Returns the records in order and the rejected lines by reason: `not_json`, `not_object` (or a record whose type
    is no text), `bad_timestamp`, `no_session`, `bad_usage`, and `bad_cost` and `bad_tokens` for that block only; and
    how many lines there were. Entries of other kinds are no rejects.
    """
    records: list[SessionRecord] = []
    rejected: Counter[str] = Counter()
    lines = 0
    for line in data.split(b"\n"):
        if not line or line.isspace():
            continue
        lines += 1
        # Nearly all bytes of a session are content: a line without one of these words cannot matter.
        if b'"usage"' not in line and b'"compaction"' not in line and b'"session"' not in line:
            if not line.startswith(b"{"):
                rejected["not_json"] += 1
            continue
        try:
            entry = _entry(line)
        except MALFORMED:
            pieces = objects(line)
            lines += len(pieces) - 1
            for piece in pieces:
                records += _odd(piece, rejected)
            continue
        record = _record(entry, rejected)
        if record is not None:
            records.append(record)
    return records, rejected, lines


def _entry(line: bytes) -> _Entry:
    if len(line) <= LONG:
        return decode_line(_decoder.decode, line)
    members = _entry_members.read(line)
    message = bytes(members.pop("message"))
    return msgspec.convert(
        {**members, "message": _message_members.read(message) if message not in {b"", b"null"} else None}, _Entry)


def _odd(line: bytes, rejected: Counter[str]) -> list[SessionRecord]:
    try:
        entry = _entry(line)
    except msgspec.ValidationError:
        rejected["not_object"] += 1
        return []
    except MALFORMED:
        rejected["not_json"] += 1
        return []
    record = _record(entry, rejected)
    return [] if record is None else [record]


def session_key(name: str) -> str:
    """The session's uuid out of a session id, file name or path: pi and its log writers use `<start>_<uuid>`."""
    found = _UUID_AT_END.search(name)
    return found.group(1) if found else name


def _record(entry: _Entry, rejected: Counter[str]) -> SessionRecord | None:
    if entry.type == "session":
        created = iso_ms(entry.timestamp)
        if not isinstance(entry.id, str) or not entry.id:
            rejected["no_session"] += 1
            return None
        parent = entry.parentSession
        above = identifier(session_key(parent)) if isinstance(parent, str) else ""
        return SessionHeader(identifier(entry.id), created or 0, above)
    if entry.type == "compaction":
        recorded = iso_ms(entry.timestamp)
        if recorded is None or not isinstance(entry.id, str):
            rejected["bad_timestamp"] += 1
            return None
        return SessionCompaction(identifier(entry.id), recorded)
    message = entry.message
    if entry.type != "message" or message is None or message.role != "assistant" or message.usage is None:
        return None
    recorded = iso_ms(entry.timestamp)
    started = message.timestamp
    if isinstance(started, bool) or not isinstance(started, int | float) or not 0 < started < MAX_MS:
        if recorded is None:
            rejected["bad_timestamp"] += 1
            return None
        started = recorded
    usage = message.usage
    if not isinstance(usage, dict):
        rejected["bad_usage"] += 1
        return None
    return SessionMessage(
        entry=identifier(entry.id) if isinstance(entry.id, str) else "",
        started=int(started),
        recorded=recorded if recorded is not None else int(started),
        provider=message.provider if isinstance(message.provider, str) else "",
        model=message.model if isinstance(message.model, str) else "",
        cost=cost_of(usage.get("cost"), rejected),
        tokens=tokens_of(usage, rejected),
    )


def iso_ms(value: Any) -> int | None:
    """Epoch milliseconds of an ISO 8601 time, a naive one as UTC; None if it is none."""
    if not isinstance(value, str):
        return None
    try:
        parsed = datetime.fromisoformat(value)
        if parsed.tzinfo is None:
            parsed = parsed.replace(tzinfo=UTC)
        ms = round(parsed.timestamp() * 1000)
    except (ValueError, OverflowError):
        return None
    return ms if 0 < ms < MAX_MS else None


def _money(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
        return None
    return round(value * PICO)


def cost_of(block: Any, rejected: Counter[str]) -> int | None:
    """Pico-USD; the total where it stands, else the sum of its parts."""
    if block is None:
        return None
    if not isinstance(block, dict):
        rejected["bad_cost"] += 1
        return None
    if "total" in block:
        total = _money(block["total"])
        if total is None:
            rejected["bad_cost"] += 1
        return total
    parts = [_money(block[name]) for name in ("input", "output", "cacheRead", "cacheWrite") if name in block]
    if not parts or None in parts:
        return None
    return sum(part for part in parts if part is not None)


def tokens_of(usage: dict[str, Any], rejected: Counter[str]) -> tuple[int, int, int, int] | None:
    """(input, output, cache read, cache creation) of a usage block; None, and a reject, if one is no count."""
    counts = []
    for name in ("input", "output", "cacheRead", "cacheWrite"):
        value = usage.get(name, 0)
        value = 0 if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            rejected["bad_tokens"] += 1
            return None
        counts.append(value)
    return (counts[0], counts[1], counts[2], counts[3])
