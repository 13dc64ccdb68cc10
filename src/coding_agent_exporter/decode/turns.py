"""Takes whole lines of a pi or oh-my-pi session file from tail, gives the records that turns are made of to turns.

A pass of its own beside `decode.session`: money needs a few of the lines, turns need nearly all of them. What holds
content is skipped by the decoder or kept raw for as long as one line takes; it is in no record.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgspec

from coding_agent_exporter.decode.lines import LONG, MALFORMED, Members, decode_line, elements, objects
from coding_agent_exporter.decode.session import MAX_MS, cost_of, iso_ms, session_key, tokens_of
from coding_agent_exporter.turnmodel import (
    STOPS,
    Call,
    Compaction,
    Exit,
    Header,
    Other,
    Prompt,
    Record,
    ToolResult,
    ToolStart,
)

MAX_TEXT = 200
"""Names and ids are cut to this many characters."""

MAX_TOOLS = 1000
"""Tool calls of one reply beyond this are not followed: the state of an open turn stays bounded."""

# What is left of a path that names a session. A path that names none may be anything.
_SESSION = re.compile(r"[0-9A-Za-z-]{1,64}")

# Messages of these roles are answers or notes; any other role that is no user's (`developer`, `custom`) can make an
# agent run.
_PASSIVE = frozenset({"bashExecution", "branchSummary", "compactionSummary", "system"})


class _Message(msgspec.Struct, frozen=True):
    role: Any = None
    content: msgspec.Raw = msgspec.Raw()
    provider: Any = None
    model: Any = None
    usage: Any = None
    stopReason: Any = None  # noqa: N815  the file's own spelling, here and below
    responseId: Any = None  # noqa: N815
    timestamp: Any = None
    completedAt: Any = None  # noqa: N815
    ttft: Any = None
    errorMessage: msgspec.Raw = msgspec.Raw()  # noqa: N815
    toolCallId: Any = None  # noqa: N815
    isError: Any = None  # noqa: N815


class _Entry(msgspec.Struct, frozen=True):
    type: str
    id: Any = None
    parentId: Any = None  # noqa: N815
    timestamp: Any = None
    parentSession: Any = None  # noqa: N815
    message: msgspec.Raw = msgspec.Raw()
    customType: Any = None  # noqa: N815
    data: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, frozen=True, gc=False):
    type: Any = None
    id: Any = None
    name: Any = None


class _Custom(msgspec.Struct, frozen=True):
    toolCallId: Any = None  # noqa: N815
    startedAt: Any = None  # noqa: N815


_entry = msgspec.json.Decoder(_Entry)
_entry_members = Members("type", "id", "parentId", "timestamp", "parentSession", "customType", raw=("message", "data"))
_message = msgspec.json.Decoder(_Message)
_message_members = Members(
    *(name for name in _Message.__struct_fields__ if name not in {"content", "errorMessage"}),
    raw=("content", "errorMessage"))
_parts = msgspec.json.Decoder(list[_Part])
_raw_parts = msgspec.json.Decoder(list[msgspec.Raw])
_part = msgspec.json.Decoder(_Part)
_part_members = Members("type", "id", "name")
_custom = msgspec.json.Decoder(_Custom)


def decode(data: bytes) -> tuple[list[Record], int]:
    """Decode complete lines. Returns the records in order, and how many lines were no entries.

    The pass for money counts its rejects by reason; it looks at fewer lines, so this number is the higher one.
    """
    records: list[Record] = []
    rejected = 0
    for line in data.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            entry = _decode_entry(line)
            record = _record(entry)
        except MALFORMED:
            pieces = objects(line)
            if len(pieces) == 1:
                rejected += 1
                continue
            more, wrong = decode(b"\n".join(pieces))
            records += more
            rejected += wrong
            continue
        if record is not None:
            records.append(record)
        elif entry.type != "title":
            rejected += 1
    return records, rejected


def _decode_entry(line: bytes) -> _Entry:
    return decode_line(_entry.decode, line) if len(line) <= LONG else msgspec.convert(_entry_members.read(line), _Entry)


def _decode_message(line: bytes) -> _Message:
    return decode_line(_message.decode, line) if len(line) <= LONG else _Message(**_message_members.read(line))


def _record(entry: _Entry) -> Record | None:
    """The record of an entry; None when it lacks what makes it one (a time, an id)."""
    recorded = _time(entry.timestamp)
    if entry.type == "session":
        if not isinstance(entry.id, str) or not entry.id:
            return None
        parent = session_key(entry.parentSession) if isinstance(entry.parentSession, str) else ""
        return Header(_text(entry.id), recorded, parent if _SESSION.fullmatch(parent) else "")
    message = _decode_message(bytes(entry.message)) if entry.type == "message" else None
    if message is not None:
        recorded = recorded or _time(message.timestamp)
    if not recorded:
        return None
    # The first version of the format has no ids: then a line's time and kind must do.
    kind = message.role if message is not None and isinstance(message.role, str) else entry.type
    name = _text(entry.id) or f"@{recorded} {kind[:20]}"
    parent = _text(entry.parentId)
    if message is not None:
        return _from_message(message, name, parent, recorded)
    if entry.type == "custom":
        return _from_custom(entry, name, parent, recorded)
    if entry.type == "custom_message":
        return Prompt(name, parent, recorded, recorded, user=False)
    if entry.type == "compaction":
        return Compaction(name, parent, recorded)
    return Other(name, parent, recorded)


def _from_message(message: _Message, name: str, parent: str, recorded: int) -> Record:
    at = _time(message.timestamp)
    if message.role == "assistant":
        return _call(message, name, parent, recorded)
    if message.role == "toolResult":
        return ToolResult(name, parent, recorded, _text(message.toolCallId), at or recorded, message.isError is True)
    if not isinstance(message.role, str) or message.role in _PASSIVE:
        return Other(name, parent, recorded)
    # A message may wait in a queue: it is recorded when it enters the conversation. Before it was sent it cannot.
    sent = at if 0 < at <= recorded else recorded
    return Prompt(name, parent, recorded, sent, user=message.role == "user")


def _from_custom(entry: _Entry, name: str, parent: str, recorded: int) -> Record:
    if entry.customType == "session_exit":
        return Exit(name, parent, recorded)
    if entry.customType == "tool_execution_start":
        try:
            data = decode_line(_custom.decode, bytes(entry.data)) if len(bytes(entry.data)) <= LONG else _Custom()
        except MALFORMED:
            return Other(name, parent, recorded)
        return ToolStart(name, parent, recorded, _text(data.toolCallId), _time(data.startedAt) or recorded)
    return Other(name, parent, recorded)


def _call(message: _Message, name: str, parent: str, recorded: int) -> Call:
    started = _time(message.timestamp) or recorded
    completed = _time(message.completedAt)
    usage: dict[str, Any] = message.usage if isinstance(message.usage, dict) else {}
    stop = message.stopReason if isinstance(message.stopReason, str) and message.stopReason in STOPS else "other"
    first = message.ttft
    return Call(
        entry=name,
        parent=parent,
        recorded=recorded,
        started=started,
        ended=completed if started <= completed <= recorded else max(started, recorded),
        provider=_text(message.provider),
        model=_text(message.model),
        stop=stop,
        failed=stop == "error" or bytes(message.errorMessage) not in {b"", b"null", b'""'},
        response=_text(message.responseId),
        cost=cost_of(usage.get("cost"), Counter()),
        tokens=tokens_of(usage, Counter()) if usage else None,
        tools=_tools(bytes(message.content)),
        first_token=float(first) if _number(first) and 0 <= first <= MAX_MS else None,
    )


def _tools(content: bytes) -> list[tuple[str, str]]:
    """Id and name of each tool call among the parts of a message; arguments are never decoded."""
    if b'"toolCall"' not in content:
        return []
    if len(content) > LONG:
        return _tools_apart(content)
    try:
        parts = decode_line(_parts.decode, content)
    except MALFORMED:
        parts = []
        try:
            found = decode_line(_raw_parts.decode, content)
        except MALFORMED:
            return []
        for raw in found:
            try:
                parts.append(_part.decode(raw))
            except MALFORMED:
                continue
    calls = [(_text(part.id), _text(part.name)) for part in parts if part.type == "toolCall"]
    return calls[:MAX_TOOLS]


def _tools_apart(content: bytes) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for part in elements(content):
        if b'"toolCall"' in part and len(calls) < MAX_TOOLS:
            try:
                members = _part_members.read(part)
            except MALFORMED:
                continue
            if members.get("type") == "toolCall":
                calls.append((_text(members.get("id")), _text(members.get("name"))))
    return calls


def _text(value: Any) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _time(value: Any) -> int:
    """Epoch milliseconds out of a number or an ISO 8601 text; 0 when it is neither."""
    if isinstance(value, str):
        value = iso_ms(value)
    return int(value) if _number(value) and 0 < value < MAX_MS else 0
